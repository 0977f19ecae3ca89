"""Find the k-th largest of many magnitudes exactly, without holding or sorting all of them.

1. A sample gives a bracket [low, high] that contains the k-th largest almost surely.
2. One pass over all entries counts those above the bracket and collects those inside it. Where those inside are many, a
   histogram of their bits is made instead, so that memory does not grow with the number of entries. If the counts show
   that the k-th largest is not inside, the bracket is widened and the pass is repeated.
3. The k-th largest has a known rank among those inside, and so it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

SORTED_SIZE = 1 << 18  # up to so many entries the bracket holds all of them, and nothing is sampled
MAX_VALUES = 1 << 19  # up to so many values inside are collected; of more a histogram is made
BINS = 1 << 19  # of a histogram
SIGMAS = 3.5  # half the width of the bracket, in standard errors of the sample's quantile: it misses once in thousands
INFINITY = int(np.float32(np.inf).view(np.int32))


@dataclass
class BracketCounts:
    """Hold the counts of a pass over some entries.

    Attributes:
        above: how many exceed the bracket.
        values: those inside, by part of a module and tile; empty if there is a histogram.
        histogram: of those inside, over their bits; None if they are collected.
    """

    above: int = 0
    values: dict[Hashable, list[np.ndarray]] = field(default_factory=dict)
    histogram: np.ndarray | None = None


def add_counts(parts: Sequence[BracketCounts]) -> BracketCounts:
    """Return the counts of several sets of entries together."""
    first, *others = parts
    histogram = first.histogram
    for other in others:
        histogram = None if histogram is None or other.histogram is None else histogram + other.histogram
    values = {place: some for part in parts for place, some in part.values.items()}
    return BracketCounts(sum(part.above for part in parts), values, histogram)


@dataclass
class ThresholdSearch:
    """Search for the smallest magnitude that is kept when the `keep` largest of some entries are.

    Attributes:
        entries, keep: how many entries there are, and how many of them are kept.
        sample: arrays of sampled magnitudes, each with the number of entries that one of its magnitudes represents.
        widening: the factor by which the bracket is wider than the first one.
        expected: how many entries are likely inside the bracket.
        low, high: the ends of the bracket, as bits of float32, which rise with the value where it is positive.
        counted: the counts of the last pass.
        threshold: the smallest magnitude that is kept, once it is found.
        equal, equal_kept: how many entries equal the threshold, and how many of those are kept.
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
        """How many of the lowest bits a histogram ignores."""
        return max(0, (self.high - self.low).bit_length() - BINS.bit_length() + 1)

    def start_pass(self) -> None:
        """Reset the counts before a pass."""
        few = self.expected <= MAX_VALUES
        self.counted = BracketCounts(
            0, {}, None if few else np.zeros(((self.high - self.low) >> self.shift) + 1, np.uint32)
        )

    def add(self, above: int, inside: Sequence[np.ndarray], place: Hashable) -> None:
        """Add what a pass found in one part of a module.

        Args:
            above: how many magnitudes exceed the bracket.
            inside: those inside, for each tile.
            place: the part.
        """
        found = self.counted
        found.above += above
        if found.histogram is None:
            found.values[place] = list(inside)
        else:
            bins = (np.concatenate(inside).view(np.int32) - np.int32(self.low)) >> self.shift
            found.histogram += np.bincount(bins, minlength=len(found.histogram)).astype(np.uint32)

    def equals(self, place: Hashable) -> list[int] | None:
        """Return how many entries of a part equal the threshold, in each tile; None if they were not collected."""
        tiles = self.counted.values.get(place)
        at = np.float32(self.threshold or 0.0)
        return None if tiles is None else [int(np.count_nonzero(values == at)) for values in tiles]

    def set_from_sorted(self, ranked: np.ndarray) -> None:
        """Set the threshold from all magnitudes, sorted from the smallest."""
        smallest = ranked[self.entries - self.keep]
        first, last = np.searchsorted(ranked, smallest), np.searchsorted(ranked, smallest, "right")
        self.threshold, self.equal = float(smallest), int(last - first)
        self.equal_kept = self.keep - int(self.entries - last)

    def finish_pass(self) -> None:
        """Set the threshold, or the bracket of the next pass, from the counts.

        Raises: OverflowError if some entries are NaN, which no order includes.
        """
        missing = self.keep - self.counted.above  # how many of those inside are kept, the largest first
        histogram = self.counted.histogram
        kept = [some for tiles in self.counted.values.values() for some in tiles]
        inside = np.concatenate([np.empty(0, np.float32), *kept])
        found = len(inside) if histogram is None else int(histogram.sum())
        if not 0 < missing <= found:
            self._widen()
        elif histogram is None:
            self.threshold = float(np.partition(inside, found - missing)[found - missing])
            self.equal = int(np.count_nonzero(inside == self.threshold))
            self.equal_kept = missing - int(np.count_nonzero(inside > self.threshold))
        else:
            larger = np.cumsum(histogram[::-1], dtype=np.int64)[::-1]  # in a bin or above it
            bin = int(np.count_nonzero(larger >= missing)) - 1
            self.equal = int(histogram[bin])
            self.equal_kept = missing - int(larger[bin] - self.equal)
            first, shift = self.low + (bin << self.shift), self.shift
            self.low, self.high, self.expected = first, min(self.high, first + (1 << shift) - 1), self.equal
            self.threshold = None if shift else float(self.bracket[0])

    def _widen(self) -> None:
        if (self.low, self.high) == (0, INFINITY):  # all were counted, so some are NaN
            raise OverflowError
        self.widening *= 4
        self.set_bracket()

    def set_bracket(self) -> None:
        """Set the bracket that contains the threshold almost surely, from the sample."""
        self.low, self.high, self.expected = 0, INFINITY, self.entries
        if self.entries <= SORTED_SIZE:
            return
        share = self.keep / self.entries
        total = sum(len(values) * each for values, each in self.sample)
        draws = total**2 / sum(
            len(values) * each**2 for values, each in self.sample
        )  # as many draws of equal weight are as exact
        spread = SIGMAS * self.widening * math.sqrt(share * (1 - share) / draws)
        low, high = (self._sample_quantiles if len(self.sample) == 1 else self._weighted_quantiles)(
            share + spread, share - spread
        )
        self.low = int(np.float32(low).view(np.int32))
        if share - spread > 0:
            self.high = int(np.float32(high).view(np.int32))
        self.expected = min(1.0, 2 * spread) * self.entries

    def _sample_quantiles(self, more: float, fewer: float) -> tuple[float, float]:
        """Return the magnitudes that two shares of a sample exceed, 0 for all of it, without sorting."""
        values = self.sample[0][0]
        last = len(values) - 1
        low, high = (min(max(0, last + 1 - math.ceil((last + 1) * share)), last) for share in (more, fewer))
        upper = np.partition(values, low)[low:]
        return upper[0] if low else 0.0, np.partition(upper, high - low)[high - low]

    def _weighted_quantiles(self, more: float, fewer: float) -> tuple[float, float]:
        """Return the same for samples that represent different numbers of entries."""
        values = np.concatenate([values for values, _ in self.sample])
        weights = np.concatenate([np.full(len(values), weight) for values, weight in self.sample])
        order, last = values.argsort()[::-1], len(values) - 1
        bottom, top = np.searchsorted(np.cumsum(weights[order]) / weights.sum(), (more, fewer))
        return values[order[bottom]] if bottom < last else 0.0, values[order[min(top, last)]]


def kth_largest(values: Tensor, k: int) -> float:
    """Return the k-th largest of values that are all in memory.

    >>> import torch
    >>> kth_largest(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2)
    2.0
    """
    flat = values.detach().reshape(-1).cpu().numpy()
    return float(np.partition(flat, len(flat) - k)[len(flat) - k])
