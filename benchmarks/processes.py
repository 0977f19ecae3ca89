"""One process and two: `python benchmarks/processes.py`, the same merge by both, seconds and bytes.

Eight rank-16 adapters on eight 2048 × 2048 modules, TIES in delta space. Each process computes with the
threads that it is given: all of the machine's for one, half of them for each of two. So on one machine a
second process brings little beyond what threads bring; it is for several machines.
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
    """Seconds of a merge by so many processes, from their start to their end."""
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m", "ties_peft"]
    started = time.perf_counter()
    command = [sys.executable, *launch, "merge", *map(str, paths), "--out", str(out), "--rank", "16"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **threads})
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        shapes = {f"layers.{number}.q": (2048, 2048) for number in range(8)}
        paths = synthetic.write_adapters(Path(folder), 8, shapes)
        found = {}
        for processes in (1, 2):
            out = Path(folder) / f"merged-{processes}"
            seconds = run(processes, paths, out)
            found[processes] = hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest()
            print(f"{processes} process(es): {seconds:.1f} s, start included; sha256 {found[processes][:16]}")
    print("the same bytes" if found[1] == found[2] else "NOT THE SAME BYTES")
    print(synthetic.machine())


if __name__ == "__main__":
    main()
