"""The product of (IA)³ vectors."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..errors import MethodError
from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Product(Method):
    """The (IA)³ vectors applied one after another, ∏ lᵢ^wᵢ, as the task vector ∏ lᵢ^wᵢ − 1.

    A weight is a power: 2 applies an adapter twice, ½ half of it, −1 takes it back. An entry that is
    negative has no root and one that is 0 no inverse: a weight that asks for either is refused. Whole
    weights from 0 up take entries of either sign.

    Law: with unit weights the merged adapter does what all of them do in a row; one adapter with weight
        1 comes back unchanged; weights w and −w of one adapter cancel.
    Source: (IA)³ itself: Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
        In-Context Learning, NeurIPS 2022 (arXiv 2205.05638). PEFT applies several active adapters so, but
        its add_weighted_adapter is Σ wᵢ·lᵢ, which is not centred on 1.
    """

    name: ClassVar[str] = "product"
    spaces: ClassVar[tuple[str, ...]] = ("delta",)
    kinds: ClassVar[tuple[str, ...]] = ("ia3",)
    source: ClassVar[str] = "Liu et al., NeurIPS 2022, arXiv 2205.05638"
    entrywise: ClassVar[bool] = True

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """One pass, in float64: l is rebuilt from w·(l − 1)."""
        return task_vectors.by_tiles(self._merge_rows)

    def _merge_rows(self, task_vectors: TaskVectors) -> Tensor:
        product = torch.ones(task_vectors.shape, dtype=torch.float64, device=task_vectors.device)
        for place, (values, weight) in enumerate(zip(task_vectors.stream(), task_vectors.weights, strict=True)):
            power = (1 + values.double() / weight).pow_(weight)
            product *= power
            if not bool(product.float().isfinite().all()):
                raise MethodError(
                    f"method 'product': the weight {weight:g} of adapter {place + 1} of those that have a module asks for "
                    "a root of a negative entry of l, the inverse of 0, or a number out of range. Use whole weights "
                    "from 0 up, or another method."
                )
        return (product - 1).float()
