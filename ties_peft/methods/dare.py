"""DARE: drop and rescale."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from ..task_vectors.delta import Delta
from ..task_vectors.sparsify import drop_
from .base import Density, Method, TaskVectors, masked


class Dare(Method):
    """Drop entries at random, rescale the others, then add.

        xᵢ = mᵢ ∘ wᵢ·τᵢ / density,  mᵢ ~ Bernoulli(density) for each entry
        τ  = λ·Σ xᵢ

    Before another method (dare+ties), that method gets the xᵢ. The random number of an entry is a function of the seed, the
    module, the adapter and the entry: an adapter has the same mask whatever it is merged with.

    Law: at density 1 it is `task_arithmetic` of the same scale, and so is its expectation over seeds.
    Source: Yu, Yu, Yu, Huang and Li, Language Models are Super Mario: Absorbing Abilities from Homologous
        Models as a Free Lunch, ICML 2024 (arXiv 2311.03099), whose drop rate is 1 − density. The authors'
        code and PEFT's `dare_linear_svd` divide by the density, as here; mergekit's `dare_linear`
        rescales each tensor to the Σ|x| that it had. PEFT's plain `dare_linear` is space `factors`.
    """

    name = "dare"
    default_scale = 0.4
    spaces = ("delta", "core", "knots", "factors")
    source = "Yu et al., ICML 2024, arXiv 2311.03099"
    entrywise = True

    density: Density = Field(0.5, description="probability that an entry is kept, in (0, 1]")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Drop at random, and add."""
        return task_vectors.drop(self.density).sum()

    def prepare(self, deltas: Sequence[Delta], streams: Sequence[int]) -> Sequence[Delta]:
        """Return the xᵢ, dropped when they are read."""
        if self.density == 1:
            return deltas
        pairs = zip(deltas, streams, strict=True)
        return [masked(d, lambda values, numbers: drop_(values, numbers, self.density), key) for d, key in pairs]

    def linear(self, adapters: int) -> bool:
        """Return whether nothing is dropped."""
        return self.density == 1
