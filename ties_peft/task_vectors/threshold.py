"""Threshold: the k-th largest of many magnitudes, exactly, without holding or sorting them.

1. a sample gives a bracket [low, high] that holds it almost surely;
2. one pass over all entries counts those above the bracket and keeps those inside it, or, where they
   are many, counts how often each value occurs: a float32 is one of few in so narrow a bracket, so
   that memory does not grow with the entries. If the counts show that the threshold is not inside,
   the bracket is widened and the pass made again;
3. the threshold is a rank among those inside, and so exact.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

SORTED_SIZE = 1 << 18  # of so few entries all are kept: nothing to sample
MAX_VALUES = 1 << 19  # values that are kept; of more the counts are
STEPS = 1 << 19  # values told apart in one pass
SIGMAS = 3.5  # of the sample's quantile, on either side: the bracket misses once in thousands
INFINITY = int(np.float32(np.inf).view(np.int32))


@dataclass
class BracketCounts:
    """What a pass over some entries found.

    Attributes:
        above: how many exceed the bracket.
        values: those inside, by place and there by tile, if they are few; else
        steps: how many are inside, by steps of their bits.
    """

    above: int = 0
    values: dict[Hashable, list[np.ndarray]] = field(default_factory=dict)
    steps: np.ndarray | None = None


def add_counts(parts: Sequence[BracketCounts]) -> BracketCounts:
    """What passes over several sets of entries found together."""
    first, *others = parts
    steps = first.steps
    for other in others:
        steps = None if steps is None or other.steps is None else steps + other.steps
    values = {place: some for part in parts for place, some in part.values.items()}
    return BracketCounts(sum(part.above for part in parts), values, steps)


@dataclass
class ThresholdSearch:
    """The search for the magnitude that exactly `keep` of some entries reach, short of equals.

    Attributes:
        entries, keep: how many there are and how many to keep, 0 < keep < entries.
        sample: magnitudes of some of them, and how many entries each of those stands for.
        widening: by how much the bracket is wider than a first one.
        expected: how many are likely inside the bracket.
        low, high: the bracket, as the bits of its ends: those of positive float32 rise with the value.
        counted: what a pass found.
        threshold: the magnitude of the smallest entry kept, once it is found.
        equal, equal_kept: how many equal it, and how many of those are to be kept.
    """

    entries: int
    keep: int
    sample: Sequence[tuple[np.ndarray, float]] = ()
    widening: float = 1.0
    expected: float = 0.0
    low: int = 0
    high: int = INFINITY
    counted: BracketCounts = field(default_factory=lambda: BracketCounts())
    threshold: float | None = None
    equal: int = 0
    equal_kept: int = 0

    @property
    def bracket(self) -> tuple[np.float32, np.float32]:
        """The bracket as magnitudes."""
        low, high = np.array([self.low, self.high], np.int32).view(np.float32)
        return low, high

    @property
    def needed(self) -> bool:
        """Whether there is anything to search: neither all entries are kept nor none."""
        return 0 < self.keep < self.entries

    @property
    def shift(self) -> int:
        """How coarsely values are told apart."""
        return max(0, (self.high - self.low).bit_length() - STEPS.bit_length() + 1)

    def start_pass(self, kept: bool = False) -> None:
        """Forget what was counted, before a pass; with `kept` it will bring no more values than there is room for."""
        few = kept or self.expected <= MAX_VALUES
        self.counted = BracketCounts(
            0, {}, None if few else np.zeros(((self.high - self.low) >> self.shift) + 1, np.uint32)
        )

    def add(self, above: int, inside: Sequence[np.ndarray], place: Hashable) -> None:
        """Count what a pass found in one place, tile by tile."""
        found = self.counted
        found.above += above
        if found.steps is None:
            found.values[place] = list(inside)
        else:
            steps = (np.concatenate(inside).view(np.int32) - np.int32(self.low)) >> self.shift
            found.steps += np.bincount(steps, minlength=len(found.steps)).astype(np.uint32)

    def equals(self, place: Hashable) -> list[int] | None:
        """How many entries of a place equal the threshold, in each tile; None where their values were not kept."""
        tiles = self.counted.values.get(place)
        at = np.float32(self.threshold or 0.0)
        return None if tiles is None else [int(np.count_nonzero(values == at)) for values in tiles]

    def set_from_sorted(self, ranked: np.ndarray) -> None:
        """Settle the threshold from all magnitudes, the smallest first."""
        smallest = ranked[self.entries - self.keep]
        first, last = np.searchsorted(ranked, smallest), np.searchsorted(ranked, smallest, "right")
        self.threshold, self.equal = float(smallest), int(last - first)
        self.equal_kept = self.keep - int(self.entries - last)

    def finish_pass(self) -> None:
        """Settle the threshold, or the next bracket.

        Raises: OverflowError where some entries have no place in an order.
        """
        missing = self.keep - self.counted.above  # so many of those inside are kept, the largest first
        steps = self.counted.steps
        kept = [some for tiles in self.counted.values.values() for some in tiles]
        inside = np.concatenate([np.empty(0, np.float32), *kept])
        found = len(inside) if steps is None else int(steps.sum())
        if not 0 < missing <= found:
            self._widen()
        elif steps is None:
            self.threshold = float(np.partition(inside, found - missing)[found - missing])
            self.equal = int(np.count_nonzero(inside == self.threshold))
            self.equal_kept = missing - int(np.count_nonzero(inside > self.threshold))
        else:
            larger = np.cumsum(steps[::-1], dtype=np.int64)[::-1]  # in a step or above it
            step = int(np.count_nonzero(larger >= missing)) - 1
            self.equal = int(steps[step])
            self.equal_kept = missing - int(larger[step] - self.equal)
            first, shift = self.low + (step << self.shift), self.shift
            self.low, self.high, self.expected = first, min(self.high, first + (1 << shift) - 1), self.equal
            self.threshold = None if shift else float(self.bracket[0])

    def _widen(self) -> None:
        if (self.low, self.high) == (0, INFINITY):  # all were counted, so some have no place in an order
            raise OverflowError
        self.widening *= 4
        self.set_bracket()

    def set_bracket(self) -> None:
        """Take the magnitudes between which the threshold lies, most likely."""
        self.low, self.high, self.expected = 0, INFINITY, self.entries
        if self.entries <= SORTED_SIZE:
            return
        share = self.keep / self.entries
        total = sum(len(values) * each for values, each in self.sample)
        draws = total**2 / sum(len(values) * each**2 for values, each in self.sample)  # of equal weight
        spread = SIGMAS * self.widening * math.sqrt(share * (1 - share) / draws)
        low, high = (self._sample_quantiles if len(self.sample) == 1 else self._weighted_quantiles)(
            share + spread, share - spread
        )
        self.low = int(np.float32(low).view(np.int32))
        if share - spread > 0:
            self.high = int(np.float32(high).view(np.int32))
        self.expected = min(1.0, 2 * spread) * self.entries

    def _sample_quantiles(self, more: float, fewer: float) -> tuple[float, float]:
        """The magnitudes that two shares of a sample of equal weights reach, 0 for all of it; without sorting it."""
        values = self.sample[0][0]
        last = len(values) - 1
        low, high = (min(max(0, last + 1 - math.ceil((last + 1) * share)), last) for share in (more, fewer))
        upper = np.partition(values, low)[low:]
        return upper[0] if low else 0.0, np.partition(upper, high - low)[high - low]

    def _weighted_quantiles(self, more: float, fewer: float) -> tuple[float, float]:
        """The same of unequal weights."""
        values = np.concatenate([values for values, _ in self.sample])
        weights = np.concatenate([np.full(len(values), weight) for values, weight in self.sample])
        order, last = values.argsort()[::-1], len(values) - 1
        bottom, top = np.searchsorted(np.cumsum(weights[order]) / weights.sum(), (more, fewer))
        return values[order[bottom]] if bottom < last else 0.0, values[order[min(top, last)]]


def kth_largest(values: Tensor, k: int) -> float:
    """Return the k-th largest of values that are all in memory, exactly.

    >>> import torch
    >>> kth_largest(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2)
    2.0
    """
    flat = values.detach().reshape(-1).cpu().numpy()
    return float(np.partition(flat, len(flat) - k)[len(flat) - k])
