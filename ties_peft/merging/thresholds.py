"""Find the thresholds of the trims before the merge, exactly, without holding or sorting a task vector.

The thresholds and the merge compute the same tiles by the same operations, so that they see the same bits and the
number of entries kept is exactly the one asked for.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TypeVar

import numpy as np
import torch

from ..adapters.types.base import EMBEDDING
from ..errors import MethodError
from ..task_vectors.delta import Delta, size
from ..task_vectors.kernels.backends import Bracket, Counts
from ..task_vectors.processes import ProcessGroup
from ..task_vectors.threshold import SORTED_SIZE, ThresholdSearch, gather_counts
from ..task_vectors.tiles import TILE, ThreadPool
from ..task_vectors.trim import KEEP_ALL, KEEP_NONE, Cut, band_ends, kept_count
from .encoding import EncodedModules
from .plan import Plan, Progress

VOCABULARY_MODULES = ("lm_head", "embed_out", "embed_tokens", "wte", "shared")  # last part of the names of such modules
SAMPLE_SIZES = (1 << 13, 1 << 18)  # fewest and most entries of a group that are sampled
SAMPLE_STEP = 512  # one entry in so many is sampled
BATCH = 64  # adapters whose thresholds are searched together, and task vectors that the threads share at a time
Value = TypeVar("Value")
PartKey = tuple[int, str, int]  # (member, module, part)
CutsByPart = dict[PartKey, list[Cut]]  # one cut for each density


@dataclass
class KeptCount:
    """How many of the entries of one adapter the trim keeps."""

    kept: int = 0
    entries: int = 0


@dataclass
class RankedEntries:
    """Entries of one adapter that are ranked together.

    Attributes:
        member: the adapter's place in the plan.
        modules: in the order of their names.
        part: which part of them; None for all parts.
        densities: shares of the bands of magnitudes, from the largest magnitudes down.
        sizes: the number of entries of each part.
        sample: (magnitudes, how many entries each of them stands for).
        searches: for the threshold at the lower end of each band.
    """

    member: int
    modules: list[str]
    part: int | None
    densities: tuple[float, ...]
    sizes: dict[PartKey, int] = field(default_factory=dict)
    sample: list[tuple[np.ndarray, float]] = field(default_factory=list)
    searches: list[ThresholdSearch] = field(default_factory=list)

    @property
    def unfinished(self) -> list[ThresholdSearch]:
        """The searches that have no threshold yet."""
        return [search for search in self.searches if search.needed and search.threshold is None]

    @property
    def entries(self) -> int:
        """How many entries there are."""
        return sum(self.sizes.values())


class TrimThresholds:
    """The cuts of all trims of a merge.

    With scope `adapter` all are found at the start. With scope `module` those of one module are found when it is merged.

    Args:
        modules: the encoded task vectors.
        pool: the threads.
        progress: called with the number of adapters that are done.
        processes: that share the work.
        mine: the modules of this process.

    Law: of each group of n entries exactly ⌊density·n⌋ are kept.
    """

    def __init__(
        self,
        modules: EncodedModules,
        pool: ThreadPool,
        progress: Progress,
        processes: ProcessGroup,
        mine: Sequence[str],
    ) -> None:
        self.modules, self.plan, self.pool = modules, modules.plan, pool
        self.processes, self.mine = processes, set(mine)
        self.by_module = _ranks_by_module(self.plan)
        self._kept = [KeptCount() for _ in self.plan.members]
        self._cuts: CutsByPart = {}
        self._module: str | None = None  # whose cuts these are, if magnitudes are ranked by module
        if self.plan.trim is None or self.by_module:
            return
        by_member = [self._groups(member) for member in range(len(self.plan.members))]
        step = self._adapters_per_pass(len(by_member))
        for start in range(0, len(by_member), step):
            self._find([group for groups in by_member[start : start + step] for group in groups])
            progress("trim", min(start + step, len(by_member)), len(by_member))

    def cuts(self, module: str, part: int) -> list[tuple[Cut, ...]]:
        """Return the cuts of one part of a module, for each adapter that has the module."""
        if self.by_module and module != self._module:
            self._cuts, self._module = {}, module
            groups = [
                RankedEntries(member, [module], part, self._densities(member, module))
                for member, parts in self.modules.weighted(module).items()
                for part in range(len(parts))
            ]
            self._find(groups)
        return [tuple(self._cuts[place, module, part]) for place, _ in self.plan.holders(module)]

    def kept(self) -> list[KeptCount]:
        """Return for each member how many entries its trim keeps, after all modules were merged."""
        if not self.by_module:
            return self._kept
        of_processes = zip(*self.processes.gather(self._kept), strict=True)
        return [KeptCount(sum(k.kept for k in counts), sum(k.entries for k in counts)) for counts in of_processes]

    def _adapters_per_pass(self, adapters: int) -> int:
        """Return how many adapters to search in one pass: one if each is encoded alone, else all that share coordinates.

        Of very many adapters, fewer at a time if all encodings are kept, because each search takes memory.
        """
        if not self.modules.joint:
            return 1
        if adapters <= BATCH or not all(self.processes.gather(self.modules.all_cached(self.mine))):
            return adapters
        return BATCH

    def _groups(self, member: int) -> list[RankedEntries]:
        """Return the sets of one adapter's entries that are ranked together over its modules."""
        separate = vocabulary_modules(self.plan)
        groups: dict[tuple[str, tuple[float, ...]], RankedEntries] = {}
        for module in self.plan.members[member].adapter.modules:
            if self.plan.weight(member, module) != 0:
                densities = self._densities(member, module)
                key = (module if module in separate else self.plan.part(module), densities)
                groups.setdefault(key, RankedEntries(member, [], None, densities)).modules.append(module)
        return list(groups.values())

    def _densities(self, member: int, module: str) -> tuple[float, ...]:
        """Return the method's densities, the last one replaced by what was set for the adapter or the module."""
        assert self.plan.trim is not None
        *others, last = self.plan.trim.densities
        return (*others, self.plan.density(member, module, last))

    def _gather(self, value: Value) -> list[Value]:
        """Return the values of all processes; of this one alone for groups within one module, which no other process has."""
        return [value] if self.by_module else self.processes.gather(value)

    def _parts(self, groups: Iterable[RankedEntries]) -> Iterator[tuple[RankedEntries, PartKey, Delta]]:
        """Yield the parts of some groups that this process has, module by module."""
        by_module: dict[str, list[RankedEntries]] = {}
        for group in groups:
            for module in group.modules:
                if module in self.mine:
                    by_module.setdefault(module, []).append(group)
        for module in sorted(by_module):
            for group in by_module[module]:
                parts = self.modules.weighted_parts(group.member, module)
                for part in range(len(parts)) if group.part is None else (group.part,):
                    yield group, (group.member, module, part), parts[part]

    def _batches(self, groups: Iterable[RankedEntries]) -> Iterator[list[tuple[RankedEntries, PartKey, Delta]]]:
        """Yield the parts of one module, several at a time, so that threads seldom wait between adapters."""
        for _, parts in groupby(self._parts(groups), lambda item: item[1][1]):
            while batch := list(islice(parts, BATCH)):
                yield batch

    def _find(self, groups: Sequence[RankedEntries]) -> None:
        """Find the cuts of all parts of some groups: sample, bracket, count, and count again where a bracket missed."""
        self._sample(groups)
        for group in groups:
            kept, entries = self._kept[group.member], group.entries
            kept.kept += kept_count(group.densities[-1], entries)
            kept.entries += entries
            ends = band_ends(group.densities, entries)
            group.searches = [ThresholdSearch(entries, keep, group.sample) for keep in ends]
        unfinished = [search for group in groups for search in group.unfinished]
        few = sum(search.entries for search in unfinished) <= TILE
        self.pool.map(ThresholdSearch.set_bracket, unfinished, few)
        while remaining := [group for group in groups if group.unfinished]:
            self._count_all(remaining)
        for group in groups:
            for search in group.searches:
                for key, cut in self._group_cuts(group, search).items():
                    self._cuts.setdefault(key, []).append(cut)
            group.sample, group.searches = [], []  # those of hundreds of adapters add up

    def _sample(self, groups: Sequence[RankedEntries]) -> None:
        """Find the sizes of all parts and sample the large ones."""
        for batch in self._batches(groups):
            large = []
            for group, key, delta in batch:
                group.sizes[key] = size(delta)
                if size(delta) > SORTED_SIZE // (4 * len(group.modules)):  # else the whole group is small
                    large.append((group, key, delta))
            drawn = self.pool.map(lambda item: _draw(item[1], item[2], len(item[0].modules)), large)
            for (group, _, _), sample in zip(large, drawn, strict=True):
                group.sample.append(sample)
        found = self._gather([(group.sizes, group.sample) for group in groups])
        for group, of_processes in zip(groups, zip(*found, strict=True), strict=True):
            group.sizes = {key: count for sizes, _ in of_processes for key, count in sizes.items()}
            group.sample = [drawn for _, sample in of_processes for drawn in sample]

    def _count_all(self, groups: Sequence[RankedEntries]) -> None:
        """Go through all entries once and count, for each unfinished search, those above and inside its bracket."""
        searches = [(group, search) for group in groups for search in group.unfinished]
        for _, search in searches:
            search.start_pass()
        few = sum(group.entries for group in groups) <= TILE
        for batch in self._batches(groups):
            asked = [(delta, [search.bracket for search in group.unfinished]) for group, _, delta in batch]
            for (group, key, _), tiles in zip(batch, _count_in_brackets(asked, self.pool, few), strict=True):
                for search, counts in zip(group.unfinished, zip(*tiles, strict=True), strict=True):
                    search.add(sum(above for above, _ in counts), [inside for _, inside in counts], key)
        gather_counts([search for _, search in searches], self._gather)
        self.pool.map(_finish, searches, few)

    def _group_cuts(self, group: RankedEntries, search: ThresholdSearch) -> dict[PartKey, Cut]:
        """Return the cut of each part; of the magnitudes equal to the threshold the first by position are kept."""
        if search.threshold is None:
            return dict.fromkeys(group.sizes, KEEP_NONE if search.keep == 0 else KEEP_ALL)
        if search.threshold == 0 or search.equal == search.equal_kept:
            return dict.fromkeys(group.sizes, Cut(search.threshold))
        bracket = (np.float32(search.threshold), np.float32(search.threshold))
        own = {
            key: search.equals(key) or _count_inside(delta, bracket, self.pool)
            for _, key, delta in self._parts([group])
        }
        equal = {key: counts for of_process in self._gather(own) for key, counts in of_process.items()}
        cuts, left = {}, search.equal_kept
        for key in sorted(equal):
            cuts[key] = Cut.with_first(search.threshold, equal[key], left)
            left -= min(left, sum(equal[key]))
        return cuts


def vocabulary_modules(plan: Plan) -> list[str]:
    """Return the modules as large as the vocabulary; they are trimmed separately, since they would dominate the count."""
    if plan.scope != "adapter":
        return []
    separate = [
        name
        for name, module in plan.modules.items()
        if module.layer_type == EMBEDDING or name.rsplit(".", 1)[-1] in VOCABULARY_MODULES
    ]
    return separate if len(separate) < len(plan.modules) else []


def _ranks_by_module(plan: Plan) -> bool:
    """Return whether magnitudes are ranked within one module: by scope, or because there is only one."""
    if plan.trim is None or plan.trim.scope == "module":
        return plan.trim is not None
    return len(plan.modules) == 1 and not plan.arithmetic.shared


def _finish(item: tuple[RankedEntries, ThresholdSearch]) -> None:
    """End a pass of one search.

    Raises: MethodError if values are not finite.
    """
    group, search = item
    try:
        search.finish_pass()
    except OverflowError:
        raise MethodError(
            f"module {group.modules[0]!r}: a weighted task vector is beyond what float32 can hold. Use smaller weights."
        ) from None


def _draw(key: PartKey, delta: Delta, modules: int) -> tuple[np.ndarray, float]:
    """Return a sample of magnitudes and how many entries each stands for; the module's name alone seeds it."""
    _, module, part = key
    entries, (fewest, most) = size(delta), SAMPLE_SIZES
    count = max(1, min(max(fewest // modules, entries // SAMPLE_STEP), most // modules))
    drawn = delta.sample(count, np.random.default_rng([zlib.crc32(module.encode()), part]))
    return drawn.abs_().cpu().numpy(), entries / drawn.numel()


def _count_inside(delta: Delta, bracket: Bracket, pool: ThreadPool) -> list[int]:
    """Return how many magnitudes lie inside a bracket, in each tile."""
    (tiles,) = _count_in_brackets([(delta, [bracket])], pool)
    return [len(inside) for ((_, inside),) in tiles]


def _count_in_brackets(
    asked: Sequence[tuple[Delta, Sequence[Bracket]]], pool: ThreadPool, few: bool = False
) -> list[list[list[Counts]]]:
    """Count the magnitudes above and inside the brackets of each task vector, tile by tile.

    Args:
        asked: task vectors, each with its brackets.
        pool: the threads.
        few: whether there are so few entries that other threads do not pay.
    Returns: for each task vector, for each of its tiles, for each bracket.
    """

    def count(task: tuple[Delta, Sequence[Bracket], tuple[int, int], torch.device]) -> list[Counts]:
        delta, brackets, rows, device = task
        shape = (rows[1] - rows[0], *delta.shape[1:])
        return pool.kernels.count(delta, rows, brackets, lambda: pool.scratch("vector", shape, device))

    tasks, tiles = [], []
    for delta, brackets in asked:
        device = delta.rows(0, 0).device
        grid = pool.tiles(delta.shape, device)
        tasks += [(delta, brackets, rows, device) for rows in grid]
        tiles.append(len(grid))
    counts = iter(pool.map(count, tasks, few or any(device.type != "cpu" for *_, device in tasks)))
    return [list(islice(counts, number)) for number in tiles]
