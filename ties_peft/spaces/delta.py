"""Delta space: Δ = s·B·A itself, computed a tile at a time and never held whole for any adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ..delta import Delta, LowRank, Span, inner
from ..factorise import OVERSAMPLE, Factors, Run, Sum, few, leading_rows, truncate
from .base import Encoding, Space

GUESSED = 512  # Σrᵢ beyond which an informed start costs more than the round that it saves


class DeltaEncoding(Encoding):
    """The entries of the task vectors, still in factors."""

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self.deltas = list(deltas)
        self.parts = [(delta,) for delta in self.deltas]
        self._start: tuple[int, Tensor] | None = None

    def begin(self, rank: int) -> None:
        """The informed start of a factorisation."""
        few_enough = sum(delta.rank for delta in self.deltas) <= GUESSED
        if few_enough and self.span is not None:
            self._start = rank, leading_rows(self.span, rank + OVERSAMPLE)

    def decode(self, merged: Sequence[Delta], rank: int | None, run: Run = map) -> Factors:
        """The merged vector is the task vector."""
        whole = merged[0]
        if rank is None:
            energy = inner(whole, whole)
            return Factors(whole, energy, energy)
        if not isinstance(whole, LowRank) and (self._start is None or self._start[0] != rank):
            self.begin(rank)
        start, self._start = self._start, None  # not to be held by what is prepared
        return truncate(whole, rank, start[1] if start else None, run, self._span_of(whole))

    def _span_of(self, whole: Delta) -> Span | None:
        """The span of what a sum adds up, where that is the task vectors as they are; it was made for the report."""
        if not isinstance(whole, Sum) or [*map(id, whole.deltas)] != [*map(id, self.deltas)]:
            return None
        return self.span if few(whole.rank, min(whole.shape)) else None


class DeltaSpace(Space):
    """Where the effect of an adapter lives: independent of how its B and A are factored.

    Law: replacing (B, A) by (B·G, G⁻¹·A) changes nothing.
    """

    name: ClassVar[str] = "delta"
    in_factors: ClassVar[bool] = False

    def encode(self, deltas: Sequence[Delta], rank: int | None = None) -> Encoding:
        """As they are."""
        return DeltaEncoding(deltas)
