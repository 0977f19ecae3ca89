"""Concatenation."""

from __future__ import annotations

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Cat(Method):
    """Add the weighted task vectors, Σ wᵢ·τᵢ, exact at rank Σrᵢ.

    For LoRA the factors are concatenated: the merged adapter computes what all of them compute when each is active with
    its weight. For (IA)³ the l − 1 are added; method `product` applies the vectors one after another.

    Law: one adapter with weight 1 comes back unchanged; it is `task_arithmetic` with scale 1.
    Source: PEFT's combination_type `cat` (huggingface/peft pull request 817), which multiplies all of
        A by the weight and the lora scaling, where this multiplies B: the same product.
    """

    name = "cat"
    source = "PEFT's combination_type cat, huggingface/peft #817"

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Return Σ w·τ."""
        return task_vectors.sum()

    def linear(self, adapters: int) -> bool:
        """Return true: the result is a weighted sum."""
        return True
