"""Time a merge of adapters of Llama-3-8B's shape: `python benchmarks/whole_model.py [--space delta] [--method ties]`.

Eight synthetic rank-16 adapters on all seven linear layers of 32 blocks (84 MB each in bfloat16) are merged at rank 16 from
files and written to a folder. The script prints seconds, the peak memory of the process, and the times of the stages.
`--layers 2` is a quick run. The adapters are made once, in --folder.
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
from ties_peft.task_vectors.kernels import backends

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
    """Merge, and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir(), "ties-peft-whole-model"),
        help="of adapters and result",
    )
    parser.add_argument("--layers", type=int, default=32, help="number of blocks (32)")
    parser.add_argument("--adapters", type=int, default=8, help="number of adapters (8)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters and the result (16)")
    parser.add_argument("--space", default="delta", help="of the merge (delta)")
    parser.add_argument("--method", default="ties", help="of the merge (ties)")
    parser.add_argument("--device", default="cpu", help="that computes (cpu)")
    parser.add_argument("--no-kernels", action="store_true", help="use torch only, also where numba is installed")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.no_kernels:
        backends.MIN_ENTRIES = 1 << 62
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
