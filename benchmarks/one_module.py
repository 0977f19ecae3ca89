"""Time merges of one large module against PEFT and mergekit, in one process: `python benchmarks/one_module.py`.

Eight rank-16 adapters on one 4096 × 4096 module are opened from files, checked, digested, merged, factorised and
reported; `--shape 4096x4096 4096x14336 --adapters 2 8 32` measures other sizes. PEFT's steps are those of
`add_weighted_adapter` without the live model that it needs: multiply the deltas out, `merge_utils.ties` (`ties_svd`) or a
sum (`svd`), one full SVD, as PEFT asks for it. The SVD is timed once, of the TIES merge, and counted for both.
mergekit's TIES is its trim and its election on the dense deltas. These steps take over a minute, and are run for eight
adapters on 4096 × 4096 only, unless `--slow` asks for them. PEFT's `linear` and `cat` work on the factors, which are in
memory. The floor is the time of the products alone on this machine: two products of all deltas at the speed of a
large product; and of one copy of a delta.

A small module is merged first, so that no library is set up while the time is taken. The times of this package are
medians of several runs. Its merges are measured first, because the peak of memory only rises: the memory of a further case is
what it adds to the peak.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import synthetic
import torch
from mergekit.merge_methods.generalized_task_arithmetic import get_mask
from mergekit.sparsify import SparsificationMethod, sparsify
from peft.utils.merge_utils import task_arithmetic, ties
from rich.console import Console

import ties_peft
from ties_peft.merging.tables import make_table, number_column
from ties_peft.task_vectors.delta import LowRank
from ties_peft.task_vectors.kernels import backends

MODULE = "layers.0.q"
TIES, SUM, KNOTS = "PEFT ties_svd steps", "PEFT svd steps", "dense SVD of the stacked deltas alone, scaled from 512"
Measured = tuple[float, float, torch.Tensor | None]  # seconds, megabytes, merged delta
Row = tuple[str, float, float | None, str]  # name, seconds, megabytes, times faster


def timed(work: Callable[[], object], times: int) -> tuple[float, float]:
    """Run some work several times; return the median seconds, and the megabytes by which the peak rose in all runs."""
    runs = []
    for _ in range(times):
        with synthetic.measured() as run:
            work()
        runs.append(run)
    return statistics.median(run.seconds for run in runs), sum(run.megabytes for run in runs)


def ours(paths: list[Path], rank: int) -> dict[str, Measured]:
    """Return the time, the memory and the result of each merge of this package."""
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

        seconds, megabytes = timed(work, 15)
        found[name] = seconds, megabytes, last[0].delta(MODULE)
        if "space" in given:
            space = str(given["space"])
            once = timed(lambda space=space: ties_peft.prepare(paths, space=space).merge(scope="module", **common), 9)  # type: ignore[misc]
            found[f"{name}, prepared and merged once"] = *once, None
            plan = ties_peft.prepare(paths, space=space)
            further, more = timed(lambda plan=plan: plan.merge(scope="module", **common), 9)  # type: ignore[misc]
            found[f"{name}, a further merge of a prepared plan"] = further, more, None
    return found


def in_factors(deltas: Sequence[LowRank]) -> list[Row]:
    """Time PEFT's `linear` and `cat`."""
    ones = torch.ones(len(deltas))

    def linear() -> None:
        task_arithmetic([d.A for d in deltas], ones)
        task_arithmetic([d.B for d in deltas], ones)

    def cat() -> None:
        torch.cat([d.A for d in deltas]), torch.cat([d.B for d in deltas], 1)

    return [
        ("PEFT linear (sums A and B apart), from memory", *timed(linear, 5), ""),
        ("PEFT cat (rank Σr), from memory", *timed(cat, 5), ""),
    ]


def floor(deltas: Sequence[LowRank]) -> list[Row]:
    """Estimate two products of all deltas at the speed of a large product, and time one copy of a delta."""
    big = torch.randn(2048, 2048)
    out = torch.empty_like(big)
    seconds, _ = timed(lambda: torch.mm(big, big, out=out), 3)
    speed = 2 * 2048**3 / seconds
    work = sum(2 * d.shape[0] * d.rank * d.shape[1] for d in deltas)
    source = torch.ones(deltas[0].shape)
    target = torch.zeros_like(source)
    copy, _ = timed(lambda: target.copy_(source), 3)
    rate = 8 * source.numel() / copy / 1e9
    return [
        (f"floor: all deltas multiplied out twice at {speed / 1e9:.0f} GFLOP/s", 2 * work / speed, None, ""),
        (f"floor: one delta copied, {rate:.0f} GB/s", copy, None, ""),
    ]


def mergekit_ties(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Merge dense deltas by mergekit's `ties`, with unit weights and `normalize`."""
    kept = torch.stack([sparsify(delta, 0.2, SparsificationMethod.magnitude) for delta in deltas])
    mask = get_mask(kept, "sum")
    return (kept * mask).sum(0) / mask.sum(0).clamp_min(1)


def dense_knots(side: int, adapters: int, small: int) -> float:
    """Estimate the seconds of KnOTS's dense SVD of the stacked deltas, from a small side, by the cube of the side."""
    stacked = torch.randn(small, adapters * small, dtype=torch.float64)
    seconds, _ = timed(lambda: torch.linalg.svd(stacked, full_matrices=False), 1)
    return seconds * (side / small) ** 3


def slow(factors: Sequence[LowRank], merged: torch.Tensor, rank: int) -> tuple[dict[str, Row], list[Row], str]:
    """Time PEFT's and mergekit's steps on the dense deltas, and compare the error of `merged` with the best of its rank."""
    deltas: list[torch.Tensor] = []
    making, memory = timed(lambda: deltas.extend(d.dense() for d in factors), 1)
    total, _ = timed(lambda: sum(deltas), 1)
    with synthetic.measured() as merging:
        dense = ties(deltas, torch.ones(len(deltas)), density=0.2)
    with synthetic.measured() as decomposing:
        _, S, _ = torch.linalg.svd(dense, full_matrices=True)
    svd = decomposing.seconds
    knots = dense_knots(min(factors[0].shape), len(factors), 512)
    theirs, extra = timed(lambda: mergekit_ties(deltas), 1)
    best = float(S[rank:].double().square().sum().sqrt())
    reached = float(torch.linalg.vector_norm((dense - merged).double()))
    everything = memory + merging.megabytes + decomposing.megabytes
    rows = {
        TIES: (TIES, making + merging.seconds + svd, everything, "1"),
        SUM: (SUM, making + total + svd, None, "1"),
        KNOTS: (KNOTS, knots, None, "1"),
    }
    more: list[Row] = [("mergekit ties on dense deltas, no factorisation", making + theirs, memory + extra, "")]
    return rows, more, f"error of TIES, delta, over that of the best rank {rank} of PEFT's merge: {reached / best:.5f}"


def case(shape: tuple[int, int], adapters: int, rank: int, with_slow: bool) -> None:
    """Measure one size, with the slow steps of PEFT and mergekit or without, and print its table."""
    with tempfile.TemporaryDirectory() as folder:
        paths = synthetic.write_adapters(Path(folder), adapters, {MODULE: shape}, rank)
        found = ours(paths, rank)
        opened = [ties_peft.Adapter.load(path) for path in paths]
        read = [adapter.read(MODULE) for adapter in opened]
    factors = [delta for delta in read if isinstance(delta, LowRank)]
    others = [*in_factors(factors), *floor(factors)]
    merged = found["TIES, delta"][2]
    assert merged is not None
    reference, more, remark = slow(factors, merged, rank) if with_slow else ({}, [], "")
    rows = [*reference.values(), *more, *others]
    for name, (seconds, megabytes, _) in found.items():
        ratios = [f"{reference[TIES if 'TIES' in name else SUM][1] / seconds:.0f}"] if reference else []
        ratios += [f"(dense SVD: {reference[KNOTS][1] / seconds:.0f})"] if reference and "KnOTS" in name else []
        rows.append((name, seconds, megabytes, " ".join(ratios)))
    console = Console(width=120)
    cells = [(name, f"{s:.4f}", "" if mb is None else f"{mb:.0f}", ratio) for name, s, mb, ratio in rows]
    headings = ["", *map(number_column, ("seconds", "extra MB", "times faster"))]
    console.print(make_table(headings, cells, f"{adapters} adapters, rank {rank}, {shape[0]} × {shape[1]}"))
    if remark:
        console.print(remark)


def main() -> None:
    """Measure all sizes that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", default=["4096x4096"], help="rows x columns (4096x4096); several are measured in turn"
    )
    parser.add_argument(
        "--adapters", nargs="+", type=int, default=[8], help="number of adapters (8); several are measured in turn"
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters and of the result (16)")
    parser.add_argument("--no-kernels", action="store_true", help="use torch only, also where numba is installed")
    parser.add_argument("--no-peft", action="store_true", help="leave out the slow steps of PEFT and mergekit")
    parser.add_argument("--slow", action="store_true", help="run the slow steps of PEFT and mergekit at every size")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        small = synthetic.write_adapters(Path(folder), 2, {MODULE: (64, 64)}, asked.rank)
        usual_size, backends.MIN_ENTRIES = backends.MIN_ENTRIES, 1 << 62 if asked.no_kernels else 0
        ours(small, asked.rank)  # loads numba, if it is installed, before times are taken
        if not asked.no_kernels:
            backends.MIN_ENTRIES = usual_size
    for shape in [(int(rows), int(columns)) for rows, columns in (text.split("x") for text in asked.shape)]:
        for adapters in asked.adapters:
            usual = (shape, adapters) == ((4096, 4096), 8)
            case(shape, adapters, asked.rank, (usual or asked.slow) and not asked.no_peft)
    loops = "torch" if asked.no_kernels else backends.select_kernels(backends.MIN_ENTRIES).name
    print(f"inner loops of large merges in delta space by {loops}; {synthetic.machine()}")


if __name__ == "__main__":
    main()
