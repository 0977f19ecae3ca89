"""The methods of merging: one file each in this folder, and those that other packages add.

In: the weighted task vectors of one module. Out: the merged one. Uses: `errors`, `task_vectors`, to check
parameters and names `spaces`, and to find the files `adapters.found_classes`.

A package of yours adds a method by an entry point of the group `ties_peft.methods` that names a subclass of `Method`;
nothing here changes. In a notebook or a script, `register` adds one to the running process. `Method` shows a complete one.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..adapters.found_classes import ClassesByName
from ..errors import MethodError, RecipeError, unknown
from ..spaces import build, spaces
from ..task_vectors.trim import Scope
from .aliases import other_name
from .base import Density, Method, TaskVectors, Trim, masked

__all__ = [
    "Density",
    "Method",
    "MethodInfo",
    "Scope",
    "Stages",
    "TaskVectors",
    "Trim",
    "find_method",
    "make_method",
    "make_stages",
    "masked",
    "method_classes",
    "methods",
    "register",
]

GROUP = "ties_peft.methods"
_REGISTERED: dict[str, type[Method]] = {}


class Parameter(NamedTuple):
    """One parameter of a method."""

    name: str
    default: Any
    meaning: str


class MethodInfo(NamedTuple):
    """Name, parameters, spaces and source of a method, as `ties-peft methods` shows them."""

    name: str
    summary: str
    parameters: tuple[Parameter, ...]
    default_scale: float | str
    spaces: tuple[str, ...]
    kinds: tuple[str, ...]
    source: str
    text: str


@functools.cache
def method_classes() -> Mapping[str, type[Method]]:
    """Return the class of every method by its name; a file of this folder is imported when its class is asked for.

    Raises: MethodError where another package adds one that cannot be loaded, or whose name is taken.
    """
    added: dict[str, type[Method]] = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        cls = _load_entry_point(point)
        other = ClassesByName(__name__, Method, added | _REGISTERED).get(cls.name)
        if other is not None and _path(other) != _path(cls):
            raise MethodError(
                f"two methods have the name '{cls.name}': {other.__module__}.{other.__name__} and {point.value}. Rename "
                "one of them, or uninstall the package that adds it."
            )
        added[cls.name] = cls
    return ClassesByName(__name__, Method, added | _REGISTERED)


def _path(cls: type) -> tuple[str, str]:
    """Return what stays the same when a module is loaded again."""
    return cls.__module__, cls.__qualname__


def _load_entry_point(point: importlib.metadata.EntryPoint) -> type[Method]:
    """Return the class that another package adds.

    Raises: MethodError naming the entry point, where it cannot be loaded or is not a method.
    """
    try:
        cls = point.load()
    except Exception as error:
        raise MethodError(
            f"the entry point {point.name} = {point.value} of group {GROUP} cannot be loaded "
            f"({type(error).__name__}: {error}). Correct the package that adds it, or uninstall it."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, Method) and isinstance(getattr(cls, "name", None), str)):
        raise MethodError(
            f"the entry point {point.name} = {point.value} of group {GROUP} is {cls!r}; expected a "
            "subclass of ties_peft.methods.Method with a name. Correct the package that adds it, or uninstall it."
        )
    return cls


def register(cls: type[Method]) -> type[Method]:
    """Add a method of your own to the running process; also as the decorator `@register`.

    The recipe of a result holds the method's name, and can be run again where the method is registered again. To add a
    method to every process, the command line's too, use an entry point (see above). Registering a name again replaces
    the class.

    Args:
        cls: a subclass of `Method` with a `name`, a docstring and a `merge`.
    Returns: the class.
    Raises: MethodError for anything else, and for the name of a method of this package. Where an entry point adds another class
        of the name, the next use of a method's name raises it; entry points are not loaded here, since a class may stand
        in one and be registered as well.
    """
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise MethodError(f"{cls!r} is not a method; expected a subclass of ties_peft.methods.Method.")
    missing = [] if isinstance(getattr(cls, "name", None), str) else ["name"]
    missing += [] if vars(cls).get("__doc__") else ["a docstring"]
    missing += ["merge"] if inspect.isabstract(cls) else []
    if missing:
        raise MethodError(f"the method class {cls.__name__} lacks {' and '.join(missing)}.")
    if not cls.name.isidentifier():
        raise MethodError(f"the method {cls.__name__} has the name {cls.name!r}; expected letters, digits and _.")
    if cls.name in ClassesByName(__name__, Method):
        raise MethodError(f"the name '{cls.name}' is that of another method. Give yours another name.")
    _REGISTERED[cls.name] = cls
    method_classes.cache_clear()
    return cls


def find_method(name: str) -> type[Method]:
    """Return the class of a method.

    Raises: RecipeError for an unknown name, with the nearest names and all of them.
    """
    if not isinstance(name, str) or name not in method_classes():
        raise RecipeError(unknown("method", name, method_classes(), _method_hint(str(name))))
    return method_classes()[name]


def _method_hint(name: str) -> str | None:
    """Return a sentence on the name of something else, such as a space; None for an unknown name."""
    if name in spaces():
        return f'{name} is a space: --space {name} (space="{name}").'
    return other_name(name)


@dataclass(frozen=True)
class Stages:
    """A method, or several in a row: dare+ties, pico+ties, ties+iso_c.

    Attributes:
        before: the methods that prepare the task vectors, in order.
        method: the method that merges.
        after: the methods that change the result, in order.
    """

    before: tuple[Method, ...]
    method: Method
    after: tuple[Method, ...]

    @property
    def all(self) -> tuple[Method, ...]:
        """All of them, in order."""
        return (*self.before, self.method, *self.after)

    @property
    def last(self) -> Method:
        """The stage that changes the result last, whose default λ holds."""
        return (self.method, *(stage for stage in self.before if stage.finishes()), *self.after)[-1]


def make_stages(name: str, parameters: dict[str, Any]) -> Stages:
    """Return the method or methods of a name such as `ties` or `dare+ties`, with their parameters, checked.

    A parameter that several stages have is set by the stage's name: `dare.density`, `ties.density`.

    Raises: RecipeError for an unknown method, MethodError for methods that cannot be combined and for a parameter that
        no stage has, that several stages have, or that is out of range.
    """
    names = [part.strip() for part in name.split("+")]
    classes = [find_method(part) for part in names]
    merging = _find_merging_stage(names, classes)
    given: list[dict[str, Any]] = [{} for _ in names]
    for parameter, value in parameters.items():
        stage, own = _find_stage(parameter, names, classes)
        given[stage][own] = value
    made = [make_method(part, values) for part, values in zip(names, given, strict=True)]
    return Stages(tuple(made[:merging]), made[merging], tuple(made[merging + 1 :]))


def _find_merging_stage(names: list[str], classes: list[type[Method]]) -> int:
    """Return the position of the stage that merges: the first that cannot stand before another, else the last."""
    place = next((i for i, cls in enumerate(classes) if not cls.prepares()), len(classes) - 1)
    wrong = [name for name, cls in zip(names[place + 1 :], classes[place + 1 :], strict=True) if not cls.finishes()]
    if wrong:
        raise MethodError(
            f"method '{'+'.join(names)}': '{wrong[0]}' cannot stand after '{names[place]}'. Before a merging method: "
            f"{_methods_with('prepares')}; after it: {_methods_with('finishes')}."
        )
    return place


def _methods_with(role: str) -> str:
    return ", ".join(name for name, cls in method_classes().items() if getattr(cls, role)())


def _find_stage(parameter: str, names: list[str], classes: list[type[Method]]) -> tuple[int, str]:
    """Return the position of the stage that a parameter belongs to, and its name there."""
    stage, dot, own = parameter.rpartition(".")
    if dot and stage in names and own in classes[names.index(stage)].model_fields:
        return names.index(stage), own
    holders = [i for i, cls in enumerate(classes) if parameter in cls.model_fields]
    if len(holders) == 1:
        return holders[0], parameter
    if holders:
        choices = " or ".join(f"{names[i]}.{parameter}" for i in holders)
        raise MethodError(f"method '{'+'.join(names)}' has several parameters '{parameter}'. Use {choices}.")
    known = [field for cls in classes for field in cls.model_fields]
    raise MethodError(f"method '{'+'.join(names)}': {unknown('parameter', parameter, known)}")


def make_method(name: str, parameters: dict[str, Any]) -> Method:
    """Return one method with its parameters, checked.

    Raises: RecipeError for an unknown method, MethodError for a parameter out of range.
    """
    return build("method", name, find_method(name), parameters)


def methods() -> tuple[MethodInfo, ...]:
    """Return all methods: name, parameters with defaults, spaces, source."""
    return tuple(_info(cls) for cls in method_classes().values())


def _info(cls: type[Method]) -> MethodInfo:
    text = inspect.cleandoc(cls.__doc__ or "")
    parameters = tuple(Parameter(n, f.default, f.description or "") for n, f in cls.model_fields.items())
    return MethodInfo(
        cls.name, text.split("\n")[0], parameters, cls.default_scale, cls.spaces, cls.kinds, cls.source, text
    )
