"""Write everything that a merge was asked for to YAML, and read it back.

    merge_method: ties
    adapters:
      - adapter: org/a@main
        parameters: {weight: 1.0, density: 0.3}
      - adapter: path/b
        parameters: {weight: [1.0, 0.5]}
    parameters: {density: 0.2, scale: 1.0, space: delta, rank: 32, seed: 0}
    dtype: bfloat16

A weight or a density may differ from module to module (see `schedule`). The density in `parameters:` is that of every
adapter without one of its own; a list there is a gradient over the layers, as in mergekit. With scope `adapter` a trim then
ranks together the modules of an adapter that have the same density. An adapter with weight 0 on a module is absent there.
`parameters: {weights: norm}` brings all adapters to the same norm. `models:`, `model:` and `lambda:` are synonyms of
`adapters:`, `adapter:` and `scale:`. A recipe of mergekit's (see `mergekit` for how it is recognised) is converted, and its
notes name every difference. A file with `adapters:` is never one.

The keys are the options of `options`. Everything is checked when it is read, the parameters of methods too, and a message
names the line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, NoReturn, get_type_hints

from pydantic import AfterValidator, BaseModel, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from ...adapters.sources import expand_patterns
from ...errors import MethodError, RecipeError, TiesPeftError, unknown
from ..options import NORM, OPTIONS, PARAMETERS, TOP, Options
from .schedule import EXPECTED as EXPECTED_SCHEDULE
from .schedule import is_schedule, listed_schedule, to_plain
from .settings import all_parameters, find_space, make_settings, parameter_names, unknown_parameter
from .yaml_document import STRICT, Document, Location, dump, expecting

SYNONYMS = {"models": "adapters", "model": "adapter", "lambda": "scale"}
IN_MEMORY = "in memory"
NORM_ALONE = "norm; the weight of one adapter stands in its own `parameters:` as `weight:`"


@dataclass(frozen=True)
class Recipe(Options):
    """What to merge, and how: the options of a merge, written to YAML and read from it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the YAML form as plain values, without what was left to a default."""
        nothing = (None,) * len(self.adapters)
        weights = nothing if self.weights is None or isinstance(self.weights, str) else self.weights
        entries = []
        for name, weight, density in zip(self.adapters, weights, self.densities or nothing, strict=True):
            own = {key: value for key, value in (("weight", weight), ("density", density)) if value is not None}
            entries.append({"adapter": name} | ({"parameters": own} if own else {}))
        shared = self._stated(PARAMETERS) | ({"weights": self.weights} if isinstance(self.weights, str) else {})
        values: dict[str, Any] = yaml_value(
            {
                "merge_method": self.method,
                "adapters": entries,
                "parameters": {**shared, **self.parameters},
                **{key: value for key, value in self._stated(TOP).items() if key != "merge_method"},
                **({"notes": list(self.notes)} if self.notes else {}),
            }
        )
        return values

    def _stated(self, table: str) -> dict[str, Any]:
        """Return the options of one table of a recipe that are not at their default, or are always stated."""
        found = {option.key: (option, getattr(self, name)) for name, option in OPTIONS.items() if option.table == table}
        return {
            key: value
            for key, (option, value) in found.items()
            if value is not None and (option.always or value != option.default)
        }

    def to_yaml(self) -> str:
        """Return the recipe as text that `from_yaml` reads back."""
        return dump(self.to_dict())

    def expanded(self) -> tuple[Recipe, list[str]]:
        """Return the recipe with every pattern replaced by the adapters that fit it, and a remark on each pattern.

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
        """Read a recipe from YAML.

        Raises: RecipeError or MethodError naming the line, for an unknown key or a value that is not accepted.
        """
        from . import mergekit

        document = Document(text, where, SYNONYMS)
        if mergekit.is_recipe(document.values):
            mergekit.convert(document)
        file = document.read(_File, _unknown_key)
        tables = {TOP: file, PARAMETERS: file.parameters}
        recipe = cls(
            adapters=tuple(entry.adapter for entry in file.adapters),
            weights=_weights(document, file.parameters.weights, [entry.parameters.weight for entry in file.adapters]),
            densities=_unless_none([entry.parameters.density for entry in file.adapters]),
            parameters=file.parameters.model_extra,
            notes=tuple(file.notes),
            **{name: getattr(tables[o.table], o.key) for name, o in OPTIONS.items() if o.table is not None},
        )
        _check(document, recipe)
        return recipe

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a recipe from a file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe '{path}' cannot be read: {error}.") from None
        return cls.from_yaml(text, str(path))


# The tables of a recipe's file


def _or_none(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


class _Table(BaseModel):
    """Keys with values, under their names or synonyms; an empty table may be left blank."""

    model_config = STRICT
    blank: ClassVar[bool] = True

    @model_validator(mode="before")
    @classmethod
    def rename(cls, values: Any) -> Any:
        """Replace synonyms by the names they stand for."""
        if not isinstance(values, dict):
            return {} if values is None and cls.blank else values
        found: dict[str, Any] = {}
        for key, value in values.items():
            name = SYNONYMS.get(str(key), str(key))
            if name in found:
                raise PydanticCustomError("twice", "'{key}' stands there twice. Keep one of them.", {"key": key})
            found[name] = value
        return found


_Schedule = Annotated[Any, AfterValidator(listed_schedule), expecting(EXPECTED_SCHEDULE, is_schedule)]


class _Own(_Table):
    """The parameters of one adapter."""

    weight: _Schedule = None
    density: _Schedule = None


class _Entry(_Table):
    """One adapter; a text is its path or Hub id."""

    blank: ClassVar[bool] = False
    adapter: Annotated[str, Field(None, validate_default=True), expecting("a path or Hub id", bool)]
    parameters: _Own = _Own()

    @model_validator(mode="before")
    @classmethod
    def read_name(cls, value: Any) -> Any:
        """Return the table that a text stands for."""
        return {"adapter": value} if isinstance(value, str) else value


class _Shared(_Table):
    """The parameters of the merge; what is not an option belongs to its method or space."""

    model_config = {**STRICT, "extra": "allow"}
    weights: Annotated[str | None, expecting(NORM_ALONE, _or_none(lambda value: value == NORM))] = None


class _Top(_Table):
    """A whole recipe."""

    blank: ClassVar[bool] = False
    adapters: Annotated[
        list[_Entry], Field(None, validate_default=True), expecting("a list of adapters", bool, nested=True)
    ]
    notes: Annotated[list[str], expecting("a list of texts")] = []


def _with_options(base: type[_Table], table: str, **more: Any) -> Any:
    """Return a model with a field for each option that one table of a recipe holds, and with further fields."""
    types = get_type_hints(Options)
    found = {
        option.key: (Annotated[types[name], expecting(option.expected, _or_none(option.accepts))], option.default)
        for name, option in OPTIONS.items()
        if option.table == table
    }
    return create_model(f"{base.__name__}Options", __base__=base, **(found | more))


_Parameters = _with_options(_Shared, PARAMETERS)
_File = _with_options(_Top, TOP, parameters=(_Parameters, _Parameters()))
KEYS = {0: tuple(_File.model_fields), 2: tuple(_Entry.model_fields), 3: tuple(_Own.model_fields)}  # by depth


def _unknown_key(path: Location, key: str) -> str:
    """Return the message on a key that a table of a recipe does not have."""
    return unknown("key", key, KEYS[len(path)], _misplaced_hint(key, path))


def _misplaced_hint(key: str, path: Location) -> str | None:
    """Return a sentence that says where in a recipe a misplaced key belongs; None for an unknown key."""
    if key in _Own.model_fields and path[:1] == ("adapters",):
        return f"{key} belongs under `parameters:` of this adapter."
    if key == "weight":
        return "weight belongs under `parameters:` of an adapter."
    if key in _File.model_fields:
        return f"{key} belongs at the top of the recipe."
    if path != ("parameters",) and (key in _Parameters.model_fields or key in all_parameters()):
        return f"{key} belongs under `parameters:`" + (" at the top of the recipe." if path else ".")
    return None


# Checks of several tables together


def _weights(document: Document, shared: str | None, own: list[Any]) -> tuple[Any, ...] | str | None:
    """Return the weights of the entries, or `norm` in their place."""
    if shared is None or all(weight is None for weight in own):
        return shared or _unless_none([1.0 if weight is None else weight for weight in own], own)
    with document.naming("parameters", "weights"):
        raise RecipeError(
            "weights: norm weighs every adapter, but some have a `weight:` of their own. Keep one of the two."
        )


def _unless_none(values: list[Any], given: list[Any] | None = None) -> tuple[Any, ...] | None:
    """Return values as a tuple; None where all that were given are None."""
    return None if all(value is None for value in (given or values)) else tuple(values)


def _check(document: Document, recipe: Recipe) -> None:
    """Check the names and parameters of a recipe's method and space; an error names the line."""
    method, space, parameters = recipe.method, recipe.space, recipe.parameters
    with document.naming("parameters", "space"):
        find_space(space)
    with document.naming("merge_method"):
        make_settings(method, space, {})
    known = parameter_names(method, space)
    for key in parameters:
        if key not in known:
            with document.naming("parameters", key):
                _refuse_parameter(recipe, key, known)
    densities = recipe.densities or ()
    try:
        make_settings(method, space, parameters, densities)
    except TiesPeftError:
        for key, value in parameters.items():
            with document.naming("parameters", key):
                make_settings(method, space, {key: value})
        for place, density in enumerate(densities):
            with document.naming("adapters", place, "parameters", "density"):
                make_settings(method, space, parameters, [density])
        with document.naming("parameters"):
            raise


def _refuse_parameter(recipe: Recipe, key: str, known: Sequence[str]) -> NoReturn:
    """Refuse a parameter that neither the method nor the space has."""
    names = {*_Parameters.model_fields, *(name for name in known if "." not in name)}
    hint = _misplaced_hint(key, ("parameters",))
    if key == "densities":
        hint = "Write each adapter's `density:` in `parameters:` of its own entry, and one density for all as `density:` here."
    if hint is not None:
        raise RecipeError(unknown("parameter", key, names, hint))
    raise MethodError(unknown_parameter(recipe.method, recipe.space, key, tuple(names)))


def _repeated(values: Any, counts: Sequence[int]) -> Any:
    """Return values with that of each pattern repeated for every adapter it matches; anything but one per pattern as it is."""
    if not isinstance(values, tuple) or len(values) != len(counts):
        return values
    return tuple(value for value, count in zip(values, counts, strict=True) for _ in range(count))


def yaml_value(value: Any) -> Any:
    """Return a value as YAML and JSON have it; an adapter becomes its source."""
    if isinstance(value, dict):
        return {key: yaml_value(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [yaml_value(own) for own in value]
    return (value.source or IN_MEMORY) if hasattr(value, "source") else to_plain(value)
