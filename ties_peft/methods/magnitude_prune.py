"""Magnitude pruning."""

from __future__ import annotations

from pydantic import Field

from ..task_vectors.delta import Delta
from ..task_vectors.trim import Scope
from .base import Density, Method, TaskVectors


class MagnitudePrune(Method):
    """Trim each task vector to its largest entries, then add: λ·Σ trim(wᵢ·τᵢ, density).

    It is TIES without the election: values of different signs cancel.

    Law: at density 1 it is `task_arithmetic` of the same scale; for one adapter it is the trimmed adapter, times λ.
    Source: PEFT's combination_type `magnitude_prune` (merge_utils.magnitude_prune): `magnitude_prune_svd`
        is this with scope `module` and scale 1; the plain one is space `factors`.
    """

    name = "magnitude_prune"
    default_scale = 0.4
    spaces = ("delta", "core", "knots", "factors")
    source = "PEFT's combination_type magnitude_prune"
    entrywise = True

    density: Density = Field(0.2, description="share of the entries that the trim keeps, in (0, 1]")
    scope: Scope = Field("adapter", description="rank magnitudes over the whole adapter or each module")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Trim each, and add."""
        return task_vectors.trim(self.density, self.scope).sum()

    def linear(self, adapters: int) -> bool:
        """Return whether nothing is trimmed."""
        return self.density == 1
