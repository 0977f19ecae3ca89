"""Find order statistics: the k-th largest of a value that a method computes for every entry of an adapter.

They are exact (see `threshold`), and take two or three passes over the entries, and memory that does not grow with their
number.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor

from ..errors import MethodError
from .collection import TaskVectors
from .threshold import INFINITY, ThresholdSearch, count_in_bracket, gather_counts
from .tiles import ThreadPool, Tile
from .trim import Scope

TOGETHER = 16  # groups that are searched in one pass; the counts of each take 2 MB for each rank
Group = Hashable  # the name of entries that are ranked together
Parts = Callable[[], Iterable[tuple[TaskVectors, Sequence[Group]]]]
Values = dict[Group, tuple[float, ...]]
Searches = Sequence[tuple[Group, ThresholdSearch]]


@dataclass(frozen=True)
class OrderStatistics:
    """Ask for order statistics, the values at some ranks, of a value that a method computes for every entry of each adapter.

    Attributes:
        values: values(task_vectors) yields, for each of them, the value of every selected entry, float32 of any sign;
            the next one may overwrite it.
        ranks: ranks(entries, density) returns the ranks that are wanted among so many entries, 1 for the largest.
        scope: over what the values are ranked.
    """

    values: Callable[[TaskVectors], Iterable[Tensor]]
    ranks: Callable[[int, float], Sequence[int]]
    scope: Scope


def find_order_statistics(
    wanted: Sequence[OrderStatistics],
    parts: Parts,
    densities: Mapping[Group, float],
    pool: ThreadPool,
    gather: Callable[[Any], list[Any]] = lambda own: [own],
) -> Values:
    """Return the values at all ranks that are wanted, for every group, in the order in which they are asked for.

    Args:
        wanted: what a method asks for; the values of each one may use the order statistics of those before it.
        parts: returns an iterator over the parts of modules that this process has, each with the group of every task
            vector.
        densities: for every group, also of other processes, the share of its entries that the method keeps.
        pool: the threads.
        gather: returns what every process found.
    Raises: MethodError if the values of a group are not numbers.
    Law: the value of rank k is the k-th of all values of the group, sorted from the largest.
    """
    values: Values = dict.fromkeys(densities, ())
    for one in wanted:
        search = _RankSearch(one, parts, values, pool, gather)
        groups = list(densities)
        found: Values = {}
        for start in range(0, len(groups), TOGETHER):
            found |= search.select({group: densities[group] for group in groups[start : start + TOGETHER]})
        values = {group: (*own, *found[group]) for group, own in values.items()}
    return values


def with_order_statistics(wanted: Sequence[OrderStatistics], part: TaskVectors, pool: ThreadPool) -> TaskVectors:
    """Return the task vectors of one part with their order statistics, each ranked among the selected entries."""
    groups = range(len(part))
    densities = [1.0] * len(part) if part.densities is None else part.densities.each
    values = find_order_statistics(wanted, lambda: [(part, groups)], dict(enumerate(densities)), pool)
    return replace(part, order_statistics=[values[group] for group in groups])


@dataclass(frozen=True)
class _RankSearch:
    """Find the values at the ranks that are wanted; the attributes are the arguments of `find_order_statistics`."""

    wanted: OrderStatistics
    parts: Parts
    values: Values
    pool: ThreadPool
    gather: Callable[[Any], list[Any]]

    def select(self, densities: Mapping[Group, float]) -> Values:
        """Return the values at the ranks of some groups."""
        first = {group: ThresholdSearch(math.inf, 0, least=-INFINITY) for group in densities}
        self._count([*first.items()])  # all values: the ranks depend on their number
        searches = [(group, one) for group, every in first.items() for one in self._searches(every, densities[group])]
        remaining = _finish_pass(searches)
        while remaining:
            self._count(remaining)
            remaining = _finish_pass(remaining)
        return {
            group: tuple(cast(float, one.threshold) for own, one in searches if own == group) for group in densities
        }

    def _searches(self, every: ThresholdSearch, density: float) -> list[ThresholdSearch]:
        """Return a search for each rank of a group, which begins with the counts of all values."""
        entries = every.counted.inside
        return [replace(every, entries=entries, keep=rank) for rank in self.wanted.ranks(entries, density)]

    def _count(self, searches: Searches) -> None:
        """Go through all entries once, and count for each search those above and inside its bracket."""
        lock = threading.Lock()
        by_group: dict[Group, list[ThresholdSearch]] = {}
        for group, search in searches:
            search.start_pass()
            by_group.setdefault(group, []).append(search)

        def count(task_vectors: TaskVectors, names: Sequence[Group]) -> None:
            for group, values in zip(names, self.wanted.values(task_vectors), strict=True):
                for search in by_group.get(group, ()):
                    above, inside = count_in_bracket(values, *search.bracket)
                    with lock:
                        search.add(above, [inside], group)

        for part, names in self.parts():
            known = replace(part, order_statistics=[self.values[group] for group in names])
            grid = self.pool.tiles(part.shape, part.device)
            tiles = [replace(known, tile=Tile(number, rows)) for number, rows in enumerate(grid)]
            self.pool.map(lambda tile, names=names: count(tile, names), tiles, part.device.type != "cpu")
        gather_counts([search for _, search in searches], self.gather)


def _finish_pass(searches: Searches) -> Searches:
    """End a pass, and return the searches that need another one."""
    try:
        for _, search in searches:
            search.finish_pass()
    except OverflowError:
        raise MethodError(
            "the values that the method ranks are not numbers, because a weighted task vector is beyond what float32 can "
            "hold. Use smaller weights."
        ) from None
    return [(group, search) for group, search in searches if search.threshold is None]
