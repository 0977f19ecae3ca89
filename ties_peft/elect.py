"""Elect: one sign per entry, and the disjoint merge of the entries that agree with it.

A `Ballot` reads task vectors one at a time and keeps a handful of accumulators, so that its memory
does not grow with their number. With x the trimmed, weighted task vectors and w their weights:

    P = Σ max(x, 0)    Q = Σ min(x, 0)    p, q = Σ |w| over x > 0, over x < 0
    sign = + where P + Q ≥ 0 (mass) or #(x > 0) ≥ #(x < 0) (count), else −
    mean = P/p or Q/q     sum = P or Q     max = largest x or smallest x

Source: Yadav et al., TIES-Merging (NeurIPS 2023), section 3, steps 2 and 3. A sum of exactly zero
goes to +, as in PEFT (the authors' code asks the majority of the whole vector). With weights, PEFT
elects before it weighs and divides by the count; mergekit elects after, as here, and divides by Σw.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Elect = Literal["mass", "count"]
Disjoint = Literal["mean", "sum", "max"]
NOTHING = 1e-30  # a divisor for entries that nobody kept: their numerator is exactly 0


class Ballot:
    """The running count of an election over entries of one shape.

    Args:
        room: (5, …), memory for the accumulators and one buffer; … is the shape of every vector cast.
        elect: `mass` sums the values, `count` their signs.
        disjoint: how agreeing entries are combined: `mean`, `sum` or `max`.
        normalize: whether the mean divides by Σ|w| of the agreeing entries or by their number.
    Law: the result does not depend on the order of the casts beyond rounding, and equals that of
        `disjoint_merge` on the stack.
    """

    def __init__(
        self,
        room: Tensor,
        elect: Elect = "mass",
        disjoint: Disjoint = "mean",
        normalize: bool = True,
    ) -> None:
        self.elect, self.disjoint, self.normalize = elect, disjoint, normalize
        self.positive, self.negative, self.plus, self.minus, self.buffer = room.zero_()
        self.sums = torch.zeros_like(self.buffer) if disjoint == "max" else None
        self.heft: tuple[Tensor, Tensor] | None = None  # Σ|w| a side, from the first weight that is not ±1

    def cast(self, values: Tensor, weight: float = 1.0) -> None:
        """Count one trimmed, weighted task vector; zeros do not vote."""
        if self.sums is not None:
            torch.maximum(self.positive, values, out=self.positive)
            torch.minimum(self.negative, values, out=self.negative)
            self.sums += values
        else:
            self.positive += torch.clamp_min(values, 0, out=self.buffer)
            self.negative += torch.clamp_max(values, 0, out=self.buffer)
        if self.heft is None and abs(weight) != 1 and self.normalize and self.disjoint == "mean":
            self.heft = (self.plus.clone(), self.minus.clone())
        for side, (count, compare) in enumerate(((self.plus, torch.gt), (self.minus, torch.lt))):
            compare(values, 0, out=self.buffer)
            count += self.buffer
            if self.heft is not None:
                self.heft[side].add_(self.buffer, alpha=abs(weight))

    def elected(self, signs: Tensor | None = None) -> Tensor:
        """1.0 where + is elected and 0.0 where −; where `signs` is not 0 it decides."""
        if self.elect == "count":
            lead = self.plus - self.minus
        else:
            lead = self.positive + self.negative if self.sums is None else self.sums
        if signs is not None:
            lead = torch.where(signs != 0, signs, lead)
        return torch.ge(lead, 0).to(torch.float32)

    def result(self, signs: Tensor | None = None) -> Tensor:
        """The disjoint merge of all that was cast, of the ballot's shape."""
        plus = self.elected(signs)
        agreed: Tensor = self.positive * plus + self.negative * (1 - plus)
        if self.disjoint != "mean":
            return agreed
        heft_plus, heft_minus = self.heft or (self.plus, self.minus)
        divisor = heft_plus * plus + heft_minus * (1 - plus)
        return agreed.div_(divisor.clamp_min_(NOTHING))

    def conflicts(self) -> tuple[int, int]:
        """(entries with both signs among the kept values, entries kept by two adapters or more)."""
        both = (self.plus > 0) & (self.minus > 0)
        return int(both.sum()), int((self.plus + self.minus >= 2).sum())


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
    """Combine, entry by entry, the values whose sign is the elected one; 0 where there is none.

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
