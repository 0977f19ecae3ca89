"""The weighted mean."""

from __future__ import annotations

from collections.abc import Sequence

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Average(Method):
    """Compute the weighted mean of the task vectors, Σ wᵢ·τᵢ / Σ wᵢ, exact at rank Σrᵢ.

    An adapter without a module counts there as zero, with its weight in Σ wᵢ. PEFT's `linear` instead multiplies averaged
    factors, whose cross terms Bᵢ·Aⱼ belong to no adapter.

    When to use: as a baseline; for adapters of the same task. For different tasks the result gets weaker as 1/N.

    Law: weights (w, …, w) give the plain mean; one adapter comes back unchanged.
    Source: Wortsman et al., Model Soups, ICML 2022 (arXiv 2203.05482), on task vectors.
    """

    name = "average"
    source = "Wortsman et al., ICML 2022, arXiv 2203.05482"

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Return Σ w·τ / Σ w, over all adapters of the merge."""
        return task_vectors.sum(1 / task_vectors.total_weight)

    def linear(self, adapters: int) -> bool:
        """Return true: the result is a weighted sum."""
        return True

    def check(self, weights: Sequence[float], space: str) -> str | None:
        """Refuse weights that sum to 0."""
        cancels = abs(sum(weights)) <= 1e-9 * sum(map(abs, weights))
        return "the weights sum to 0, which an average divides by" if cancels else None
