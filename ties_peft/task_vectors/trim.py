"""Trim a task vector: keep the k = ⌊density·n⌋ entries of largest magnitude, and set the others to zero.

Of equal magnitudes the first by position are kept, so that exactly k are. A search for the threshold results in a
`Cut`, which a later pass over the same entries applies tile by tile.

Source: Yadav et al., TIES-Merging (NeurIPS 2023), section 3, step 1. The authors' code keeps
int(k·n) + 1 entries and all that equal the threshold; PEFT keeps int(density·n), with equal
magnitudes cut arbitrarily; both take `density` in binary, so that 0.29 of 100 is 28.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from .threshold import kth_largest

Scope = Literal["adapter", "module"]  # over what a trim ranks magnitudes: the whole task vector, or each module


@functools.lru_cache(1 << 12)
def kept_count(density: float, entries: int) -> int:
    """Return k = ⌊density·n⌋, with the density as the decimal that was written.

    >>> kept_count(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    return math.floor(Fraction(repr(float(density))) * entries)


def count_at_least(share: float, entries: int) -> int:
    """Return ⌈share·n⌉, with the share as the decimal that was written.

    >>> count_at_least(0.07, 100), math.ceil(0.07 * 100)
    (7, 8)
    """
    return math.ceil(Fraction(repr(float(share))) * entries)


def band_ends(densities: Sequence[float], entries: int) -> list[int]:
    """Return how many entries lie above the lower end of each band of magnitudes.

    The last band has its full size; the others are shortened where together they would exceed all entries.
    """
    *others, last = [kept_count(density, entries) for density in densities]
    ends: list[int] = []
    for count in others:
        ends.append(min(entries - last, (ends[-1] if ends else 0) + count))
    return [*ends, (ends[-1] if ends else 0) + last]


@dataclass(frozen=True)
class Trim:
    """Describe a trim as a method asks for it.

    Attributes:
        densities: the shares of successive bands of magnitudes, from the largest down, see `band_ends`; a cut is found
            at the lower end of each. A density set for one adapter or module replaces the last one.
        scope: over what magnitudes are ranked.
    """

    densities: tuple[float, ...]
    scope: Scope = "adapter"


@dataclass(frozen=True)
class Cut:
    """Trim one task vector on one part of one module by a threshold that is known.

    Attributes:
        threshold: the smallest magnitude that is kept; inf keeps nothing, 0 keeps everything.
        excess: for every tile, how many of the entries that equal the threshold are set to zero, the last ones in
            row-major order; empty if all of them are kept.
    """

    threshold: float
    excess: tuple[int, ...] = ()

    @classmethod
    def with_first(cls, threshold: float, equal: Sequence[int], kept: int) -> Cut:
        """Return the cut that keeps the first `kept` of the entries that equal the threshold, or all if there are fewer.

        Args:
            equal: how many there are in each tile.
        """
        excess = []
        for count in equal:
            excess.append(max(0, count - kept))
            kept -= min(count, kept)
        return cls(threshold, tuple(excess) if any(excess) else ())

    def apply_(self, values: Tensor, tile: int | None = None) -> Tensor:
        """Set the entries below the threshold to zero, in place.

        Args:
            values: the entries of one tile, or of the whole part.
            tile: the number of the tile; None for the whole part.
        """
        if self.threshold == math.inf:
            return values.zero_()
        if self.threshold == 0:
            return values
        excess = self.excess_in(tile)
        if excess:
            equal = (values.abs() == self.threshold).reshape(-1).nonzero().reshape(-1)
            values.view(-1)[equal[-excess:]] = 0.0
        # hardshrink keeps |x| > λ, and with λ just below the threshold |x| ≥ threshold
        return torch.ops.aten.hardshrink.out(values, self.limit, out=values)  # type: ignore[no-any-return]

    @functools.cached_property
    def limit(self) -> float:
        """The largest magnitude that is set to zero; 0 if none is."""
        if self.threshold in (0, math.inf):
            return self.threshold
        return torch.nextafter(torch.tensor(self.threshold, dtype=torch.float32), torch.zeros(())).item()

    def excess_in(self, tile: int | None) -> int:
        """Return how many entries of a tile, or of the whole part, equal the threshold and are set to zero."""
        return sum(self.excess) if tile is None or not self.excess else self.excess[tile]


KEEP_ALL = Cut(0.0)
KEEP_NONE = Cut(math.inf)
Cuts = Sequence[tuple[Cut, ...]]  # for each task vector, a cut for each density


@dataclass(frozen=True)
class DeclaredTrim:
    """Hold the trim that `Method.trims` returns, and how to get its cuts, which are found over all modules.

    Attributes:
        trim: None if the method declares none.
        cuts: returns the cuts of these task vectors.
    """

    trim: Trim | None
    cuts: Callable[[], Cuts]


@dataclass(frozen=True)
class Densities:
    """Hold the method's own density and those that replace it.

    Attributes:
        own: that of the method.
        each: for each task vector: the same, or one set for the adapter or the module.
    """

    own: float
    each: Sequence[float]


def find_cuts(magnitudes: Tensor, densities: Sequence[float], grid: Sequence[tuple[int, int]]) -> tuple[Cut, ...]:
    """Return the cut at the lower end of each band, for magnitudes that are all in memory.

    Args:
        magnitudes: (rows, …), of one task vector on one part.
        densities: as in `Trim`.
        grid: the tiles in which the cuts will be applied.
    Law: exactly ⌊density·n⌋ entries stay, the first of equal magnitudes.
    """
    return tuple(find_cut(magnitudes, keep, grid) for keep in band_ends(densities, magnitudes.numel()))


def find_cut(magnitudes: Tensor, keep: int, grid: Sequence[tuple[int, int]]) -> Cut:
    """Return the cut that keeps the `keep` largest magnitudes; the other arguments are those of `find_cuts`.

    >>> find_cut(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2, [(0, 4)])
    Cut(threshold=2.0, excess=(1,))
    """
    if keep in (0, magnitudes.numel()):
        return KEEP_NONE if keep == 0 else KEEP_ALL
    threshold = kth_largest(magnitudes.detach().cpu().numpy(), keep)
    equal = [int((magnitudes[start:stop] == threshold).sum()) for start, stop in grid]
    return Cut.with_first(threshold, equal, keep - int((magnitudes > threshold).sum()))
