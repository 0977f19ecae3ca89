"""Delta space: Δ = s·B·A itself, computed a tile at a time and never held whole for any adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor

from ..task_vectors.delta import Delta, LowRank, Span, inner
from ..task_vectors.factorise import OVERSAMPLE, SMALL_SIDE, Factors, Run, Sum, gram_is_cheaper, leading_rows, truncate
from .base import Encoding, Space

MAX_COLUMNS_OF_START = 512  # Σrᵢ beyond which an informed start costs more than the round that it saves


class DeltaEncoding(Encoding):
    """The entries of the task vectors, still in factors."""

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self.deltas = list(deltas)
        self.parts = [(delta,) for delta in self.deltas]
        self._start: Tensor | None = None

    def prepare_decode(self, rank: int) -> Callable[[], None] | None:
        """The informed start of a factorisation."""
        self._start = None
        guess = sum(delta.rank for delta in self.deltas) <= MAX_COLUMNS_OF_START
        return partial(self._find_start, rank) if guess and min(self.deltas[0].shape) > SMALL_SIDE else None

    def _find_start(self, rank: int) -> None:
        if self.span is not None:
            self._start = leading_rows(self.span, rank + OVERSAMPLE)

    def decode(self, merged: Sequence[Delta], rank: int | None, run: Run = map) -> Factors:
        """The merged vector is the task vector."""
        whole = merged[0]
        if rank is None:
            energy = inner(whole, whole)
            return Factors(whole, energy, energy)
        known, self._start = self._start, None  # what is prepared shall not hold it
        if known is None and not isinstance(whole, LowRank) and (work := self.prepare_decode(rank)) is not None:
            work()
            known, self._start = self._start, None
        return truncate(whole, rank, known, run, self._span_of(whole))

    def _span_of(self, whole: Delta) -> Span | None:
        """The span of what a sum adds up, where that is the task vectors as they are; it was made for the report."""
        if not isinstance(whole, Sum) or [*map(id, whole.deltas)] != [*map(id, self.deltas)]:
            return None
        return self.span if gram_is_cheaper(whole.rank, min(whole.shape)) else None


class DeltaSpace(Space):
    """Where the effect of an adapter lives: independent of how its B and A are factored.

    Law: replacing (B, A) by (B·G, G⁻¹·A) changes nothing.
    """

    name: ClassVar[str] = "delta"
    in_factors: ClassVar[bool] = False

    def encode(self, deltas: Sequence[Delta], rank: int | None = None) -> Encoding:
        """As they are."""
        return DeltaEncoding(deltas)
