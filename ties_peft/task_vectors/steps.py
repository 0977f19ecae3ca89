"""Change task vectors as they are read, before they are combined.

A step changes the selected rows of one vector in place. Methods of `TaskVectors` such as `trim` add steps, which do
nothing until the vectors are read.
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


class SelectedRows(Protocol):
    """Say what a step may know of the task vectors that it changes; see `TaskVectors`."""

    @property
    def deltas(self) -> Sequence[Delta]:
        """The task vectors, whole."""

    @property
    def rows(self) -> tuple[int, int] | None:
        """The range of selected rows; None for all."""

    @property
    def tile(self) -> int:
        """The number of that range in the grid of tiles."""

    @property
    def start(self) -> int:
        """The flat index of the first selected entry."""

    def density_of(self, place: int, density: float) -> float:
        """Return the density of one task vector, if the method asks for `density`."""

    def uniform(self, place: int) -> Tensor:
        """Return one random number for each selected entry of one task vector."""


class Step(Protocol):
    """Change every task vector as it is read."""

    @property
    def idle(self) -> bool:
        """Whether it keeps every entry, whatever the values."""

    def apply(self, vectors: SelectedRows, place: int, values: Tensor) -> Tensor:
        """Change the selected rows of one task vector, in place, and return them."""


@dataclass(frozen=True, eq=False)
class Trimmed:
    """Set the entries of each vector below its threshold to zero, or those outside a band of magnitudes.

    Attributes:
        trim: the trim that was asked for.
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

    def apply(self, vectors: SelectedRows, place: int, values: Tensor) -> Tensor:
        """Set the entries that are not kept to zero: by one cut, or between two."""
        cuts = self.cuts[place]
        if vectors.rows is None:
            cuts = tuple(cut.untiled() for cut in cuts)
        return cuts[0].apply_(values, vectors.tile) if len(cuts) == 1 else band_(values, cuts, vectors.tile)


@dataclass(frozen=True)
class Dropped:
    """Keep each entry with probability `density`, divided by it; with `epsilon`, it rises with the magnitude."""

    density: float
    epsilon: float | None = None

    @property
    def idle(self) -> bool:
        """Whether all entries are kept."""
        return self.density == 1

    def apply(self, vectors: SelectedRows, place: int, values: Tensor) -> Tensor:
        """Set the entries that are dropped to zero, and rescale the others."""
        numbers = vectors.uniform(place)
        density = vectors.density_of(place, self.density)
        if self.epsilon is None:
            return drop_(values, numbers, density)
        delta = vectors.deltas[place]
        row = delta.dense() if len(delta.shape) == 1 else None  # a vector is ranked as a whole, a matrix row by row
        return drop_by_rank_(values, numbers, density, self.epsilon, row, vectors.start)


__all__ = ["Cuts", "Dropped", "Step", "Trimmed"]
