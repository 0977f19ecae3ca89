"""The methods there are, found by looking into this folder and at the entry points of other packages.

A package of yours adds one with an entry point in the group `ties_peft.methods` that names a subclass
of `Method`; nothing here changes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from typing import Any, NamedTuple

from pydantic import ValidationError

from ..errors import MethodError, RecipeError, printable, unknown
from ..trim import Scope
from .base import Density, Method, Task, TaskVectors

__all__ = [
    "Density",
    "Method",
    "MethodInfo",
    "Scope",
    "Task",
    "TaskVectors",
    "find_method",
    "make_method",
    "method_classes",
    "methods",
]


class Parameter(NamedTuple):
    """One parameter of a method."""

    name: str
    default: Any
    meaning: str


class MethodInfo(NamedTuple):
    """What there is to know of a method before using it."""

    name: str
    summary: str
    parameters: tuple[Parameter, ...]
    default_scale: float
    spaces: tuple[str, ...]
    source: str
    text: str


@functools.cache
def method_classes() -> dict[str, type[Method]]:
    """Every method's class by name."""
    found: list[type[Method]] = []
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        found += [c for c in own if issubclass(c, Method) and "name" in vars(c)]
    found += [point.load() for point in importlib.metadata.entry_points(group="ties_peft.methods")]
    return {c.name: c for c in sorted(found, key=lambda c: c.name)}


def find_method(name: str) -> type[Method]:
    """The class of a method.

    Raises: RecipeError naming the nearest method and all of them.
    """
    if not isinstance(name, str) or name not in method_classes():
        raise RecipeError(unknown("method", name, method_classes()))
    return method_classes()[name]


def make_method(name: str, parameters: dict[str, Any]) -> Method:
    """A method with its parameters, checked.

    Raises: RecipeError for an unknown method, MethodError for a parameter that it lacks or that is
        out of range.
    """
    cls = find_method(name)
    for parameter in parameters:
        if parameter not in cls.model_fields:
            raise MethodError(
                f"method '{name}' has no such parameter: {unknown('parameter', parameter, cls.model_fields)}"
            )
    try:
        return cls(**parameters)
    except ValidationError as error:
        first = error.errors()[0]
        where, seen = first["loc"][0], printable(repr(first["input"]))
        what = first["msg"][0].lower() + first["msg"][1:]
        meaning = cls.model_fields[str(where)].description
        raise MethodError(f"method '{name}', parameter '{where}' is {seen}: {what} ({meaning}).") from None


def methods() -> tuple[MethodInfo, ...]:
    """All methods: name, parameters with defaults, spaces, source."""
    return tuple(_info(cls) for cls in method_classes().values())


def _info(cls: type[Method]) -> MethodInfo:
    text = inspect.cleandoc(cls.__doc__ or "")
    parameters = tuple(Parameter(n, f.default, f.description or "") for n, f in cls.model_fields.items())
    return MethodInfo(cls.name, text.split("\n")[0], parameters, cls.default_scale, cls.spaces, cls.source, text)
