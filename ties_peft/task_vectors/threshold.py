"""Find the k-th largest of many values exactly, without holding or sorting all of them.

1. A sample gives a bracket [low, high] that contains the k-th largest almost surely; without one, it contains all values.
2. One pass over all entries counts those above the bracket and collects those inside it. Where those inside are many, a
   histogram of their bits is made instead, so that memory does not grow with the number of entries; the bin that contains
   the k-th largest is the next bracket. If the counts show that the k-th largest is not inside, the bracket is widened.
   In both cases the pass is repeated.
3. The k-th largest has a known rank among those collected, and so it is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

SORTED_SIZE = 1 << 18  # up to so many entries the bracket contains all of them, and nothing is sampled
MAX_VALUES = 1 << 19  # up to so many values inside are collected; of more a histogram is made
BINS = 1 << 19  # of a histogram
SIGMAS = 3.5  # half the width of the bracket, in standard errors of the sample's quantile: it misses once in thousands
INFINITY = int(np.float32(np.inf).view(np.int32))
Counts = tuple[int, np.ndarray]  # how many values exceed a bracket, and those inside it, in any order


def kth_largest(values: np.ndarray, k: int) -> float:
    """Return the k-th largest of values that are all in memory.

    >>> kth_largest(np.array([1.0, 3.0, 2.0, 2.0]), 2)
    2.0
    """
    place = values.size - k
    return float(np.partition(values, place, axis=None)[place])


def count_in_bracket(values: Tensor, low: np.float32, high: np.float32) -> Counts:
    """Count the values above a bracket and return those inside it; on the CPU by NumPy, which is faster than torch."""
    if values.device.type == "cpu":
        flat = values.numpy().reshape(-1)
        above = flat > high
        return int(np.count_nonzero(above)), flat[(flat >= low) ^ above]
    larger = values > float(high)
    return int(larger.sum()), values[(values >= float(low)) ^ larger].cpu().numpy()


def _reflected(bits: np.ndarray) -> np.ndarray:
    """Return int32 that rise with the float32 of these bits; of those integers, the bits.

    The bits of positive numbers do already. Those of negative ones fall, and are reflected; both zeros become 0.
    """
    return np.where(bits < 0, np.int32(-(1 << 31)) - bits, bits)


@dataclass
class BracketCounts:
    """Hold the counts of a pass over some entries.

    Attributes:
        above: how many exceed the bracket.
        values: those inside, for each place, tile by tile; empty if there is a histogram.
        histogram: of those inside, over their bits; None if they are collected.
    """

    above: int = 0
    values: dict[Hashable, list[np.ndarray]] = field(default_factory=dict)
    histogram: np.ndarray | None = None

    @property
    def inside(self) -> int:
        """How many are inside the bracket."""
        if self.histogram is not None:
            return int(self.histogram.sum())
        return sum(len(some) for tiles in self.values.values() for some in tiles)


def _add_counts(parts: Sequence[BracketCounts]) -> BracketCounts:
    """Return the counts of several sets of entries together."""
    first, *others = parts
    histogram = first.histogram
    for other in others:
        histogram = None if histogram is None or other.histogram is None else histogram + other.histogram
    values: dict[Hashable, list[np.ndarray]] = {}
    for part in parts:
        for place, tiles in part.values.items():
            values[place] = values.get(place, []) + tiles
    return BracketCounts(sum(part.above for part in parts), values, histogram)


@dataclass
class ThresholdSearch:
    """Search for the smallest value that is kept when the `keep` largest of some entries are.

    Attributes:
        entries, keep: how many entries there are, and how many of them are kept.
        sample: arrays of sampled magnitudes, each with the number of entries that one of its magnitudes represents.
        least: the smallest possible value, as the ends of the bracket: 0 for magnitudes, −INFINITY for any values.
        counted: the counts of the last pass.
        low, high: the ends of the bracket, as integers that rise with the float32 (see `_reflected`).
        expected: how many entries are likely inside the bracket.
        widening: the factor by which the bracket is wider than the first one.
        threshold: the smallest value that is kept, once it is found.
        equal, equal_kept: how many entries equal the threshold, and how many of those are kept.
    """

    entries: float
    keep: int
    sample: Sequence[tuple[np.ndarray, float]] = ()
    least: int = 0
    counted: BracketCounts = field(default_factory=BracketCounts)
    low: int = field(init=False)
    high: int = field(init=False)
    expected: float = field(init=False)
    widening: float = field(default=1.0, init=False)
    threshold: float | None = field(default=None, init=False)
    equal: int = field(default=0, init=False)
    equal_kept: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._include_all()

    def _include_all(self) -> None:
        self.low, self.high, self.expected = self.least, INFINITY, self.entries

    @property
    def bracket(self) -> tuple[np.float32, np.float32]:
        """The ends of the bracket as values."""
        low, high = _reflected(np.array([self.low, self.high], np.int32)).view(np.float32)
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
        """Add what a pass found in some tiles.

        Args:
            above: how many values exceed the bracket.
            inside: those inside, for each tile.
            place: to which the tiles belong, such as a part of a module; see `equals`.
        """
        found = self.counted
        found.above += above
        if found.histogram is None:
            found.values.setdefault(place, []).extend(inside)
        else:
            bins = (_reflected(np.concatenate(inside).view(np.int32)).astype(np.int64) - self.low) >> self.shift
            found.histogram += np.bincount(bins, minlength=len(found.histogram)).astype(np.uint32)

    def equals(self, place: Hashable) -> list[int] | None:
        """Return how many entries equal the threshold, in each tile of a place; None if they were not collected."""
        tiles = self.counted.values.get(place)
        at = np.float32(self.threshold or 0.0)
        return None if tiles is None else [int(np.count_nonzero(values == at)) for values in tiles]

    def finish_pass(self) -> None:
        """Set the threshold, or the bracket of the next pass, from the counts.

        Raises: OverflowError if some entries are NaN, which no order includes.
        """
        missing = self.keep - self.counted.above  # how many of those inside are kept, the largest first
        histogram = self.counted.histogram
        if not 0 < missing <= self.counted.inside:
            self._widen()
        elif histogram is None:
            inside = np.concatenate([some for tiles in self.counted.values.values() for some in tiles])
            self.threshold = kth_largest(inside, missing)
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
        if (self.low, self.high) == (self.least, INFINITY):  # all were counted, so some are NaN
            raise OverflowError
        self.widening *= 4
        self.set_bracket()

    def set_bracket(self) -> None:
        """Set the bracket that contains the threshold almost surely, from the sample."""
        self._include_all()
        if self.entries <= SORTED_SIZE:
            return
        share = self.keep / self.entries
        total = sum(len(values) * each for values, each in self.sample)
        # as many draws of equal weight are as exact
        draws = total**2 / sum(len(values) * each**2 for values, each in self.sample)
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


def gather_counts(searches: Sequence[ThresholdSearch], gather: Callable[[Any], list[Any]]) -> None:
    """Replace the counts of each search by those of all processes together; `gather` returns what every process has."""
    counted = gather([search.counted for search in searches])
    for search, of_processes in zip(searches, zip(*counted, strict=True), strict=True):
        search.counted = _add_counts(of_processes)
