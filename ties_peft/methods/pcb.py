"""PCB-Merging: parameter competition balancing."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..elect import NOTHING
from ..sparsify import add_up, threshold
from ..trim import kept_count
from .base import Density, Method, TaskVectors


class Pcb(Method):
    """A mean of the task vectors in which entries compete: within their adapter and with the other adapters.

        xᵢ = wᵢ·τᵢ,  aᵢ = |xᵢ|, the largest and smallest `clamp` share brought to the next
        sᵢ = exp(N·minmax(aᵢ)²) · tanh(xᵢ·Σⱼ xⱼ)                       (intra- and inter-balancing)
        cᵢ = minmax(max(sᵢ, the ⌊density·n⌋-th largest of sᵢ))           (drop and rescale)
        τ  = λ · Σ cᵢ·sign(xᵢ)·aᵢ / Σ cᵢ·|wᵢ|

    n counts one module, N all adapters; minmax maps a module's values of one adapter to 0 … 1. The
    smallest score that is kept gets the coefficient 0, unless it is also the largest: then 1.

    Law: the order of the adapters does not matter; with unit weights and λ 1 an entry of the result lies
        within the range of the adapters' own and 0; of one adapter it is the adapter's own or 0 (but for
        the levelling). Weights (2, 1) and (10, 5) mean nearly the same: the tanh bends.
    Source: Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024 (arXiv 2410.02396), in
        the form of the authors' pcb-merging.py, which takes n and minmax over the whole adapter. Their
        scripts differ among themselves: they level 0.0001 or 0.01, keep 0.05 or 0.1, and take the xⱼ in the
        tanh as they are, as here, or normalised; λ is 1.2.
    """

    name: ClassVar[str] = "pcb"
    default_scale: ClassVar[float] = 1.2
    source: ClassVar[str] = "Du et al., NeurIPS 2024, arXiv 2410.02396"

    density: Density = Field(0.1, description="share of each adapter's entries, those of highest score, that count")
    clamp: float = Field(0.0001, ge=0, lt=0.5, description="share of the largest and smallest magnitudes levelled")

    def merge(self, tasks: TaskVectors) -> Tensor:
        """Two passes: the sum, then scores and mean."""
        total = add_up(task.vector for task in tasks)
        mean, divisor = torch.zeros_like(total), torch.zeros_like(total)
        for task in tasks:
            levelled = self._level(task.vector.abs())
            score = _ramp(levelled, float(levelled.min())).square_()
            score.sub_(1).mul_(tasks.adapters).exp_()  # exp(N·…) but for the factor eᴺ, which cancels
            score.mul_((task.vector * total).tanh_())
            share = _ramp(score, threshold(score, max(1, kept_count(task.density or self.density, score.numel()))))
            divisor.add_(share, alpha=abs(task.weight))
            mean.add_(share.mul_(levelled).mul_(task.vector.sign_()))
        return mean.div_(divisor.clamp_min_(NOTHING))

    def _level(self, magnitudes: Tensor) -> Tensor:
        """The extreme magnitudes brought to the least extreme of them."""
        count = kept_count(self.clamp, magnitudes.numel())
        if count == 0:
            return magnitudes
        low, high = (threshold(magnitudes, place) for place in (magnitudes.numel() + 1 - count, count))
        return magnitudes.clamp_(low, high)


def _ramp(values: Tensor, floor: float) -> Tensor:
    """0 up to the floor and from there in proportion up to 1 at the largest; if that is the floor, 1 where it is reached.

    Nothing is reached where no value is positive, as where all are 0.
    """
    high = float(values.max())
    if high > floor:
        return (values - floor).div_(high - floor).clamp_min_(0)
    return (values >= max(high, NOTHING)).to(values.dtype)
