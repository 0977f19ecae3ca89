"""Concatenation."""

from __future__ import annotations

from typing import ClassVar

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Cat(Method):
    """The weighted sum of the task vectors, Σ wᵢ·τᵢ, exact at rank Σrᵢ: all adapters at once, at full strength.

    For LoRA the factors stand side by side, so that the merged adapter does what all of them do when
    each is active with its weight. For (IA)³ the l − 1 add up; the vectors applied one after another
    are method `product`.

    Law: one adapter with weight 1 comes back unchanged; it is `task_arithmetic` with scale 1.
    Source: PEFT's combination_type `cat` (huggingface/peft pull request 817), which multiplies all of
        A by the weight and the lora scaling where this multiplies B: the same product.
    """

    name: ClassVar[str] = "cat"
    source: ClassVar[str] = "PEFT's combination_type cat, huggingface/peft #817"

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Σ wτ."""
        return task_vectors.sum()

    def linear(self, adapters: int) -> bool:
        """Always."""
        return True
