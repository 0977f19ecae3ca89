"""Tuning: the parameters of a recipe that a search sets, and the values that each may have. A setting gives one value to each.

    weights: [-1.5, 1.5]                     one weight for each adapter
    weights: {low: 0, high: 2, points: 3}    for each adapter a schedule of weights over the layers, given at 3 points
    adapters: some                           for each adapter whether it takes part
    method: [ties, flat_tsv]                 a choice
    scale: {low: 0.1, high: 3, log: true}    a range, sampled on a logarithmic scale
    density: [0.05, 1.0]                     any parameter of the method, or of those of several methods that have it

A list of two numbers is a range, of integers if both are integers; any other list holds choices. `method` and `space`
must be choices, `weights` a range.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, product
from typing import Any

from ..adapters.config_values import is_number
from ..errors import MethodError, RecipeError, unknown
from ..merging.options import OPTIONS
from ..merging.recipes.recipe import Recipe
from ..merging.recipes.scale import EXPECTED, Scale, is_scale
from ..merging.recipes.settings import find_space, make_settings, parameter_names
from ..merging.values import check_whole
from ..methods import find_method
from . import GRID

RECIPE_FIELDS = tuple(name for name, option in OPTIONS.items() if option.tunable)
PER_ADAPTER = ("weights", "adapters")
SOME = "some"
BOUND = 1.5  # LoRAHub's, of the weights
Setting = Mapping[str, Any]  # the values of a trial, by the names in `Tuning.domains`


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included.

    Attributes:
        low, high: the bounds.
        log: whether to sample on a logarithmic scale.
        whole: whether only integers are in it.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest and the highest value."""
        return self.low, self.high

    def value_at(self, share: float) -> float:
        """Return the value at a share, in [0, 1], of the distance from low to high."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        value = low + share * (high - low)
        value = math.exp(value) if self.log else value
        return min(max(round(value) if self.whole else value, self.low), self.high)

    def share_of(self, value: float) -> float:
        """Return the share of the distance from low to high at which a value lies: the inverse of `value_at`."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        return (self._scaled(value) - low) / (high - low)

    def suggest(self, trial: Any, name: str) -> float:
        """Return the value that a trial of Optuna takes for the parameter `name`."""
        suggest = trial.suggest_int if self.whole else trial.suggest_float
        value: float = suggest(name, self.low, self.high, log=self.log)
        return value

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else float(value)


@dataclass(frozen=True)
class Choice:
    """Some values without an order.

    Attributes:
        values: strings, numbers, true or false.
    """

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, Any]:
        """The first and the last value."""
        return self.values[0], self.values[-1]

    def value_at(self, share: float) -> Any:
        """Return the value at a share, in [0, 1), of the length of the list."""
        return self.values[int(share * len(self.values))]

    def suggest(self, trial: Any, name: str) -> Any:
        """Return the value that a trial of Optuna takes for the parameter `name`."""
        return trial.suggest_categorical(name, list(self.values))


Domain = Range | Choice


@dataclass(frozen=True)
class Tuning:
    """A recipe, and those of its parameters that a search sets.

    Attributes:
        recipe: the recipe, whose other parameters stay as they are.
        domains: the values that each tuned parameter may have, by name; `weights.2` is the weight of the third adapter,
            `weights.2.0` the first point of its schedule, and `adapters.2` whether it takes part.
    """

    recipe: Recipe
    domains: Mapping[str, Domain] = field(default_factory=dict)

    @classmethod
    def read(cls, recipe: Recipe, asked: Mapping[str, Any] | None = None) -> Tuning:
        """Return the tuning that a user asks for; by default of the weights, from −1.5 to 1.5 as in LoRAHub.

        Raises: RecipeError or MethodError for an unknown name, an empty range, and a value that no merge accepts.
        """
        asked = {"weights": [-BOUND, BOUND]} if asked is None else asked
        if not isinstance(asked, Mapping):
            raise RecipeError(
                f"tune is {asked!r}; expected a dict of parameters and their values, such as {{'method': ['auto', 'ties']}}."
            )
        if not asked:
            raise RecipeError("tune names no parameter. Name at least one, such as weights or density.")
        domains: dict[str, Domain] = {}
        for name, value in asked.items():
            domains |= _domains(name, value, len(recipe.adapters))
        made = cls(recipe, domains)
        made._check(asked)
        return made

    @property
    def has_weights(self) -> bool:
        """Whether one weight for each adapter is tuned."""
        return "weights.0" in self.domains

    @property
    def weights_alone(self) -> bool:
        """Whether nothing but weights is tuned."""
        return all(name.startswith("weights.") for name in self.domains)

    @property
    def combination_count(self) -> int | None:
        """The number of combinations where all domains are choices; None where a range is tuned."""
        choices = [len(domain.values) for domain in self.domains.values() if isinstance(domain, Choice)]
        return math.prod(choices) if len(choices) == len(self.domains) else None

    def initial_setting(self, weight: float = 1.0) -> dict[str, Any]:
        """Return a first setting: the recipe's own values, or the nearest that the domains allow.

        Args:
            weight: of every adapter, where weights are tuned.
        """
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

    def combinations(self, most: int | None = None) -> list[dict[str, Any]]:
        """Return every setting, or the first `most`, where all domains are choices; the last domain changes first.

        Raises: RecipeError where a range is tuned.
        """
        choices = {name: domain.values for name, domain in self.domains.items() if isinstance(domain, Choice)}
        ranges = [name for name in self.domains if name not in choices]
        if ranges:
            raise RecipeError(
                f"the sampler '{GRID}' tries each combination of choices, and {', '.join(ranges)} can take any value of a range. "
                "Give a list of three or more values, or of names, or choose another sampler."
            )
        return [dict(zip(choices, values, strict=True)) for values in islice(product(*choices.values()), most)]

    def recipes_of_choices(self) -> list[tuple[str, Recipe]]:
        """Return what each choice makes of the first recipe, one choice at a time, for each method in each space.

        Returns: the choices as text, such as `method=ties, rank=8`, and the recipe; each recipe once.
        """
        pairs = [{"method": method, "space": space} for method, space in self._pairs()]
        others = {
            name: domain.values
            for name, domain in self.domains.items()
            if isinstance(domain, Choice) and name.partition(".")[0] not in ("method", "space", "adapters")
        }
        changes = [{}, *({name: value} for name, values in others.items() for value in values)]
        found: dict[str, tuple[str, Recipe]] = {}
        for change in (pair | other for pair in pairs for other in changes):
            tuned = {name: value for name, value in change.items() if name in self.domains}
            recipe = self.to_recipe({**self.initial_setting(), **tuned})
            named = ", ".join(f"{name}={value}" for name, value in tuned.items())
            found.setdefault(repr(recipe.to_dict()), (named, recipe))
        return list(found.values())

    def to_recipe(self, setting: Setting) -> Recipe:
        """Return the recipe of a setting.

        No merge accepts weights that are all 0; in their place the weights are 1 and the scale is 0.
        """
        shared = {name: setting[name] for name in RECIPE_FIELDS if name in setting}
        recipe = replace(self.recipe, **shared)
        weights = self._weights(setting)
        if weights is not None:
            if any(any(w) if isinstance(w, list) else w for w in weights):
                recipe = replace(recipe, weights=tuple(weights))
            else:
                recipe = replace(recipe, weights=(1.0,) * len(weights), scale=0.0)
        own = {name: value for name, value in setting.items() if not _is_common(name)}
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
        """Check that each parameter, tuned or fixed, belongs to a method or space of the search, which accepts its values.

        Raises: MethodError.
        """
        pairs = self._pairs()
        own = [name for name in asked if not _is_common(name)]
        known = {name for pair in pairs for name in parameter_names(*pair)}
        for name in own:
            if name not in known:
                names = {*RECIPE_FIELDS, *PER_ADAPTER, *(other for other in known if "." not in other)}
                raise MethodError(f"tune: {unknown('parameter', name, names)}")
        for method, space in pairs:
            allowed = parameter_names(method, space)
            # A name that belongs to no method of the search is left in, so that `make_settings` refuses it.
            fixed = {
                name: value for name, value in self.recipe.parameters.items() if name in allowed or name not in known
            }
            for end in (0, 1):
                tuned = {name: self.domains[name].ends[end] for name in own if name in allowed}
                make_settings(method, space, fixed | tuned)

    def _pairs(self) -> list[tuple[str, str]]:
        """Return each method of the search with each space."""
        methods, spaces = (self._names(name, getattr(self.recipe, name)) for name in ("method", "space"))
        return list(product(methods, spaces))

    def _names(self, name: str, otherwise: str) -> tuple[str, ...]:
        domain = self.domains.get(name)
        return tuple(map(str, domain.values)) if isinstance(domain, Choice) else (otherwise,)


def _domains(name: str, value: Any, adapters: int) -> dict[str, Domain]:
    """Return the domains of one parameter that is asked for, by name; weights and adapters have one for each adapter."""
    if name == "adapters":
        if value != SOME:
            raise RecipeError(
                f"tune: adapters is {value!r}; expected {SOME}, which tries merges with and without each adapter."
            )
        return {f"adapters.{place}": Choice((True, False)) for place in range(adapters)}
    if name == "weights":
        return _weight_domains(value, adapters)
    domain = _domain(name, value)
    if name in ("method", "space") and not isinstance(domain, Choice):
        raise RecipeError(f"tune: {name} is {value!r}; expected a list of names, such as {name}: [A, B].")
    if name == "scale" and isinstance(domain, Choice) and not all(map(is_scale, domain.values)):
        raise RecipeError(f"tune: scale is {value!r}; expected choices of which each is {EXPECTED}.")
    for choice in domain.values if isinstance(domain, Choice) else ():
        if name == "space":
            find_space(str(choice))
        for part in str(choice).split("+") if name == "method" else ():
            find_method(part.strip())
    return {name: domain}


def _weight_domains(value: Any, adapters: int) -> dict[str, Domain]:
    points = value.get("points", 1) if isinstance(value, Mapping) else 1
    check_whole("weights, points", points, 1)
    domain = _domain(
        "weights", {k: v for k, v in value.items() if k != "points"} if isinstance(value, Mapping) else value
    )
    if not isinstance(domain, Range):
        raise RecipeError(f"tune: weights is {value!r}; expected a range, [low, high]. Weights cannot be choices.")
    suffixes = [""] if points == 1 else [f".{point}" for point in range(points)]
    return {
        f"weights.{place}{suffix}": replace(domain, whole=False) for place in range(adapters) for suffix in suffixes
    }


def _domain(name: str, value: Any) -> Domain:
    if isinstance(value, Mapping):
        odd = [key for key in value if key not in ("low", "high", "log")]
        if odd or not {"low", "high"} <= value.keys():
            raise RecipeError(
                f"tune: {name} is {dict(value)!r}; expected {{low: …, high: …}}, and log: true if wanted, for a range. For "
                "choices give a list of three or more values, or of names."
            )
        return _range(name, value["low"], value["high"], bool(value.get("log", False)))
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RecipeError(
            f"tune: {name} is {value!r}; expected [low, high], or a list of choices: three or more values, or names."
        )
    if len(value) == 2 and all(is_number(end) for end in value):
        return _range(name, value[0], value[1], log=False)
    if not all(isinstance(choice, (str, int, float, bool)) for choice in value):
        raise RecipeError(f"tune: {name} holds {value!r}; expected choices that are strings, numbers, true or false.")
    return Choice(tuple(value))


def _range(name: str, low: Any, high: Any, log: bool) -> Range:
    if not (is_number(low) and is_number(high) and math.isfinite(low) and math.isfinite(high) and low < high):
        raise RecipeError(
            f"tune: {name} goes from {low!r} to {high!r}; expected low < high. Give the lower bound first."
        )
    if log and low <= 0:
        raise RecipeError(f"tune: {name} is a logarithmic range from {low}; expected a lower bound above 0. Raise it.")
    return Range(low, high, log, isinstance(low, int) and isinstance(high, int))


def _is_common(name: str) -> bool:
    """Return whether a tuned parameter belongs to every merge, not to a method or a space."""
    return name in RECIPE_FIELDS or name.partition(".")[0] in PER_ADAPTER
