"""Elect one sign per entry, and merge the values that agree with it.

`SignedSums` takes task vectors one at a time and holds a few sums, so that memory does not grow with their number. With
x the trimmed, weighted task vectors and w their weights:

    P = Σ max(x, 0)    Q = Σ min(x, 0)    p, q = Σ |w| over x > 0, over x < 0
    sign = + where P + Q ≥ 0 (mass) or #(x > 0) ≥ #(x < 0) (count), else −
    mean = P/p or Q/q     sum = P or Q     max = largest x or smallest x

The paper's ablations leave a step out. Without an election both signs are combined: mean = (P + Q)/(p + q), sum = P +
Q, max = the x of largest magnitude. "No disjoint mean" has two readings, both over all adapters: mean_elected = (P or
Q)/Σ|w|, as the paper words it, and mean_all = (P + Q)/Σ|w|, as the authors' code computes it, where the election does
not matter.

Source: Yadav et al., TIES-Merging (NeurIPS 2023), section 3, steps 2 and 3. A sum of exactly zero
goes to +, as in PEFT (the authors' code takes the majority sign of the whole vector). With weights, PEFT
elects before it weights and divides by the count; mergekit elects after, as here, and divides by Σw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Elect = Literal["mass", "count"]
ElectRule = Literal["mass", "count", "none"]  # `none` leaves the election out
Disjoint = Literal["mean", "sum", "max"]
DisjointRule = Literal["mean", "sum", "max", "mean_elected", "mean_all"]  # the last two divide by all adapters
MIN_DIVISOR = 1e-30  # for entries that no adapter keeps: their numerator is exactly 0


@dataclass(frozen=True)
class MergeRule:
    """Say how signs are elected and values combined.

    Attributes:
        elect: `mass` sums the values, `count` their signs; with `none` all values agree.
        disjoint: how agreeing values are combined: `mean`, `sum` or `max`; `mean_elected` and `mean_all` (of both signs)
            divide by what all adapters weigh, not only those that agree.
        normalize: whether a mean divides by Σ|w| of the adapters or by their number.
    """

    elect: ElectRule = "mass"
    disjoint: DisjointRule = "mean"
    normalize: bool = True

    @property
    def sums_both_signs(self) -> bool:
        """Whether the result is a weighted sum of all values, whatever their signs."""
        return self.disjoint == "mean_all" or (self.elect == "none" and self.disjoint in ("sum", "mean_elected"))


@dataclass(frozen=True)
class WeightTotals:
    """Hold the number and the weights of all adapters of a merge, also of those that lack the module.

    Attributes:
        adapters: N.
        weight: Σw.
        magnitude: Σ|w|.
    """

    adapters: int = 1
    weight: float = 1.0
    magnitude: float = 1.0

    @classmethod
    def of(cls, weights: Sequence[float]) -> WeightTotals:
        """Return the totals of the weights of all adapters."""
        return cls(len(weights), sum(weights), sum(map(abs, weights)))


class SignedSums:
    """Sum the positive and the negative values of task vectors, entry by entry, for an election and a disjoint merge.

    Args:
        memory: (5, …), for the sums and one buffer; … is the shape of every vector that is added.
        rule: how the values are combined.
        total: Σ|w| of all adapters, or their number.
    Law: beyond rounding, the result does not depend on the order of the additions.
    """

    def __init__(self, memory: Tensor, rule: MergeRule, total: float = 1.0) -> None:
        self.rule, self.total = rule, total
        self.positive, self.negative, self.plus, self.minus, self.buffer = memory.zero_()
        self.sums = torch.zeros_like(self.buffer) if rule.disjoint == "max" else None
        # Σ|w| of the values of each sign; None as long as every weight is ±1, since it equals the counts then
        self.weight_sums: tuple[Tensor, Tensor] | None = None

    def add(self, values: Tensor, weight: float = 1.0) -> None:
        """Add one weighted, trimmed task vector."""
        if self.sums is not None:
            torch.maximum(self.positive, values, out=self.positive)
            torch.minimum(self.negative, values, out=self.negative)
            self.sums += values
        if self.weight_sums is None and abs(weight) != 1 and self.rule.normalize and self.rule.disjoint == "mean":
            self.weight_sums = (self.plus.clone(), self.minus.clone())
        for side, (count, mass, compare) in enumerate(
            ((self.plus, self.positive, torch.gt), (self.minus, self.negative, torch.lt))
        ):
            compare(values, 0, out=self.buffer)  # as 0.0 and 1.0: torch is slow to convert bool to float
            count += self.buffer
            if self.sums is None:
                mass.addcmul_(values, self.buffer)
            if self.weight_sums is not None:
                self.weight_sums[side].add_(self.buffer, alpha=abs(weight))

    def elected(self, signs: Tensor | None = None) -> Tensor:
        """Return 1.0 where + is elected and 0.0 where −; where `signs` is given and not 0, its sign is taken."""
        if self.rule.elect == "count":
            lead = self.plus - self.minus
        else:
            lead = self.positive + self.negative if self.sums is None else self.sums
        if signs is not None:
            lead = torch.where(signs != 0, signs, lead)
        return torch.ge(lead, 0, out=self.buffer)

    def result(self, signs: Tensor | None = None) -> Tensor:
        """Return the disjoint merge of all that was added."""
        if self.rule.elect == "none" or self.rule.disjoint == "mean_all":
            plus = minus = torch.ones_like(self.positive)
        else:
            plus = self.elected(signs)
            minus = plus.neg().add_(1)
        return self._combine(plus, minus)

    def _combine(self, plus: Tensor, minus: Tensor) -> Tensor:
        """Return the merge of the positive values where `plus` is 1 and of the negative ones where `minus` is 1."""
        positive: Tensor = self.positive * plus
        negative: Tensor = self.negative * minus
        if self.rule.disjoint == "max":
            extremes: Tensor = torch.where(positive >= -negative, positive, negative)
            return extremes
        agreed: Tensor = positive.add_(negative)
        if self.rule.disjoint == "sum":
            return agreed
        if self.rule.disjoint != "mean":
            return agreed.div_(self.total)
        weight_plus, weight_minus = self.weight_sums or (self.plus, self.minus)
        divisor = weight_plus * plus + weight_minus * minus
        return agreed.div_(divisor.clamp_min_(MIN_DIVISOR))

    def conflicts(self) -> tuple[int, int]:
        """Return how many entries have kept values of both signs, and how many are kept by two adapters or more."""
        both = torch.sign(self.plus).mul_(self.minus.sign())
        several = (self.plus + self.minus).sub_(1).clamp_(0, 1)
        conflicting, shared = torch.stack([both.sum(), several.sum()]).tolist()  # a device is waited for once
        return int(conflicting), int(shared)
