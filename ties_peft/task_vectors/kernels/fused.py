"""Fused: factored task vectors multiplied out inside the compiled loops that count them and vote on them.

A product rounds as the loop that makes it does. Of one merge, everything that reads the entries of a
factored task vector by rows must therefore read them here: what the survey counts is then what the merge cuts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..delta import Delta, LowRank
from .backends import Kernels, Launches, Loops

Room = Callable[[str, Sequence[int]], Tensor]  # float32 memory by purpose and shape, its content left from the last use
UNCUT = math.inf


def read(delta: Delta, rows: tuple[int, int], out: Tensor, loops: Loops | None, room: Room) -> Tensor:
    """Rows of a task vector, written into `out`; the same bits in every pass of a merge."""
    if loops is None or not fits(delta, loops):
        return delta.rows(*rows, out=out)
    if isinstance(loops, Launches):
        loops.read(*_part(delta, rows), out)
        return out
    B, A = _factors(delta, rows)
    loops.read(B, A, *_panel(loops, len(A), room), out.numpy())
    return out


def fits(delta: Delta, loops: Loops) -> bool:
    """Whether the loops can multiply it out."""
    return isinstance(delta, LowRank) and delta.B.device.type == loops.device


def census(
    delta: Delta, rows: tuple[int, int], low: np.float32, high: np.float32, loops: Loops, room: Room
) -> tuple[int, np.ndarray]:
    """(how many magnitudes of some rows exceed `high`, those in [low, high] in no certain order)."""
    entries = (rows[1] - rows[0]) * delta.shape[1]
    if isinstance(loops, Launches):
        return loops.census(*_part(delta, rows), float(low), float(high), room("inside", (entries,)))
    B, A = _factors(delta, rows)
    inside = room("inside", (entries + 1,)).numpy()
    marks = room("marks", (loops.rows * loops.panel // 4 + 1,)).numpy().view(np.uint8)
    above, found = loops.census(B, A, low, high, inside, marks, *_panel(loops, len(A), room))
    return above, inside[:found].copy()


def vote(
    deltas: Sequence[Delta],
    below: Sequence[float],
    weights: Sequence[float],
    mean: bool,
    rows: tuple[int, int],
    out: Tensor,
    loops: Loops,
    room: Room,
) -> tuple[int, int]:
    """Some rows of the disjoint mean (or sum) of trimmed task vectors, elected by mass, into `out`; see `SignedSums`.

    Args:
        below: for each, the largest magnitude that is cut.
        weights: for each, what its vote adds to the divisor of the mean.
    Returns: how many entries have kept values of both signs, how many have several.
    """
    if isinstance(loops, Launches):
        return loops.vote([_part(delta, rows) for delta in deltas], below, weights, mean, out)
    factors = [_factors(delta, rows) for delta in deltas]
    call = _call(factors, below, weights, mean, out, loops, room, loops.group)
    conflicting, shared, _ = loops.vote(*call, None, None, None, None, None)
    return conflicting, shared


@dataclass(frozen=True)
class Look:
    """What a glance at some rows found and left open.

    Attributes:
        conflicts: as of `vote`, of the entries that it decided.
        above: for each task vector, how many of its magnitudes exceed its bracket.
        inside: for each, its magnitudes inside the bracket, in no certain order.
        places: (L,), int32, the entries that it did not decide, flat in the rows, in no certain order.
        values: (N, L), of each task vector there.
    """

    conflicts: tuple[int, int]
    above: Sequence[int]
    inside: Sequence[np.ndarray]
    places: np.ndarray
    values: np.ndarray


def glance(
    deltas: Sequence[Delta],
    brackets: Sequence[tuple[np.float32, np.float32]],
    weights: Sequence[float],
    mean: bool,
    rows: tuple[int, int],
    out: Tensor,
    loops: Kernels,
    room: Room,
    most: int,
) -> Look | None:
    """`vote` before the cuts are known and `census` in one, of the entries of which no magnitude is inside its bracket.

    Args:
        brackets: for each, the magnitudes [low, high] between which its cut lies; low is NaN where high is the cut.
        most: entries that may be left open.
    Returns: None where there are more.
    """
    factors = [_factors(delta, rows) for delta in deltas]
    low, high = zip(*brackets, strict=True)
    count = len(deltas) + -len(deltas) % loops.group
    block = loops.rows * loops.panel
    above = np.zeros(count, np.int64)
    ints = {"spots": block + 1, "places": most + block}
    spots, places = (room(name, (size,)).numpy().view(np.int32) for name, size in ints.items())
    values = room("values", (len(deltas), most + block)).numpy()
    least, largest = _filled(low, UNCUT, count), _filled(high, UNCUT, count)
    call = _call(factors, high, weights, mean, out, loops, room, count)
    *conflicts, found = loops.vote(*call, least, above, spots, places, values)
    if found > most:
        return None
    marks = room("marks", (found // 4 + 1,)).numpy().view(np.uint8)
    kept = room("inside", (len(deltas) * found + 1,)).numpy()
    ends = loops.within(values, found, least, largest, kept, marks).cumsum()
    inside = np.split(kept[: ends[-1]].copy(), ends[:-1])
    return Look(
        (conflicts[0], conflicts[1]),
        above[: len(deltas)].tolist(),
        inside,
        places[:found].copy(),
        values[:, :found].copy(),
    )


def settle(
    look: Look, below: Sequence[float], weights: Sequence[float], mean: bool, out: Tensor, loops: Kernels, room: Room
) -> tuple[int, int]:
    """Decide what a glance left open, into the `out` that it wrote, by `vote`'s operations; what `vote` returns."""
    count = len(below) + -len(below) % loops.group
    conflicting, shared = loops.settle(
        look.places,
        look.values,
        _filled(below, UNCUT, count),
        _filled(weights, 0.0, count),
        mean,
        room("blocks", (loops.group, loops.rows * loops.panel)).numpy(),
        room("votes", (4, loops.rows * loops.panel)).numpy(),
        room("tallies", (2, loops.rows * loops.panel)).numpy().view(np.int32),
        room("decided", (loops.rows * loops.panel,)).numpy(),
        out.view(-1).numpy(),
    )
    return look.conflicts[0] + conflicting, look.conflicts[1] + shared


def _call(
    factors: Sequence[tuple[np.ndarray, np.ndarray]],
    below: Sequence[float],
    weights: Sequence[float],
    mean: bool,
    out: Tensor,
    loops: Kernels,
    room: Room,
    blocks: int,
) -> tuple[Any, ...]:
    """The arguments of the compiled vote that it always has; what fills up the last group has rank 0 and never votes."""
    count = len(factors) + -len(factors) % loops.group
    ranks = _filled([len(A) for _, A in factors], 0, count, np.int64)
    addresses = [(B.ctypes.data, A.ctypes.data) for B, A in factors]
    addresses += addresses[:1] * (count - len(factors))
    return (
        np.array(addresses, np.int64),
        ranks,
        _filled(below, UNCUT, count),
        _filled(weights, 0.0, count),
        mean,
        room("panels", (max(1, int(ranks.sum())), loops.panel)).numpy(),
        room("blocks", (blocks, loops.rows, loops.panel)).numpy(),
        room("votes", (4, loops.rows * loops.panel)).numpy(),
        room("tallies", (2, loops.rows * loops.panel)).numpy().view(np.int32),
        room("decided", (loops.rows * loops.panel,)).numpy(),
        out.numpy(),
    )


def _filled(values: Sequence[Any], filling: float, count: int, kind: type = np.float32) -> np.ndarray:
    return np.array([*values, *[filling] * (count - len(values))], kind)


def _part(delta: Delta, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    assert isinstance(delta, LowRank)
    return delta.B[rows[0] : rows[1]].contiguous(), delta.A.contiguous()


def _factors(delta: Delta, rows: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    B, A = _part(delta, rows)
    return B.numpy(), A.numpy()


def _panel(loops: Kernels, rank: int, room: Room) -> tuple[np.ndarray, np.ndarray]:
    return room("panels", (max(1, rank), loops.panel)).numpy(), room("blocks", (loops.rows, loops.panel)).numpy()


__all__ = ["Look", "census", "fits", "glance", "read", "settle", "vote"]
