"""Choices: the names and defaults that the command line's help and completion show. Reading them needs no torch."""

from __future__ import annotations

import pkgutil
from pathlib import Path

# The defaults of a merge, the same for every call, command and recipe; a method's and a space's own are its fields'.
METHOD, SPACE, RANK, SEED, DEVICE = "ties", "delta", "auto", 0, "cpu"

DTYPES = ("float32", "float16", "bfloat16")
SCOPES = ("adapter", "module")

# What becomes of whole layers in a merge; see `heads`.
ERROR, DROP, AVERAGE, MERGE, KEEP = "error", "drop", "average", "merge", "keep="
POLICIES = (ERROR, DROP, f"{KEEP}NAME", AVERAGE, MERGE)

STATISTICS = ("fisher", "gram")
EVALUATION_BATCH = 32  # rows
FITS = ("factors", "gains")
DISTIL_BATCH = 16  # rows

# A search: trials, the factor on the mean of |w|, and what it is held against; see `controls`.
BUDGET, PENALTY = 40, 0.05
BASE, MEAN, SINGLE = "base", "mean", "best single"
WEIGHTS, ADAPTERS, TRAINED = "random weights", "random adapters", "trained"
CONTROLS = (BASE, MEAN, SINGLE, WEIGHTS, ADAPTERS)
DETAIL = " · "  # in the name of a stage of work, before what changes while the stage lasts


def method_names() -> list[str]:
    """Return the names of this package's own methods: those of the files that define them."""
    return _files("methods")


def space_names() -> list[str]:
    """Return the names of the spaces: those of the files that define them."""
    return _files("spaces")


def _files(folder: str) -> list[str]:
    found = pkgutil.iter_modules([str(Path(__file__).parent / folder)])
    return sorted(entry.name for entry in found if entry.name != "base")
