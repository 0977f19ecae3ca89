"""Override a recipe by what was given on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from ..options import NORM, read_flag
from .recipe import Recipe
from .schedule import conditions_of, listed_schedule
from .settings import parameter_names, recipe_parameters
from .yaml_document import parse


def overridden(
    file: Path | None,
    adapters: Sequence[str] | None,
    options: Mapping[str, Any],
    parameters: Mapping[str, Any],
    settings: Sequence[str] | None,
) -> Recipe:
    """Return a recipe in which what was given on the command line replaces what it says.

    Args:
        file: the recipe; None for the defaults.
        adapters: in place of the recipe's, whose weights and densities are then left out too.
        options: of the merge, by name; a text is read as the option's flag; None or False for one that was not given.
        parameters: density and scope; None for one that was not given.
        settings: any parameters, as NAME=VALUE.
    Raises: RecipeError for a flag that cannot be read; as `Recipe.from_file`.
    """
    recipe = Recipe.from_file(file) if file else Recipe(adapters=())
    if adapters:
        weights = recipe.weights if recipe.weights == NORM else None
        recipe = replace(recipe, adapters=tuple(adapters), weights=weights, densities=None)
    given = {name: read_flag(name, value) if isinstance(value, str) else value for name, value in options.items()}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    own = {name: value for name, value in parameters.items() if value is not None}
    if "density" in own:
        own["density"] = _density(own["density"])
    own = recipe_parameters(own | read_pairs("--set", settings, "elect=count"), given.get("densities"))
    changed = replace(recipe, **given)
    densities = None if "density" in own and "densities" not in given else changed.densities
    return replace(
        changed,
        parameters={**_kept(recipe, changed, own), **own},
        densities=densities,
        notes=_notes(recipe, {*given, *own, *(["adapters"] if adapters else [])}),
    )


def with_part_weights(recipe: Recipe, settings: Sequence[str] | None) -> Recipe:
    """Return a recipe with other weights on some parts of a pipeline.

    Args:
        recipe: of LoRAs of image models.
        settings: PART=WEIGHT, or one weight per adapter: PART=1,0.5.
    Raises: RecipeError if they cannot be read, or the recipe weights by norms.
    """
    if not settings:
        return recipe
    if isinstance(recipe.weights, str):
        raise RecipeError(f"--weights-for cannot be combined with weights {recipe.weights}. Leave one of them out.")
    count = len(recipe.adapters)
    conditions: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    for part, value in read_pairs("--weights-for", settings, "text_encoder=0.5").items():
        numbers = _part_weights(part, value, count)
        for own, number in zip(conditions, numbers, strict=True):
            own.append({"filter": f"{part}.", "value": number})
    whole = recipe.weights or (1.0,) * count
    weights = [[*own, *conditions_of(listed_schedule(weight))] for own, weight in zip(conditions, whole, strict=True)]
    return replace(recipe, weights=tuple(weights))


def _part_weights(part: str, value: Any, count: int) -> list[float]:
    """Return the weight of each adapter on one part."""
    try:
        numbers = [float(number) for number in str(value).split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers * count
    if len(numbers) != count:
        raise RecipeError(
            f"--weights-for {part}={value}: expected one number, or one per adapter ({count}) with commas between."
        )
    return numbers


def read_pairs(flag: str, settings: Sequence[str] | None, example: str) -> dict[str, Any]:
    """Return what a flag that takes NAME=VALUE says, each value read as YAML.

    Raises: RecipeError where there is no `=` or no name.
    """
    pairs = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"{flag} is {setting!r}; expected NAME=VALUE, such as {flag} {example}.")
        pairs[key.strip()] = parse(value)
    return pairs


def _kept(recipe: Recipe, changed: Recipe, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's parameters without those that are overridden, or that a new method or space does not have.

    `density` overrides `ties.density`, and the reverse.
    """
    same = (recipe.method, recipe.space) == (changed.method, changed.space)
    known = recipe.parameters if same else parameter_names(changed.method, changed.space)
    given = {*own, *map(_bare, own)}
    return {k: v for k, v in recipe.parameters.items() if k in known and k not in given and _bare(k) not in own}


def _bare(parameter: str) -> str:
    """Return a parameter's name without that of its method."""
    return parameter.rpartition(".")[2]


def _notes(recipe: Recipe, given: set[str]) -> tuple[str, ...]:
    """Return a recipe's notes without those on what was overridden; another method removes all notes on parameters."""
    kept = []
    for note in recipe.notes:
        key = note.partition(":")[0]
        of_method = key == "merge_method" or key.startswith("parameters.")
        if key.removeprefix("parameters.") not in given and not (of_method and "method" in given):
            kept.append(note)
    return tuple(kept)


def _density(text: str) -> float | list[float]:
    """Return what --density says: a number; `recipe_parameters` says what several could mean."""
    try:
        first, *others = [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--density is {text!r}; expected a number in (0, 1], such as 0.2.") from None
    return [first, *others] if others else first
