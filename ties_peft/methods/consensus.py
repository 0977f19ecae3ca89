"""Consensus merging by TALL masks."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta
from ..task_vectors.sparsify import add_up
from .base import Method, TaskVectors


class Consensus(Method):
    """The sum of the task vectors where enough adapters need it, 0 elsewhere.

        τ_Σ = Σ wᵢ·τᵢ
        mᵢ  = 1 where |wᵢ·τᵢ| > threshold · |τ_Σ − wᵢ·τᵢ|   (the TALL mask: the entry serves adapter i)
        τ   = λ·τ_Σ where Σ mᵢ ≥ agree, else 0

    What no adapter needs (catastrophic) or only one does (selfish) is removed. An adapter that lacks
    the module needs nothing of it. With fewer adapters than `agree` all of them must agree.

    Law: with agree 0 it is `task_arithmetic` of the same scale; of one adapter too; of equal
        adapters and threshold < 1/(N − 1) as well.
    Source: Wang, Dimitriadis, Ortiz-Jiménez, Fleuret and Frossard, Localizing Task Information for Improved
        Model Merging and Compression, ICML 2024 (arXiv 2405.07813), consensus task arithmetic. The authors
        choose each adapter's threshold from 0.2 … 0.6 by validation; here one holds for all, by default
        the middle. Their code trims nothing and takes agree = 2, as here; the mask is built on the unscaled sum.
    """

    name: ClassVar[str] = "consensus"
    default_scale: ClassVar[float] = 0.4
    source: ClassVar[str] = "Wang et al., ICML 2024, arXiv 2405.07813"
    entrywise: ClassVar[bool] = True

    threshold: float = Field(0.4, ge=0, allow_inf_nan=False, description="λ of the TALL masks; a larger one keeps less")
    agree: int = Field(2, ge=0, description="how many adapters must need an entry for it to stay")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Two passes: the sum, then how many need it."""
        if self.linear(task_vectors.adapters):
            return task_vectors.sum()
        return task_vectors.by_tiles(self._merge_rows)

    def _merge_rows(self, task_vectors: TaskVectors) -> Tensor:
        total = add_up(task_vectors.stream())
        needed = torch.zeros_like(total)
        for values in task_vectors.stream():
            rest = (total - values).abs_()
            needed += values.abs_() > rest.mul_(self.threshold)
        return total.masked_fill_(needed < min(self.agree, task_vectors.adapters), 0.0)

    def linear(self, adapters: int) -> bool:
        """True of one adapter, and where none is asked."""
        return adapters == 1 or self.agree == 0
