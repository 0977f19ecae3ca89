"""The product of (IA)³ vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MethodError
from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Product(Method):
    """Multiply the (IA)³ vectors, ∏ lᵢ^wᵢ, as if they were applied one after another; the task vector is ∏ lᵢ^wᵢ − 1.

    A weight is an exponent: 2 applies an adapter twice, ½ takes the root of it, −1 reverts it. A negative entry has no
    root, and 0 has no inverse: a weight that needs one is refused. Whole weights from 0 up accept entries of either sign.

    Law: with unit weights the merged adapter computes what all of them compute in sequence; one adapter with weight
        1 comes back unchanged; weights w and −w of one adapter cancel.
    Source: (IA)³ itself: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
        In-Context Learning, NeurIPS 2022 (arXiv 2205.05638). PEFT applies several active adapters in this way, but
        its add_weighted_adapter is Σ wᵢ·lᵢ, which is not centred on 1.
    """

    name = "product"
    spaces = ("delta",)
    kinds = ("ia3",)
    source = "Liu et al., NeurIPS 2022, arXiv 2205.05638"
    entrywise = True

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Compute l from w·(l − 1), and multiply in float64."""
        return task_vectors.by_tiles(self._merge_rows)

    def _merge_rows(self, task_vectors: TaskVectors) -> Tensor:
        product = torch.ones(task_vectors.shape, dtype=torch.float64, device=task_vectors.device)
        for place, (values, weight) in enumerate(zip(task_vectors.stream(), task_vectors.weights, strict=True)):
            power = (1 + values.double() / weight).pow_(weight)
            product *= power
            if not bool(product.float().isfinite().all()):
                raise MethodError(
                    f"method 'product': the weight {weight:g} of adapter {place + 1} of those that have a module needs "
                    "the root of a negative entry of l, the inverse of 0, or a number out of range. Use whole weights "
                    "from 0 up, or another method."
                )
        return (product - 1).float()
