"""Space: the coordinates in which task vectors meet. One file in this folder each; the folder is the list.

A space turns each adapter's task vector into one or more *parts*, which a method merges each on its
own, and turns the merged parts back into one task vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from ..delta import Delta
from ..trim import Scope


class Frame(ABC):
    """The coordinates of one module."""

    @abstractmethod
    def encode(self, delta: Delta, weight: float) -> tuple[Delta, ...]:
        """The parts of w·τ."""

    @abstractmethod
    def decode(self, merged: Sequence[Delta]) -> Delta:
        """The task vector that the merged parts make."""

    def weights(self, weight: float) -> tuple[float, ...]:
        """The weight that each part carries in a disjoint mean."""
        return (weight,)


class Space(ABC):
    """A choice of coordinates.

    Attributes:
        name: as users write it.
        lossless_rank: whether the merged vector's rank is at most Σrᵢ for any method.
        scopes: over what a trim may rank magnitudes; the first is used where the user names none.
        kinds: the kinds of adapter it makes sense for.
    """

    name: ClassVar[str]
    lossless_rank: ClassVar[bool] = False
    scopes: ClassVar[tuple[Scope, ...]] = ("adapter", "module")
    kinds: ClassVar[tuple[str, ...]] = ("lora", "ia3")

    def check(self, ranks: Sequence[int]) -> str | None:
        """What is wrong with adapters of these ranks on one module; None if nothing."""
        return None

    @abstractmethod
    def frame(self, deltas: Sequence[Delta]) -> Frame:
        """The coordinates that these task vectors of one module share."""
