"""Recipe: everything that a merge was asked for; to YAML and back.

    merge_method: ties
    adapters:
      - adapter: org/a
        parameters: {weight: 1.0}
      - adapter: path/b
    parameters: {density: 0.2, scale: 1.0, space: delta, rank: 32, seed: 0}
    dtype: bfloat16

`models:` and `model:` are read as synonyms, as mergekit users write them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError, printable, unknown

TOP = ("merge_method", "adapters", "parameters", "dtype", "base_model", "allow_disjoint")
SYNONYMS = {"models": "adapters", "lambda": "scale"}
SHARED = ("space", "rank", "scale", "seed")
Rank = int | str


@dataclass(frozen=True)
class Recipe:
    """What to merge, and how.

    Attributes:
        adapters: paths or Hub ids, in order.
        weights: one number per adapter; None for 1 each.
        method: its name.
        parameters: the method's own.
        space: coordinates; see `spaces`.
        scale: λ; None for the method's default.
        rank: an integer, `max` or `auto`.
        seed: of every random draw.
        dtype: of the tensors written; None for that of the inputs.
        base_model: the base's name in the output; None to keep the inputs'.
        allow_disjoint: whether adapters with no module in common may be merged.
    """

    adapters: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    method: str = "ties"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    space: str = "delta"
    scale: float | None = None
    rank: Rank = "auto"
    seed: int = 0
    dtype: str | None = None
    base_model: str | None = None
    allow_disjoint: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The YAML form as plain values; what was left to a default is left out."""
        weights = tuple(map(plain, self.weights)) if self.weights else (None,) * len(self.adapters)
        entries = [
            {"adapter": name} | ({} if weight is None else {"parameters": {"weight": weight}})
            for name, weight in zip(self.adapters, weights, strict=True)
        ]
        shared = {"space": self.space, "rank": self.rank, "scale": self.scale, "seed": self.seed}
        parameters = {k: plain(value) for k, value in {**shared, **self.parameters}.items() if value is not None}
        rest = {"dtype": self.dtype, "base_model": self.base_model, "allow_disjoint": self.allow_disjoint or None}
        return {
            "merge_method": self.method,
            "adapters": entries,
            "parameters": parameters,
            **{key: value for key, value in rest.items() if value is not None},
        }

    def to_yaml(self) -> str:
        """The recipe as text that `from_yaml` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        """Read a recipe.

        Raises: RecipeError naming the line, for anything that it does not know.
        """
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            values = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            raise RecipeError(f"{where}{line}: not YAML ({getattr(error, 'problem', None) or error}).") from None
        return _Reader(where, _lines(node)).read(values)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe from a file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe '{path}' cannot be read: {error}.") from None
        return cls.from_yaml(text, str(path))


class _Reader:
    """The values of one recipe, checked; knows the line of every key for its messages."""

    def __init__(self, where: str, lines: dict[tuple[Any, ...], int]) -> None:
        self.where, self.lines = where, lines

    def read(self, values: Any) -> Recipe:
        top = self.table(values, (), TOP)
        method = top.get("merge_method", "ties")
        self.expect(isinstance(method, str), ("merge_method",), "the name of a method", method)
        names, weights = self.entries(top.get("adapters"))
        for key in ("dtype", "base_model"):
            self.expect(isinstance(top.get(key), (str, type(None))), (key,), f"a name for `{key}`", top.get(key))
        disjoint = top.get("allow_disjoint", False)
        self.expect(isinstance(disjoint, bool), ("allow_disjoint",), "true or false for `allow_disjoint`", disjoint)
        parameters = self.table(top.get("parameters") or {}, ("parameters",), None)
        self.expect(
            isinstance(parameters.get("space", ""), str),
            ("parameters", "space"),
            "the name of a space",
            parameters.get("space"),
        )
        shared = {key: parameters.pop(key) for key in SHARED if key in parameters}
        return Recipe(
            adapters=names,
            weights=weights,
            method=method,
            parameters=parameters,
            space=shared.get("space", "delta"),
            scale=shared.get("scale"),
            rank=shared.get("rank", "auto"),
            seed=shared.get("seed", 0),
            dtype=top.get("dtype"),
            base_model=top.get("base_model"),
            allow_disjoint=disjoint,
        )

    def entries(self, values: Any) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
        self.expect(isinstance(values, list) and len(values) > 0, ("adapters",), "a list of adapters", values)
        names, weights = [], []
        for place, value in enumerate(values):
            path = ("adapters", place)
            entry = (
                {"adapter": value}
                if isinstance(value, str)
                else self.table(value, path, ("adapter", "model", "parameters"))
            )
            name = entry.get("adapter", entry.get("model"))
            self.expect(isinstance(name, str) and bool(name), path, "`adapter:` with a path or Hub id", entry)
            own = self.table(entry.get("parameters") or {}, (*path, "parameters"), ("weight",))
            weight = own.get("weight")
            self.expect(weight is None or is_number(weight), (*path, "parameters", "weight"), "a number", weight)
            names.append(str(name))
            weights.append(weight)
        if all(weight is None for weight in weights):
            return tuple(names), None
        return tuple(names), tuple(1.0 if weight is None else float(weight) for weight in weights)

    def table(self, values: Any, path: tuple[Any, ...], known: Sequence[str] | None) -> dict[str, Any]:
        self.expect(isinstance(values, dict), path, "keys with values", values)
        result = {}
        for key, value in values.items():
            name = SYNONYMS.get(str(key), str(key))
            if known is not None and name not in known:
                raise RecipeError(f"{self.at((*path, key))}: {unknown('key', name, known)}")
            if name in result:
                raise RecipeError(f"{self.at((*path, key))}: '{key}' stands there twice. Keep one.")
            result[name] = value
        return result

    def expect(self, holds: bool, path: tuple[Any, ...], what: str, seen: Any) -> None:
        if not holds:
            raise RecipeError(f"{self.at(path)}: expected {what}, found {printable(repr(seen))}.")

    def at(self, path: tuple[Any, ...]) -> str:
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.where}, line {self.lines.get(path, 1)}"


def is_number(value: Any) -> bool:
    """Whether a value is a finite int or float (a bool is not a number)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def plain(value: Any) -> Any:
    """A value as YAML and JSON know it: numbers of NumPy and torch as Python's, an Adapter as its source."""
    if hasattr(value, "item"):
        return value.item()
    return (
        value if value is None or isinstance(value, (bool, int, float, str)) else str(getattr(value, "source", value))
    )


def _lines(
    node: yaml.Node | None, path: tuple[Any, ...] = (), seen: frozenset[int] = frozenset()
) -> dict[tuple[Any, ...], int]:
    """The line, from 1, on which each key or list entry stands; one that holds itself is not followed."""
    lines: dict[tuple[Any, ...], int] = {}
    if id(node) in seen:
        return lines
    seen |= {id(node)}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place = (*path, key.value)
            lines |= {place: key.start_mark.line + 1} | _lines(value, place, seen)
            lines |= {(*path, SYNONYMS.get(key.value, key.value)): key.start_mark.line + 1}
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            lines |= {(*path, number): value.start_mark.line + 1} | _lines(value, (*path, number), seen)
    return lines
