"""Method: one way of combining task vectors. One file in this folder each; the folder is the list.

A method is a frozen pydantic model: its fields are its parameters, its docstring is its paper, and
it has one `merge`. What it is handed is a `TaskVectors`: the weighted task vectors of one part of
one module, lazily, with a length, iterable again and again. A streaming method loops once and keeps
accumulators; an iterative one loops again; one that only sums asks for the exact sum.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..delta import Delta, stack
from ..trim import KEEP_ALL, Cut, Scope

Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class Task:
    """One adapter's weighted task vector w·τ, on the rows at hand.

    Attributes:
        vector: float32; it may be written into, and is good until the next one is asked for.
        weight: w.
        cut: where the trim that the method asked for cuts it.
        tile: which tile of the part this is.
    """

    vector: Tensor
    weight: float
    cut: Cut
    tile: int

    def trimmed(self) -> Tensor:
        """The vector, cut in place."""
        return self.cut.apply_(self.vector, self.tile)


@dataclass
class TaskVectors:
    """The task vectors of one part of one module, restricted to a tile where the method allows it.

    Attributes:
        deltas: w·τ of each adapter that has the module, whole.
        weights: w of each of them.
        cuts: where each is cut; empty where the method trims nothing.
        total_weight: Σw over all adapters of the merge, also those that lack the module.
        rows: the range of rows at hand; None for all.
        tile: the number of that range in the part's grid.
        signs: the vector that decides the signs, if the method was given one.
        room: gives memory by purpose and shape, its content left from the last use.
        tally: numbers that a method wants summed over tiles for the report.
    """

    deltas: Sequence[Delta]
    weights: Sequence[float]
    cuts: Sequence[Cut] = ()
    total_weight: float = 1.0
    rows: tuple[int, int] | None = None
    tile: int = 0
    signs: Delta | None = None
    room: Callable[[str, Sequence[int]], Tensor] = lambda purpose, shape: torch.empty(*shape)
    tally: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.deltas)

    def __iter__(self) -> Iterator[Task]:
        cuts = self.cuts or [KEEP_ALL] * len(self.deltas)
        for delta, weight, cut in zip(self.deltas, self.weights, cuts, strict=True):
            vector = delta.rows(*self.span, out=self.room("vector", self.shape))
            yield Task(vector, weight, cut, self.tile)

    @property
    def span(self) -> tuple[int, int]:
        """The range of rows at hand."""
        return self.rows or (0, self.deltas[0].shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every vector at hand."""
        start, stop = self.span
        return (stop - start, *self.deltas[0].shape[1:])

    def sign_vector(self) -> Tensor | None:
        """The rows at hand of the vector that decides the signs."""
        return None if self.signs is None else self.signs.rows(*self.span)

    def sum(self, factor: float = 1.0) -> Delta:
        """factor · Σ w·τ, exactly: factors side by side, at rank Σrᵢ."""
        return stack([delta.scaled(factor) for delta in self.deltas])


class Method(BaseModel, ABC):
    """A way of combining task vectors.

    Attributes:
        name: as users write it.
        default_scale: λ where the user gives none.
        spaces: where it can be used; the first is its default.
        source: the paper.
        entrywise: whether `merge` may be given a few rows at a time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str]
    default_scale: ClassVar[float] = 1.0
    spaces: ClassVar[tuple[str, ...]] = ("delta",)
    source: ClassVar[str]
    entrywise: ClassVar[bool] = False

    @abstractmethod
    def merge(self, tasks: TaskVectors) -> Tensor | Delta:
        """The merged vector of `tasks`, before the scale: a tensor of their shape, or factors."""

    def trims(self) -> tuple[float, Scope] | None:
        """(density, scope) of the trim to prepare, None for none."""
        return None

    def linear(self, adapters: int) -> bool:
        """Whether the result is a weighted sum, hence exact at rank Σrᵢ."""
        return False

    def check(self, weights: Sequence[float], space: str) -> str | None:
        """What is wrong with using it on these weights in this space; None if nothing."""
        return None
