"""Elect: one sign per entry, and the disjoint merge of the entries that agree with it.

A `SignedSums` reads task vectors one at a time and keeps a handful of accumulators, so that its memory
does not grow with their number. With x the trimmed, weighted task vectors and w their weights:

    P = Σ max(x, 0)    Q = Σ min(x, 0)    p, q = Σ |w| over x > 0, over x < 0
    sign = + where P + Q ≥ 0 (mass) or #(x > 0) ≥ #(x < 0) (count), else −
    mean = P/p or Q/q     sum = P or Q     max = largest x or smallest x

The ablations of the paper leave a step out. Without an election both signs are combined: mean =
(P + Q)/(p + q), sum = P + Q, max = the x of largest magnitude. Its "no disjoint mean" has two
readings, both over all adapters: mean_elected = (P or Q)/Σ|w|, as the paper words it, and mean_all =
(P + Q)/Σ|w|, as the authors' code has it, where the election no longer matters.

Source: Yadav et al., TIES-Merging (NeurIPS 2023), section 3, steps 2 and 3. A sum of exactly zero
goes to +, as in PEFT (the authors' code asks the majority of the whole vector). With weights, PEFT
elects before it weighs and divides by the count; mergekit elects after, as here, and divides by Σw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Elect = Literal["mass", "count"]
Disjoint = Literal["mean", "sum", "max"]
ElectRule = Literal["mass", "count", "none"]  # an election, or none
DisjointRule = Literal[
    "mean", "sum", "max", "mean_elected", "mean_all"
]  # a disjoint merge, or a mean over all adapters
MIN_DIVISOR = 1e-30  # a divisor for entries that nobody kept: their numerator is exactly 0


@dataclass(frozen=True)
class MergeRule:
    """How kept entries are elected and combined; as in `SignedSums`."""

    elect: ElectRule = "mass"
    disjoint: DisjointRule = "mean"
    normalize: bool = True


class SignedSums:
    """The running count of an election over entries of one shape.

    Args:
        room: (5, …), memory for the accumulators and one buffer; … is the shape of every vector cast.
        elect: `mass` sums the values, `count` their signs; with `none` every value agrees.
        disjoint: how agreeing entries are combined: `mean`, `sum` or `max`; `mean_elected` and `mean_all`
            (of both signs) divide by `total` instead of what agrees.
        normalize: whether the mean divides by Σ|w| of the agreeing entries or by their number.
        total: Σ|w| of all adapters, or their number.
    Law: the result does not depend on the order of the additions beyond rounding, and equals that of
        `disjoint_merge` on the stack.
    """

    def __init__(
        self,
        room: Tensor,
        elect: ElectRule = "mass",
        disjoint: DisjointRule = "mean",
        normalize: bool = True,
        total: float = 1.0,
    ) -> None:
        self.elect, self.disjoint, self.normalize, self.total = elect, disjoint, normalize, total
        self.positive, self.negative, self.plus, self.minus, self.buffer = room.zero_()
        self.sums = torch.zeros_like(self.buffer) if disjoint == "max" else None
        self.weight_sums: tuple[Tensor, Tensor] | None = None  # Σ|w| a side, from the first weight that is not ±1

    def add(self, values: Tensor, weight: float = 1.0, below: float = 0.0) -> None:
        """Count one trimmed, weighted task vector; zeros do not vote.

        What does not exceed `below` in magnitude does not either, which saves a trim of its own; it must be 0 for `max`.
        """
        if self.sums is not None:
            torch.maximum(self.positive, values, out=self.positive)
            torch.minimum(self.negative, values, out=self.negative)
            self.sums += values
        if self.weight_sums is None and abs(weight) != 1 and self.normalize and self.disjoint == "mean":
            self.weight_sums = (self.plus.clone(), self.minus.clone())
        sides = ((self.plus, self.positive, torch.gt, below), (self.minus, self.negative, torch.lt, -below))
        for side, (count, mass, compare, than) in enumerate(sides):
            compare(values, than, out=self.buffer)  # as 0.0 and 1.0: torch is slow between bool and float
            count += self.buffer
            if self.sums is None:
                mass.addcmul_(values, self.buffer)
            if self.weight_sums is not None:
                self.weight_sums[side].add_(self.buffer, alpha=abs(weight))

    def elected(self, signs: Tensor | None = None) -> Tensor:
        """1.0 where + is elected and 0.0 where −; where `signs` is not 0 it decides."""
        if self.elect == "count":
            lead = self.plus - self.minus
        else:
            lead = self.positive + self.negative if self.sums is None else self.sums
        if signs is not None:
            lead = torch.where(signs != 0, signs, lead)
        return torch.ge(lead, 0, out=self.buffer)

    def result(self, signs: Tensor | None = None) -> Tensor:
        """The disjoint merge of all that was added, of the sums's shape."""
        if self.elect == "none" or self.disjoint == "mean_all":
            plus = minus = torch.ones_like(self.positive)
        else:
            plus = self.elected(signs)
            minus = plus.neg().add_(1)
        return self._combine(plus, minus)

    def _combine(self, plus: Tensor, minus: Tensor) -> Tensor:
        """The merge of the positive values where `plus` is 1 with the negative ones where `minus` is 1."""
        positive: Tensor = self.positive * plus
        negative: Tensor = self.negative * minus
        if self.disjoint == "max":
            extremes: Tensor = torch.where(positive >= -negative, positive, negative)
            return extremes
        agreed: Tensor = positive.add_(negative)
        if self.disjoint == "sum":
            return agreed
        if self.disjoint != "mean":
            return agreed.div_(self.total)
        weight_plus, weight_minus = self.weight_sums or (self.plus, self.minus)
        divisor = weight_plus * plus + weight_minus * minus
        return agreed.div_(divisor.clamp_min_(MIN_DIVISOR))

    def conflicts(self) -> tuple[int, int]:
        """(entries with both signs among the kept values, entries kept by two adapters or more)."""
        both = torch.sign(self.plus).mul_(self.minus.sign())
        several = (self.plus + self.minus).sub_(1).clamp_(0, 1)
        conflicting, shared = torch.stack([both.sum(), several.sum()]).tolist()  # a device is waited for once
        return int(conflicting), int(shared)


def elect(vectors: Tensor, by: Elect = "mass") -> Tensor:
    """The elected sign of every entry, +1 or −1.

    Args:
        vectors: (N, …), trimmed and weighted.
        by: `mass`, the sign of the sum; `count`, the sign of the sum of the signs. Zero goes to +.

    >>> elect(torch.tensor([[3.0, 1.0], [-1.0, -1.0], [-1.0, 0.0]]))
    tensor([1., 1.])
    """
    votes = vectors if by == "mass" else vectors.sign()
    return torch.where(votes.sum(0) >= 0, 1.0, -1.0)


def disjoint_merge(vectors: Tensor, signs: Tensor, by: Disjoint = "mean") -> Tensor:
    """DisjointRule, entry by entry, the values whose sign is the elected one; 0 where there is none.

    Args:
        vectors: (N, …), trimmed.
        signs: (…), +1 or −1.
        by: `mean` divides by how many agree; `sum`; `max` takes the largest magnitude.

    >>> disjoint_merge(torch.tensor([[3.0], [-1.0], [1.0]]), torch.tensor([1.0]))
    tensor([2.])
    """
    agreeing = torch.where(vectors.sign() == signs, vectors, torch.zeros_like(vectors))
    if by == "max":
        return agreeing.abs().amax(0) * signs
    total = agreeing.sum(0)
    return total if by == "sum" else total / (agreeing != 0).sum(0).clamp_min(1)
