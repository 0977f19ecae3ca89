"""Fused: factored task vectors multiplied out inside the compiled loops that count them and vote on them.

A product rounds as the loop that makes it does. Of one merge, everything that reads the entries of a
factored task vector by rows must therefore read them here: what the survey counts is then what the merge cuts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from .delta import Delta, LowRank
from .fast import Kernels, Launches, Loops

Room = Callable[[str, Sequence[int]], Tensor]  # float32 memory by purpose and shape, its content left from the last use
UNCUT = np.float32(np.inf)


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
    hefts: Sequence[float],
    mean: bool,
    rows: tuple[int, int],
    out: Tensor,
    loops: Loops,
    room: Room,
) -> tuple[int, int]:
    """Some rows of the disjoint mean (or sum) of trimmed task vectors, elected by mass, into `out`; see `Ballot`.

    Args:
        below: for each, the largest magnitude that is cut.
        hefts: for each, what its vote adds to the divisor of the mean.
    Returns: how many entries have kept values of both signs, how many have several.
    """
    if isinstance(loops, Launches):
        return loops.vote([_part(delta, rows) for delta in deltas], below, hefts, mean, out)
    factors = [_factors(delta, rows) for delta in deltas]
    count = -len(deltas) % loops.group  # so many fill up the last group
    ranks = np.array([*(len(A) for _, A in factors), *[0] * count], np.int64)
    addresses = [(B.ctypes.data, A.ctypes.data) for B, A in factors]
    addresses += addresses[:1] * count
    return loops.vote(
        np.array(addresses, np.int64),
        ranks,
        np.array([*below, *[UNCUT] * count], np.float32),
        np.array([*hefts, *[0.0] * count], np.float32),
        mean,
        room("panels", (max(1, int(ranks.sum())), loops.panel)).numpy(),
        room("blocks", (loops.group, loops.rows, loops.panel)).numpy(),
        room("votes", (5, loops.rows * loops.panel)).numpy(),
        out.numpy(),
    )


def _part(delta: Delta, rows: tuple[int, int]) -> tuple[Tensor, Tensor]:
    assert isinstance(delta, LowRank)
    return delta.B[rows[0] : rows[1]].contiguous(), delta.A.contiguous()


def _factors(delta: Delta, rows: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    B, A = _part(delta, rows)
    return B.numpy(), A.numpy()


def _panel(loops: Kernels, rank: int, room: Room) -> tuple[np.ndarray, np.ndarray]:
    return room("panels", (max(1, rank), loops.panel)).numpy(), room("blocks", (loops.rows, loops.panel)).numpy()


__all__ = ["census", "fits", "read", "vote"]
