"""Delta space: Δ = s·B·A itself, computed a tile at a time and never held whole for any adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ..delta import Delta
from .base import Frame, Space


class DeltaFrame(Frame):
    """The entries of the task vector."""

    def encode(self, delta: Delta, weight: float) -> tuple[Delta, ...]:
        """w·τ, still in factors."""
        return (delta.scaled(weight),)

    def decode(self, merged: Sequence[Delta]) -> Delta:
        """The merged vector is the task vector."""
        return merged[0]


class DeltaSpace(Space):
    """Where the effect of an adapter lives: independent of how its B and A are factored.

    Law: replacing (B, A) by (B·G, G⁻¹·A) changes nothing.
    """

    name: ClassVar[str] = "delta"

    def frame(self, deltas: Sequence[Delta]) -> Frame:
        """The same for every module."""
        return DeltaFrame()
