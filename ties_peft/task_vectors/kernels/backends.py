"""Read, count and merge rows of task vectors, by torch or by compiled functions; only this module decides by which.

torch writes the entries of B·A to memory and reads them again for each of the ten or so operations of a trim and an
election. The compiled functions compute a block that fits into a core's first cache, and count it or merge it there. On
two CPU cores torch takes 1.8 times as long as the compiled functions to merge eight adapters of rank 16 on one
4096 × 4096 module, and 2.1 times (260 s) on the shape of an 8B model.

Results agree with torch's within float32. Which code is used depends on the size and the device of a merge alone, so that
a merge has the same bytes whatever was merged before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from torch import Tensor

from ..delta import Delta, LowRank
from ..elect import MergeRule
from ..threshold import Counts, count_in_bracket

MIN_ENTRIES = 1 << 26  # entries of all task vectors together; smaller merges are quicker without a compiler
Pair = tuple[Tensor, Tensor]  # B (rows, r) and A (r, columns)
Rows = tuple[int, int]  # (start, stop)
Bracket = tuple[np.float32, np.float32]  # (low, high), both included


@dataclass(frozen=True)
class Kernels:
    """Hold the compiled functions.

    Attributes:
        name: of the compiler, with its version.
        multiply: multiply(B, A, out) writes B·A into `out`.
        count: count(B, A, low, high) returns the `Counts` of B·A.
        merge: merge(factors, limits, weights, mean, out); see `merge_rows`.

    All three compute an entry by the same operations in the same order, so that an entry counted above a threshold is
    above it in the merge too. Every other reading of such a task vector in the same merge must therefore go through
    `read_rows`.
    """

    name: str
    multiply: Callable[[Tensor, Tensor, Tensor], None]
    count: Callable[[Tensor, Tensor, float, float], Counts]
    merge: Callable[[Sequence[Pair], Sequence[float], Sequence[float], bool, Tensor], tuple[int, int]]


def select_kernels(entries: float, device: str = "cpu") -> Kernels | None:
    """Return the compiled functions; None if they would not pay, do not run on the device, or numba is not installed.

    Args:
        entries: of all task vectors of a merge together.
        device: the sort of device.
    """
    return None if device != "cpu" or entries < MIN_ENTRIES or find_spec("numba") is None else load_kernels()


def load_kernels() -> Kernels:
    """Return the functions that numba compiles."""
    import numba

    from . import numba_kernels as compiled

    return Kernels(f"numba {numba.__version__}", compiled.multiply, compiled.count, compiled.merge)


def read_rows(delta: Delta, rows: Rows, out: Tensor, kernels: Kernels | None) -> Tensor:
    """Return some rows of a task vector, written into `out`; the same bits each time within a merge."""
    if kernels is None or (factors := _factors(delta, rows)) is None:
        return delta.rows(*rows, out=out)
    kernels.multiply(*factors, out)
    return out


def count_rows(
    delta: Delta, rows: Rows, brackets: Sequence[Bracket], memory: Callable[[], Tensor], kernels: Kernels | None
) -> list[Counts]:
    """Count the magnitudes of some rows of a task vector, for each bracket.

    Args:
        delta, rows, brackets, kernels: of the task vector.
        memory: returns memory for the rows; it is called if they have to be written.
    """
    if kernels is None or (factors := _factors(delta, rows)) is None:
        magnitudes = delta.rows(*rows, out=memory()).abs_()
        return [count_in_bracket(magnitudes, *bracket) for bracket in brackets]
    return [kernels.count(*factors, float(low), float(high)) for low, high in brackets]


def merge_rows(
    deltas: Sequence[Delta],
    rows: Rows,
    limits: Sequence[float],
    weights: Sequence[float],
    rule: MergeRule,
    out: Tensor,
    kernels: Kernels | None,
) -> tuple[int, int] | None:
    """Trim some rows of task vectors, elect signs, and write the disjoint merge into `out`, as `SignedSums` does.

    Args:
        deltas: the task vectors.
        rows: of each of them.
        limits: for each, the largest magnitude that is trimmed away.
        weights: for each, what it adds to the divisor of the mean where it agrees.
        rule: how they are merged.
        out: (rows, columns).
        kernels: the compiled functions, if they may be used.
    Returns: how many entries have kept values of both signs, and how many have several kept values. None if nothing was
        written, since no compiled function has this merge.
    """
    if kernels is None or rule.elect != "mass" or rule.disjoint not in ("mean", "sum"):
        return None
    factors = [pair for delta in deltas if (pair := _factors(delta, rows)) is not None]
    if len(factors) < len(deltas):
        return None
    return kernels.merge(factors, limits, weights, rule.disjoint == "mean", out)


def _factors(delta: Delta, rows: Rows) -> Pair | None:
    """Return B and A of some rows, contiguous; None if the task vector is not factored."""
    if not isinstance(delta, LowRank) or delta.rank == 0:
        return None
    return delta.B[rows[0] : rows[1]].contiguous(), delta.A.contiguous()


__all__ = ["Bracket", "Counts", "Kernels", "count_rows", "load_kernels", "merge_rows", "read_rows", "select_kernels"]
