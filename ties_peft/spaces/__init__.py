"""The coordinates in which task vectors are merged: one file in this folder for each space, found by looking into it.

In: the task vectors of one module; the merged parts. Out: the parts that a method merges; the factors of the result. Uses:
`errors`, `task_vectors` and, to find the files, `adapters.found_classes`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..adapters.found_classes import ClassesByName
from ..errors import MethodError, RecipeError, share_hint, unknown
from .base import Encoding, Space

__all__ = ["Encoding", "Space", "build", "find_space", "make_space", "spaces"]

Model = TypeVar("Model", bound=BaseModel)


@functools.cache
def spaces() -> Mapping[str, type[Space]]:
    """Return the class of every space by its name; its file is imported when the class is asked for."""
    return ClassesByName(__name__, Space)


def find_space(name: str, hint: str | None = None) -> type[Space]:
    """Return the class of a space.

    Args:
        name: of the space.
        hint: a sentence on a name that is none, in place of the nearest space.
    Raises: RecipeError naming the nearest space and all of them.
    """
    if not isinstance(name, str) or name not in spaces():
        raise RecipeError(unknown("space", name, spaces(), hint))
    return spaces()[name]


def make_space(name: str, parameters: dict[str, Any]) -> Space:
    """Return a space with its parameters, checked.

    Raises: RecipeError for an unknown space, MethodError for a parameter out of range.
    """
    return build("space", name, find_space(name), parameters)


def build(kind: str, name: str, cls: type[Model], parameters: dict[str, Any]) -> Model:
    """Return a space or a method with its parameters, checked.

    Args:
        kind: `space` or `method`, for the message.
        name: of the space or method.
        cls: its class.
        parameters: by name.
    Raises: MethodError for a parameter out of range.
    """
    try:
        return cls(**parameters)
    except ValidationError as error:
        first = error.errors()[0]
        where, seen = first["loc"][0], repr(first["input"])
        what = first["msg"][0].lower() + first["msg"][1:]
        meaning = cls.model_fields[str(where)].description
        said = f" ({meaning})" if meaning else ""
        percent = share_hint(first["input"], first.get("ctx", {}).get("le"))
        raise MethodError(f"{kind} '{name}', parameter '{where}' is {seen}: {what}{said}.{percent}") from None
