"""Settings: what a recipe's names and parameters stand for: a space, methods, and a density for each adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import MethodError, RecipeError, share_hint, unknown
from ...methods import Method, Stages, find_method, make_stages, method_classes
from ...methods.aliases import PARAMETERS
from ...spaces import Space, make_space, spaces
from ...spaces import find_space as find_known_space
from ..options import OPTIONS
from .schedule import OVER_LAYERS, Schedule, is_gradient, plain_schedule, to_plain

DENSITY = "density"


@dataclass(frozen=True)
class Settings:
    """A space, methods and densities that were checked.

    Attributes:
        space: the coordinates.
        stages: what prepares, merges and finishes.
        densities: for each adapter, what its trim keeps in place of the method's density; None for that.
    """

    space: Space
    stages: Stages
    densities: tuple[Schedule | None, ...]


def make_settings(method: str, space: str, parameters: Mapping[str, Any], densities: Sequence[Any] = ()) -> Settings:
    """Make the space and the methods of a merge, each with the parameters that it has.

    A density that is a schedule (a gradient, or conditions) is that of every adapter without one of its own; where no filter
    of a schedule fits, the method's density holds.

    Args:
        method, space: by name.
        parameters: the method's and the space's own.
        densities: one per adapter; None for that of the method.
    Raises: RecipeError for an unknown name; MethodError for a parameter that neither has, or that is out of range.
    """
    if not isinstance(method, str):
        raise RecipeError(unknown("method", str(method), method_classes()))
    if not isinstance(space, str):
        raise RecipeError(unknown("space", str(space), spaces()))
    own = find_space(space).model_fields
    _check_once(method, parameters)
    _check_known(method, space, parameters)
    varying = {k: value for k, value in parameters.items() if _is_density(k) and isinstance(value, (list, tuple, dict))}
    numbers = {key: value for key, value in parameters.items() if key not in own and key not in varying}
    made = make_space(space, {key: value for key, value in parameters.items() if key in own})
    stages = make_stages(method, numbers)
    shared = None
    for key, value in varying.items():
        _check_owner(method, stages, key)
        shared = Schedule.read(value, key)
    _check_signs(stages.method)
    changed, read = _densities(stages.method, shared, densities)
    return Settings(made, replace(stages, method=changed), read)


def find_space(name: str) -> type[Space]:
    """Return the class of a space.

    Raises: RecipeError naming the nearest space, or that the name is a method's.
    """
    is_method = isinstance(name, str) and name in method_classes()
    return find_known_space(name, f'{name} is a method: --method {name} (method="{name}").' if is_method else None)


def recipe_parameters(parameters: Mapping[str, Any], densities: Sequence[Any] | None = None) -> dict[str, Any]:
    """Return the parameters of a call or of a command line as a recipe holds them.

    Args:
        parameters: the method's and the space's own.
        densities: of each adapter, where they were given too.
    Raises: RecipeError for a density that is a plain list of numbers. In a recipe that is mergekit's gradient over the
        layers; in a call it could as well be one number per adapter. Also where a density for all could have no effect.
    """
    asked = {}
    for key, given in parameters.items():
        value = to_plain(given)
        if _is_density(key):
            if is_gradient(value):
                raise RecipeError(_two_meanings(key, value))
            if densities and None not in densities:
                raise RecipeError(
                    f"{key} is {value!r}, but every adapter has a density of its own: "
                    f"{to_plain(densities)!r}. Leave one of the two out."
                )
            value = plain_schedule(value)
        asked[key] = value
    return asked


def _two_meanings(key: str, points: Sequence[Any]) -> str:
    text = repr(points)
    flag = ",".join(map(str, points))
    return (
        f"{key} is {text}, which can mean one density per adapter or a gradient over the layers. For one per adapter write "
        f"densities={text} (--densities {flag}); for a gradient over the layers write {key}={{'{OVER_LAYERS}': {text}}} "
        f"(--set '{key}={{{OVER_LAYERS}: {text}}}')."
    )


def _is_density(key: str) -> bool:
    return key.rpartition(".")[2] == DENSITY


def parameter_names(method: str, space: str) -> list[str]:
    """Return the names of the parameters of a method and a space: `density`, and also `ties.density`."""
    names = list(find_space(space).model_fields)
    for stage in (part.strip() for part in method.split("+")):
        fields = list(find_method(stage).model_fields)
        names += [*fields, *(f"{stage}.{field}" for field in fields)]
    return names


def all_parameters() -> set[str]:
    """Return the names of the parameters of all methods and spaces."""
    models = (*method_classes().values(), *spaces().values())
    return {name for model in models for name in model.model_fields}


def unknown_parameter(method: str, space: str, name: str, more: Sequence[str] = ()) -> str:
    """Return the message on a parameter that neither the method nor the space has, with its name here or what has it.

    Args:
        method, space: by name.
        name: of the parameter, as it was given.
        more: further names that could have been given in its place.
    """
    known = {*(own for own in parameter_names(method, space) if "." not in own), *more}
    bare = name.rpartition(".")[2]
    ours = PARAMETERS.get(bare, bare)
    hints = [f"{bare} is {ours} here."] if ours != bare else []
    if ours in OPTIONS and ours not in known:
        hints.append(f"It is an argument of the merge: {OPTIONS[ours].flag} ({ours}=…).")
    elif ours not in known:
        having = [other for other, cls in method_classes().items() if ours in cls.model_fields]
        spatial = [other for other, cls in spaces().items() if ours in cls.model_fields]
        hints += [f"Methods that have it: {', '.join(having)}."] if having else []
        hints += [f"It belongs to space {', '.join(spatial)}."] if spatial else []
    return f"method '{method}': {unknown('parameter', name, known, ' '.join(hints) or None)}"


def _check_known(method: str, space: str, parameters: Mapping[str, Any]) -> None:
    known = parameter_names(method, space)
    for name in parameters:
        if name not in known:
            raise MethodError(unknown_parameter(method, space, name))


def _check_once(method: str, parameters: Mapping[str, Any]) -> None:
    for key in parameters:
        if "+" not in method and "." in key and key.rpartition(".")[2] in parameters:
            raise MethodError(f"'{key.rpartition('.')[2]}' and '{key}' are one parameter. Keep one of them.")


def _check_owner(method: str, stages: Stages, key: str) -> None:
    """Refuse a schedule for a density that is not that of the merging method's trim."""
    make_stages(method, {key: 1.0})  # refuses a density that no stage has, or several
    stage = key.rpartition(".")[0]
    if stage not in ("", stages.method.name) or DENSITY not in type(stages.method).model_fields:
        raise MethodError(f"method '{method}': {key} is a schedule, and before a merge it can only be one number.")


def _check_signs(method: Method) -> None:
    given = getattr(method, "sign_from", None)
    if given is not None and not isinstance(given, (str, Path)) and not hasattr(given, "layout"):
        raise MethodError(f"sign_from is {given!r}; expected an adapter's path, its Hub id or an Adapter.")


def _densities(
    method: Method, shared: Schedule | None, own: Sequence[Any]
) -> tuple[Method, tuple[Schedule | None, ...]]:
    """Return the method, with another density where all adapters have that one, and the density of each adapter.

    Args:
        method: that merges.
        shared: the schedule for all adapters, if one was given.
        own: the density of each adapter; None for that of all.
    """
    if shared is None and all(density is None for density in own):
        return method, (None,) * len(own)
    of_method = getattr(method, DENSITY, None)
    if of_method is None:
        raise MethodError(f"method '{method.name}' has no density, but an adapter was given one.")
    of_all = Schedule(of_method) if shared is None else shared.with_default(of_method)
    of_each = [
        of_all if density is None else Schedule.read(density, f"density {place + 1}").with_default(of_all.value)
        for place, density in enumerate(own)
    ]
    numbers = [number for schedule in [of_all, *of_each] for number in schedule.numbers()]
    for number in numbers:
        if not 0 < number <= 1:
            raise MethodError(
                f"method '{method.name}', a density is {number}; expected a share in (0, 1].{share_hint(number)}"
            )
    used = {number for schedule in of_each for number in schedule.numbers()} or set(numbers)
    if len(used) == 1:
        return method.model_copy(update={DENSITY: used.pop()}), (None,) * len(own)
    return method, tuple(of_each)
