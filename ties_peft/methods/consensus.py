"""Consensus merging by TALL masks."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Consensus(Method):
    """Sum the task vectors, and keep the entries that matter to enough adapters.

        τ_Σ = Σ wᵢ·τᵢ
        mᵢ  = 1 where |wᵢ·τᵢ| > threshold · |τ_Σ − wᵢ·τᵢ|   (the TALL mask: the entry matters to adapter i)
        τ   = λ·τ_Σ where Σ mᵢ ≥ agree, else 0

    Entries that matter to no adapter (the paper's catastrophic weights) or to one alone (selfish weights) become 0. The
    mask of an adapter without the module is 0. With fewer adapters than `agree`, all of them must agree.

    Law: with agree 0 it is `task_arithmetic` of the same scale, and so it is for one adapter, and for equal adapters at
        threshold < 1/(N − 1).
    Source: Wang, Dimitriadis, Ortiz-Jiménez, Fleuret and Frossard, Localizing Task Information for Improved
        Model Merging and Compression, ICML 2024 (arXiv 2405.07813), consensus task arithmetic. The authors
        choose a threshold from 0.2 … 0.6 for each adapter by validation; here one is used for all, by default the middle
        of that range. As in their code, nothing is trimmed, agree is 2, and the mask is built on the unscaled sum.
    """

    name = "consensus"
    default_scale = 0.4
    source = "Wang et al., ICML 2024, arXiv 2405.07813"
    entrywise = True

    threshold: float = Field(0.4, ge=0, allow_inf_nan=False, description="λ of the TALL masks; larger keeps less")
    agree: int = Field(2, ge=0, description="to how many adapters an entry must matter to be kept")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Sum in a first pass, count the masks in a second."""
        if self.linear(task_vectors.adapters):
            return task_vectors.sum()
        return task_vectors.by_tiles(self._merge_rows)

    def _merge_rows(self, task_vectors: TaskVectors) -> Tensor:
        total = task_vectors.dense_sum()
        votes = torch.zeros_like(total)
        for values in task_vectors.stream():
            rest = (total - values).abs_()
            votes += values.abs_() > rest.mul_(self.threshold)
        return total.masked_fill_(votes < min(self.agree, task_vectors.adapters), 0.0)

    def linear(self, adapters: int) -> bool:
        """Return whether every entry is kept: for one adapter, and with agree 0."""
        return adapters == 1 or self.agree == 0
