"""Subspace boosting: raise the small singular values of a merge."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta, Dense
from ..task_vectors.singular_values import spectrum
from .base import Method, TaskVectors


class Boosting(Method):
    """Raise the small singular values of a merged task vector to a common level.

        D = U·S·Vᵀ,   c = the first index with Σ_{j ≤ c} Sⱼ ≥ β·Σ Sⱼ
        τ = U · max(S, S_c) · Vᵀ

    It stands after another method (task_arithmetic+boosting, ties+boosting in space core); alone it changes the sum. Of K
    singular values the first is at least 1/K of their sum: with β below 1/K, as with the default on most LoRAs, all are
    raised to the largest; with β = 1 none is.

    The result is stronger than the sum, more so for more adapters. The published λ = 1 measured worse on sets of two,
    four and six sample adapters than the default λ = 0.7/√N, which was chosen on them (benchmarks/results/scales.json)
    and also holds after another method.

    Law: with λ = 1, β = 1 changes nothing and no singular value decreases; it commutes with scaling; for a given λ, an
        adapter of zeros equals an absent one.
    Source: Skorobogat, Roth, Georgescu and Akata, Subspace-Boosted Model Merging, 2025 (arXiv 2506.16506),
        with the default of its code (0.01; there a joint matrix of the attention has 0.1). As published, all
        min(out, in) singular values are raised; here only those above 0, since the singular vectors of the others are
        arbitrary for a LoRA.
    """

    name = "boosting"
    default_scale = "0.7/sqrt(N)"
    published_scale = 1.0
    source = "Skorobogat et al., 2025, arXiv 2506.16506"
    kinds = ("lora",)
    spaces = ("delta", "core")
    spectral = True

    beta: float = Field(0.01, ge=0, le=1, description="share of the sum of singular values that counts as strong")

    def has_flat_spectrum(self) -> bool:
        """Return whether all weak directions become equally strong: unless β = 1."""
        return self.beta < 1

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """Return the boosted sum."""
        return self._boosted(task_vectors.matrices().sum(0))

    def finish(self, merged: Delta, task_vectors: TaskVectors) -> Delta:
        """Return the boosted result of the methods before it."""
        return Dense(self._boosted(merged.dense()).float())

    def _boosted(self, matrix: Tensor) -> Tensor:
        found = spectrum(matrix)
        weaker = int((found.S.cumsum(0) < self.beta * found.S.sum()).sum())
        floor = found.S[min(weaker, len(found) - 1) :][:1]  # no direction, no floor
        return found.with_values(found.S.maximum(floor) if len(found) else found.S).dense()
