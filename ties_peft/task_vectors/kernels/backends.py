"""Fast: the inner loops of a trim and an election, compiled where a compiler is there.

On a CPU that is numba (the extra `fast`), on a GPU Triton (the extra `gpu`; torch brings it along on Linux).

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

import numpy as np

WORTH = 1 << 26  # entries of all task vectors together from which loading a compiler pays
WORTH_ON_GPU = 1 << 30  # there; reckoned, not measured: a second of compiling, against memory of some TB/s


@dataclass(frozen=True)
class Kernels:
    """The compiled loops for a CPU, each as described in `loops`.

    Attributes:
        name: of what compiled them, with its version.
        device: the sort that they run on.
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
    device: str = "cpu"


@dataclass(frozen=True)
class Launches:
    """The same for a GPU, each as described in `triton_loops`.

    Attributes:
        name: of what compiles them, with its version.
        device: the sort that they run on.
    """

    name: str
    read: Callable[..., None]
    census: Callable[..., tuple[int, np.ndarray]]
    vote: Callable[..., tuple[int, int]]
    device: str = "cuda"


Loops = Kernels | Launches


def load(entries: float, device: str = "cpu") -> Loops | None:
    """The compiled loops for a sort of device, if its compiler is there and so many entries are worth it, else None."""
    if device == "cpu":
        return None if entries < WORTH or find_spec("numba") is None else _kernels()
    return None if device != "cuda" or entries < WORTH_ON_GPU or find_spec("triton") is None else _launches()


def _launches() -> Launches:
    triton: Any = importlib.import_module("triton")
    made: Any = importlib.import_module(f"{__package__}.triton_kernels")
    return Launches(f"triton {triton.__version__}", made.read, made.census, made.vote)


def _kernels() -> Kernels:
    numba: Any = importlib.import_module("numba")
    made: Any = importlib.import_module(f"{__package__}.numba_kernels")
    loops = (made.cast, made.count, made.within, made.read, made.census, made.vote, made.settle)
    return Kernels(f"numba {numba.__version__}", made.PANEL, made.ROWS, made.GROUP, *loops)
