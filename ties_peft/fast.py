"""Fast: the inner loops of a trim and an election, compiled where numba is installed (the extra `fast`).

Each does in one pass over a tile what takes torch or NumPy several, by the same operations on the
same numbers in the same order: the results are the same, bit for bit. They are loaded for merges
that are large enough to make up for loading them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

WORTH = 1 << 26  # entries of all task vectors together from which loading a compiler pays
WORD = 8  # marks of a byte each that are looked at together
CHUNK = 2048  # entries that are voted on together
BY_MASS, BY_COUNT, BY_NOBODY = range(3)  # who elects
A_MEAN, A_SUM, OVER_ALL = range(3)  # what becomes of those that agree


@dataclass(frozen=True)
class Kernels:
    """The compiled loops; arrays are flat float32.

    Attributes:
        name: of what compiled them, with its version.
        cast: cast(values (g, n), thresholds, hefts, positive, negative, (plus, minus), weighed): the votes of
            g task vectors cut at a magnitude each, see `Ballot`; `weighed` are Σ|w| a side, or empty.
        settle: settle(positive, negative, (plus, minus), hefts, (by, combine), total, result) → (conflicting,
            shared): the disjoint merge, see `Ballot.result`.
        count: count(values, low, high, room, marks) → (how many |values| exceed high, how many lie in
            [low, high]); the latter are written into `room`, in order. `room` has an entry more than
            `values`, and `marks` a byte for each.
    """

    name: str
    cast: Callable[..., None]
    settle: Callable[..., tuple[int, int]]
    count: Callable[..., tuple[int, int]]


_loaded: list[Kernels] = []


def load(entries: float) -> None:
    """Compile the loops if numba is there and so many entries are worth it."""
    if _loaded or entries < WORTH or find_spec("numba") is None:
        return
    numba: Any = importlib.import_module("numba")
    compiled = numba.njit(nogil=True, cache=True)
    _loaded.append(Kernels(f"numba {numba.__version__}", compiled(_cast), compiled(_settle), compiled(_count)))


def kernels() -> Kernels | None:
    """The compiled loops, if they are loaded."""
    return _loaded[0] if _loaded else None


def _cast(
    values: np.ndarray,
    thresholds: np.ndarray,
    hefts: np.ndarray,
    positive: np.ndarray,
    negative: np.ndarray,
    counts: tuple[np.ndarray, np.ndarray],
    weighed: tuple[np.ndarray, np.ndarray],
) -> None:
    none, one = np.float32(0.0), np.float32(1.0)
    for start in range(0, values.shape[1], CHUNK):  # the accumulators of a chunk stay in a core's nearest cache
        chunk = slice(start, min(start + CHUNK, values.shape[1]))
        above, below = positive[chunk], negative[chunk]
        plus, minus = counts[0][chunk], counts[1][chunk]
        for number in range(len(thresholds)):
            vector, threshold = values[number][chunk], thresholds[number]
            for place in range(len(vector)):
                value = vector[place] if abs(vector[place]) >= threshold else none
                above[place] += max(none, value)
                below[place] += min(none, value)
                plus[place] += one if value > none else none
                minus[place] += one if value < none else none
        if len(weighed[0]):
            heavier, lighter = weighed[0][chunk], weighed[1][chunk]
            for number in range(len(thresholds)):
                vector, threshold, heft = values[number][chunk], thresholds[number], hefts[number]
                for place in range(len(vector)):
                    value = vector[place] if abs(vector[place]) >= threshold else none
                    heavier[place] += heft if value > none else none
                    lighter[place] += heft if value < none else none


def _settle(
    positive: np.ndarray,
    negative: np.ndarray,
    counts: tuple[np.ndarray, np.ndarray],
    hefts: tuple[np.ndarray, np.ndarray],
    rule: tuple[int, int],
    total: np.float32,
    result: np.ndarray,
) -> tuple[int, int]:
    none, one, nothing = np.float32(0.0), np.float32(1.0), np.float32(1e-30)
    plus, minus = counts
    by, combine = rule
    for place in range(len(result)):
        lead = plus[place] - minus[place] if by == BY_COUNT else positive[place] + negative[place]
        up = one if lead >= none else none
        down = one - up
        if by == BY_NOBODY:
            up, down = one, one
        agreed = positive[place] * up + negative[place] * down
        if combine == A_MEAN:
            agreed = agreed / max(hefts[0][place] * up + hefts[1][place] * down, nothing)
        elif combine == OVER_ALL:
            agreed = agreed / total
        result[place] = agreed
    both: Any = np.int32(0)
    several: Any = np.int32(0)
    for place in range(len(result)):
        both += np.int32((plus[place] > none) & (minus[place] > none))
        several += np.int32(plus[place] + minus[place] > one)
    return both, several


def _count(
    values: np.ndarray, low: np.float32, high: np.float32, room: np.ndarray, marks: np.ndarray
) -> tuple[int, int]:
    above: Any = np.int32(0)  # one that fits beside float32 lanes
    inside: Any = 0
    whole = len(values) // WORD * WORD
    for place in range(len(values)):
        size = abs(values[place])
        above += np.int32(size > high)
        marks[place] = np.uint8((size >= low) & (size <= high))
    words = marks[:whole].view(np.uint64)
    for word in range(len(words)):  # most hold no mark at all
        if words[word]:
            for place in range(WORD * word, WORD * (word + 1)):
                room[inside] = abs(values[place])  # the next overwrites it unless it counts
                inside += np.int64(marks[place])
    for place in range(whole, len(values)):
        room[inside] = abs(values[place])
        inside += np.int64(marks[place])
    return above, inside
