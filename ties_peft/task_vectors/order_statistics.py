"""Find order statistics: the k-th largest of a value that a method computes for every entry of an adapter.

They are exact. Radix selection takes two passes over the entries, and memory that does not grow with their number: the
first pass counts how often each upper half of a float32's bits occurs; the second counts the lower halves of the values
that share the upper half of the k-th largest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .collection import TaskVectors
from .tiles import ThreadPool
from .trim import Scope

HALF = 16  # bits of a digit
BINS = 1 << HALF
TOGETHER = 64  # groups that are counted in one pass, half a megabyte for each rank
Group = Hashable  # the name of entries that are ranked together
Parts = Callable[[], Iterable[tuple[TaskVectors, Sequence[Group]]]]
Values = dict[Group, tuple[float, ...]]


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
    Law: the value of rank k is the k-th of all values of the group, sorted from the largest, to the bit.
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
    values = find_order_statistics(
        wanted, lambda: [(part, groups)], dict(enumerate(part.densities or [1.0] * len(part))), pool
    )
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
        sought: dict[Group, list[tuple[int, int]]] = {}
        for group, (counts,) in self._count(densities, lambda group, keys: [_upper(keys)]).items():
            ranks = self.wanted.ranks(int(counts.sum()), densities[group])
            sought[group] = [_locate(counts, rank) for rank in ranks]
        lower = self._count(
            densities, lambda group, keys: [keys[_upper(keys) == upper] & (BINS - 1) for upper, _ in sought[group]]
        )
        return {
            group: tuple(
                _value(upper, _locate(counts, rest)[0])
                for (upper, rest), counts in zip(found, lower[group], strict=True)
            )
            for group, found in sought.items()
        }

    def _count(
        self, groups: Mapping[Group, float], digits: Callable[[Group, Tensor], Sequence[Tensor]]
    ) -> dict[Group, Tensor]:
        """Return how often each digit occurs in each group: BINS counts for each sequence of digits."""
        own: dict[Group, Tensor] = {}
        lock = threading.Lock()

        def tile(task_vectors: TaskVectors, names: Sequence[Group]) -> None:
            for group, values in zip(names, self.wanted.values(task_vectors), strict=True):
                if group in groups:
                    found = digits(group, _keys(values))
                    counts = torch.stack([torch.bincount(some, minlength=BINS) for some in found]).cpu()
                    with lock:
                        own[group] = own[group].add_(counts) if group in own else counts

        for part, names in self.parts():
            known = replace(part, order_statistics=[self.values[group] for group in names])
            grid = self.pool.tiles(part.shape, part.device)
            tiles = [replace(known, rows=rows, tile=number) for number, rows in enumerate(grid)]
            self.pool.map(lambda each, names=names: tile(each, names), tiles, part.device.type != "cpu")
        every = self.gather(own)
        return {group: torch.stack([part[group] for part in every if group in part]).sum(0) for group in groups}


def _keys(values: Tensor) -> Tensor:
    """Return 32-bit integers in the order of float32 values: their bits, inverted below the sign if negative."""
    bits = values.contiguous().view(-1).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _upper(keys: Tensor) -> Tensor:
    return (keys >> HALF) + BINS // 2


def _value(upper: int, lower: int) -> float:
    """Return the float32 whose key has these halves."""
    key = ((upper - BINS // 2) << HALF) | lower
    return float(np.array(key ^ 0x7FFFFFFF if key < 0 else key, np.int32).view(np.float32))


def _locate(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the digit of the value at a rank, and the rank among the values that have this digit."""
    reached = counts.flip(0).cumsum(0)
    place = int((reached < rank).sum())
    return BINS - 1 - place, rank - int(reached[place] - counts[BINS - 1 - place])
