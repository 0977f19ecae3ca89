"""Fast: the two inner loops of a trim and an election, compiled where numba is installed (the extra `fast`).

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


@dataclass(frozen=True)
class Kernels:
    """The compiled loops; arrays are flat float32.

    Attributes:
        name: of what compiled them, with its version.
        cast: cast(values, positive, negative, plus, minus): one vote, see `Ballot.cast`.
        count: count(values, low, high, room, marks) → (how many |values| exceed high, how many lie in
            [low, high]); the latter are written into `room`, in order. `room` has an entry more than
            `values`, and `marks` a byte for each.
    """

    name: str
    cast: Callable[..., None]
    count: Callable[..., tuple[int, int]]


_loaded: list[Kernels] = []


def load(entries: float) -> None:
    """Compile the loops if numba is there and so many entries are worth it."""
    if _loaded or entries < WORTH or find_spec("numba") is None:
        return
    numba: Any = importlib.import_module("numba")
    compiled = numba.njit(nogil=True, cache=True)
    _loaded.append(Kernels(f"numba {numba.__version__}", compiled(_cast), compiled(_count)))


def kernels() -> Kernels | None:
    """The compiled loops, if they are loaded."""
    return _loaded[0] if _loaded else None


def _cast(values: np.ndarray, positive: np.ndarray, negative: np.ndarray, plus: np.ndarray, minus: np.ndarray) -> None:
    none, one = np.float32(0.0), np.float32(1.0)
    for place in range(len(values)):
        value = values[place]
        positive[place] += max(none, value)
        negative[place] += min(none, value)
        plus[place] += one if value > none else none
        minus[place] += one if value < none else none


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
