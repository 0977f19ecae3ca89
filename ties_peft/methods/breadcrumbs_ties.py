"""Model breadcrumbs, then TIES."""

from __future__ import annotations

from pydantic import Field

from ..task_vectors.delta import Delta
from ..task_vectors.elect import Disjoint, Elect
from ..task_vectors.trim import Scope
from .base import Density, Method, TaskVectors, Trim


class BreadcrumbsTies(Method):
    """Drop the largest and the smallest entries of each task vector, elect a sign, average those that agree.

        xᵢ = wᵢ·τᵢ for the ⌊density·n⌋ largest magnitudes after the ⌊γ·n⌋ largest, else 0
        γ' = sign(Σ xᵢ)
        τ  = Σ_{i: sign(xᵢ) = γ'} xᵢ / Σ_{i: sign(xᵢ) = γ'} |wᵢ|

    If γ + density exceeds 1, fewer of the largest are dropped, so that the density is kept.

    Law: at γ = 0 it is `ties`.
    Source: Davari and Belilovsky, Model Breadcrumbs, ECCV 2024 (arXiv 2312.06795), with the election of
        Yadav et al., TIES-Merging (arXiv 2306.01708). The combination is mergekit's, whose
        `breadcrumbs_ties` sums (disjoint `sum` here) and ranks each module alone (scope `module`).
    """

    name = "breadcrumbs_ties"
    source = "Davari and Belilovsky, ECCV 2024, arXiv 2312.06795; Yadav et al., arXiv 2306.01708"
    entrywise = True

    density: Density = Field(0.2, description="share of the entries that is kept, in (0, 1]")
    gamma: float = Field(0.01, ge=0, lt=1, description="share of the entries, the largest, that is dropped")
    scope: Scope = Field("adapter", description="rank magnitudes over the whole adapter or each module")
    elect: Elect = Field("mass", description="sign of the sum of the values, or of the count of their signs")
    disjoint: Disjoint = Field("mean", description="how the agreeing entries are combined: mean, sum or max")
    normalize: bool = Field(True, description="divide the mean by the agreeing weights; false: by their number")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Keep a band of magnitudes of each, elect, merge."""
        kept = task_vectors.keep_band(self.gamma, self.density, self.scope)
        return kept.disjoint_merge(kept.elect(self.elect), self.disjoint, self.normalize)

    def trims(self) -> Trim:
        """Return the band that is kept."""
        return Trim((self.gamma, self.density), self.scope)

    def linear(self, adapters: int) -> bool:
        """Return whether there is one adapter, of which nothing is dropped."""
        return adapters == 1 and self.density == 1
