"""Multiply task vectors out on a GPU, a block at a time in registers, and count or merge each block there.

All three kernels multiply by `_product`: each entry is a chain of fused multiply-adds in the order of k, in full
float32 (no TF32), whatever the block. What `count` finds above a threshold is therefore, to the bit, what `merge`
keeps.

Floats are never added atomically, only whole numbers: a result does not depend on the order of the blocks. Tensors are
float32, contiguous and on one device. How much time they save is not measured yet: `make gpu-check` compares them with
torch on a GPU. The tests run them in Triton's interpreter, and compile them without running them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..elect import MIN_DIVISOR

ROWS, COLUMNS = 4, 512  # of a block
WARPS = 4  # that share it: 16 entries a thread, for which `merge` keeps six numbers each in registers
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}  # a multiply-add is fused where it is written so, only there
ALIGNED: Any = tl.constexpr(16)  # bytes, so that a thread may load four numbers at once
LEAST_DIVISOR: Any = tl.constexpr(MIN_DIVISOR)

_launching = threading.Lock()  # two threads at a kernel's first launch would both compile it


def _block(
    rows: int, width: int, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the rows and columns of this program's block, the offsets of its entries, and which of them exist.

    Consecutive programs take blocks one below another, so that those that run at once read the same columns of A.
    """
    down = tl.cdiv(rows, ROWS)
    row = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) // down * COLUMNS + tl.arange(0, COLUMNS)
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    return row, column, place, (row < rows)[:, None] & (column < width)[None, :]


def _product(
    B: tl.tensor, A: tl.tensor, rank: int, rows: int, width: int, row: tl.tensor, column: tl.tensor
) -> tl.tensor:
    """Return the entries of B·A at some rows and columns; those beyond the edges hold any value."""
    made = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    left = B + tl.minimum(row, rows - 1).to(tl.int64) * rank  # a mask for every row would cost as much as the product
    right = A + column[None, :]
    for _ in range(rank):
        b = tl.load(left)
        a = tl.load(right, mask=column[None, :] < width, other=0.0)
        made = tl.fma(b[:, None], a, made)
        left += 1
        right += width
    return made


def _multiply(
    B: tl.tensor,
    A: tl.tensor,
    rank: int,
    rows: int,
    width: int,
    out: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write B·A into `out`."""
    row, column, place, there = block(rows, width, ROWS, COLUMNS)
    values = product(B, A, rank, rows, width, row, column)
    tl.store(out + place, values, mask=there)


def _count(
    B: tl.tensor,
    A: tl.tensor,
    rank: int,
    rows: int,
    width: int,
    low: float,
    high: float,
    counts: tl.tensor,
    found: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Add how many magnitudes exceed `high` and lie in [low, high] to `counts`; write the latter into `found`."""
    row, column, _, there = block(rows, width, ROWS, COLUMNS)
    sizes = tl.abs(product(B, A, rank, rows, width, row, column))
    larger = (there & (sizes > high)).to(tl.int32)
    inside = tl.ravel((there & (sizes >= low) & (sizes <= high)).to(tl.int32))
    tl.atomic_add(counts, tl.sum(tl.ravel(larger), 0))
    start = tl.atomic_add(counts + 1, tl.sum(inside, 0))
    tl.store(found + start + tl.cumsum(inside, 0) - inside, tl.ravel(sizes), mask=inside > 0)


def _merge(
    factors: tl.tensor,
    limits: tl.tensor,
    members: int,
    rows: int,
    width: int,
    out: tl.tensor,
    counts: tl.tensor,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write the disjoint mean or sum of trimmed task vectors, elected by mass, into `out`; see `SignedSums`.

    Args:
        factors: (N, 3), int64: the addresses of B and A of each, and its rank.
        limits: (N, 2): the largest magnitude of each that is trimmed away, and its weight in the divisor.
        members: N.
        counts: (2,), int32, to which is added how many entries have kept values of both signs, and how many have
            several.
    """
    row, column, place, there = block(rows, width, ROWS, COLUMNS)
    positive = tl.zeros([ROWS, COLUMNS], tl.float32)
    negative = tl.zeros([ROWS, COLUMNS], tl.float32)
    plus = tl.zeros([ROWS, COLUMNS], tl.float32)
    minus = tl.zeros([ROWS, COLUMNS], tl.float32)
    kept = tl.zeros([ROWS, COLUMNS], tl.int32)
    for _ in range(members):
        B = tl.load(factors).to(tl.pointer_type(tl.float32))
        A = tl.multiple_of(tl.load(factors + 1).to(tl.pointer_type(tl.float32)), ALIGNED)
        values = product(B, A, tl.load(factors + 2).to(tl.int32), rows, width, row, column)
        least, weight = tl.load(limits), tl.load(limits + 1)
        up, down = values > least, values < -least
        positive += tl.where(up, values, 0.0)
        negative += tl.where(down, values, 0.0)
        plus += tl.where(up, weight, 0.0)
        minus += tl.where(down, weight, 0.0)
        kept += (up | down).to(tl.int32)
        factors += 3
        limits += 2
    elected = positive + negative >= 0
    agreed = tl.where(elected, positive, negative)
    if MEAN:
        agreed = tl.div_rn(agreed, tl.maximum(tl.where(elected, plus, minus), LEAST_DIVISOR))
    tl.store(out + place, agreed, mask=there)
    tl.atomic_add(counts, tl.sum(tl.ravel((there & (positive > 0) & (negative < 0)).to(tl.int32)), 0))
    tl.atomic_add(counts + 1, tl.sum(tl.ravel((there & (kept > 1)).to(tl.int32)), 0))


block = triton.jit(_block)
product = triton.jit(_product)
multiply_kernel: Any = triton.jit(_multiply, do_not_specialize=["rank", "rows"])
count_kernel: Any = triton.jit(_count, do_not_specialize=["rank", "rows", "low", "high"])
merge_kernel: Any = triton.jit(_merge, do_not_specialize=["members", "rows"])


def multiply(B: Tensor, A: Tensor, out: Tensor) -> None:
    """Write B·A into `out`.

    Args:
        B: (rows, r).
        A: (r, columns).
        out: (rows, columns).
    """
    _launch(multiply_kernel, out.shape, B, A, len(A), *out.shape, out)


def count(B: Tensor, A: Tensor, low: float, high: float) -> tuple[int, np.ndarray]:
    """Return how many magnitudes of B·A exceed `high`, and those in [low, high] in any order.

    Args:
        B: (rows, r).
        A: (r, columns).
        low, high: 0 ≤ low ≤ high.
    """
    shape = len(B), A.shape[1]
    counts = torch.zeros(2, dtype=torch.int32, device=B.device)
    found = torch.empty(shape[0] * shape[1], device=B.device)
    _launch(count_kernel, shape, B, A, len(A), *shape, float(low), float(high), counts, found)
    above, inside = counts.tolist()  # here it waits for the device
    return above, torch.empty(inside).copy_(found[:inside]).numpy()


def merge(
    factors: Sequence[tuple[Tensor, Tensor]], below: Sequence[float], weights: Sequence[float], mean: bool, out: Tensor
) -> tuple[int, int]:
    """Write the disjoint mean or sum of trimmed task vectors, elected by mass, into `out`; see `Kernels.merge_rows`.

    Args:
        factors: B (rows, r) and A (r, columns) of each; r may differ.
        below: for each, the largest magnitude that is trimmed away.
        weights: for each, what it adds to the divisor of the mean.
        mean: the mean, else the sum.
        out: (rows, columns).
    Returns: how many entries have kept values of both signs, and how many have several kept values.
    """
    aligned = [(B, A if A.data_ptr() % ALIGNED.value == 0 else A.clone()) for B, A in factors]
    rows = [(B.data_ptr(), A.data_ptr(), len(A)) for B, A in aligned]
    table = torch.tensor(rows, dtype=torch.int64, device=out.device)
    limits = torch.tensor([*zip(below, weights, strict=True)], dtype=torch.float32, device=out.device)
    counts = torch.zeros(2, dtype=torch.int32, device=out.device)
    _launch(merge_kernel, out.shape, table, limits, len(aligned), *out.shape, out, counts, mean)
    conflicting, shared = counts.tolist()
    return conflicting, shared


def _launch(kernel: Any, shape: Sequence[int], *given: Any) -> None:
    """Run a kernel on every block of a matrix."""
    blocks = triton.cdiv(shape[0], ROWS) * triton.cdiv(shape[1], COLUMNS)
    on_device: Any = torch.cuda.device_of  # a thread's own device is the first one, whatever the tensors'
    with _launching, on_device(next(each for each in given if isinstance(each, Tensor))):
        kernel[(blocks,)](*given, ROWS=ROWS, COLUMNS=COLUMNS, **OPTIONS)
