"""Count, entry by entry, what each adapter's trim keeps and where the kept signs of two adapters differ.

These figures need the entries. They are counted in the tiles, and by the thresholds, of a merge with `ties`, so that they
say what such a merge meets. Where all entries together are too many, the same is done on a random part of the rows of each
module, the same rows for all adapters.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..merging.encoding import EncodedModules
from ..merging.plan import Plan, Progress
from ..merging.thresholds import TrimThresholds
from ..task_vectors.delta import Delta, Dense, LowRank
from ..task_vectors.processes import SINGLE_PROCESS
from ..task_vectors.tiles import ThreadPool, thread_pool
from ..task_vectors.trim import Cut, Trim
from .figures import Measured

LARGEST = 0.2  # the share of the entries whose squared norm is the redundancy
MOST_ENTRIES = 2_000_000_000  # of all adapters together, up to which every entry is counted


class SampledModules(EncodedModules):
    """Read a random part of the rows of each module, at least one, the same for all adapters.

    Args:
        plan: the merge whose task vectors are read.
        share: of the rows.
    """

    def __init__(self, plan: Plan, share: float) -> None:
        super().__init__(plan)
        self.share = share

    def read(self, place: int, module: str) -> Delta:
        """Return some rows of one adapter's task vector."""
        delta = super().read(place, module)
        if self.share >= 1:
            return delta
        draw = np.random.default_rng(zlib.crc32(module.encode()))
        count = max(1, round(self.share * delta.shape[0]))
        rows = torch.from_numpy(np.sort(draw.choice(delta.shape[0], count, replace=False)))
        if isinstance(delta, LowRank):
            return LowRank(delta.B[rows].contiguous(), delta.A, delta.scaling)
        return Dense(delta.dense()[rows])


def counted_share(plan: Plan, exact: bool | None) -> float:
    """Return the share of the rows that is counted: all of them, unless there are too many entries.

    Args:
        plan: of the merge.
        exact: True to count all, False for a tenth at most; None to decide by their number.
    """
    entries = sum(math.prod(module.shape) * len(plan.holders(name)) for name, module in plan.modules.items())
    share = min(1.0, MOST_ENTRIES / max(1, entries))
    return 1.0 if exact else min(0.1, share) if exact is False else share


def measure_entries(measured: Measured, plan: Plan, share: float, progress: Progress) -> None:
    """Fill in what the entries of all modules tell.

    Args:
        measured: is filled in.
        plan: of a merge with a trim over the adapter.
        share: of the rows of each module that are counted.
        progress: as in `merge`.
    """
    assert plan.trim is not None
    with torch.no_grad(), thread_pool() as pool:
        cuts = _Cuts(plan, plan.trim.densities[-1], share, pool, progress)
        same = plan.trim.densities[-1] == LARGEST
        largest = None if same else _Cuts(plan, LARGEST, share, pool, progress)
        for number, name in enumerate(plan.modules):
            places = [place for place, _ in plan.holders(name)]
            deltas = [cuts.modules.read(place, name) for place in places]
            others = None if largest is None else largest.of(name)
            _measure_module(measured, number, places, deltas, cuts.of(name), others, pool)
            progress("signs", number + 1, len(plan.modules))


class _Cuts:
    """Find the cuts of one density for all adapters and modules."""

    def __init__(self, plan: Plan, density: float, share: float, pool: ThreadPool, progress: Progress) -> None:
        self.modules = SampledModules(replace(plan, trim=Trim((density,), "adapter")), share)
        self._thresholds = TrimThresholds(self.modules, pool, progress, SINGLE_PROCESS, list(plan.modules))

    def of(self, module: str) -> list[Cut]:
        """Return the cut of each adapter that has the module."""
        return [cut for (cut,) in self._thresholds.cuts(module, 0)]


def _measure_module(
    measured: Measured,
    module: int,
    places: Sequence[int],
    deltas: Sequence[Delta],
    cuts: Sequence[Cut],
    largest: Sequence[Cut] | None,
    pool: ThreadPool,
) -> None:
    """Fill in what the entries of one module tell.

    Args:
        measured: is filled in.
        module: its number.
        places: the numbers of the adapters that have it.
        deltas: their task vectors.
        cuts: of the trim.
        largest: cuts that keep the share `LARGEST`; None if those of the trim do.
        pool: the threads.
    """
    count = len(deltas)

    def sum_tile(tile: tuple[int, tuple[int, int]]) -> np.ndarray:
        """Return (N, 2N + 2): agreeing less opposite signs, entries that both keep, ‖entries‖², ‖largest entries‖²."""
        number, rows = tile
        signs = torch.empty(count, (rows[1] - rows[0]) * math.prod(deltas[0].shape[1:]))
        found = np.empty((count, 2 * count + 2))
        for i, delta in enumerate(deltas):
            values = delta.rows(*rows)
            found[i, -2] = _square(values)
            if largest is not None:
                found[i, -1] = _square(largest[i].apply_(values.clone(), number))
            cuts[i].apply_(values, number)
            if largest is None:
                found[i, -1] = _square(values)
            torch.sign(values.view(-1), out=signs[i])
        found[:, :count] = (signs @ signs.T).numpy()  # exact in float32: a tile has fewer than 2²⁴ entries
        signs.abs_()
        found[:, count : 2 * count] = (signs @ signs.T).numpy()
        return found

    grid = pool.tiles(deltas[0].shape, torch.device("cpu"))
    total = sum(pool.map(sum_tile, list(enumerate(grid))), np.zeros((count, 2 * count + 2)))
    agreeing_less_opposite, both = total[:, :count], total[:, count : 2 * count]
    pairs = np.ix_([module], places, places)
    measured.both[pairs] = both
    measured.opposite[pairs] = (both - agreeing_less_opposite) / 2
    measured.entries[module, places] = math.prod(deltas[0].shape)
    measured.entries_square[module, places] = total[:, -2]
    measured.largest_square[module, places] = total[:, -1]


def _square(values: Tensor) -> float:
    """Return the sum of the squares, by rows in float32 and over the rows in float64."""
    rows = values.view(len(values), -1)
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())
