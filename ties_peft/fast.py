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
BLOCK = 16  # entries that are looked at together for one that lies in a bracket


@dataclass(frozen=True)
class Kernels:
    """The compiled loops; arrays are flat float32.

    Attributes:
        name: of what compiled them, with its version.
        cast: cast(values, positive, negative, plus, minus): one vote, see `Ballot.cast`.
        count: count(values, low, high, room) → (how many |values| exceed high, how many lie in [low, high]);
            the latter are written into `room`, in order.
    """

    name: str
    cast: Callable[..., None]
    count: Callable[..., tuple[int, int]]


_loaded: list[Kernels] = []


def load(entries: int) -> None:
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


def _count(values: np.ndarray, low: np.float32, high: np.float32, room: np.ndarray) -> tuple[int, int]:
    above, inside = 0, 0
    for start in range(0, len(values), BLOCK):
        stop = min(start + BLOCK, len(values))
        larger, reaching = 0, 0
        for place in range(start, stop):
            size = abs(values[place])
            larger += size > high
            reaching += size >= low
        above += larger
        if reaching != larger:
            for place in range(start, stop):
                size = abs(values[place])
                if size >= low and not size > high:
                    room[inside] = size
                    inside += 1
    return above, inside
