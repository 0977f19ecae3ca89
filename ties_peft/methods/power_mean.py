"""A power mean of (IA)³ vectors."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta
from ..task_vectors.elect import MIN_DIVISOR
from .base import Method, TaskVectors


class PowerMean(Method):
    """Average (IA)³ task vectors, larger entries weighted more.

        xᵢ = wᵢ·τᵢ
        τ  = λ · Σ xᵢ·|xᵢ|ᵖ / Σ |wᵢ|·|xᵢ|ᵖ

    p = 0 is the mean over the adapters that have the module; a large p approaches the entry of largest magnitude. An (IA)³
    adapter works by a few large entries, which a mean makes small. The default λ = 1.5 was chosen on eight tasks: it makes
    up for what a mean over many adapters loses. Use scale 1 for a single adapter, whose l − 1 it would stretch by half.

    Law: with scale 1 one adapter of positive weight comes back unchanged, and so do equal ones; for
        p > 0 an adapter of zeros equals an absent one; weights (2, 1) and (10, 5) mean the same.
    Source: our own, from a comparison of rules on eight classification tasks; we know of no paper. On the six
        sample adapters it is 3 points below task arithmetic with λ = 1/√N, and far more below it where the
        adapters' norms differ (benchmarks/results). For LoRA the same rule was worse than matrix methods, and is not
        offered.
    """

    name = "power_mean"
    default_scale = 1.5
    spaces = ("delta",)
    kinds = ("ia3",)
    source = "our own"
    entrywise = True

    p: float = Field(2.0, ge=0, le=64, description="power of its magnitude by which an entry is weighted")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Find the largest magnitude of each entry first, which keeps the powers in range, then the mean."""
        return task_vectors.by_tiles(self._merge_rows)

    def _merge_rows(self, task_vectors: TaskVectors) -> Tensor:
        largest = torch.full(task_vectors.shape, MIN_DIVISOR, device=task_vectors.device)
        for values in task_vectors.stream():
            torch.maximum(largest, values.abs(), out=largest)
        total, divisor = torch.zeros_like(largest), torch.zeros_like(largest)
        for values, weight in zip(task_vectors.stream(), task_vectors.weights, strict=True):
            share = (values.abs() / largest).pow_(self.p)
            divisor.add_(share, alpha=abs(weight))
            total += share.mul_(values)
        return total.div_(divisor.clamp_min_(MIN_DIVISOR))
