"""Survey: where each adapter's trim cuts, found exactly without holding or sorting the task vector.

Tiles are computed here and in the merge by the same operation on the same ranges, hence with the
same bits: the entries kept are exactly as many as asked.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, islice
from typing import TypeVar

import numpy as np
from torch import Tensor

from ..adapters.types.base import EMBEDDING
from ..errors import MethodError
from ..task_vectors.delta import Delta, size
from ..task_vectors.kernels import fused
from ..task_vectors.kernels.backends import Kernels
from ..task_vectors.processes import ProcessGroup
from ..task_vectors.single_pass import SinglePass
from ..task_vectors.threshold import SORTED_SIZE, ThresholdSearch, add_counts
from ..task_vectors.tiles import TILE, ThreadPool
from ..task_vectors.trim import ALL, KEEP_ALL, KEEP_NONE, Cut, band_ends, kept_count
from .encoding import Coordinates
from .plan import Plan

VOCABULARY = ("lm_head", "embed_out", "embed_tokens", "wte", "shared")  # as large as the vocabulary: trimmed apart
SAMPLE = (1 << 13, 1 << 18)  # entries of a group that are sampled, at least and at most; about one in SPARSE
SPARSE, FINE = 512, 64  # and in FINE for a single pass, which notes the less the narrower its brackets are
TOGETHER = 64  # adapters whose cuts are sought at once where all could be, and task vectors looked at in one go
Value = TypeVar("Value")
Progress = Callable[[str, int, int], None]
Spot = tuple[int, str, int]  # member, module, part
Cuts = dict[Spot, list[Cut]]  # a cut for each density


@dataclass
class Kept:
    """How many entries of one adapter the trim kept, of how many in the coordinates of the space."""

    kept: int = 0
    entries: int = 0


@dataclass
class Group:
    """Entries that are ranked together.

    Attributes:
        member: whose.
        modules: of which modules, sorted.
        part: of which part of them; None for all parts.
        densities: the shares of its bands of magnitudes, from the largest down.
        sizes: the number of entries of each place, once it is known.
        sample: magnitudes, and how many entries each stands for.
    """

    member: int
    modules: list[str]
    part: int | None
    densities: tuple[float, ...]
    sizes: dict[Spot, int] = field(default_factory=dict)
    sample: list[tuple[np.ndarray, float]] = field(default_factory=list)

    @property
    def entries(self) -> int:
        """How many there are."""
        return sum(self.sizes.values())


class Survey:
    """The cuts of a merge: over whole adapters found at once, over modules when a module is asked for.

    Args:
        coordinates, pool: of the merge.
        progress: told of every adapter that is done.
        processes, mine: the processes that share the work, and the modules that are this one's.

    Law: over each group of n entries exactly ⌊density·n⌋ are kept.
    """

    def __init__(
        self,
        coordinates: Coordinates,
        pool: ThreadPool,
        progress: Progress,
        processes: ProcessGroup,
        mine: Sequence[str],
    ) -> None:
        self.coordinates, self.plan, self.pool = coordinates, coordinates.plan, pool
        self.processes, self.mine = processes, set(mine)
        self.by_module = _by_module(self.plan)
        self._kept = [Kept() for _ in self.plan.members]
        self._cuts: Cuts = {}
        if self.plan.trim is None or self.by_module:
            return
        everyone = [self._groups(member) for member in range(len(self.plan.members))]
        step = self._together(len(everyone))
        for start in range(0, len(everyone), step):
            self._find([group for groups in everyone[start : start + step] for group in groups])
            progress("trim", min(start + step, len(everyone)), len(everyone))

    def _together(self, adapters: int) -> int:
        """How many adapters are looked at in one pass: one where it is there alone, all that share coordinates.

        Of very many fewer, if another pass need not find the coordinates again: what a search holds adds up.
        """
        if not self.coordinates.joint:
            return 1
        if adapters <= TOGETHER or not all(self.processes.gather(self.coordinates.holds(self.mine))):
            return adapters
        return TOGETHER

    def kept(self) -> list[Kept]:
        """For each member, how many of its entries stay; once every module was asked for."""
        if not self.by_module:
            return self._kept
        all_kept = zip(*self.processes.gather(self._kept), strict=True)
        return [Kept(sum(k.kept for k in parts), sum(k.entries for k in parts)) for parts in all_kept]

    def _gather(self, value: Value) -> list[Value]:
        """What all processes found, where groups go beyond the modules of one."""
        return [value] if self.by_module else self.processes.gather(value)

    def of_module(self, module: str, places: Sequence[int]) -> ModuleThresholds:
        """Return the thresholds of one module, of the members at some places, found when they are first asked for."""
        return ModuleThresholds(self, module, places)

    def cuts(self, module: str, single_pass: SinglePass | None = None) -> Cuts:
        """The cuts of one module, for every member that has it; found in a single pass where that suffices."""
        if self.by_module:
            self._cuts, groups = {}, []
            for member, _ in self.plan.holders(module):
                densities = self._densities(member, module)
                parts = range(len(self.coordinates.parts(member, module)))
                groups += [Group(member, [module], part, densities) for part in parts]
            alone = len(groups) == len(self.plan.holders(module))  # a single pass sees one part
            self._find(groups, single_pass if alone else None)
        return self._cuts

    def _groups(self, member: int) -> list[Group]:
        """The sets of one adapter's entries that are ranked together over its modules."""
        apart = trimmed_apart(self.plan)
        together: dict[tuple[str | None, tuple[float, ...]], Group] = {}
        for module in self.plan.members[member].adapter.modules:
            if self.plan.weight(member, module) == 0:
                continue
            densities = self._densities(member, module)
            key = (module if module in apart else None, densities)
            together.setdefault(key, Group(member, [], None, densities)).modules.append(module)
        return list(together.values())

    def _densities(self, member: int, module: str) -> tuple[float, ...]:
        """The method's densities, the last replaced by one that was set for the adapter or the module."""
        assert self.plan.trim is not None
        *others, last = self.plan.trim.densities
        return (*others, self.plan.density(member, module, last))

    def _walk(self, groups: Iterable[Group]) -> Iterator[tuple[Group, Spot, Delta]]:
        """Every place of some groups, a module at a time."""
        by_module: dict[str, list[Group]] = {}
        for group in groups:
            for module in group.modules:
                if module in self.mine:
                    by_module.setdefault(module, []).append(group)
        for module in sorted(by_module):
            for group in by_module[module]:
                parts = self.coordinates.parts(group.member, module)
                for part in range(len(parts)) if group.part is None else (group.part,):
                    yield group, (group.member, module, part), parts[part]

    def _by_module(self, groups: Iterable[Group]) -> Iterator[list[tuple[Group, Spot, Delta]]]:
        """The places of a module, several in one go, so that threads seldom wait for each other between adapters."""
        for _, steps in groupby(self._walk(groups), lambda step: step[1][1]):
            while some := list(islice(steps, TOGETHER)):
                yield some

    def _find(self, groups: Sequence[Group], single_pass: SinglePass | None = None) -> None:
        """The cuts of all places of some groups."""
        sparse = SPARSE if single_pass is None else FINE
        for steps in self._by_module(groups):
            large = []
            for group, spot, delta in steps:
                group.sizes[spot] = size(delta)
                if size(delta) > SORTED_SIZE // (4 * len(group.modules)):  # else the whole group is small
                    large.append((group, spot, delta))
            drawn = self.pool.map(lambda step: _sample(step[1], step[2], len(step[0].modules), sparse), large)
            for (group, _, _), sample in zip(large, drawn, strict=True):
                group.sample.append(sample)
        found = self._gather([(group.sizes, group.sample) for group in groups])
        for group, parts in zip(groups, zip(*found, strict=True), strict=True):
            group.sizes = {spot: count for sizes, _ in parts for spot, count in sizes.items()}
            group.sample = [some for _, sample in parts for some in sample]
        searches = []
        for group in groups:
            kept, entries = self._kept[group.member], group.entries
            kept.kept += kept_count(group.densities[-1], entries)
            kept.entries += entries
            ends = band_ends(group.densities, entries)
            searches += [(group, ThresholdSearch(entries, keep, group.sample)) for keep in ends]
        sought = [(group, search) for group, search in searches if search.needed]
        little = sum(group.entries for group, _ in sought) <= TILE
        self.pool.map(lambda each: each[1].set_bracket(), sought, little)
        for group, search in sought:
            ranked = self._ranked(group)
            if ranked is not None:
                search.set_from_sorted(ranked)
        if single_pass is not None and single_pass.suffices([search for _, search in searches]):
            self._look(single_pass, searches)
        while unsettled := [(group, search) for group, search in sought if search.threshold is None]:
            self._pass(unsettled)
        for group, search in searches:
            for spot, cut in self._share(group, search).items():
                self._cuts.setdefault(spot, []).append(cut)
        for group in groups:
            group.sample = []  # those of hundreds of adapters add up

    def _look(self, single_pass: SinglePass, searches: Sequence[tuple[Group, ThresholdSearch]]) -> None:
        """Settle the searches of a module's only part by one walk, which is in vain if any stays open."""
        (place,) = {(module, part) for group, _ in searches for _, module, part in group.sizes}
        single_pass.walk([search for _, search in searches], place)
        if single_pass.looks:
            self.pool.map(_close, [each for each in searches if each[1].needed])
        if any(search.needed and search.threshold is None for _, search in searches):
            single_pass.looks = []

    def _ranked(self, group: Group) -> np.ndarray | None:
        """All magnitudes of one small part in order, which a prepared merge keeps; None where there is more to look at."""
        memory, plan = self.coordinates.memory, self.plan
        if memory is None or plan.preparations or plan.signs is not None or self.pool.loops is not None:
            return None
        if len(group.sizes) > 1 or group.entries > TILE:
            return None
        (spot,) = group.sizes
        weight = plan.weight(*spot[:2])
        if memory.ranked.get(spot, (None,))[0] != weight:
            delta = self.coordinates.parts(*spot[:2])[spot[2]]
            memory.ranked[spot] = weight, np.sort(delta.rows(0, delta.shape[0]).abs_().cpu().numpy(), axis=None)
        values = memory.ranked[spot][1]
        return values if values[-1] >= 0 else None  # NaN, which is last, has no place in an order

    def _pass(self, searches: Sequence[tuple[Group, ThresholdSearch]]) -> None:
        """One look at every entry."""
        of_group: dict[int, list[ThresholdSearch]] = {}
        for group, search in searches:
            search.start_pass()
            of_group.setdefault(id(group), []).append(search)
        groups = list({id(group): group for group, _ in searches}.values())
        little = sum(group.entries for group in groups) <= TILE
        for walk in self._by_module(groups):
            steps = [(delta, spot, of_group[id(group)]) for group, spot, delta in walk]
            asked = [(delta, [search.bracket for search in mine]) for delta, _, mine in steps]
            for (_, spot, mine), tallies in zip(steps, _census(asked, self.pool, little), strict=True):
                for number, search in enumerate(mine):
                    found = [tile[number] for tile in tallies]
                    search.add(sum(above for above, _ in found), [inside for _, inside in found], spot[1:])
        counted = self._gather([search.counted for _, search in searches])
        for (_, search), parts in zip(searches, zip(*counted, strict=True), strict=True):
            search.counted = add_counts(parts)
        self.pool.map(_close, searches, little)

    def _share(self, group: Group, search: ThresholdSearch) -> dict[Spot, Cut]:
        """The cut of each place; where too many equal the threshold, the first in order of position stay."""
        if search.threshold is None:
            return dict.fromkeys(group.sizes, KEEP_NONE if search.keep == 0 else KEEP_ALL)
        if search.threshold == 0 or search.equal == search.equal_kept:
            return dict.fromkeys(group.sizes, Cut(search.threshold))
        at = np.float32(search.threshold)
        own = {spot: search.equals(spot[1:]) or _equals(delta, at, self.pool) for _, spot, delta in self._walk([group])}
        equal = {spot: counts for part in self._gather(own) for spot, counts in part.items()}
        cuts, equal_kept = {}, search.equal_kept
        for spot in sorted(equal):
            quota, before = [], equal_kept
            for count in equal[spot]:
                quota.append(ALL if count <= equal_kept else equal_kept)
                equal_kept -= min(count, equal_kept)
            cuts[spot] = Cut(search.threshold, tuple(quota), before - equal_kept)
        return cuts


@dataclass
class ModuleThresholds:
    """The cuts of one module, found when they are first asked for.

    Attributes:
        survey: that finds them.
        module: its name.
        places: of the members whose cuts are asked for, in order.
    """

    survey: Survey
    module: str
    places: Sequence[int]
    _cuts: Cuts | None = None

    def of(self, part: int, single_pass: SinglePass | None = None) -> list[tuple[Cut, ...]]:
        """Return the cuts of one part of the module; found in a single pass where one is offered and suffices."""
        if self._cuts is None:
            self._cuts = self.survey.cuts(self.module, single_pass)
        return [tuple(self._cuts[place, self.module, part]) for place in self.places]


def _close(sought: tuple[Group, ThresholdSearch]) -> None:
    group, search = sought
    try:
        search.finish_pass()
    except OverflowError:
        raise MethodError(
            f"module {group.modules[0]!r}: a weighted task vector is beyond what float32 can hold. Use smaller weights."
        ) from None


def _equals(delta: Delta, magnitude: np.float32, pool: ThreadPool) -> list[int]:
    """How many entries have a magnitude, in each tile."""
    (tallies,) = _census([(delta, [(magnitude, magnitude)])], pool)
    return [len(inside) for ((_, inside),) in tallies]


def _by_module(plan: Plan) -> bool:
    """Whether magnitudes are ranked over one module at a time, be it the only one."""
    if plan.trim is None or plan.trim.scope == "module":
        return plan.trim is not None
    return len(plan.modules) == 1 and not plan.arithmetic.shared


def trimmed_apart(plan: Plan) -> list[str]:
    """The modules as large as the vocabulary, whose entries would swamp the count of the others."""
    if plan.scope != "adapter":
        return []
    apart = [
        name
        for name, module in plan.modules.items()
        if module.layer_type == EMBEDDING or name.rsplit(".", 1)[-1] in VOCABULARY
    ]
    return apart if len(apart) < len(plan.modules) else []


def _sample(spot: Spot, delta: Delta, modules: int, sparse: int) -> tuple[np.ndarray, float]:
    """Some magnitudes, drawn by the module's name alone, and how many each stands for."""
    _, module, part = spot
    entries = size(delta)
    count = max(1, min(max(SAMPLE[0] // modules, entries // sparse), SAMPLE[1] // modules))
    drawn = delta.sample(count, np.random.default_rng([zlib.crc32(module.encode()), part]))
    return drawn.abs_().cpu().numpy(), entries / drawn.numel()


Brackets = Sequence[tuple[np.float32, np.float32]]
Tallies = list[tuple[int, np.ndarray]]  # for each bracket: how many magnitudes exceed it, and those inside


def _census(asked: Sequence[tuple[Delta, Brackets]], pool: ThreadPool, little: bool = False) -> list[list[Tallies]]:
    """Of each task vector, what lies above and inside each of its brackets, tile by tile."""

    def tile(task: tuple[Delta, Brackets, tuple[int, int]]) -> Tallies:
        delta, brackets, rows = task
        device = delta.rows(0, 0).device
        shape = (rows[1] - rows[0], *delta.shape[1:])
        loops = pool.loops
        if loops is not None and fused.fits(delta, loops):
            memory = partial(pool.scratch, like=device)
            return [fused.census(delta, rows, low, high, loops, memory) for low, high in brackets]
        values = delta.rows(*rows, out=pool.scratch("vector", shape, device))
        if not isinstance(loops, Kernels):
            values = values.abs_()
            return [_count(values, low, high) for low, high in brackets]
        flat = values.view(-1).numpy()
        room = pool.scratch("inside", (len(flat) + 1,), device).numpy()
        marks = pool.scratch("marks", (len(flat) // 4 + 1,), device).numpy().view(np.uint8)
        found = []
        for low, high in brackets:
            above, inside = loops.count(flat, low, high, room, marks)
            found.append((above, room[:inside].copy()))
        return found

    grids = [pool.tiles(delta.shape, delta.rows(0, 0).device) for delta, _ in asked]
    tasks = [(*each, rows) for each, grid in zip(asked, grids, strict=True) for rows in grid]
    tallies = iter(pool.map(tile, tasks, little))
    return [list(islice(tallies, len(grid))) for grid in grids]


def _count(values: Tensor, low: np.float32, high: np.float32) -> tuple[int, np.ndarray]:
    """(how many exceed `high`, those in [low, high] in order); on the CPU by NumPy, whose counting is faster."""
    if values.device.type == "cpu":
        flat = values.numpy().reshape(-1)
        above = flat > high
        return int(np.count_nonzero(above)), flat[(flat >= low) ^ above]
    larger = values > float(high)
    return int(larger.sum()), values[(values >= float(low)) ^ larger].cpu().numpy()
