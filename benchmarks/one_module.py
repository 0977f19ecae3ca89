"""One large module: `python benchmarks/one_module.py`, every space and method family against PEFT, in one process.

Eight rank-16 adapters on one 4096 × 4096 module, from the files: opened, checked, digested, merged,
factorised and reported. PEFT's steps are those of `add_weighted_adapter` without the live model that it
needs: multiply the deltas out, `merge_utils.ties` (`ties_svd`) or a sum (`svd`), one full SVD, as PEFT
asks for it. The SVD is timed once, of the TIES merge, and counted in both. All have met a small module
first, so that no library is being set up while the clock runs; ours is the median of several. Takes
about a minute, nearly all of it PEFT's; what is ours goes first, for a peak of memory only rises.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import synthetic
import torch
from peft.utils.merge_utils import ties
from rich.console import Console
from rich.table import Table

import ties_peft
from ties_peft import fast

MODULE = "layers.0.q"
Measured = tuple[float, float, torch.Tensor | None]  # seconds, megabytes, merged delta


def timed(work: Callable[[], object], times: int) -> tuple[float, float]:
    """(median seconds, megabytes by which the peak rose over all runs)."""
    runs = []
    for _ in range(times):
        with synthetic.measured() as run:
            work()
        runs.append(run)
    return statistics.median(run.seconds for run in runs), sum(run.megabytes for run in runs)


def ours(paths: list[Path], rank: int) -> dict[str, Measured]:
    """What each of our merges cost, and its result."""
    common = {"rank": rank, "dtype": "float32"}
    asked = {
        "TIES, delta": {"scope": "module"},
        "TIES, core": {"scope": "module", "space": "core"},
        "TIES, KnOTS": {"scope": "module", "space": "knots"},
        "sum (task arithmetic)": {"method": "task_arithmetic", "scale": 1.0},
    }
    found: dict[str, Measured] = {}
    for name, given in asked.items():
        last: list[ties_peft.Merged] = []

        def work(given: dict[str, object] = given, last: list[ties_peft.Merged] = last) -> None:
            last[:] = [ties_peft.merge(paths, **common, **given)]

        seconds, megabytes = timed(work, 3 if name == "TIES, delta" else 9)
        found[name] = seconds, megabytes, last[0].delta(MODULE)
        if "space" in given:
            plan = ties_peft.prepare(paths, space=str(given["space"]))
            further, more = timed(lambda plan=plan: plan.merge(scope="module", **common), 9)  # type: ignore[misc]
            found[f"{name}, a further merge of a prepared plan"] = further, more, None
    return found


def dense_knots(side: int, adapters: int, small: int) -> float:
    """Seconds of KnOTS's dense SVD of the stacked deltas, measured at a small side and scaled by its cube."""
    stacked = torch.randn(small, adapters * small, dtype=torch.float64)
    seconds, _ = timed(lambda: torch.linalg.svd(stacked, full_matrices=False), 1)
    return seconds * (side / small) ** 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--no-kernels", action="store_true", help="torch only, also where numba is installed")
    parser.add_argument("--no-peft", action="store_true", help="only what is ours")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    if asked.no_kernels:
        fast.WORTH = 1 << 62
    with tempfile.TemporaryDirectory() as folder:
        paths = synthetic.write_adapters(Path(folder), asked.adapters, {MODULE: (asked.side, asked.side)}, asked.rank)
        small = synthetic.write_adapters(Path(folder) / "small", 2, {MODULE: (64, 64)}, asked.rank)
        if not asked.no_kernels:
            fast.load(fast.WORTH)  # before the clock runs, if numba is installed
        ours(small, asked.rank)
        found = ours(paths, asked.rank)
        deltas = [ties_peft.Adapter.load(path).delta(MODULE) for path in paths]
    reference, dense = {}, None
    if not asked.no_peft:
        knots = dense_knots(asked.side, asked.adapters, min(512, asked.side))
        total, _ = timed(lambda: sum(deltas), 1)
        with synthetic.measured() as merging:
            dense = ties(deltas, torch.ones(len(deltas)), density=0.2)
        with synthetic.measured() as decomposing:
            _, S, _ = torch.linalg.svd(dense, full_matrices=True)
        svd = decomposing.seconds
        reference = {
            "TIES": ("PEFT ties_svd steps", merging.seconds + svd, merging.megabytes + decomposing.megabytes),
            "sum": ("PEFT svd steps", total + svd, decomposing.megabytes),
            "KnOTS": (f"dense SVD of the stacked deltas alone, scaled from {min(512, asked.side)}", knots, 0.0),
        }
    loops = fast.kernels()
    table = Table(title=f"{asked.adapters} adapters, rank {asked.rank}, {asked.side} × {asked.side}", box=None)
    for heading in ("", "seconds", "extra MB", "times faster"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, seconds, megabytes in reference.values():
        table.add_row(name, f"{seconds:.2f}", f"{megabytes:.0f}" if megabytes else "", "1")
    for name, (seconds, megabytes, _) in found.items():
        against = reference.get(name[:4].rstrip(), reference.get(name[:3]))
        ratio = f"{against[1] / seconds:.0f}" if against else ""
        if "KnOTS" in reference and "KnOTS" in name:
            ratio += f" (dense SVD: {reference['KnOTS'][1] / seconds:.0f})"
        table.add_row(name, f"{seconds:.4f}", f"{megabytes:.0f}", ratio)
    console = Console(width=120)
    console.print(table)
    if dense is not None:
        best = float(S[asked.rank :].double().square().sum().sqrt())
        merged = found["TIES, delta"][2]
        assert merged is not None
        reached = float(torch.linalg.vector_norm((dense - merged).double()))
        console.print(f"error of TIES, delta, against the best rank {asked.rank} of PEFT's merge: {reached / best:.5f}")
    console.print(f"inner loops by {loops.name if loops else 'torch'}; {synthetic.machine()}")


if __name__ == "__main__":
    main()
