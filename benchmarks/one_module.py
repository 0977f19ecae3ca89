"""One large module: `python benchmarks/one_module.py`, against PEFT's `ties_svd` steps in the same process.

Eight rank-16 adapters on one 4096 × 4096 module, TIES in delta space at density 0.2, output rank 16.
PEFT's steps are those of `add_weighted_adapter(combination_type="ties_svd")` without the live model
that it needs: multiply the deltas out, `merge_utils.ties`, full SVD. Ours reads the files, checks
them, merges and factorises. Both have met a small module first, so that no library is being set up
while the clock runs; ours is the median of three. Takes about a minute, nearly all of it PEFT's.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path

import synthetic
import torch
from peft.utils.merge_utils import ties
from rich.console import Console
from rich.table import Table

import ties_peft


def peft_ties_svd(
    deltas: list[torch.Tensor], rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """PEFT's steps on deltas: (merged, U, S, Vh) of the full decomposition, as PEFT asks for it."""
    merged = ties(deltas, torch.ones(len(deltas)), density=0.2)
    U, S, Vh = torch.linalg.svd(merged, full_matrices=True)
    return merged, U[:, :rank] * S[:rank], S, Vh[:rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        paths = synthetic.write_adapters(
            Path(folder), asked.adapters, {"layers.0.q": (asked.side, asked.side)}, asked.rank
        )
        small = synthetic.write_adapters(Path(folder) / "small", 2, {"layers.0.q": (64, 64)}, asked.rank)
        ties_peft.merge(small, scope="module", rank=asked.rank, dtype="float32")
        peft_ties_svd([ties_peft.Adapter.load(path).delta("layers.0.q") for path in small], asked.rank)
        runs = []
        for _ in range(3):
            with synthetic.measured() as run:
                merged = ties_peft.merge(paths, scope="module", rank=asked.rank, dtype="float32")
            runs.append(run)
        ours = statistics.median(run.seconds for run in runs)
        loaded = [ties_peft.Adapter.load(path) for path in paths]
        with synthetic.measured() as theirs:
            deltas = [adapter.delta("layers.0.q") for adapter in loaded]
            dense, _, S, _ = peft_ties_svd(deltas, asked.rank)
    best = float(S[asked.rank :].double().square().sum().sqrt())
    reached = float(torch.linalg.vector_norm((dense - merged.delta("layers.0.q")).double()))
    table = Table(title=f"{asked.adapters} adapters, rank {asked.rank}, {asked.side} × {asked.side}", box=None)
    for heading in ("", "seconds", "extra MB", "error / optimum"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("PEFT ties_svd steps", f"{theirs.seconds:.2f}", f"{theirs.megabytes:.0f}", "1")
    table.add_row("ties_peft", f"{ours:.2f}", f"{sum(run.megabytes for run in runs):.0f}", f"{reached / best:.5f}")
    console = Console()
    console.print(table)
    console.print(f"{theirs.seconds / ours:.0f} times faster; {synthetic.machine()}")


if __name__ == "__main__":
    main()
