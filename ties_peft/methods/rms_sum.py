"""The sum of the task vectors at their root mean square norm."""

from __future__ import annotations

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class RmsSum(Method):
    """Add the task vectors and bring the sum to their root mean square norm, module by module.

        τ ∝ Σ wᵢ·τᵢ,   ‖τ‖² = Σ‖wᵢ·τᵢ‖²/N

    N counts all adapters: one that lacks the module contributes a τ of zeros. For orthogonal task vectors this is
    `task_arithmetic` with λ = 1/√N. Where they agree λ falls to 1/N, the average; where they cancel each other it rises,
    at most to 1.

    Law: N equal adapters come back unchanged; a common factor of all weights is a factor of the result; the order does
        not matter.
    Source: our own. λ = 1/√N is the scale of task arithmetic that was best for (IA)³ on validation rows; see
        docs/measurements.md.
    """

    name = "rms_sum"
    source = "our own"

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Return the sum, scaled."""
        gram = task_vectors.gram()
        mean, added = float(gram.trace()) / task_vectors.adapters, float(gram.sum())
        return task_vectors.sum((mean / max(mean, added)) ** 0.5 if mean else 1.0)

    def linear(self, adapters: int) -> bool:
        """Return true: the result is a weighted sum."""
        return True
