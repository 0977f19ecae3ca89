"""Tensors of another format under PEFT's names: views of a file's tensors, read when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from .tensors import TensorInfo, TensorSource

Span = tuple[int, int]


@dataclass(frozen=True)
class View:
    """A tensor of a file, or a part of it, in the form of PEFT.

    Attributes:
        key: its name in the file.
        shape, dtype: of the result.
        transposed: whether the file has it transposed.
        rows, columns: the part of it; None for all.
        swapped: whether the halves of its rows are exchanged.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False
    rows: Span | None = None
    columns: Span | None = None
    swapped: bool = False

    @classmethod
    def of(cls, tensors: TensorSource, key: str, transposed: bool = False) -> View:
        """Return a view of a whole tensor."""
        info = tensors.info(key)
        return cls(key, info.shape[::-1] if transposed else info.shape, info.dtype, transposed)

    def part(self, rows: Span | None, columns: Span | None) -> View:
        """Return a view of some rows and columns; None for all."""
        height = self.shape[0] if rows is None else rows[1] - rows[0]
        width = self.shape[1] if columns is None else columns[1] - columns[0]
        return replace(self, shape=(height, width, *self.shape[2:]), rows=rows, columns=columns)

    def reshaped(self, shape: tuple[int, ...]) -> View:
        """Return a view with another shape, of the same numbers in the same order."""
        return replace(self, shape=shape)

    def read(self, tensors: TensorSource) -> Tensor:
        """Return the tensor."""
        found = tensors.read(self.key)
        found = found.T if self.transposed else found
        found = found if self.rows is None else found[slice(*self.rows)]
        found = found if self.columns is None else found[:, slice(*self.columns)]
        if self.swapped:
            found = torch.cat(found.chunk(2)[::-1])
        return found.reshape(self.shape).contiguous()


@dataclass(frozen=True)
class ConvertedTensors:
    """Views of one file's tensors by the names that PEFT gives them.

    Attributes:
        source: the file's tensors.
        views: by name.
        path: of the file.
    """

    source: TensorSource
    views: Mapping[str, View]
    path: Path | None = None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(sorted(self.views))

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype."""
        view = self.views[name]
        return TensorInfo(view.shape, view.dtype)

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in its own dtype."""
        return self.views[name].read(self.source)


def split_rows(B: Tensor, heights: Sequence[int]) -> list[tuple[Span, Span] | None]:
    """Return the rows and columns of B, (out, r), that belong to each of the layers stacked in it.

    A LoRA of the whole layer uses all columns in every layer. One that was made of a LoRA for each layer has blocks: each
    layer uses columns of its own, and one without a LoRA has rows of zeros, for which None is returned.

    Args:
        B: the factor of the whole layer.
        heights: the number of rows of each layer.
    """
    ends = list(accumulate(heights))
    rows = [(end - height, end) for end, height in zip(ends, heights, strict=True)]
    used = [(B[start:end].flatten(1) != 0).any(0).nonzero().flatten().tolist() for start, end in rows]
    if not any(used):
        return [(own, (0, B.shape[1])) for own in rows]
    columns = iter(_column_blocks([own for own in used if own], B.shape[1]))
    return [(own, next(columns)) if has else None for own, has in zip(rows, used, strict=True)]


def _column_blocks(used: Sequence[Sequence[int]], rank: int) -> list[Span]:
    """Return the columns of each layer that has a LoRA: equal blocks, else unequal ones in order, else all for each.

    Args:
        used: for each, the columns in which it is not zero.
        rank: the number of columns.
    """
    count, firsts = len(used), [own[0] for own in used]
    width, rest = divmod(rank, count)
    equal = [(width * i, width * (i + 1)) for i in range(count)]
    unequal = list(zip([0, *firsts[1:]], [*firsts[1:], rank], strict=True))
    for blocks in (unequal,) if rest else (equal, unequal):
        if all(a <= own[0] and own[-1] < b for own, (a, b) in zip(used, blocks, strict=True)):
            return blocks
    return [(0, rank)] * count
