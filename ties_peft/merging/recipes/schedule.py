"""Schedule: a number that may differ from module to module, as mergekit's users write it.

    0.5                                      the same everywhere
    {over_layers: [1.0, 0.7, 0.1]}           a gradient over the layers, straight between its points
    [1.0, 0.7, 0.1]                          the same in a recipe, and where it is one adapter's own
    [{filter: mlp, value: 0.5}, {value: 0}]  the first whose filter is part of the module's name

A filter is plain text, not a pattern; without one, or with `*`, a condition holds for every module. A value inside a
condition may itself be a gradient. The layers are counted by the modules' names, of all adapters of the merge: layer i of L
reads the gradient at i/(L − 1). A module outside the numbered layers (an embedding, a head) reads its first point.

Source: the meaning is that of mergekit's recipes (Goddard et al., 2024, arXiv 2403.13257).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters.config_values import is_number
from ...errors import RecipeError

LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
EVERYWHERE = (None, "*")
OVER_LAYERS = "over_layers"
EXPECTED = (
    f"a finite number, {{{OVER_LAYERS}: [1.0, 0.5]}} for a gradient over the layers, or a list of "
    "{filter: PART_OF_NAME, value: …} whose last may lack the filter"
)


@dataclass(frozen=True)
class Schedule:
    """A number that may differ from module to module, checked.

    Attributes:
        value: a number, a list of numbers, or a list of conditions.
    """

    value: Any

    @classmethod
    def read(cls, value: Any, what: str) -> Schedule:
        """Check a value as a user wrote it.

        Raises: RecipeError saying what `what` may be.
        """
        if not is_schedule(listed := listed_schedule(value)):
            raise RecipeError(f"{what} is {value!r}; expected {EXPECTED}.")
        return cls(listed)

    def at(self, module: str, layers: int, default: float = 1.0) -> float:
        """Return the number for one module of a model with this number of layers; `default` where no filter fits."""
        value = self.value
        if _is_conditions(value):
            fits = (c["value"] for c in value if c.get("filter") in EVERYWHERE or str(c["filter"]) in module)
            value = next(fits, default)
        if not isinstance(value, list):
            return float(value)
        return _gradient(value, module, layers)

    def with_default(self, value: Any) -> Schedule:
        """Return this schedule with `value` where none of its filters fits."""
        return Schedule([*self.value, *conditions_of(value)]) if _is_conditions(self.value) else self

    def mapped(self, change: Callable[[float], float]) -> Schedule:
        """Return this schedule with every number changed by `change`, which must be linear if there is a gradient."""

        def of(value: Any) -> Any:
            return [change(point) for point in value] if isinstance(value, list) else change(value)

        if _is_conditions(self.value):
            return Schedule([{**c, "value": of(c["value"])} for c in self.value])
        return Schedule(of(self.value))

    def numbers(self) -> list[float]:
        """Return all its numbers."""
        values = [condition["value"] for condition in conditions_of(self.value)]
        return [float(n) for value in values for n in (value if isinstance(value, list) else [value])]

    @property
    def filters(self) -> list[str]:
        """The parts of names that its conditions look for."""
        return [str(c["filter"]) for c in conditions_of(self.value) if c.get("filter") not in EVERYWHERE]

    @property
    def constant(self) -> bool:
        """Whether it is one number."""
        return not isinstance(self.value, list)


def layer_of(module: str) -> int | None:
    """Return the number of the layer that a module lies in: the first number in its path."""
    found = LAYER.search(module)
    return int(found.group(1)) if found else None


def count_layers(modules: Iterable[str]) -> int:
    """Return the number of layers, by the largest number in the modules' names."""
    return 1 + max((layer for layer in map(layer_of, modules) if layer is not None), default=0)


def to_plain(value: Any) -> Any:
    """Return a value as YAML would give it: lists for tuples and arrays, Python's own numbers, text for paths.

    >>> to_plain((0.5, (1, 0.2)))
    [0.5, [1, 0.2]]
    """
    if isinstance(value, Mapping):
        return {str(key): to_plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(own) for own in value]
    if isinstance(value, Path):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value  # what NumPy and torch hold


def plain_schedule(value: Any) -> Any:
    """Return a schedule as a recipe holds it: a gradient as the list of its points.

    >>> plain_schedule({"over_layers": (1, 0.2)})
    [1, 0.2]
    """
    value = to_plain(value)
    if isinstance(value, dict) and list(value) == [OVER_LAYERS] and is_gradient(value[OVER_LAYERS]):
        return value[OVER_LAYERS]
    if isinstance(value, dict) and "value" in value:
        return {**value, "value": plain_schedule(value["value"])}
    return [plain_schedule(own) for own in value] if isinstance(value, list) else value


def listed_schedule(value: Any) -> Any:
    """Return a schedule as a recipe holds it, with one condition alone as a list of one."""
    value = plain_schedule(value)
    return [value] if isinstance(value, dict) else value


def is_schedule(value: Any) -> bool:
    """Return whether a value is a number, a gradient, or a list of conditions."""
    return _is_value(value) or _is_conditions(value)


def is_gradient(value: Any) -> bool:
    """Return whether a value is a list of numbers, one at least."""
    return isinstance(value, list) and bool(value) and all(map(is_number, value))


def _gradient(points: list[float], module: str, layers: int) -> float:
    layer = layer_of(module)
    if layer is None or len(points) == 1 or layers == 1:
        return float(points[0])
    place = layer / (layers - 1) * (len(points) - 1)
    left = min(math.floor(place), len(points) - 2)
    return points[left] + (points[left + 1] - points[left]) * (place - left)


def _is_value(value: Any) -> bool:
    return is_number(value) or is_gradient(value)


def _is_conditions(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_condition, value))


def _is_condition(value: Any) -> bool:
    if not isinstance(value, dict) or not set(value) <= {"filter", "value"}:
        return False
    return _is_value(value.get("value")) and isinstance(value.get("filter"), (str, int, type(None)))


def conditions_of(value: Any) -> list[dict[str, Any]]:
    """Return a schedule, in the form of a recipe, as a list of conditions."""
    return value if _is_conditions(value) else [{"value": value}]
