"""Multiply task vectors out on a CPU, a block at a time, and count or merge each block while it is in the first cache.

A block has ROWS rows and PANEL columns. The columns of A that it needs are packed side by side first; far apart they
would displace each other from the cache. Columns beyond the last one hold NaN, which no comparison counts.

All functions multiply the same rows and panels by `_multiply_block`: each entry is a chain of fused multiply-adds in
the order of k. What `count` finds above a threshold is therefore, to the bit, what `merge` keeps. Arrays are float32
and contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.cpython.unsafe import numbers
from torch import Tensor

from ..elect import MIN_DIVISOR
from .numba_product import PANEL, compare, multiply_two_rows, pointer

ROWS = 32  # rows of a block, even
TOGETHER = 4  # task vectors that are added to the sums at once
LEAST_DIVISOR = np.float32(MIN_DIVISOR)

carray: Any = numba.carray  # type: ignore[attr-defined]
trailing_zeros: Any = numbers.trailing_zeros
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile a function, to run beside other threads."""
    made: Any = numba.njit(nogil=True, cache=True)(function)
    return cast(Function, made)


def multiply(B: Tensor, A: Tensor, out: Tensor) -> None:
    """Write B·A into `out`.

    Args:
        B: (rows, r), r ≥ 1.
        A: (r, columns).
        out: (rows, columns).
    """
    _multiply(B.numpy(), A.numpy(), out.numpy())


def count(B: Tensor, A: Tensor, low: float, high: float) -> tuple[int, np.ndarray]:
    """Return how many magnitudes of B·A exceed `high`, and those in [low, high] in any order."""
    inside = np.empty(len(B) * A.shape[1] + 1, np.float32)
    above, found = _count(B.numpy(), A.numpy(), np.float32(low), np.float32(high), inside)
    return above, inside[:found].copy()


def merge(
    factors: Sequence[tuple[Tensor, Tensor]], limits: Sequence[float], weights: Sequence[float], mean: bool, out: Tensor
) -> tuple[int, int]:
    """Write the disjoint mean or sum of trimmed task vectors, elected by mass, into `out`; see `NumbaKernels.merge`.

    Args:
        factors: B (rows, r) and A (r, columns) of each; r may differ.
        limits: for each, the largest magnitude that is trimmed away.
        weights: for each, what it adds to the divisor of the mean.
        mean: the mean, else the sum.
        out: (rows, columns).
    Returns: how many entries have kept values of both signs, and how many have several kept values.
    """
    addresses = np.array([(B.data_ptr(), A.data_ptr()) for B, A in factors], np.int64)
    ranks = np.array([len(A) for _, A in factors], np.int64)
    missing = -len(factors) % TOGETHER  # the last ones are added together with nothing: no value exceeds infinity
    padded = np.array([[*limits, *[np.inf] * missing], [*weights, *[0.0] * missing]], np.float32)
    made = _merge(addresses, ranks, padded[0], padded[1], mean, out.numpy())
    return int(made[0]), int(made[1])


@compiled
def _pack(A: np.ndarray, start: int, panel: np.ndarray) -> None:
    """Copy PANEL columns of A, from `start` on, side by side into `panel` (r, PANEL)."""
    columns = min(PANEL, A.shape[1] - start)
    for k in range(len(A)):
        source, target = A[k, start : start + columns], panel[k]
        for column in range(columns):
            target[column] = source[column]
        target[columns:] = np.float32(np.nan)


@compiled
def _multiply_block(B: np.ndarray, panel: np.ndarray, first: int, rows: int, block: np.ndarray) -> None:
    """Write some rows of B times a panel, from `first` on, into `block` (ROWS, PANEL)."""
    for row in range(0, rows, 2):
        multiply_two_rows(B, first + row, first + min(row + 1, rows - 1), panel, block[row:])  # an odd last row twice


@compiled
def _store(block: np.ndarray, out: np.ndarray, first: int, rows: int, start: int) -> None:
    """Copy a block to its place in `out`, without what lies beyond the edges."""
    columns = min(PANEL, out.shape[1] - start)
    for row in range(rows):
        source, target = block[row], out[first + row, start : start + columns]
        for column in range(columns):
            target[column] = source[column]


@compiled
def _multiply(B: np.ndarray, A: np.ndarray, out: np.ndarray) -> None:
    """Write B·A into `out`."""
    panel, block = np.empty((len(A), PANEL), np.float32), np.empty((ROWS, PANEL), np.float32)
    for start in range(0, A.shape[1], PANEL):
        _pack(A, start, panel)
        for first in range(0, len(B), ROWS):
            rows = min(ROWS, len(B) - first)
            _multiply_block(B, panel, first, rows, block)
            _store(block, out, first, rows, start)


@compiled
def _count(B: np.ndarray, A: np.ndarray, low: Any, high: Any, inside: np.ndarray) -> tuple[int, int]:
    """Return how many magnitudes exceed `high` and how many lie in [low, high]; write the latter into `inside`."""
    panel, block = np.empty((len(A), PANEL), np.float32), np.empty((ROWS, PANEL), np.float32)
    above: Any = 0
    found: Any = 0
    for start in range(0, A.shape[1], PANEL):
        _pack(A, start, panel)
        for first in range(0, len(B), ROWS):
            rows = min(ROWS, len(B) - first)
            _multiply_block(B, panel, first, rows, block)
            for row in range(rows):
                larger, marks = compare(block, row, low, high)
                above += larger
                while True:  # one place is written in any case, since whether there is a mark cannot be predicted
                    inside[found] = abs(block[row, trailing_zeros(marks) % PANEL])
                    found += np.int64(marks > 0)
                    marks &= marks - 1
                    if marks == 0:
                        break
    return above, found


@compiled
def _merge(
    addresses: np.ndarray, ranks: np.ndarray, limits: np.ndarray, weights: np.ndarray, mean: bool, out: np.ndarray
) -> tuple[int, int]:
    """Do what `merge` says, with the addresses of B and A, (N, 2), and the ranks; `limits` and `weights` are padded."""
    rows, width = out.shape
    panels, blocks = np.empty((ranks.sum(), PANEL), np.float32), np.empty((TOGETHER, ROWS, PANEL), np.float32)
    sums, kept = np.empty((4, ROWS * PANEL), np.float32), np.empty(ROWS * PANEL, np.int32)
    merged = np.empty((ROWS, PANEL), np.float32)
    conflicting: Any = 0
    shared: Any = 0
    for start in range(0, width, PANEL):
        at = 0
        for member in range(len(ranks)):
            _pack(carray(pointer(addresses[member, 1]), (ranks[member], width), np.float32), start, panels[at:])
            at += ranks[member]
        for first in range(0, rows, ROWS):
            some = min(ROWS, rows - first)
            flat = some * PANEL
            sums[:] = np.float32(0.0)
            kept[:] = np.int32(0)
            at = 0
            for group in range(0, len(ranks), TOGETHER):
                for member in range(group, min(group + TOGETHER, len(ranks))):
                    B = carray(pointer(addresses[member, 0]), (rows, ranks[member]), np.float32)
                    _multiply_block(B, panels[at : at + ranks[member]], first, some, blocks[member - group])
                    at += ranks[member]
                _add(blocks.reshape(TOGETHER, -1), flat, limits[group:], weights[group:], sums, kept)
            both, several = _elect(sums, kept, mean, merged.reshape(-1)[:flat])
            conflicting += both
            shared += several
            _store(merged, out, first, some, start)
    return conflicting, shared


@compiled
def _add_value(
    value: Any, limit: Any, weight: Any, positive: Any, negative: Any, plus: Any, minus: Any, kept: Any
) -> tuple[Any, ...]:
    """Return the sums of one entry after the value of one more task vector."""
    zero, over, under = np.float32(0.0), value > limit, value < -limit
    return (
        positive + (value if over else zero),
        negative + (value if under else zero),
        plus + (weight if over else zero),
        minus + (weight if under else zero),
        np.int32(kept + np.int32(over | under)),
    )


@compiled
def _add(
    blocks: np.ndarray, places: int, limits: np.ndarray, weights: np.ndarray, sums: np.ndarray, kept: np.ndarray
) -> None:
    """Add what exceeds its limit in magnitude, and its weight, to the sums of its sign, as `SignedSums.add` does.

    Args:
        blocks: (TOGETHER, …), values of as many task vectors, of which the first `places` are added.
        limits, weights: of each.
        sums: (4, …): of positive values, of negative values, and of their weights.
        kept: how many values were added.
    """
    positive, negative, plus, minus = sums[0], sums[1], sums[2], sums[3]
    v1, v2, v3, v4 = blocks[0], blocks[1], blocks[2], blocks[3]
    l1, l2, l3, l4 = limits[0], limits[1], limits[2], limits[3]
    w1, w2, w3, w4 = weights[0], weights[1], weights[2], weights[3]
    for place in range(places):  # written out: a loop over the task vectors would store the sums each time
        entry = positive[place], negative[place], plus[place], minus[place], kept[place]
        entry = _add_value(v1[place], l1, w1, *entry)
        entry = _add_value(v2[place], l2, w2, *entry)
        entry = _add_value(v3[place], l3, w3, *entry)
        entry = _add_value(v4[place], l4, w4, *entry)
        positive[place], negative[place], plus[place], minus[place], kept[place] = entry


@compiled
def _elect(sums: np.ndarray, kept: np.ndarray, mean: bool, out: np.ndarray) -> tuple[Any, Any]:
    """Write the mean or sum of the elected sign into `out`; return the numbers that `merge` returns."""
    positive, negative, plus, minus = sums[0], sums[1], sums[2], sums[3]
    conflicting: Any = np.int32(0)
    shared: Any = np.int32(0)
    zero = np.float32(0.0)
    for place in range(len(out)):  # all is loaded first: a choice between two loads would be a branch
        up, down, weight_up, weight_down = positive[place], negative[place], plus[place], minus[place]
        elected = up + down >= zero
        agreed, weight = (up if elected else down), (weight_up if elected else weight_down)
        out[place] = agreed / max(weight, LEAST_DIVISOR) if mean else agreed
        conflicting = np.int32(conflicting + np.int32((up > zero) & (down < zero)))
        shared = np.int32(shared + np.int32(kept[place] > 1))
    return conflicting, shared
