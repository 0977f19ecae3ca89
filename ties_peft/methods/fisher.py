"""Fisher merging."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .base import Method, TaskVectors


class Fisher(Method):
    """The mean of the task vectors, entry by entry, each weighed by how sharply its adapter's predictions depend on it.

        τ = Σ Fᵢ·(wᵢ·τᵢ) / Σ |wᵢ|·Fᵢ,   F = E_x E_{y ~ p(y|x)} (∂ log p(y|x) / ∂τ)²

    F is the diagonal of the Fisher information, of the task vector itself: of Δ for LoRA, of l for (IA)³. An
    entry on which nobody's predictions depend, ΣF = 0, is the weighted mean. An adapter without a module has
    no part in it there. It needs the statistics `fisher` beside every adapter (`ties-peft statistics`).

    Law: equal F and positive weights: the average; one adapter with a positive weight comes back unchanged;
        the order of the adapters does not matter; a factor common to all F changes nothing.
    Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022 (arXiv 2111.09832),
        on task vectors. The Fisher information of A and B would depend on how an adapter happens to be
        factored, and merging them apart brings cross terms; that of Δ does neither, and is as large as Δ.
    """

    name: ClassVar[str] = "fisher"
    spaces: ClassVar[tuple[str, ...]] = ("delta",)
    source: ClassVar[str] = "Matena and Raffel, NeurIPS 2022, arXiv 2111.09832"
    entrywise: ClassVar[bool] = True
    needs: ClassVar[str | None] = "fisher"

    def merge(self, tasks: TaskVectors) -> Tensor:
        """One pass, with accumulators for both sums and for the plain mean."""
        above, below, plain = tasks.room("fisher", (3, *tasks.shape)).zero_()
        for task, statistic in zip(tasks, tasks.statistics, strict=True):
            F = statistic.rows(*tasks.span).to(tasks.device)
            above.addcmul_(F, task.vector)
            below.add_(F, alpha=abs(task.weight))
            plain.add_(task.vector)
        merged: Tensor = torch.where(below > 0, above / below, plain / sum(map(abs, tasks.weights)))
        return merged
