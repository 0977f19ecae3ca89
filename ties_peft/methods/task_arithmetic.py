"""Task arithmetic."""

from __future__ import annotations

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class TaskArithmetic(Method):
    """Add the task vectors, λ·Σ wᵢ·τᵢ, exact at rank Σrᵢ; a negative weight subtracts a task.

    Law: linear in every weight and in λ; λ = 1/N with unit weights is the average.
    Source: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023 (arXiv 2212.04089). The default
        λ = 0.4 is what the TIES paper uses without a validation set. PEFT's `svd` is this at rank
        max rᵢ and λ = 1, its `cat` at rank Σrᵢ; its `linear` is another function (cross terms Bᵢ·Aⱼ).
    """

    name = "task_arithmetic"
    default_scale = 0.4
    source = "Ilharco et al., ICLR 2023, arXiv 2212.04089"

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Return Σ w·τ; the scale λ is applied to the result of every method."""
        return task_vectors.sum()

    def linear(self, adapters: int) -> bool:
        """Return true: the result is a weighted sum."""
        return True
