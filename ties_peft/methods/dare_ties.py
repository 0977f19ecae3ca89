"""DARE, then TIES."""

from __future__ import annotations

from pydantic import Field

from ..task_vectors.delta import Delta
from ..task_vectors.elect import Disjoint, Elect
from .base import Density, Method, TaskVectors


class DareTies(Method):
    """Drop entries at random, rescale the others, elect one sign per entry, average those that agree.

        xᵢ = mᵢ ∘ wᵢ·τᵢ / density,  mᵢ ~ Bernoulli(density) for each entry
        γ  = sign(Σ xᵢ)
        τ  = Σ_{i: sign(xᵢ) = γ} xᵢ / Σ_{i: sign(xᵢ) = γ} |wᵢ|

    The random drop replaces the trim of TIES. The mean is over the entries that are kept, so that their rescaling remains
    in the result: τ grows as the density decreases, unlike that of TIES.

    Law: at density 1 it is `ties` at density 1; it is dare+ties with `ties.density` 1, bit for bit.
    Source: Yu et al., Super Mario, ICML 2024 (arXiv 2311.03099), with TIES as the merging method. The
        authors' code also trims what is left, which is dare+ties. PEFT's `dare_ties_svd` elects before the weights are
        applied and divides by the count; its `dare_ties` is space `factors`. mergekit's `dare_ties` sums
        (disjoint `sum` here) and rescales each tensor to its Σ|x| instead of by 1/density.
    """

    name = "dare_ties"
    spaces = ("delta", "core", "knots", "factors")
    source = "Yu et al., ICML 2024, arXiv 2311.03099"
    entrywise = True

    density: Density = Field(0.5, description="probability that an entry is kept, in (0, 1]")
    elect: Elect = Field("mass", description="sign of the sum of the values, or of the count of their signs")
    disjoint: Disjoint = Field("mean", description="how the agreeing entries are combined: mean, sum or max")
    normalize: bool = Field(True, description="divide the mean by the agreeing weights; false: by their number")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Drop at random, elect, merge."""
        kept = task_vectors.drop(self.density)
        return kept.disjoint_merge(kept.elect(self.elect), self.disjoint, self.normalize)

    def linear(self, adapters: int) -> bool:
        """Return whether there is one adapter, of which nothing is dropped."""
        return adapters == 1 and self.density == 1
