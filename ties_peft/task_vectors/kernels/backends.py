"""Select the compiled functions that multiply task vectors out and use each entry where it is computed.

torch writes the entries of B·A to memory and reads them again for each of the ten or so operations of a trim and an
election. The compiled functions compute a block that fits into a core's first cache, or into a GPU's registers, and
count it or merge it there. On two CPU cores torch takes 1.8 times as long as the compiled functions to merge
eight adapters of rank 16 on one 4096 × 4096 module, and 2.1 times (260 s) on the shape of an 8B model.

Results agree with torch's within float32. What is used depends on the size and the device of a merge alone, so that a
merge has the same bytes whatever was merged before it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor

from ..delta import Delta, LowRank

MIN_ENTRIES = 1 << 26  # entries of all task vectors together; smaller merges are quicker without a compiler
MIN_ENTRIES_ON_GPU = 1 << 30  # the same on a GPU, estimated: the first call compiles for some seconds
Pair = tuple[Tensor, Tensor]  # B (rows, r) and A (r, columns)
Rows = tuple[int, int]  # (start, stop)


@dataclass(frozen=True)
class Kernels:
    """Hold the compiled functions for one sort of device.

    Attributes:
        name: of the compiler, with its version.
        device: the sort of device: `cpu` or `cuda`.
        multiply: multiply(B, A, out) writes B·A into `out`.
        count: count(B, A, low, high) returns how many magnitudes of B·A exceed `high`, and those in [low, high] in any
            order.
        merge: merge(factors, below, weights, mean, out); see `merge_rows`.

    All three compute an entry by the same operations in the same order, so that an entry counted above a threshold is
    above it in the merge too. Every other reading of such a task vector in the same merge must therefore go through
    `read_rows`.
    """

    name: str
    device: str
    multiply: Callable[[Tensor, Tensor, Tensor], None]
    count: Callable[[Tensor, Tensor, float, float], tuple[int, np.ndarray]]
    merge: Callable[[Sequence[Pair], Sequence[float], Sequence[float], bool, Tensor], tuple[int, int]]

    def accepts(self, delta: Delta) -> bool:
        """Return whether a task vector is factored and lies on the device."""
        return isinstance(delta, LowRank) and delta.rank > 0 and delta.B.device.type == self.device

    def count_rows(self, delta: Delta, rows: Rows, low: float, high: float) -> tuple[int, np.ndarray]:
        """Return how many magnitudes of some rows exceed `high`, and those in [low, high] in any order."""
        return self.count(*_factors(delta, rows), low, high)

    def merge_rows(
        self,
        deltas: Sequence[Delta],
        rows: Rows,
        below: Sequence[float],
        weights: Sequence[float],
        mean: bool,
        out: Tensor,
    ) -> tuple[int, int]:
        """Trim some rows of task vectors, elect signs by mass, and write the disjoint merge into `out`.

        It computes what `SignedSums` does.

        Args:
            deltas: the task vectors.
            rows: of each of them.
            below: for each, the largest magnitude that is trimmed away.
            weights: for each, what it adds to the divisor of the mean where it agrees.
            mean: the mean of the values that agree, else their sum.
            out: (rows, columns).
        Returns: how many entries have kept values of both signs, and how many have several kept values.
        """
        return self.merge([_factors(delta, rows) for delta in deltas], below, weights, mean, out)


def select_kernels(entries: float, device: str = "cpu") -> Kernels | None:
    """Return the compiled functions for a sort of device; None if they would not pay or cannot be compiled.

    Args:
        entries: of all task vectors of a merge together.
        device: `cpu` or `cuda`; others have none.
    """
    compilers = {"cpu": ("numba", MIN_ENTRIES), "cuda": ("triton", MIN_ENTRIES_ON_GPU)}
    compiler, least = compilers.get(device, ("", 0))
    return None if not compiler or entries < least or find_spec(compiler) is None else load_kernels(compiler, device)


def load_kernels(compiler: str, device: str) -> Kernels:
    """Return the functions that `numba` or `triton` compiles."""
    version = importlib.import_module(compiler).__version__
    made: Any = importlib.import_module(f"{__package__}.{compiler}_kernels")
    return Kernels(f"{compiler} {version}", device, made.multiply, made.count, made.merge)


def read_rows(delta: Delta, rows: Rows, out: Tensor, kernels: Kernels | None) -> Tensor:
    """Return some rows of a task vector, written into `out`; the same bits each time within a merge."""
    if kernels is None or not kernels.accepts(delta):
        return delta.rows(*rows, out=out)
    kernels.multiply(*_factors(delta, rows), out)
    return out


def _factors(delta: Delta, rows: Rows) -> Pair:
    assert isinstance(delta, LowRank)
    return delta.B[rows[0] : rows[1]].contiguous(), delta.A.contiguous()


__all__ = ["Kernels", "load_kernels", "read_rows", "select_kernels"]
