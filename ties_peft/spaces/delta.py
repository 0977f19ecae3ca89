"""Merge in delta space: the entries of Δ = s·B·A, computed a tile at a time and never held whole for an adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from ..task_vectors.delta import Delta, LowRank, Span, inner
from ..task_vectors.factorise import OVERSAMPLE, SMALL_SIDE, Factors, Run, Sum, gram_is_cheaper, leading_rows, truncate
from .base import Encoding, Space

MAX_COLUMNS_OF_START = 512  # Σrᵢ above which an informed start costs more than the round of iteration that it saves


class DeltaEncoding(Encoding):
    """Hold the task vectors as they are, in factors."""

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self.deltas = list(deltas)
        self.parts = [(delta,) for delta in self.deltas]
        self._start: Tensor | None = None

    def prepare_decode(self, rank: int) -> Callable[[], None] | None:
        """Return the work that finds the informed start of the factorisation.

        It saves products with the large matrix: on a TIES merge of eight adapters of rank 16, 2048 × 2048, three are needed
        in place of nine, and the result keeps 3 % more energy.
        """
        self._start = None
        guess = sum(delta.rank for delta in self.deltas) <= MAX_COLUMNS_OF_START
        return partial(self._find_start, rank) if guess and min(self.deltas[0].shape) > SMALL_SIDE else None

    def _find_start(self, rank: int) -> None:
        if self.span is not None:
            self._start = leading_rows(self.span, rank + OVERSAMPLE)

    def decode(self, merged: Sequence[Delta], rank: int | None, run: Run = map) -> Factors:
        """Return the merged task vector, truncated to the rank."""
        whole = merged[0]
        if rank is None:
            energy = inner(whole, whole)
            return Factors(whole, energy, energy)
        known, self._start = self._start, None  # a prepared merge must not hold it
        if known is None and not isinstance(whole, LowRank) and (work := self.prepare_decode(rank)) is not None:
            work()
            known, self._start = self._start, None
        return truncate(whole, rank, known, run, self._span_of(whole))

    def _span_of(self, whole: Delta) -> Span | None:
        """Return the span of the terms of a sum, if these are the task vectors, whose span the report needs anyway."""
        if not isinstance(whole, Sum) or [*map(id, whole.deltas)] != [*map(id, self.deltas)]:
            return None
        return self.span if gram_is_cheaper(whole.rank, min(whole.shape)) else None


class DeltaSpace(Space):
    """Merge the entries of the deltas, which do not depend on how B and A are factored.

    Law: replacing (B, A) by (B·G, G⁻¹·A) changes nothing.
    """

    name = "delta"
    in_factors = False

    def encode(self, deltas: Sequence[Delta], rank: int | None = None) -> Encoding:
        """Return the task vectors as they are."""
        return DeltaEncoding(deltas)
