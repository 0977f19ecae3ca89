"""Compare the time and the bytes of a merge by one process and by two: `python benchmarks/processes.py`.

Eight rank-16 adapters on eight 2048 × 2048 modules are merged by TIES in delta space. One process has all threads of the
machine, each of two has half of them. So on one machine a second process gains little over threads; several processes
are meant for several machines.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import synthetic
import torch


def run(processes: int, paths: list[Path], out: Path) -> float:
    """Return the seconds of a merge by some processes, with their start."""
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "ties_peft"]
    started = time.perf_counter()
    command = [sys.executable, *launch, "merge", *map(str, paths), "--out", str(out), "--rank", "16"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **threads})
    return time.perf_counter() - started


def main() -> None:
    """Measure both numbers of processes."""
    with tempfile.TemporaryDirectory() as folder:
        shapes = {f"layers.{number}.q": (2048, 2048) for number in range(8)}
        paths = synthetic.write_adapters(Path(folder), 8, shapes)
        found = {}
        for processes in (1, 2):
            out = Path(folder) / f"merged-{processes}"
            seconds = run(processes, paths, out)
            found[processes] = hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()
            print(f"{processes} process(es): {seconds:.1f} s, with the start; sha256 {found[processes][:16]}")
    print("the same bytes" if found[1] == found[2] else "NOT THE SAME BYTES")
    print(synthetic.machine())


if __name__ == "__main__":
    main()
