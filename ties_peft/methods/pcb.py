"""PCB-Merging: parameter competition balancing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta
from ..task_vectors.elect import MIN_DIVISOR
from ..task_vectors.trim import Scope, count_at_least, kept_count
from .base import Density, Method, Ranking, TaskVectors


class Pcb(Method):
    """A mean of the task vectors in which entries compete: within their adapter and with the other adapters.

        xᵢ = wᵢ·τᵢ,  aᵢ = |xᵢ|, of which the ⌊clamp·n⌋ smallest and the ⌈clamp·n⌉ largest are brought to the next
        sᵢ = exp(N·minmax(aᵢ)²) · tanh(xᵢ·Σⱼ xⱼ)                       (intra- and inter-balancing)
        cᵢ = minmax(max(sᵢ, the ⌈density·n⌉-th largest of sᵢ))           (drop and rescale)
        τ  = λ · Σ cᵢ·sign(xᵢ)·aᵢ / Σ cᵢ·|wᵢ|

    n counts the entries of one adapter and minmax maps its values to 0 … 1: over all its modules with scope
    `adapter`, over one module with scope `module`. N counts all adapters. A clamp above 0 levels at least the largest
    magnitude. The smallest score that is kept gets the coefficient 0, unless it is also the largest: then 1 (where the
    authors' code divides 0 by 0). clamp and density are taken as the decimals that were written.

    Law: the order of the adapters does not matter; with unit weights and λ 1 an entry of the result lies
        within the range of the adapters' own and 0; of one adapter it is the adapter's own or 0 (but for
        the levelling). Weights (2, 1) and (10, 5) mean nearly the same: the tanh bends.
    Source: Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024 (arXiv 2410.02396), in
        the form of the authors' pcb-merging.py, which this equals with unit weights and scope `adapter`. Their
        other scripts level 0.01; the two for vision keep 0.05 and take the tanh of values normalised by minmax.
        λ is 1.2 there.
    """

    name: ClassVar[str] = "pcb"
    default_scale: ClassVar[float] = 1.2
    source: ClassVar[str] = "Du et al., NeurIPS 2024, arXiv 2410.02396"
    entrywise: ClassVar[bool] = True

    density: Density = Field(0.1, description="share of each adapter's entries, those of highest score, that count")
    clamp: float = Field(0.0001, ge=0, lt=0.5, description="share of the largest and smallest magnitudes levelled")
    scope: Scope = Field("adapter", description="rank magnitudes and scores over the whole adapter or each module")

    def rankings(self) -> Sequence[Ranking]:
        """The magnitudes to level at, then the least score kept and the largest."""
        return (
            Ranking(lambda vectors: (values.abs_() for values in vectors.stream()), self._magnitude_ranks, self.scope),
            Ranking(lambda vectors: (score for _, score in _with_scores(vectors)), _score_ranks, self.scope),
        )

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Two passes over the rows at hand: the sum, then scores and mean."""
        return task_vectors.by_tiles(self._merge_rows)

    def _merge_rows(self, task_vectors: TaskVectors) -> Tensor:
        mean, divisor = task_vectors.room("mean", (2, *task_vectors.shape)).zero_()
        every = zip(_with_scores(task_vectors), task_vectors.weights, task_vectors.levels, strict=True)
        for (values, score), weight, levels in every:
            share = _minmax(score, *levels[2:])
            divisor.add_(share, alpha=abs(weight))
            mean.add_(share.mul_(_clamped(values, levels)).mul_(values.sign_()))
        merged: Tensor = mean.div_(divisor.clamp_min_(MIN_DIVISOR))
        return merged

    def _magnitude_ranks(self, entries: int, density: float) -> Sequence[int]:
        """The ranks of the magnitudes that the smallest and the largest are brought to."""
        return entries - kept_count(self.clamp, entries), min(entries, count_at_least(self.clamp, entries) + 1)


def _score_ranks(entries: int, density: float) -> Sequence[int]:
    """The ranks of the least score that is kept, and of the largest."""
    return count_at_least(density, entries), 1


def _with_scores(task_vectors: TaskVectors) -> Iterator[tuple[Tensor, Tensor]]:
    """Each task vector with the scores of its entries, but for the factor eᴺ, which cancels."""
    total = task_vectors.room("total", task_vectors.shape).zero_()
    for values in task_vectors.stream():
        total.add_(values)
    for values, levels in zip(task_vectors.stream(), task_vectors.levels, strict=True):
        score = _minmax(_clamped(values, levels), *levels[:2]).square_()
        score.sub_(1).mul_(task_vectors.adapters).exp_()
        yield values, score.mul_((values * total).tanh_())


def _clamped(values: Tensor, levels: Sequence[float]) -> Tensor:
    """The magnitudes, the extreme ones brought to the levels."""
    return values.abs().clamp_(*levels[:2])


def _minmax(values: Tensor, low: float, high: float) -> Tensor:
    """0 up to `low`, in proportion from there, 1 from `high` on; where `low` is not below it, 1 where `high` is reached.

    Nothing is reached where no value is positive, as where all are 0.
    """
    if high > low:
        return (values - low).div_(high - low).clamp_(0, 1)
    return (values >= max(high, MIN_DIVISOR)).to(values.dtype)
