"""Model Stock: an average that trusts agreement."""

from __future__ import annotations

from typing import ClassVar

import torch

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class ModelStock(Method):
    """Average the task vectors, the shorter the less their directions agree, module by module.

        c = mean cosine between two of the task vectors
        t = N·c / (1 + (N − 1)·c), at least 0
        τ = t · Σ wᵢ·τᵢ / Σ |wᵢ|

    It was made for runs of one task that differ by noise, and t estimates how far the mean of so many is
    from their common centre. Adapters of different tasks are nearly orthogonal, so that t, and with it
    the result, is near zero: raise the scale, or use `average`. N counts the adapters whose task vector
    there is not zero; Σ |wᵢ| all.

    Law: adapters of one direction: the average; orthogonal ones: zero; one adapter comes back unchanged;
        weights (2, 1) and (10, 5) mean the same.
    Source: Jang, Yun and Han, Model Stock: All We Need Is Just a Few Fine-Tuned Models, ECCV 2024 (arXiv
        2403.19522), for two. For more, the paper has one angle and no way to it: here the mean cosine, as
        in mergekit (FusionBench takes the mean angle). Neither stops t at 0; below it, opposing adapters
        would be merged to the negative of their mean.
    """

    name: ClassVar[str] = "model_stock"
    source: ClassVar[str] = "Jang et al., ECCV 2024, arXiv 2403.19522"

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """One factor, from the Gram matrix."""
        gram = task_vectors.gram()
        gram = gram[gram.diagonal() > 0][:, gram.diagonal() > 0]
        count, units = len(gram), gram.diagonal().rsqrt()
        agreement = 1.0
        if count > 1:
            cosines = (gram * units * units.unsqueeze(1)).clamp(-1, 1)
            agreement = float(cosines.sum() - torch.trace(cosines)) / (count * (count - 1))
        share = count * max(agreement, 0.0) / (1 + max(count - 1, 0) * max(agreement, 0.0))
        return task_vectors.sum(share / task_vectors.total_magnitude)

    def linear(self, adapters: int) -> bool:
        """Always."""
        return True
