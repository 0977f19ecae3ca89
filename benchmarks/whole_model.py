"""A whole model: `python benchmarks/whole_model.py [--space delta] [--method ties]`, adapters of Llama-3-8B's shape.

Eight synthetic rank-16 adapters on all seven linear layers of 32 blocks (84 MB each in bfloat16), merged
at rank 16 from the files and written to a folder. Prints seconds, the process's peak memory, and what
the parts cost. `--layers 2` for a look. The adapters are made once in --folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import synthetic
import torch

import ties_peft
from ties_peft.task_vectors.kernels import backends as fast

BLOCK = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "ties-peft-whole-model"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--space", default="delta")
    parser.add_argument("--method", default="ties")
    parser.add_argument("--device", default="cpu", help="where the arithmetic is done")
    parser.add_argument("--no-kernels", action="store_true", help="torch only, also where numba is installed")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.no_kernels:
        fast.MIN_ENTRIES = 1 << 62
    shapes = {f"model.layers.{n}.{name}": shape for n in range(asked.layers) for name, shape in BLOCK.items()}
    home = asked.folder / f"{asked.layers}-layers"
    paths = [home / f"adapter-{n}" for n in range(asked.adapters)]
    if not all(path.exists() for path in paths):
        paths = synthetic.write_adapters(home, asked.adapters, shapes, asked.rank)
    before, cpu, started = synthetic.peak(), time.process_time(), time.perf_counter()
    stages: dict[str, float] = {}
    merged = ties_peft.merge(
        paths,
        method=asked.method,
        space=asked.space,
        rank=asked.rank,
        device=asked.device,
        progress=lambda stage, done, of: stages.__setitem__(stage, time.perf_counter() - started),
    )
    merged.save(asked.folder / "merged", force=True)
    seconds = time.perf_counter() - started
    parts = ", ".join(f"{stage} done at {at:.1f} s" for stage, at in stages.items())
    print(
        f"{asked.method} in space {asked.space}: {seconds:.1f} s ({time.process_time() - cpu:.1f} core-seconds); {parts}"
    )
    print(
        f"peak {synthetic.peak():.0f} MB, {synthetic.peak() - before:.0f} over the start; energy {merged.report.energy:.3f}"
    )
    print(f"{asked.adapters} adapters, {len(shapes)} modules; loops by {merged.report.loops}; {synthetic.machine()}")
    if torch.device(asked.device).type == "cuda":
        print(
            f"{torch.cuda.get_device_name(asked.device)}, peak {torch.cuda.max_memory_allocated(asked.device) / 1e6:.0f} MB there"
        )
    print(f"dtype {str(merged.dtype).removeprefix('torch.')}, threads {torch.get_num_threads()}")


if __name__ == "__main__":
    main()
