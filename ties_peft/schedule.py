"""Schedule: a number that may differ from module to module, as mergekit's users write it.

    0.5                                      the same everywhere
    [1.0, 0.7, 0.1]                          a gradient over the layers, straight between its points
    [{filter: mlp, value: 0.5}, {value: 0}]  the first whose filter is part of the module's name

A value inside a condition may itself be a gradient. A module outside the numbered layers (an
embedding, a head) reads a gradient's first point, as in mergekit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import RecipeError, printable

LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Schedule:
    """A checked value.

    Attributes:
        value: a number, a list of numbers, or a list of conditions.
    """

    value: Any

    @classmethod
    def read(cls, value: Any, what: str) -> Schedule:
        """Check a value as a user wrote it.

        Raises: RecipeError saying what `what` may be.
        """
        if not _is_value(value) and not _is_conditions(value):
            raise RecipeError(
                f"{what} is {printable(repr(value))}; expected a finite number, a list of numbers (a gradient over "
                "the layers), or a list of {filter: PART_OF_NAME, value: …} whose last may lack the filter."
            )
        return cls(value)

    def at(self, module: str, layers: int, default: float = 1.0) -> float:
        """The number for one module of a model with so many layers; `default` where no filter fits."""
        value = self.value
        if _is_conditions(value):
            fits = (c["value"] for c in value if c.get("filter") in (None, "*") or str(c["filter"]) in module)
            value = next(fits, default)
        if not isinstance(value, list):
            return float(value)
        return _gradient(value, module, layers)

    def numbers(self) -> list[float]:
        """Every number that stands in it."""
        values = [c["value"] for c in self.value] if _is_conditions(self.value) else [self.value]
        return [float(n) for value in values for n in (value if isinstance(value, list) else [value])]

    @property
    def constant(self) -> bool:
        """Whether it is one number."""
        return not isinstance(self.value, list)


def layer_of(module: str) -> int | None:
    """The number of the layer that a module lies in: the first number in its path."""
    found = LAYER.search(module)
    return int(found.group(1)) if found else None


def count_layers(modules: Iterable[str]) -> int:
    """How many layers the modules' names speak of."""
    return 1 + max((layer for layer in map(layer_of, modules) if layer is not None), default=0)


def _gradient(points: list[float], module: str, layers: int) -> float:
    layer = layer_of(module)
    if layer is None or len(points) == 1 or layers == 1:
        return float(points[0])
    place = layer / (layers - 1) * (len(points) - 1)
    left = min(math.floor(place), len(points) - 2)
    return points[left] + (points[left + 1] - points[left]) * (place - left)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_value(value: Any) -> bool:
    return _is_number(value) or (isinstance(value, list) and bool(value) and all(map(_is_number, value)))


def _is_conditions(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(c, dict) for c in value):
        return False
    return all(set(c) <= {"filter", "value"} and "value" in c and _is_value(c["value"]) for c in value)
