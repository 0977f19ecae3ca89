"""PCB-Merging: parameter competition balancing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta
from ..task_vectors.elect import MIN_DIVISOR
from ..task_vectors.trim import Scope, count_at_least, kept_count
from .base import Density, Method, OrderStatistics, TaskVectors


class Pcb(Method):
    """Average the task vectors, each entry weighted by a score within its adapter and against the other adapters.

        xᵢ = wᵢ·τᵢ,  aᵢ = |xᵢ|, of which the ⌊clamp·n⌋ smallest and the ⌈clamp·n⌉ largest are clamped to the next one
        sᵢ = exp(N·minmax(aᵢ)²) · tanh(xᵢ·Σⱼ xⱼ)                       (intra- and inter-balancing)
        cᵢ = minmax(max(sᵢ, the ⌈density·n⌉-th largest of sᵢ))           (drop and rescale)
        τ  = λ · Σ cᵢ·sign(xᵢ)·aᵢ / Σ cᵢ·|wᵢ|

    n counts the entries of one adapter, and minmax maps its values to [0, 1]: over all its modules with scope `adapter`,
    over one module with scope `module`. N counts all adapters. A clamp above 0 changes at least the largest magnitude. The
    smallest score that is kept has coefficient 0, unless it is also the largest: then 1 (the authors' code divides 0 by
    0). clamp and density are read as the decimals that were written.

    Law: the order of the adapters does not matter; with unit weights and λ = 1 an entry of the result lies between the
        smallest and the largest of 0 and the adapters' entries; for one adapter it is the adapter's clamped entry or 0.
        Weights (2, 1) and (10, 5) do not mean quite the same, because of the tanh.
    Source: Du et al., Parameter Competition Balancing for Model Merging, NeurIPS 2024 (arXiv 2410.02396), in
        the form of the authors' pcb-merging.py, to which it is equal with unit weights and scope `adapter`. Their other
        scripts clamp 0.01; the two for vision keep 0.05 and apply the tanh to values normalised by minmax. λ is 1.2
        there.
    """

    name = "pcb"
    default_scale = 1.2
    source = "Du et al., NeurIPS 2024, arXiv 2410.02396"
    entrywise = True

    density: Density = Field(0.1, description="share of each adapter's entries, those of largest score, that counts")
    clamp: float = Field(0.0001, ge=0, lt=0.5, description="share of magnitudes clamped at either end")
    scope: Scope = Field("adapter", description="rank magnitudes and scores over the whole adapter or each module")

    def order_statistics(self) -> Sequence[OrderStatistics]:
        """Return the magnitudes to clamp to, then the smallest score that is kept and the largest."""
        return (
            OrderStatistics(
                lambda vectors: (values.abs_() for values in vectors.stream()), self._magnitude_ranks, self.scope
            ),
            OrderStatistics(lambda vectors: (score for _, score in _with_scores(vectors)), _score_ranks, self.scope),
        )

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Sum in a first pass, compute scores and mean in a second."""
        return task_vectors.by_tiles(self._merge_rows)

    def _merge_rows(self, task_vectors: TaskVectors) -> Tensor:
        mean, divisor = task_vectors.scratch("mean", (2, *task_vectors.shape)).zero_()
        triples = zip(_with_scores(task_vectors), task_vectors.weights, task_vectors.order_statistics, strict=True)
        for (values, score), weight, statistics in triples:
            share = _minmax(score, *statistics[2:])
            divisor.add_(share, alpha=abs(weight))
            mean.add_(share.mul_(_clamped(values, statistics)).mul_(values.sign_()))
        merged: Tensor = mean.div_(divisor.clamp_min_(MIN_DIVISOR))
        return merged

    def _magnitude_ranks(self, entries: int, density: float) -> Sequence[int]:
        """Return the ranks of the magnitudes that the smallest and the largest are clamped to."""
        return entries - kept_count(self.clamp, entries), min(entries, count_at_least(self.clamp, entries) + 1)


def _score_ranks(entries: int, density: float) -> Sequence[int]:
    """Return the ranks of the smallest score that is kept, and of the largest."""
    return count_at_least(density, entries), 1


def _with_scores(task_vectors: TaskVectors) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each task vector with the scores of its entries, without the factor eᴺ, which cancels."""
    total = task_vectors.scratch("total", task_vectors.shape).zero_()
    for values in task_vectors.stream():
        total.add_(values)
    for values, statistics in zip(task_vectors.stream(), task_vectors.order_statistics, strict=True):
        score = _minmax(_clamped(values, statistics), *statistics[:2]).square_()
        score.sub_(1).mul_(task_vectors.adapters).exp_()
        yield values, score.mul_((values * total).tanh_())


def _clamped(values: Tensor, statistics: Sequence[float]) -> Tensor:
    """Return the magnitudes, clamped to the first two order statistics."""
    return values.abs().clamp_(*statistics[:2])


def _minmax(values: Tensor, low: float, high: float) -> Tensor:
    """Map [low, high] linearly to [0, 1], smaller values to 0, larger ones to 1.

    If low = high, values of at least `high` become 1, unless `high` is 0.
    """
    if high > low:
        return (values - low).div_(high - low).clamp_(0, 1)
    return (values >= max(high, MIN_DIVISOR)).to(values.dtype)
