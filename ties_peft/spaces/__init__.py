"""The spaces there are, found by looking into this folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from ..errors import RecipeError, unknown
from .base import Frame, Space

__all__ = ["Frame", "Space", "find_space", "spaces"]


@functools.cache
def spaces() -> dict[str, Space]:
    """Every space by name."""
    found: dict[str, Space] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        found.update({c.name: c() for c in own if issubclass(c, Space) and "name" in vars(c)})
    return dict(sorted(found.items()))


def find_space(name: str) -> Space:
    """A space by name.

    Raises: RecipeError naming the nearest space and all of them.
    """
    if not isinstance(name, str) or name not in spaces():
        raise RecipeError(unknown("space", name, spaces()))
    return spaces()[name]
