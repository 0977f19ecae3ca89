"""Model Stock: an average scaled by the agreement of the adapters."""

from __future__ import annotations

import torch

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class ModelStock(Method):
    """Average the task vectors, scaled by how much their directions agree, for each module.

        c = mean cosine between two of the task vectors
        t = N·c / (1 + (N − 1)·c), at least 0
        τ = t · Σ wᵢ·τᵢ / Σ |wᵢ|

    When to use: for runs of one task that differ by noise, where t estimates the distance of their mean from their common
    centre. Adapters of different tasks are nearly orthogonal, so that t and the result are near 0: raise the scale, or
    use `average`. N counts the adapters whose task vector of the module is not zero; Σ |wᵢ| is over all.

    Law: adapters of one direction give the average, orthogonal ones zero; one adapter comes back unchanged;
        weights (2, 1) and (10, 5) mean the same.
    Source: Jang, Yun and Han, Model Stock: All We Need Is Just a Few Fine-Tuned Models, ECCV 2024 (arXiv
        2403.19522), for two adapters. For more, the paper uses one angle and does not say how it is
        found: here it is that of the mean cosine, as in mergekit (FusionBench uses the mean angle). Neither of them limits
        t to 0 or more; a negative t would merge opposing adapters to the negative of their mean.
    """

    name = "model_stock"
    source = "Jang et al., ECCV 2024, arXiv 2403.19522"

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Compute t from the Gram matrix."""
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
        """Return true: the result is a weighted sum."""
        return True
