"""Survey: where each adapter's trim cuts, found exactly without holding or sorting the task vector.

For every group of entries that are ranked together (a whole adapter, or one module):

1. a sample of entries gives a bracket [low, high] that holds the threshold almost surely;
2. one pass over all tiles counts the entries above it and collects those inside it, about one in a
   hundred; if the counts show that the threshold is not inside, the bracket is widened and the pass
   made again;
3. the threshold is a rank among the few collected, and so exact.

Tiles are computed here and in the merge by the same operation on the same ranges, hence with the
same bits: the entries kept are exactly as many as asked.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from .coordinates import Coordinates
from .delta import Delta, size
from .errors import MethodError, printable
from .kinds.base import EMBEDDING
from .plan import Plan
from .tiles import Workers, tiles
from .trim import ALL, KEEP_ALL, KEEP_NONE, Cut, kept_count

VOCABULARY = ("lm_head", "embed_out", "embed_tokens", "wte", "shared")  # as large as the vocabulary: trimmed apart
SAMPLE = 1 << 14
WHOLE = 1 << 18  # up to so many entries all are collected: nothing to sample
SIGMAS = 4.0  # of the sample's quantile, on either side: the bracket misses once in thousands
Cuts = dict[tuple[int, str], tuple[tuple[Cut, ...], ...]]  # (member, module) → for each part, a cut for each density
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Place:
    """One part of one module of one adapter.

    Attributes:
        module, part: which.
        size: how many entries it has.
        read: gives the part; it may read it from the file anew.
    """

    module: str
    part: int
    size: int
    read: Callable[[], Delta]


@dataclass(frozen=True)
class Census:
    """What a pass over one place found: entries above the bracket, and those inside it by tile."""

    above: int
    inside: list[np.ndarray]


@dataclass
class Kept:
    """How many entries of one adapter the trim kept, of how many in the coordinates of the space."""

    kept: int = 0
    entries: int = 0


def find_cuts(coordinates: Coordinates, crew: Workers, progress: Progress) -> tuple[Cuts, list[Kept]]:
    """Every adapter's cuts, and how many of its entries are kept.

    Law: over each group of n entries exactly ⌊density·n⌋ are kept.
    """
    plan = coordinates.plan
    cuts: Cuts = {}
    kept = [Kept() for _ in plan.members]
    if plan.trim is None:
        return cuts, kept
    for number, member in enumerate(plan.members):
        modules = [name for name in member.adapter.modules if plan.weight(number, name) != 0]
        found: dict[tuple[str, int], list[Cut]] = {}
        for group, densities in _groups(coordinates, number, modules):
            entries = sum(place.size for place in group)
            kept[number].kept += kept_count(densities[-1], entries)
            kept[number].entries += entries
            for keep in _ends(densities, entries):
                for key, cut in _cut(group, keep, crew).items():
                    found.setdefault(key, []).append(cut)
        for module in modules:
            parts = sorted(part for name, part in found if name == module)
            cuts[number, module] = tuple(tuple(found[module, part]) for part in parts)
        progress("trim", number + 1, len(plan.members))
    return cuts, kept


def trimmed_apart(plan: Plan) -> list[str]:
    """The modules as large as the vocabulary, whose entries would swamp the count of the others."""
    if plan.trim is None or plan.trim.scope != "adapter":
        return []
    apart = [
        name
        for name, module in plan.modules.items()
        if module.form == EMBEDDING or name.rsplit(".", 1)[-1] in VOCABULARY
    ]
    return apart if len(apart) < len(plan.modules) else []


def _groups(
    coordinates: Coordinates, number: int, modules: Sequence[str]
) -> Iterator[tuple[list[Place], tuple[float, ...]]]:
    """The sets of places whose entries are ranked together, each with its densities."""
    plan = coordinates.plan
    assert plan.trim is not None
    apart = trimmed_apart(plan)
    together: dict[tuple[float, ...], list[Place]] = {}
    for module in modules:
        densities = _densities(plan, number, module)
        places = _places(coordinates, number, module)
        if plan.trim.scope == "module":
            yield from (([place], densities) for place in places)
        elif module in apart:
            yield places, densities
        else:
            together.setdefault(densities, []).extend(places)
    yield from ((places, densities) for densities, places in together.items())


def _densities(plan: Plan, number: int, module: str) -> tuple[float, ...]:
    """The method's densities, the last replaced by one that was set for the adapter or the module."""
    assert plan.trim is not None
    *others, last = plan.trim.densities
    return (*others, plan.density(number, module, last))


def _ends(densities: Sequence[float], entries: int) -> list[int]:
    """How many entries lie above the lower end of each band; the last band is whole, the others give way."""
    *others, last = [kept_count(density, entries) for density in densities]
    ends: list[int] = []
    for count in others:
        ends.append(min(entries - last, (ends[-1] if ends else 0) + count))
    return [*ends, (ends[-1] if ends else 0) + last]


def _places(coordinates: Coordinates, number: int, module: str) -> list[Place]:
    def read(part: int) -> Delta:
        return coordinates.parts(number, module)[part]

    sizes = [size(part) for part in coordinates.parts(number, module)]
    return [Place(module, part, count, partial(read, part)) for part, count in enumerate(sizes)]


def _cut(group: Sequence[Place], keep: int, crew: Workers) -> dict[tuple[str, int], Cut]:
    """The cut of each place of one group that keeps so many of its entries."""
    entries = sum(place.size for place in group)
    if keep in (0, entries):
        return {(place.module, place.part): KEEP_NONE if keep == 0 else KEEP_ALL for place in group}
    sigmas = SIGMAS
    while True:
        low, high = _bracket(group, keep / entries, sigmas, entries)
        found = [_census(place.read(), low, high, crew) for place in group]
        above = sum(census.above for census in found)
        inside = np.concatenate([values for census in found for values in census.inside])
        if above < keep <= above + len(inside):
            break
        if (low, high) == (0.0, math.inf):  # all were counted, so some have no place in an order
            raise MethodError(
                f"module '{printable(group[0].module)}': a weighted task vector is beyond what float32 can hold. "
                "Use smaller weights."
            )
        sigmas *= 4
    missing = keep - above  # so many of those inside are kept, the largest first
    threshold = float(np.partition(inside, len(inside) - missing)[len(inside) - missing])
    spare = missing - int(np.count_nonzero(inside > threshold))
    return _share(group, found, threshold, spare)


def _share(group: Sequence[Place], found: Sequence[Census], threshold: float, spare: int) -> dict[tuple[str, int], Cut]:
    """Hand out the places left for entries that equal the threshold, in order of position."""
    equal = [[int(np.count_nonzero(values == threshold)) for values in census.inside] for census in found]
    if threshold == 0 or sum(map(sum, equal)) == spare:
        return {(place.module, place.part): Cut(threshold) for place in group}
    cuts = {}
    for place, counts in zip(group, equal, strict=True):
        quota = []
        for count in counts:
            quota.append(ALL if count <= spare else spare)
            spare -= min(count, spare)
        cuts[place.module, place.part] = Cut(threshold, tuple(quota))
    return cuts


def _bracket(group: Sequence[Place], share: float, sigmas: float, entries: int) -> tuple[float, float]:
    """Magnitudes between which the one that `share` of all entries exceed lies, most likely."""
    spread = sigmas * math.sqrt(share * (1 - share) / SAMPLE)
    if entries <= WHOLE or spread >= 0.5:
        return 0.0, math.inf
    sample = torch.cat([_sample(place, max(1, SAMPLE * place.size // entries)) for place in group])
    count = len(sample)
    top = count - 1 - math.floor((share - spread) * count)  # places from the smallest magnitude up
    bottom = count - 1 - math.ceil((share + spread) * count)
    ranked = np.partition(sample.abs().numpy(), (max(0, bottom), min(count - 1, top)))
    low = 0.0 if bottom < 0 else float(ranked[bottom])
    high = math.inf if top >= count - 1 else float(ranked[top])
    return low, high


def _sample(place: Place, count: int) -> Tensor:
    """Some entries, at places that depend on the module's name alone; they only steer the search."""
    draw = np.random.default_rng([zlib.crc32(place.module.encode()), place.part])
    delta = place.read()
    where = torch.from_numpy(draw.integers(0, place.size, count))
    return delta.sample(where.to(delta.rows(0, 0).device)).cpu()


def _census(delta: Delta, low: float, high: float, crew: Workers) -> Census:
    """Count the magnitudes above `high` and collect those in [low, high], tile by tile."""

    device = delta.rows(0, 0).device

    def tile(rows: tuple[int, int]) -> tuple[int, np.ndarray]:
        shape = (rows[1] - rows[0], *delta.shape[1:])
        values = delta.rows(*rows, out=crew.scratch("vector", shape, device)).abs_()
        return _count(values, low, high)

    found = crew.map(tile, tiles(delta.shape))
    return Census(sum(above for above, _ in found), [inside for _, inside in found])


def _count(values: Tensor, low: float, high: float) -> tuple[int, np.ndarray]:
    """(how many exceed `high`, those in [low, high] in order); on the CPU by NumPy, whose counting is faster."""
    if values.device.type == "cpu":
        flat = values.numpy().reshape(-1)
        above = flat > np.float32(high)
        return int(np.count_nonzero(above)), flat[(flat >= np.float32(low)) ^ above]
    larger = values > high
    return int(larger.sum()), values[(values >= low) ^ larger].cpu().numpy()
