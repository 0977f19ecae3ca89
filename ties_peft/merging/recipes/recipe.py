"""Recipe: everything that a merge was asked for; to YAML and back.

    merge_method: ties
    adapters:
      - adapter: org/a@main
        parameters: {weight: 1.0, density: 0.3}
      - adapter: path/b
        parameters: {weight: [1.0, 0.5]}
    parameters: {density: 0.2, scale: 1.0, space: delta, rank: 32, seed: 0}
    dtype: bfloat16

A weight or a density may differ from module to module (see `schedule`), the density in `parameters:`
too, for every adapter that has none of its own: a list there is a gradient over the layers, as in mergekit. Under scope `adapter` a trim then ranks the modules of
one adapter together that have the same density. A weight of 0 on some modules is absence there.
`parameters: {weights: norm}` weighs all adapters to one length. `models:`, `model:` and `lambda:` are synonyms of `adapters:`,
`adapter:` and `scale:`. A file of mergekit's is read as mergekit means it, and every difference is
noted; how such a file is known stands in `mergekit`. A file that says `adapters:` never is one.

Everything is checked as it is read, the methods' parameters too, and a message names the line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

from ...adapters.extra_tensors import is_policy
from ...adapters.sources import expand_patterns
from ...adapters.targets import TARGETS
from ...choices import DTYPES, ERROR, METHOD, POLICIES, RANK, SEED, SPACE
from ...errors import MethodError, RecipeError, TiesPeftError, unknown
from ...spaces import find_space
from . import mergekit
from .scale import EXPECTED as EXPECTED_SCALE
from .scale import is_scale
from .schedule import Schedule, to_plain
from .settings import SHARED, all_parameters, make_settings, parameter_names, unknown_parameter
from .yaml_document import Document, Location, dump

TOP = (
    "merge_method",
    "adapters",
    "parameters",
    "dtype",
    "base_model",
    "base",
    "target",
    "allow_disjoint",
    "heads",
    "notes",
)
SYNONYMS = {"models": "adapters", "model": "adapter", "lambda": "scale"}
ENTRY = ("adapter", "model", "parameters")
OWN = ("weight", "density")
NORM = "norm"
IN_MEMORY = "in memory"
Rank = int | str
Weights = Sequence[Any] | str  # a number or a schedule for each adapter, or `norm`


@dataclass(frozen=True)
class Recipe:
    """What to merge, and how.

    Attributes:
        adapters: in order, as `sources` reads them: paths, Hub ids, patterns.
        weights: one per adapter, a number or a schedule (see `schedule`); `norm` for one length for
            all; None for 1 each.
        densities: one per adapter where some have their own; None inside for the method's.
        method: its name.
        parameters: the method's own, and the space's.
        space: coordinates; see `spaces`.
        scale: λ, a number or a formula in the number of adapters (see `scale`); None for the method's default.
        rank: an integer, `max` or `auto`.
        restore_norm: whether a truncated result is brought back to the norm it had.
        seed: of every random draw.
        dtype: of the tensors written; None for that of the inputs.
        base_model: the base's name in the output; None to keep the inputs'.
        allow_disjoint: whether adapters with no module in common may be merged.
        notes: said in the report; a note on one thing starts with its name and a colon.
        heads: what becomes of whole tensors; see `heads`.
        target: the loader that the output is for (see `targets`); None for PEFT.
        base: where the base model's weights are, for adapters that need them; None if none does.
    """

    adapters: tuple[str, ...]
    weights: tuple[Any, ...] | str | None = None
    densities: tuple[Any, ...] | None = None
    method: str = METHOD
    parameters: Mapping[str, Any] = field(default_factory=dict)
    space: str = SPACE
    scale: float | str | None = None
    rank: Rank = RANK
    restore_norm: bool = False
    seed: int = SEED
    dtype: str | None = None
    base_model: str | None = None
    allow_disjoint: bool = False
    notes: tuple[str, ...] = ()
    heads: str = ERROR
    target: str | None = None
    base: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The YAML form as plain values; what was left to a default is left out."""
        nothing = (None,) * len(self.adapters)
        weights = nothing if self.weights is None or isinstance(self.weights, str) else self.weights
        entries = []
        for name, weight, density in zip(self.adapters, weights, self.densities or nothing, strict=True):
            own = {key: value for key, value in zip(OWN, (weight, density), strict=True) if value is not None}
            entries.append({"adapter": name} | ({"parameters": own} if own else {}))
        shared = {"space": self.space, "rank": self.rank, "scale": self.scale, "seed": self.seed}
        shared["restore_norm"] = self.restore_norm or None
        shared["weights"] = self.weights if isinstance(self.weights, str) else None
        rest: dict[str, Any] = {"dtype": self.dtype, "base_model": self.base_model}
        rest |= {"base": self.base, "target": self.target}
        rest |= {"allow_disjoint": self.allow_disjoint or None, "heads": None if self.heads == ERROR else self.heads}
        values: dict[str, Any] = yaml_value(
            {
                "merge_method": self.method,
                "adapters": entries,
                "parameters": {**_given(shared), **self.parameters},
                **_given(rest),
                **_given({"notes": list(self.notes) or None}),
            }
        )
        return values

    def to_yaml(self) -> str:
        """The recipe as text that `from_yaml` reads back."""
        return dump(self.to_dict())

    def expanded(self) -> tuple[Recipe, list[str]]:
        """(the recipe with every pattern replaced by what it stands for, a remark on each).

        One weight or density for a pattern is that of every adapter that fits it.
        Raises: AdapterError where a pattern fits nothing.
        """
        found = [expand_patterns([source]) for source in self.adapters]
        names = tuple(name for own, _ in found for name in own)
        remarks = [remark for _, own in found for remark in own]
        counts = [len(own) for own, _ in found]
        weights, densities = (_repeated(values, counts) for values in (self.weights, self.densities))
        return replace(self, adapters=names, weights=weights, densities=densities), remarks

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> Recipe:
        """Read a recipe.

        Raises: RecipeError or MethodError naming the line, for anything that it does not know.
        """
        document = Document(text, where, SYNONYMS)
        if mergekit.is_recipe(document.values):
            mergekit.convert(document)
        return _Reader(document).read()

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

    def __init__(self, document: Document) -> None:
        self.at = document.at
        self.top = _Table(self.at, document.values, (), TOP)
        self.shared = _Table(self.at, self.top.values.get("parameters"), ("parameters",), None)

    def read(self) -> Recipe:
        top, shared = self.top, self.shared
        self.check_densities()
        names, weights, densities = self.entries(top.values.get("adapters"))
        recipe = Recipe(
            adapters=names,
            weights=self.weights(weights),
            densities=densities,
            method=top.text("merge_method", METHOD),
            parameters={key: value for key, value in shared.values.items() if key not in SHARED},
            space=shared.text("space", SPACE),
            scale=shared.get("scale", None, is_scale, EXPECTED_SCALE),
            rank=shared.get("rank", RANK, _is_rank, "a whole number from 1 up, max or auto"),
            seed=shared.get("seed", SEED, _is_seed, "a whole number, 0 or more"),
            restore_norm=shared.flag("restore_norm"),
            dtype=top.get("dtype", None, lambda name: name in DTYPES, " or ".join(DTYPES)),
            base_model=top.text("base_model"),
            base=top.text("base"),
            target=top.get("target", None, lambda name: name in TARGETS, " or ".join(TARGETS)),
            allow_disjoint=top.flag("allow_disjoint"),
            heads=top.get("heads", ERROR, is_policy, f"one of {', '.join(POLICIES)}"),
            notes=tuple(top.get("notes", (), _is_texts, "a list of texts")),
        )
        self.check(recipe)
        return recipe

    def entries(self, values: Any) -> tuple[tuple[str, ...], tuple[Any, ...] | None, tuple[Any, ...] | None]:
        """(names, weights, densities) of the adapters; None where no adapter has one."""
        if not isinstance(values, list) or not values:
            raise RecipeError(f"{self.at(('adapters',))}: expected a list of adapters, found {_seen(values)}.")
        names, own = [], []
        for place, value in enumerate(values):
            path = ("adapters", place)
            table = _Table(self.at, {"adapter": value} if isinstance(value, str) else value, path, ENTRY)
            name = table.text("adapter")
            if not name:
                raise RecipeError(f"{self.at(path)}: expected `adapter:` with a path or Hub id, found {_seen(value)}.")
            names.append(name)
            own.append(_Table(self.at, table.values.get("parameters"), (*path, "parameters"), OWN))
        weights, densities = (tuple(table.schedule(key) for table in own) for key in OWN)
        return (
            tuple(names),
            None if all(w is None for w in weights) else tuple(1.0 if w is None else w for w in weights),
            None if all(d is None for d in densities) else densities,
        )

    def weights(self, own: tuple[Any, ...] | None) -> tuple[Any, ...] | str | None:
        """Those of the entries, or `norm` in their place."""
        expected = "norm; the weight of one adapter stands in its own `parameters:` as `weight:`"
        asked: str | None = self.shared.get("weights", None, lambda w: w == NORM, expected)
        if asked is not None and own is not None:
            raise RecipeError(
                f"{self.at(('parameters', 'weights'))}: weights: norm weighs every adapter, but some have a `weight:` "
                "of their own. Keep one of the two."
            )
        return asked or own

    def check_densities(self) -> None:
        """Refuse the name of the call's densities, which stand elsewhere in a recipe."""
        if "densities" in self.shared.values:
            raise RecipeError(
                f"{self.at(('parameters', 'densities'))}: densities is no key of a recipe; write each adapter's `density:` "
                "in `parameters:` of its own entry, and one density for all as `density:` here."
            )

    def check(self, recipe: Recipe) -> None:
        """Refuse what `make_settings` refuses, naming the line."""
        method, space, parameters = recipe.method, recipe.space, recipe.parameters
        self.check_names(method, space, parameters)
        densities = recipe.densities or ()
        try:
            make_settings(method, space, parameters, densities)
        except TiesPeftError as error:
            for key, value in parameters.items():
                with self.blamed("parameters", key):
                    make_settings(method, space, {key: value})
            for place, density in enumerate(densities):
                with self.blamed("adapters", place, "parameters", "density"):
                    make_settings(method, space, parameters, [density])
            raise type(error)(f"{self.at(('parameters',))}: {error}") from None

    def check_names(self, method: str, space: str, parameters: Mapping[str, Any]) -> None:
        """Refuse unknown names, naming the nearest known one."""
        with self.blamed("parameters", "space"):
            find_space(space)
        with self.blamed("merge_method"):
            make_settings(method, space, {})
        known = parameter_names(method, space)
        for key in parameters:
            if key not in known:
                where = self.at(("parameters", key))
                elsewhere = _misplaced_hint(key, ("parameters",))
                if elsewhere is not None:
                    raise RecipeError(f"{where}: {unknown('parameter', key, {*SHARED, *known}, elsewhere)}")
                raise MethodError(f"{where}: {unknown_parameter(method, space, key, SHARED)}")

    @contextmanager
    def blamed(self, *path: Any) -> Iterator[None]:
        """Give an error the line of a key."""
        try:
            yield
        except TiesPeftError as error:
            raise type(error)(f"{self.at(path)}: {error}") from None


class _Table:
    """The keys and values at one place of a recipe.

    Args:
        at: gives the line of a path.
        values: as read; None for an empty table.
        path: of the place.
        known: the keys that may stand there; None for any.
    """

    def __init__(self, at: Callable[[Location], str], values: Any, path: Location, known: Sequence[str] | None) -> None:
        self.at, self.path = at, path
        self.values: dict[str, Any] = {}
        if not isinstance(values, (dict, NoneType)) or (values is None and not path):
            raise RecipeError(f"{at(path)}: expected keys with values, found {_seen(values)}.")
        for key, value in (values or {}).items():
            name = SYNONYMS.get(str(key), str(key))
            if known is not None and name not in known:
                raise RecipeError(f"{at((*path, key))}: {unknown('key', name, known, _misplaced_hint(name, path))}")
            if name in self.values:
                raise RecipeError(f"{at((*path, key))}: '{key}' stands there twice. Keep one of them.")
            self.values[name] = value

    def get(self, key: str, default: Any, holds: Callable[[Any], bool], expected: str) -> Any:
        """A value, or the default where there is none."""
        value = self.values.get(key, default)
        if value is default:
            return default
        if not holds(value):
            raise RecipeError(f"{self.at((*self.path, key))}: {key} is {_seen(value)}; expected {expected}.")
        return value

    def text(self, key: str, default: str | None = None) -> Any:
        """A text, or the default where there is none."""
        return self.get(key, default, lambda value: isinstance(value, str), "text")

    def flag(self, key: str) -> bool:
        """True or false; false where there is none."""
        return bool(self.get(key, False, lambda value: isinstance(value, bool), "true or false"))

    def schedule(self, key: str) -> Any:
        """The value of a schedule, if there is one."""
        if key not in self.values:
            return None
        return Schedule.read(self.values[key], f"{self.at((*self.path, key))}: {key}").value


def _misplaced_hint(key: str, path: Location) -> str | None:
    """Return the sentence on a key that stands in the wrong place of a recipe; None for one that belongs nowhere."""
    if key in OWN and path[:1] == ("adapters",):
        return f"{key} belongs under `parameters:` of this adapter."
    if key == "weight":
        return "weight belongs under `parameters:` of an adapter."
    if key in TOP:
        return f"{key} belongs at the top of the recipe."
    if path != ("parameters",) and (key in SHARED or key in all_parameters()):
        return f"{key} belongs under `parameters:`" + (" at the top of the recipe." if path else ".")
    return None


def _repeated(values: Any, counts: Sequence[int]) -> Any:
    """One value per pattern, as often as there are adapters that fit it; others as they are."""
    if not isinstance(values, tuple) or len(values) != len(counts):
        return values
    return tuple(value for value, count in zip(values, counts, strict=True) for _ in range(count))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def yaml_value(value: Any) -> Any:
    """A value as YAML and JSON know it; an adapter as its source."""
    if isinstance(value, dict):
        return {key: yaml_value(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [yaml_value(own) for own in value]
    return (value.source or IN_MEMORY) if hasattr(value, "source") else to_plain(value)


def _seen(value: Any) -> str:
    return repr(value)


def _is_rank(value: Any) -> bool:
    return value in ("max", "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
