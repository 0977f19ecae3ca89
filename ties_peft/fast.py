"""Fast: the inner loops of a trim and an election, compiled where numba is installed (the extra `fast`).

`count` and `cast` do in one pass over a tile what takes torch or NumPy several, by the same operations
on the same numbers in the same order: the results are the same, bit for bit. `census` and `vote` also make the
products B·A that they work on, which may round otherwise than torch's do, within float32; see `loops`.
Whether a merge uses them depends on its size alone, so that it has the same bytes whatever was merged before it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

WORTH = 1 << 26  # entries of all task vectors together from which loading a compiler pays


@dataclass(frozen=True)
class Kernels:
    """The compiled loops, each as described in `loops`.

    Attributes:
        name: of what compiled them, with its version.
        panel, rows, group: the sizes of their blocks.
    """

    name: str
    panel: int
    rows: int
    group: int
    cast: Callable[..., None]
    count: Callable[..., tuple[int, int]]
    within: Callable[..., Any]
    read: Callable[..., None]
    census: Callable[..., tuple[int, int]]
    vote: Callable[..., tuple[int, int, int]]
    settle: Callable[..., tuple[int, int]]


def load(entries: float) -> Kernels | None:
    """The compiled loops if numba is there and so many entries are worth it, else None."""
    if entries < WORTH or find_spec("numba") is None:
        return None
    numba: Any = importlib.import_module("numba")
    made: Any = importlib.import_module(f"{__package__}.loops")
    loops = (made.cast, made.count, made.within, made.read, made.census, made.vote, made.settle)
    return Kernels(f"numba {numba.__version__}", made.PANEL, made.ROWS, made.GROUP, *loops)
