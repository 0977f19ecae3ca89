"""SCE: select, calculate, erase."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta
from ..task_vectors.elect import MIN_DIVISOR
from ..task_vectors.trim import find_cut, kept_count
from .base import Density, Method, TaskVectors


class Sce(Method):
    """Average the entries that vary most and agree in sign, each task vector weighted by its energy.

        xᵢ = wᵢ·τᵢ for the share `select_topk` of the entries, those of largest variance over the adapters, else 0  (select)
        ηᵢ = Σ xᵢ² over the module / Σⱼ Σ xⱼ²                                               (calculate)
        γ  = sign(Σ xᵢ)                                                                     (erase)
        τ  = Σ_{i: sign(xᵢ) = γ} ηᵢ·xᵢ / Σ_{i: sign(xᵢ) = γ} ηᵢ·|wᵢ|

    The share is of the entries with a variance above 0; if there are none, as with one adapter, all are kept.

    Law: one adapter of positive weight comes back unchanged, and so do equal ones; with `select_topk` 1
        adapters of equal energy give `ties` at density 1; an adapter of zeros equals an absent one.
    Source: Wan, Zhong, Yang, Chen and Quan, FuseChat: Knowledge Fusion of Chat Models, EMNLP 2025 (arXiv
        2408.07990). mergekit's `sce` is this with unit weights, where the selection decides what is merged; in the
        authors' code it only decides the ηᵢ. mergekit also makes all ηᵢ of a tensor equal if the mean squares of the
        xᵢ sum to less than 1e-6, as is common with adapters; here the energies always count, and a common factor of
        the task vectors changes nothing. The authors' recipes use `select_topk` 0.1 and 1; the default here is
        mergekit's, 1.
    """

    name = "sce"
    source = "Wan et al., EMNLP 2025, arXiv 2408.07990"

    select_topk: Density = Field(1.0, description="share of the varying entries that is kept, by variance")

    def merge(self, task_vectors: TaskVectors) -> Tensor | Delta:
        """Sum, select by variance, then average; at most three passes."""
        if self.linear(task_vectors.adapters):
            return task_vectors.sum(1 / abs(task_vectors.weights[0]))
        total = task_vectors.dense_sum()
        selected = self._selected(task_vectors, total / task_vectors.adapters) if self.select_topk < 1 else None
        energy = max(map(_energy, task_vectors.stream())) or 1.0
        mean, divisor = torch.zeros_like(total), torch.zeros_like(total)
        for values, weight in zip(task_vectors.stream(), task_vectors.weights, strict=True):
            if selected is not None:
                values.mul_(selected)
            share = _energy(values) / energy  # ηᵢ up to a factor that cancels
            agrees = torch.where(total >= 0, values > 0, values < 0)
            divisor.add_(agrees, alpha=share * abs(weight))
            mean.add_(values.mul_(agrees), alpha=share)
        return mean.div_(divisor.clamp_min_(MIN_DIVISOR))

    def linear(self, adapters: int) -> bool:
        """Return whether there is one adapter."""
        return adapters == 1

    def _selected(self, task_vectors: TaskVectors, mean: Tensor) -> Tensor | None:
        """Return where the variance is largest; adapters without the module count as zero."""
        variance = mean.square() * (task_vectors.adapters - len(task_vectors))
        for values in task_vectors.stream():
            variance += values.sub_(mean).square_()
        varying = int(variance.count_nonzero())
        if varying == 0:
            return None
        cut = find_cut(variance, kept_count(self.select_topk, varying), [task_vectors.span])
        return cut.apply_(variance) > 0


def _energy(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
