"""Subspace boosting: the weak directions of a merge lifted."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta, Dense
from ..task_vectors.singular_values import spectrum
from .base import Method, TaskVectors


class Boosting(Method):
    """Lift the weak directions of a merged task vector to the level where the strong ones end.

        D = U·S·Vᵀ,   c = the first index with Σ_{j ≤ c} Sⱼ ≥ β·Σ Sⱼ
        τ = U · max(S, S_c) · Vᵀ

    It stands after another method (task_arithmetic+boosting, ties+boosting in space core); alone it works
    on the sum. A merge of K directions has at least 1/K of the total in its first one: with β under 1/K,
    and so with the default on most LoRAs, all are lifted to the largest; β = 1 lifts none.

    Lifting makes a result stronger, the more so the more adapters: λ = 1 is as published, and does harm on sets of two,
    four and six sample adapters. The default λ = 0.7/√N was chosen on these (benchmarks/results/scales.json); it
    holds after another method too.

    Law: with λ = 1, β = 1 changes nothing and no singular value shrinks; it commutes with scaling; for a given λ, an
        adapter of zeros equals an absent one.
    Source: Skorobogat, Roth, Georgescu and Akata, Subspace-Boosted Model Merging, 2025 (arXiv 2506.16506),
        with the default of its code (0.01; it gives attention in one matrix its own, 0.1). Published, all
        min(out, in) directions are lifted; here those of the support, since of a LoRA the others are
        arbitrary.
    """

    name: ClassVar[str] = "boosting"
    default_scale: ClassVar[float | str] = "0.7/sqrt(N)"
    published_scale: ClassVar[float | None] = 1.0
    source: ClassVar[str] = "Skorobogat et al., 2025, arXiv 2506.16506"
    kinds: ClassVar[tuple[str, ...]] = ("lora",)
    spaces: ClassVar[tuple[str, ...]] = ("delta", "core")
    spectral: ClassVar[bool] = True

    beta: float = Field(0.01, ge=0, le=1, description="share of the sum of singular values that counts as strong")

    def has_flat_spectrum(self) -> bool:
        """Whether the result has one: unless β = 1, all weak directions are equally strong."""
        return self.beta < 1

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """The sum, boosted."""
        return self._boosted(task_vectors.matrices().sum(0))

    def finish(self, merged: Delta, task_vectors: TaskVectors) -> Delta:
        """What another method made, boosted."""
        return Dense(self._boosted(merged.dense()).float())

    def _boosted(self, matrix: Tensor) -> Tensor:
        found = spectrum(matrix)
        weaker = int((found.S.cumsum(0) < self.beta * found.S.sum()).sum())
        floor = found.S[min(weaker, len(found) - 1) :][:1]  # no direction, no floor
        return found.with_values(found.S.maximum(floor) if len(found) else found.S).dense()
