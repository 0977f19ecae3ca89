"""Steps: what is done to each task vector as it is read, before the vectors are combined.

A step changes the rows at hand of one vector in place. Steps are added by the verbs of `TaskVectors` and do nothing until
the vectors are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from .delta import Delta
from .sparsify import band_, drop_, drop_by_rank_
from .trim import Cut, Trim

Cuts = Sequence[tuple[Cut, ...]]  # for each task vector, a cut for each density


class RowsAtHand(Protocol):
    """What a step may know of the task vectors that it changes; see `TaskVectors`."""

    @property
    def deltas(self) -> Sequence[Delta]:
        """The task vectors, whole."""

    @property
    def rows(self) -> tuple[int, int] | None:
        """The range of rows at hand; None for all."""

    @property
    def tile(self) -> int:
        """The number of that range in the grid of tiles."""

    @property
    def start(self) -> int:
        """The flat index of the first entry at hand."""

    def share(self, place: int, density: float) -> float:
        """Return the share to keep of one task vector, where `density` is asked of all."""

    def uniform(self, place: int) -> Tensor:
        """Return one random number for each entry at hand of one task vector."""


class Step(Protocol):
    """A change of every task vector, made as it is read."""

    @property
    def idle(self) -> bool:
        """Whether it is known, from what was asked, to change nothing."""

    def apply(self, vectors: RowsAtHand, place: int, values: Tensor) -> Tensor:
        """Change the rows at hand of one task vector, in place, and return them."""


@dataclass(frozen=True, eq=False)
class Trimmed:
    """Cut each vector below a threshold, or outside of a band of magnitudes.

    Attributes:
        trim: what was asked.
        find: finds the cuts; called once.
    """

    trim: Trim
    find: Callable[[], Cuts]

    @property
    def idle(self) -> bool:
        """Whether all entries are kept."""
        return self.trim.densities[-1] == 1 and all(own[-1].threshold == 0 for own in self.cuts)

    @cached_property
    def cuts(self) -> Cuts:
        """The cuts, found when they are first asked for."""
        return self.find()

    def apply(self, vectors: RowsAtHand, place: int, values: Tensor) -> Tensor:
        """Set what is cut to zero."""
        cuts = self.cuts[place]
        if vectors.rows is None:
            cuts = tuple(cut.untiled() for cut in cuts)
        return cuts[0].apply_(values, vectors.tile) if len(cuts) == 1 else band_(values, cuts, vectors.tile)


@dataclass(frozen=True)
class Dropped:
    """Keep each entry with probability density, divided by it; with `epsilon`, larger ones more likely."""

    density: float
    epsilon: float | None = None

    @property
    def idle(self) -> bool:
        """Whether all entries are kept."""
        return self.density == 1

    def apply(self, vectors: RowsAtHand, place: int, values: Tensor) -> Tensor:
        """Set what is dropped to zero, and rescale the rest."""
        numbers = vectors.uniform(place)
        density = vectors.share(place, self.density)
        if self.epsilon is None:
            return drop_(values, numbers, density)
        delta = vectors.deltas[place]
        row = delta.dense() if len(delta.shape) == 1 else None  # a vector is ranked as a whole, a matrix row by row
        return drop_by_rank_(values, numbers, density, self.epsilon, row, vectors.start)


__all__ = ["Cuts", "Dropped", "Step", "Trimmed"]
