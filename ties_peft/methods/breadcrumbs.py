"""Model breadcrumbs."""

from __future__ import annotations

from pydantic import Field

from ..task_vectors.delta import Delta
from ..task_vectors.trim import Scope
from .base import Density, Method, TaskVectors, Trim


class Breadcrumbs(Method):
    """Drop the largest and the smallest entries of each task vector, then add.

        xᵢ = wᵢ·τᵢ for the ⌊density·n⌋ largest magnitudes after the ⌊γ·n⌋ largest, else 0
        τ  = λ·Σ xᵢ

    If γ + density exceeds 1, fewer of the largest are dropped, so that the density is kept.

    Law: at γ = 0 it is `magnitude_prune`; at density 1 it is `task_arithmetic` of the same scale.
    Source: Davari and Belilovsky, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks,
        ECCV 2024 (arXiv 2312.06795), which masks layer by layer (scope `module`). The authors' code ranks within
        each row and counts the density among what is left after the largest are dropped; it starts from λ 0.2, density
        0.15 and γ 0.006. mergekit's `breadcrumbs` is this with scope `module` and scale 1.
    """

    name = "breadcrumbs"
    default_scale = 0.4
    source = "Davari and Belilovsky, ECCV 2024, arXiv 2312.06795"
    entrywise = True

    density: Density = Field(0.2, description="share of the entries that is kept, in (0, 1]")
    gamma: float = Field(0.01, ge=0, lt=1, description="share of the entries, the largest, that is dropped")
    scope: Scope = Field("adapter", description="rank magnitudes over the whole adapter or each module (the paper)")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Keep a band of magnitudes of each, and add."""
        return task_vectors.keep_band(self.gamma, self.density, self.scope).sum()

    def trims(self) -> Trim:
        """Return the band that is kept."""
        return Trim((self.gamma, self.density), self.scope)

    def linear(self, adapters: int) -> bool:
        """Return whether nothing is dropped."""
        return self.density == 1
