"""Fisher merging."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Fisher(Method):
    """The mean of the task vectors, entry by entry, each weighed by how sharply its adapter's predictions depend on it.

        τ = Σ Fᵢ·(wᵢ·τᵢ) / Σ |wᵢ|·Fᵢ,   F = E_x E_{y ~ p(y|x)} (∂ log p(y|x) / ∂τ)²

    F is the diagonal of the Fisher information, of the task vector itself: of Δ for LoRA, of l for (IA)³. With
    `normalize_fisher` Fᵢ is divided by its norm over all modules of the adapter, so that an adapter whose predictions
    are sharper throughout counts no more for it. An entry on which nobody's predictions depend, ΣF = 0, is the
    weighted mean. An adapter without a module has no part in it there. It needs the statistics `fisher` beside
    every adapter (`ties-peft statistics`).

    Law: equal F and positive weights: the average; one adapter with a positive weight comes back unchanged;
        the order of the adapters does not matter; a factor common to all F changes nothing, and with
        `normalize_fisher` nor does a factor on any of them.
    Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022 (arXiv 2111.09832),
        on task vectors. Their code divides each model's F by its norm over the whole model, as do MergeLM's function
        and FusionBench by default, and puts a floor of 1e-6 under F. Here there is no floor, and the division is
        left out by default: on the sample adapters it lost 0.4 ± 0.4 points (LoRA) and 2.1 ± 0.6 ((IA)³), judged by
        validation rows. The Fisher information of A and B would depend on how an adapter happens to be factored,
        and merging them apart brings cross terms; that of Δ does neither, and is as large as Δ.
    """

    name: ClassVar[str] = "fisher"
    spaces: ClassVar[tuple[str, ...]] = ("delta",)
    source: ClassVar[str] = "Matena and Raffel, NeurIPS 2022, arXiv 2111.09832"
    entrywise: ClassVar[bool] = True
    needs: ClassVar[str | None] = "fisher"

    normalize_fisher: bool = Field(False, description="divide each adapter's F by its norm over all its modules")

    def normalizes_statistics(self) -> bool:
        """As the parameter says."""
        return self.normalize_fisher

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """One pass, with accumulators for both sums and for the plain mean."""
        return task_vectors.by_tiles(self._merge_rows)

    def _merge_rows(self, task_vectors: TaskVectors) -> Tensor:
        above, below, plain = task_vectors.room("fisher", (3, *task_vectors.shape)).zero_()
        every = zip(task_vectors.stream(), task_vectors.weights, task_vectors.statistics, strict=True)
        for values, weight, statistic in every:
            F = statistic.rows(*task_vectors.span).to(task_vectors.device)
            above.addcmul_(F, values)
            below.add_(F, alpha=abs(weight))
            plain.add_(values)
        merged: Tensor = torch.where(below > 0, above / below, plain / sum(map(abs, task_vectors.weights)))
        return merged
