"""Glance: a module's task vectors counted and voted on in one walk, where its trim ranks that module alone.

A sample tells between which magnitudes a cut lies, most likely, so that most entries have their vote before the
cut is known. The few places at which the magnitude of any task vector is inside its bracket are noted in the walk
with all values there. From these come the cuts, and then the places' own votes, by the operations of the walk in
the same order: the result is to the bit that of a walk that counts and another one that votes.

What is noted grows with the number of task vectors and the width of the brackets. Where it could outgrow the merged
vector, or a bracket missed, two walks are made; that hangs on the data alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from . import fused
from .delta import Delta, Dense, size
from .fast import Kernels
from .methods.base import Method, TaskVectors, fused_hefts, is_linear, only_elects
from .threshold import Search
from .tiles import Workers, empty
from .trim import Cut

MOST = 9  # task vectors; of more, brackets from any sample that is worth its memory leave too many places open
SHARE = 0.5  # of the room for what is noted, that may be expected to be taken: tiles differ


@dataclass
class Glance:
    """One walk over the task vectors of a module.

    Attributes:
        tasks: the task vectors, without their cuts.
        hefts: what each one's vote adds to the divisor of the mean.
        mean: of those that agree, or else their sum.
        loops, crew: what walks.
        merged: what is decided so far.
        looks: what each tile's look found; empty until a walk was made, and where it was in vain.
    """

    tasks: TaskVectors
    hefts: Sequence[float]
    mean: bool
    loops: Kernels
    crew: Workers
    merged: Tensor | None = None
    looks: list[fused.Look] = field(default_factory=list)

    @classmethod
    def of(cls, method: Method, parts: Sequence[TaskVectors], crew: Workers) -> Glance | None:
        """At the parts of a module; None where the method, or how they are held, needs more than a glance."""
        election, trim, tasks = only_elects(method), method.trims(), parts[0]
        if election is None or trim is None or not isinstance(crew.loops, Kernels):
            return None
        if len(trim.densities) > 1 or len(parts) > 1 or len(tasks) > MOST or is_linear(method, len(tasks)):
            return None
        hefts = fused_hefts(tasks, election)
        return None if hefts is None else cls(tasks, hefts, election.disjoint == "mean", crew.loops, crew)

    def most(self, entries: int) -> int:
        """How many of so many entries may be noted: a place and N values each, in as much room as the merged ones."""
        return entries // (len(self.tasks) + 1)

    def suffices(self, searches: Sequence[Search]) -> bool:
        """Whether what is to be noted likely has room."""
        sought = [search for search in searches if search.sought]
        expected = sum(search.expected for search in sought)
        return bool(sought) and expected <= SHARE * self.most(size(self.tasks.deltas[0]))

    def walk(self, searches: Sequence[Search], place: Hashable) -> None:
        """Count for the search of each task vector's cut, unless there is too much to note."""
        brackets = [_bracket(search) for search in searches]
        merged = self.merged = empty(self.tasks.deltas[0].shape, self.tasks.device)
        width = merged.shape[1]

        def look(rows: tuple[int, int]) -> fused.Look | None:
            most, out = self.most((rows[1] - rows[0]) * width), merged[rows[0] : rows[1]]
            vectors = self.tasks.deltas, brackets, self.hefts, self.mean
            return fused.glance(*vectors, rows, out, self.loops, self.tasks.room, most)

        looks = self.crew.map(look, self.crew.tiles(merged.shape, merged.device))
        found = [each for each in looks if each is not None]
        if len(found) < len(looks):
            return
        self.looks = found
        for number, search in enumerate(searches):
            if search.sought:
                search.open(kept=True)
                search.add(sum(each.above[number] for each in found), [each.inside[number] for each in found], place)

    def result(self, cuts: Sequence[Cut], tally: dict[str, int]) -> Delta:
        """The merge, the cut of each task vector being known; it counts conflicts for the report."""
        merged = self.merged
        assert merged is not None
        grid = self.crew.tiles(merged.shape, merged.device)

        def settle(tile: int) -> tuple[int, int]:
            look, out = self.looks[tile], merged[grid[tile][0] : grid[tile][1]]
            for values, cut in zip(look.values, cuts, strict=True):
                if not cut.whole(tile):
                    _drop_surplus(values, look.places, cut, tile)
            below = [cut.below for cut in cuts]
            return fused.settle(look, below, self.hefts, self.mean, out, self.loops, self.tasks.room)

        counts = self.crew.map(settle, range(len(grid)))
        self.looks = []
        for name, count in zip(("conflicting", "shared"), map(sum, zip(*counts, strict=True)), strict=True):
            tally[name] = tally.get(name, 0) + count
        return Dense(merged)


def _bracket(search: Search) -> tuple[np.float32, np.float32]:
    """Between what magnitudes the cut lies; where there is nothing to search, below nothing and what is cut."""
    if search.sought:
        return search.ends
    return np.float32(np.nan), np.float32(np.inf if search.keep == 0 else 0)


def _drop_surplus(values: np.ndarray, places: np.ndarray, cut: Cut, tile: int) -> None:
    """As a cut does on a whole tile: of those that equal its threshold the first in order of position stay."""
    assert cut.spare is not None
    equal = np.flatnonzero(np.abs(values) == np.float32(cut.threshold))
    values[equal[places[equal].argsort()][cut.spare[tile] :]] = 0
