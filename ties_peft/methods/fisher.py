"""Fisher merging."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Fisher(Method):
    """Average the task vectors, each entry weighted by the Fisher information of its adapter.

        τ = Σ Fᵢ·(wᵢ·τᵢ) / Σ |wᵢ|·Fᵢ,   F = E_x E_{y ~ p(y|x)} (∂ log p(y|x) / ∂τ)²

    F, the diagonal of the Fisher information, says how strongly the adapter's predictions depend on an entry of the task
    vector itself: of Δ for LoRA, of l for (IA)³. With `normalize_fisher`, Fᵢ is divided by its norm over all modules of the
    adapter, so that an adapter with a larger F throughout counts no more. Where ΣF = 0 the entry is the weighted mean. An
    adapter without a module does not count there. It needs the statistics `fisher` beside every adapter
    (`ties-peft statistics`).

    Law: with equal F and positive weights it is the average; one adapter with a positive weight comes back unchanged;
        the order of the adapters does not matter; a factor common to all F changes nothing, nor, with
        `normalize_fisher`, does a factor of one of them.
    Source: Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022 (arXiv 2111.09832),
        applied to task vectors. Their code divides each model's F by its norm over the whole model, as do MergeLM's
        function and FusionBench by default, and raises F to at least 1e-6. Here F has no minimum, and the division is off
        by default: on validation rows of the sample adapters it lost 0.4 ± 0.4 points (LoRA) and 2.1 ± 0.6 ((IA)³). The
        Fisher information of A and B would depend on how an adapter is factored, and merging A and B separately adds
        cross terms; that of Δ avoids both, and is as large as Δ.
    """

    name = "fisher"
    spaces = ("delta",)
    source = "Matena and Raffel, NeurIPS 2022, arXiv 2111.09832"
    entrywise = True
    needs = "fisher"

    normalize_fisher: bool = Field(False, description="divide each adapter's F by its norm over all its modules")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Accumulate both sums, and the weighted mean, in one pass."""
        norms = [one.norm() if self.normalize_fisher else 1.0 for one in task_vectors.statistics]
        return task_vectors.by_tiles(lambda tile: self._merge_rows(tile, norms))

    def _merge_rows(self, task_vectors: TaskVectors, norms: Sequence[float]) -> Tensor:
        numerator, denominator, total = task_vectors.scratch("fisher", (3, *task_vectors.shape)).zero_()
        each = zip(task_vectors.stream(), task_vectors.weights, task_vectors.statistics, norms, strict=True)
        for values, weight, statistic, norm in each:
            F = statistic.rows(*task_vectors.span).to(task_vectors.device) / (norm or 1.0)
            numerator.addcmul_(F, values)
            denominator.add_(F, alpha=abs(weight))
            total.add_(values)
        merged: Tensor = torch.where(
            denominator > 0, numerator / denominator, total / sum(map(abs, task_vectors.weights))
        )
        return merged
