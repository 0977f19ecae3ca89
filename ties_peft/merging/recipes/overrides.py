"""Flags: what a command line asks for, laid over a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import RecipeError
from .recipe import NORM, Rank, Recipe
from .scale import EXPECTED, is_scale
from .settings import parameter_names, recipe_parameters
from .yaml_document import parse


@dataclass(frozen=True)
class Flags:
    """The flags of a merge, as they were typed; None for one that was not given.

    Attributes:
        recipe: a file that they override.
        adapters, method, space, seed, restore_norm, dtype, base, base_model, target, allow_disjoint, heads: as in
            `Recipe`.
        weights: numbers with commas between, or `norm`.
        scale: a number, or a formula in the number of adapters.
        rank: a whole number, `max` or `auto`.
        density, scope: parameters of the method.
        densities: one number per adapter, with commas between.
        settings: any parameter, as NAME=VALUE, the value in YAML.
    """

    recipe: Path | None
    adapters: Sequence[str] | None
    method: str | None
    space: str | None
    weights: str | None
    scale: str | None
    density: str | None
    scope: str | None
    settings: Sequence[str] | None
    rank: str | None
    restore_norm: bool
    seed: int | None
    dtype: str | None
    base: str | None
    base_model: str | None
    target: str | None
    allow_disjoint: bool
    heads: str | None = None
    densities: str | None = None

    def asked(self) -> Recipe:
        """The recipe, with what was given in place of what it says.

        Raises: RecipeError for a flag that cannot be read, and whatever the recipe's file gives rise to.
        """
        recipe = Recipe.from_file(self.recipe) if self.recipe else Recipe(adapters=())
        if self.adapters:  # what the recipe says of each adapter was meant for its own
            recipe = replace(recipe, weights=recipe.weights if recipe.weights == NORM else None, densities=None)
        own = self.parameters()
        given = {
            "adapters": tuple(self.adapters) if self.adapters else None,
            "weights": self.weights if self.weights == NORM else read_numbers("--weights", self.weights, ", or norm"),
            "densities": read_numbers("--densities", self.densities),
            "method": self.method,
            "space": self.space,
            "scale": read_scale(self.scale),
            "rank": read_rank(self.rank),
            "restore_norm": self.restore_norm or None,
            "seed": self.seed,
            "dtype": self.dtype,
            "base": self.base,
            "base_model": self.base_model,
            "target": self.target,
            "allow_disjoint": self.allow_disjoint or None,
            "heads": self.heads,
        }
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        changed = replace(recipe, **changes)
        parameters = {**_kept(recipe, changed, own), **own}
        densities = None if "density" in own and self.densities is None else changed.densities
        return replace(changed, parameters=parameters, densities=densities, notes=_notes(recipe, {**changes, **own}))

    def parameters(self) -> dict[str, Any]:
        """The method's and the space's own."""
        given = {"density": _density(self.density), "scope": self.scope}
        found = {key: value for key, value in given.items() if value is not None}
        for setting in self.settings or []:
            key, equals, value = setting.partition("=")
            if not equals or not key:
                raise RecipeError(f"--set is {setting!r}; expected NAME=VALUE, such as --set elect=count.")
            found[key] = parse(value)
        return recipe_parameters(found, read_numbers("--densities", self.densities))


def _kept(recipe: Recipe, changed: Recipe, own: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's parameters, less those that are given anew, or that a method or space given anew does not have."""
    same = (recipe.method, recipe.space) == (changed.method, changed.space)
    known = recipe.parameters if same else parameter_names(changed.method, changed.space)
    again = {*own, *(key.rpartition(".")[2] for key in own)}  # `density` and `ties.density` may be one thing
    return {
        key: value
        for key, value in recipe.parameters.items()
        if key in known and not (key in again or key.rpartition(".")[2] in own)
    }


def _notes(recipe: Recipe, given: Mapping[str, Any]) -> tuple[str, ...]:
    """A recipe's notes, less those on what was overridden; another method leaves none on parameters."""
    about = [note.partition(":")[0].removeprefix("parameters.") for note in recipe.notes]
    method = "method" in given
    return tuple(
        note
        for note, key in zip(recipe.notes, about, strict=True)
        if key not in given and not (method and (key == "merge_method" or note.startswith("parameters.")))
    )


def read_numbers(flag: str, text: str | None, otherwise: str = "") -> tuple[float, ...] | None:
    """Return what a flag with one number per adapter says.

    Raises: RecipeError.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(
            f"{flag} is {text!r}; expected numbers with commas between, such as 1,0.5,1{otherwise}."
        ) from None


def _density(text: str | None) -> float | list[float] | None:
    """What --density says: a number; of several `recipe_parameters` says what they could mean."""
    if text is None:
        return None
    try:
        first, *others = [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--density is {text!r}; expected a number in (0, 1], such as 0.2.") from None
    return [first, *others] if others else first


def read_scale(text: str | None) -> float | str | None:
    """Return what --scale says: a number, or a formula in the number of adapters."""
    if text is None or is_scale(text):
        return text
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"--scale is {text!r}; expected {EXPECTED}.") from None


def read_rank(text: str | None) -> Rank | None:
    """What --rank says: a whole number, `max` or `auto`."""
    if text is None or text in ("max", "auto"):
        return text
    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"--rank is {text!r}; expected a whole number, max or auto.") from None
