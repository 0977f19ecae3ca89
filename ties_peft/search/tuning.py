"""Tuning: which numbers and choices of a recipe a search may set, and the recipe that a setting of them makes.

    weights: [-1.5, 1.5]                 one number for each adapter
    weights: {low: 0, high: 2, points: 3}    a gradient over the layers for each, by its points
    adapters: some                       for each adapter whether it takes part
    method: [ties, flat_tsv]             a choice
    scale: {low: 0.1, high: 3, log: true}
    density: [0.05, 1.0]                 any parameter of the method; of several methods for those that have it

A list of two numbers is a range, whole if both are; any other list holds choices. `space` and `rank` are choices,
`seed` a range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters.values import is_number
from ..errors import MethodError, RecipeError, unknown
from ..merging.options import OPTIONS
from ..merging.recipes.recipe import Recipe
from ..merging.recipes.scale import EXPECTED, Scale, is_scale
from ..merging.recipes.settings import find_space, make_settings, parameter_names
from ..methods import find_method

RECIPE_FIELDS = tuple(name for name, option in OPTIONS.items() if option.tunable)
PER_ADAPTER = ("weights", "adapters")
SOME = "some"
BOUND = 1.5  # LoRAHub's, of the weights
Setting = Mapping[str, Any]  # the values of a trial by the names of `Tuning.domains`


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, ends included.

    Attributes:
        low, high: the ends.
        log: whether ratios count, not differences.
        whole: whether only whole numbers are meant.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def value_at(self, share: float) -> float:
        """The value at a share of the way from low to high, in [0, 1)."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + share * (high - low)
        value = math.exp(value) if self.log else value
        return min(max(round(value) if self.whole else value, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """A few values, without order.

    Attributes:
        values: text, numbers, true or false.
    """

    values: tuple[Any, ...]

    def value_at(self, share: float) -> Any:
        """The value at a share of the list, in [0, 1)."""
        return self.values[int(share * len(self.values))]


Domain = Range | Choice


@dataclass(frozen=True)
class Tuning:
    """A recipe, and what of it is to be set.

    Attributes:
        recipe: what stays.
        domains: by name, what is searched; `weights.2` and `weights.2.0` are of the third adapter.
    """

    recipe: Recipe
    domains: Mapping[str, Domain] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: Recipe, asked: Mapping[str, Any] | None = None) -> Tuning:
        """Check what a user asks for; nothing asked for is LoRAHub: the weights, from −1.5 to 1.5.

        Raises: RecipeError or MethodError for an unknown name or an empty range, and for a choice that no
            merge could take.
        """
        asked = {"weights": [-BOUND, BOUND]} if asked is None else dict(asked)
        if not asked:
            raise RecipeError("nothing is to be tuned. Name at least one number, such as weights or density.")
        domains: dict[str, Domain] = {}
        for name, value in asked.items():
            domains |= _domains(name, value, len(recipe.adapters))
        made = cls(recipe, domains)
        made._check(asked)
        return made

    @property
    def has_weights(self) -> bool:
        """Whether one weight for each adapter is searched."""
        return "weights.0" in self.domains

    def initial_setting(self, weight: float = 1.0) -> dict[str, Any]:
        """A setting to start from: weights as told, the recipe's own values, else the middle or the first."""
        given = {name: getattr(self.recipe, name) for name in RECIPE_FIELDS}
        given |= dict(self.recipe.parameters)
        if isinstance(self.recipe.scale, str) and isinstance(self.domains.get("scale"), Range):
            given["scale"] = Scale.read(self.recipe.scale).at(len(self.recipe.adapters))
        setting: dict[str, Any] = {}
        for name, domain in self.domains.items():
            own = weight if name.startswith("weights.") else given.get(name)
            if isinstance(domain, Choice):
                setting[name] = own if own in domain.values else domain.values[0]
            elif own is not None and is_number(own):
                setting[name] = min(max(own, domain.low), domain.high)
            else:
                setting[name] = domain.value_at(0.5)
        return setting

    def to_recipe(self, setting: Setting) -> Recipe:
        """The recipe that a setting makes.

        Where every adapter has a weight of 0 it is the first one at scale 0: an adapter that does nothing.
        """
        shared = {name: setting[name] for name in RECIPE_FIELDS if name in setting}
        recipe = replace(self.recipe, **shared)
        weights = self._weights(setting)
        if weights is not None:
            nothing = not any(any(w) if isinstance(w, list) else w for w in weights)
            idle = {"weights": (1.0,) * len(weights), "scale": 0.0}
            recipe = replace(recipe, **(idle if nothing else {"weights": tuple(weights)}))
        own = {name: value for name, value in setting.items() if not _is_shared(name)}
        known = parameter_names(recipe.method, recipe.space)
        parameters = {**recipe.parameters, **own}
        return replace(recipe, parameters={name: value for name, value in parameters.items() if name in known})

    def _weights(self, setting: Setting) -> list[Any] | None:
        if not any(name.startswith(PER_ADAPTER) for name in setting):
            return None
        given = self.recipe.weights
        weights: list[Any] = list(given) if isinstance(given, tuple) else [1.0] * len(self.recipe.adapters)
        for place in range(len(weights)):
            points = [
                setting[name] for name in self.domains if name.startswith(f"weights.{place}.") and name in setting
            ]
            weights[place] = points or setting.get(f"weights.{place}", weights[place])
            if not setting.get(f"adapters.{place}", True):
                weights[place] = 0.0
        return weights

    def _check(self, asked: Mapping[str, Any]) -> None:
        """Every method and space that may be met takes the parameters, or leaves them to others that do."""
        methods = _values(self.domains, "method", self.recipe.method)
        places = _values(self.domains, "space", self.recipe.space)
        own = [name for name in asked if name not in (*RECIPE_FIELDS, *PER_ADAPTER)]
        known = {name for method in methods for space in places for name in parameter_names(method, space)}
        for name in own:
            if name not in known:
                names = {*RECIPE_FIELDS, *PER_ADAPTER, *(other for other in known if "." not in other)}
                raise MethodError(f"what is to be tuned: {unknown('parameter', name, names)}")
        for method in methods:
            for space in places:
                has = parameter_names(method, space)
                for end in (0, -1):
                    ends = {name: _end(self.domains[name], end) for name in own if name in has}
                    make_settings(
                        method, space, {**{k: v for k, v in self.recipe.parameters.items() if k in has}, **ends}
                    )


def space_parameters(space: str) -> Sequence[str]:
    """The parameters that are a space's own."""
    return list(find_space(space).model_fields)


def _domains(name: str, value: Any, adapters: int) -> dict[str, Domain]:
    """Those that one line of the request makes."""
    if name == "adapters":
        if value != SOME:
            raise RecipeError(f"adapters is {value!r}; expected {SOME}: each takes part or does not.")
        return {f"adapters.{place}": Choice((True, False)) for place in range(adapters)}
    if name == "weights":
        points = value.get("points", 1) if isinstance(value, Mapping) else 1
        if not isinstance(points, int) or isinstance(points, bool) or points < 1:
            raise RecipeError(f"weights, points: {points!r}; expected a whole number from 1 up.")
        rest = {k: v for k, v in value.items() if k != "points"} if isinstance(value, Mapping) else value
        domain = _domain(name, rest)
        if not isinstance(domain, Range):
            raise RecipeError(f"weights is {value!r}; expected a range, [low, high].")
        one = replace(domain, whole=False)
        ends = [""] if points == 1 else [f".{point}" for point in range(points)]
        return {f"weights.{place}{end}": one for place in range(adapters) for end in ends}
    domain = _domain(name, value)
    if name in ("method", "space") and isinstance(domain, Choice):
        for choice in domain.values:
            for part in str(choice).split("+") if name == "method" else []:
                find_method(part.strip())
            if name == "space":
                find_space(str(choice))
    elif name == "scale" and isinstance(domain, Choice) and not all(map(is_scale, domain.values)):
        raise RecipeError(f"scale is {value!r}; each choice is expected to be {EXPECTED}.")
    elif name in ("method", "space"):
        raise RecipeError(f"{name} is {value!r}; expected a list of names.")
    return {name: domain}


def _domain(name: str, value: Any) -> Domain:
    if isinstance(value, Mapping):
        odd = [key for key in value if key not in ("low", "high", "log")]
        if odd or not {"low", "high"} <= value.keys():
            raise RecipeError(f"{name} is {dict(value)!r}; expected {{low: …, high: …, log: true}}.")
        return _range(name, value["low"], value["high"], bool(value.get("log", False)))
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RecipeError(f"{name} is {value!r}; expected [low, high], or a list of choices.")
    if len(value) == 2 and all(is_number(end) for end in value):
        return _range(name, value[0], value[1], log=False)
    if not all(isinstance(choice, (str, int, float, bool)) for choice in value):
        raise RecipeError(f"{name} holds {value!r}; expected texts, numbers, true or false.")
    return Choice(tuple(value))


def _range(name: str, low: Any, high: Any, log: bool) -> Range:
    if not (is_number(low) and is_number(high) and math.isfinite(low) and math.isfinite(high) and low < high):
        raise RecipeError(f"{name} goes from {low!r} to {high!r}; expected low < high.")
    if log and low <= 0:
        raise RecipeError(f"{name}: a range by ratios starts at {low}; expected more than 0.")
    return Range(low, high, log, isinstance(low, int) and isinstance(high, int))


def _is_shared(name: str) -> bool:
    return name in RECIPE_FIELDS or name.partition(".")[0] in PER_ADAPTER


def _values(domains: Mapping[str, Domain], name: str, otherwise: str) -> tuple[str, ...]:
    domain = domains.get(name)
    return tuple(map(str, domain.values)) if isinstance(domain, Choice) else (otherwise,)


def _end(domain: Domain, end: int) -> Any:
    return domain.values[end] if isinstance(domain, Choice) else (domain.low, domain.high)[end]
