"""DELLA: drop by the rank of magnitude, then elect."""

from __future__ import annotations

from pydantic import Field

from ..task_vectors.delta import Delta
from ..task_vectors.elect import Disjoint, Elect
from .base import Density, Method, TaskVectors


class Della(Method):
    """Drop entries at random, small ones more often, rescale the others, elect a sign, average those that agree.

        pᵢ = density − ε … density + ε, in equal steps by the rank of |τᵢ| within its row
        xᵢ = mᵢ ∘ wᵢ·τᵢ / pᵢ,  mᵢ ~ Bernoulli(pᵢ) for each entry
        γ  = sign(Σ xᵢ)
        τ  = Σ_{i: sign(xᵢ) = γ} xᵢ / Σ_{i: sign(xᵢ) = γ} |wᵢ|

    If density ± ε is not within [0, 1], ε is reduced until it is: at density 1 every entry is kept. An (IA)³ vector is
    one row.

    Law: at ε = 0 it is `dare_ties` of the same density; at density 1 it is `ties` at density 1.
    Source: Deep, Bhardwaj and Poria, DELLA-Merging: Reducing Interference in Model Merging through
        Magnitude-Based Sampling, 2024 (arXiv 2406.11617). As in the paper and the authors' code, each
        entry is divided by its own probability, so that its expectation is unchanged; mergekit's `della` instead
        rescales each tensor to the Σ|x| that it had, and needs density ± ε within (0, 1). ε is
        half the authors' window size (0.14 in their example, with drop rate 0.3: the defaults here) and
        is mergekit's `epsilon` (0.15 there). Weights as in `ties`.
    """

    name = "della"
    source = "Deep et al., 2024, arXiv 2406.11617"
    entrywise = True

    density: Density = Field(0.7, description="mean probability that an entry is kept, in (0, 1]")
    epsilon: float = Field(0.07, ge=0, le=0.5, description="largest distance of the probability from the density")
    elect: Elect = Field("mass", description="sign of the sum of the values, or of the count of their signs")
    disjoint: Disjoint = Field("mean", description="how the agreeing entries are combined: mean, sum or max")
    normalize: bool = Field(True, description="divide the mean by the agreeing weights; false: by their number")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Drop by rank of magnitude, elect, merge."""
        kept = task_vectors.drop_by_rank(self.density, self.epsilon)
        return kept.disjoint_merge(kept.elect(self.elect), self.disjoint, self.normalize)

    def linear(self, adapters: int) -> bool:
        """Return whether there is one adapter, of which nothing is dropped."""
        return adapters == 1 and self.density == 1
