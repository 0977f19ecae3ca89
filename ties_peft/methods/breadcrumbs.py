"""Model breadcrumbs."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..task_vectors.delta import Delta
from ..task_vectors.trim import Scope
from .base import Density, Method, TaskVectors, Trim


class Breadcrumbs(Method):
    """Drop the largest entries of each task vector and the smallest, then add.

        xᵢ = wᵢ·τᵢ where it is not among the ⌊γ·n⌋ largest magnitudes but among the ⌊density·n⌋ next, else 0
        τ  = λ·Σ xᵢ

    Where γ + density exceeds 1 fewer outliers are dropped, so that density keeps its meaning.

    Law: at γ = 0 it is `magnitude_prune`; at density 1 it is `task_arithmetic` of the same scale.
    Source: Davari and Belilovsky, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks,
        ECCV 2024 (arXiv 2312.06795), which masks layer by layer (scope `module`); the authors' code ranks
        within each row and counts the density after the outliers are gone, with λ 0.2, density 0.15 and
        γ 0.006 as a start. mergekit's `breadcrumbs` is this with scope `module` and scale 1.
    """

    name: ClassVar[str] = "breadcrumbs"
    default_scale: ClassVar[float] = 0.4
    source: ClassVar[str] = "Davari and Belilovsky, ECCV 2024, arXiv 2312.06795"
    entrywise: ClassVar[bool] = True

    density: Density = Field(0.2, description="share of entries that stay, in (0, 1]")
    gamma: float = Field(0.01, ge=0, lt=1, description="share of entries, the largest, that are dropped as outliers")
    scope: Scope = Field("adapter", description="rank magnitudes over the whole adapter or each module (the paper)")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Keep a band of each, and add."""
        return task_vectors.keep_band(self.gamma, self.density, self.scope).sum()

    def trims(self) -> Trim:
        """Two cuts, above and below what stays."""
        return Trim((self.gamma, self.density), self.scope)

    def linear(self, adapters: int) -> bool:
        """True if nothing is dropped."""
        return self.density == 1
