"""Read, count and merge rows of task vectors: by torch, or by compiled functions; only `select_kernels` decides by which.

Results of the two agree within float32. Which one is used depends on the size and the device of a merge alone, so that a
merge has the same bytes whatever was merged before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Protocol

import numpy as np
from torch import Tensor

from ..delta import Delta, LowRank
from ..elect import MergeRule, SignedSums
from ..threshold import Counts, count_in_bracket

# Entries of all task vectors together. To load the compiled functions takes longer than they save on a smaller merge:
# compare benchmarks/many_adapters.py --cases ties/delta with and without --no-kernels.
MIN_ENTRIES = 200_000_000
Rows = tuple[int, int]  # (start, stop)
Bracket = tuple[np.float32, np.float32]  # (low, high), both included
Conflicts = tuple[int, int]  # entries with kept values of both signs, and entries with several kept values


class SelectedRows(Protocol):
    """Provide what a merge of some rows of task vectors reads; `TaskVectors` does."""

    @property
    def deltas(self) -> Sequence[Delta]:
        """The whole task vectors."""

    @property
    def weights(self) -> Sequence[float]:
        """The weight of each."""

    @property
    def signs(self) -> Delta | None:
        """The vector that decides the signs, if the merge was given one."""

    @property
    def span(self) -> Rows:
        """The rows."""

    @property
    def out(self) -> Tensor | None:
        """Memory that the result may be written into."""

    def limits(self) -> Sequence[float] | None:
        """Return for each the largest magnitude that is trimmed away; None if more is done to it than that."""

    def sums(self, rule: MergeRule) -> SignedSums:
        """Return the sums of the positive and of the negative values."""

    def sign_vector(self) -> Tensor | None:
        """Return the rows of the vector that decides the signs."""


class TorchKernels:
    """Do the work by torch: the reference, on every device, for every task vector and every rule.

    Every entry is computed by the same operations in the same order in all three functions, so that an entry counted
    above a threshold is above it in the merge too. Within one merge all readings must therefore use the same object.

    Attributes:
        name: as the report gives it.
        tiles: how many times as large a tile is as the usual one.
    """

    name = "torch"
    tiles = 1

    def read(self, delta: Delta, rows: Rows, out: Tensor) -> Tensor:
        """Return some rows of a task vector, written into `out`; the same bits each time within a merge."""
        return delta.rows(*rows, out=out)

    def count(
        self, delta: Delta, rows: Rows, brackets: Sequence[Bracket], memory: Callable[[], Tensor]
    ) -> list[Counts]:
        """Count the magnitudes of some rows of a task vector, for each bracket.

        Args:
            delta, rows, brackets: of the task vector.
            memory: returns memory for the rows; it is called if they have to be written.
        """
        magnitudes = delta.rows(*rows, out=memory()).abs_()
        return [count_in_bracket(magnitudes, *bracket) for bracket in brackets]

    def merge(self, rows: SelectedRows, rule: MergeRule) -> tuple[Tensor, Conflicts]:
        """Return the disjoint merge of some rows, trimmed and with elected signs, and its conflicts."""
        sums = rows.sums(rule)
        conflicts = sums.conflicts()
        return sums.result(rows.sign_vector()), conflicts


class NumbaKernels(TorchKernels):
    """Do the same in compiled code that does not write B·A to memory, where it can; otherwise by torch.

    torch writes the entries of B·A to memory and reads them again for each of the ten or so operations of a trim and an
    election. The compiled functions compute a block that fits into a core's first cache, and count it or merge it there.
    On two CPU cores torch takes 1.8 times as long to merge eight adapters of rank 16 on one 4096 × 4096 module, and 2.1
    times (260 s) on the shape of an 8B model. Tiles are larger, since the columns of A are packed anew for each.

    They know factored task vectors, a merge by mass, as a mean or a sum, and a trim that keeps all of the entries that
    equal the threshold.
    """

    tiles = 2

    def __init__(self) -> None:
        import numba

        from . import numba_kernels

        self.name = f"numba {numba.__version__}"
        self.compiled = numba_kernels

    def read(self, delta: Delta, rows: Rows, out: Tensor) -> Tensor:
        """Return some rows of a task vector, written into `out`; the same bits each time within a merge."""
        if (factors := _factors(delta, rows)) is None:
            return super().read(delta, rows, out)
        self.compiled.multiply(*factors, out)
        return out

    def count(
        self, delta: Delta, rows: Rows, brackets: Sequence[Bracket], memory: Callable[[], Tensor]
    ) -> list[Counts]:
        """Count the magnitudes of some rows of a task vector, for each bracket; see `TorchKernels.count`."""
        if (factors := _factors(delta, rows)) is None:
            return super().count(delta, rows, brackets, memory)
        return [self.compiled.count(*factors, float(low), float(high)) for low, high in brackets]

    def merge(self, rows: SelectedRows, rule: MergeRule) -> tuple[Tensor, Conflicts]:
        """Return the disjoint merge of some rows, trimmed and with elected signs, and its conflicts."""
        limits = rows.limits() if rule.elect == "mass" and rule.disjoint in ("mean", "sum") else None
        factors = [pair for delta in rows.deltas if (pair := _factors(delta, rows.span)) is not None]
        if limits is None or rows.out is None or len(factors) < len(rows.deltas) or rows.signs is not None:
            return super().merge(rows, rule)
        weights = [abs(weight) if rule.normalize else 1.0 for weight in rows.weights]
        return rows.out, self.compiled.merge(factors, limits, weights, rule.disjoint == "mean", rows.out)


def select_kernels(entries: float, device: str = "cpu", by_entry: bool = True) -> TorchKernels:
    """Return the compiled functions where they pay, run on the device and numba is installed; elsewhere torch's.

    Args:
        entries: of all task vectors of a merge together.
        device: the sort of device.
        by_entry: whether the merge goes through the entries of factored task vectors.
    """
    pays = by_entry and device == "cpu" and entries >= MIN_ENTRIES
    return NumbaKernels() if pays and find_spec("numba") is not None else TorchKernels()


def _factors(delta: Delta, rows: Rows) -> tuple[Tensor, Tensor] | None:
    """Return B (rows, r) and A (r, columns) of some rows, contiguous; None if the task vector is not factored."""
    if not isinstance(delta, LowRank) or delta.rank == 0:
        return None
    return delta.B[rows[0] : rows[1]].contiguous(), delta.A.contiguous()


__all__ = ["Bracket", "Counts", "NumbaKernels", "SelectedRows", "TorchKernels", "select_kernels"]
