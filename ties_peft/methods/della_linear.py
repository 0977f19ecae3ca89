"""DELLA without the election."""

from __future__ import annotations

from pydantic import Field

from ..task_vectors.delta import Delta
from .base import Density, Method, TaskVectors


class DellaLinear(Method):
    """Drop entries at random, small ones more often, rescale the others, then add.

        pᵢ = density − ε … density + ε, in equal steps by the rank of |τᵢ| within its row
        xᵢ = mᵢ ∘ wᵢ·τᵢ / pᵢ,  mᵢ ~ Bernoulli(pᵢ) for each entry
        τ  = λ·Σ xᵢ

    If density ± ε is not within [0, 1], ε is reduced until it is. An (IA)³ vector is one row.

    Law: at ε = 0 it is `dare` of the same density; at density 1 it is `task_arithmetic` of the same
        scale, and so is its expectation over seeds if no pᵢ is 0.
    Source: Deep, Bhardwaj and Poria, DELLA-Merging, 2024 (arXiv 2406.11617), the MagPrune step alone, as
        mergekit's `della_linear`, which rescales each tensor to its Σ|x| instead of each entry by 1/pᵢ.
        ε is half the authors' window size and is mergekit's `epsilon`.
    """

    name = "della_linear"
    default_scale = 0.4
    source = "Deep et al., 2024, arXiv 2406.11617"
    entrywise = True

    density: Density = Field(0.7, description="mean probability that an entry is kept, in (0, 1]")
    epsilon: float = Field(0.07, ge=0, le=0.5, description="largest distance of the probability from the density")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Drop by rank of magnitude, and add."""
        return task_vectors.drop_by_rank(self.density, self.epsilon).sum()

    def linear(self, adapters: int) -> bool:
        """Return whether nothing is dropped."""
        return self.density == 1
