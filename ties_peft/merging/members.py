"""The adapters of a merge, each with its weight and density."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..adapters.adapter import Adapter
from ..adapters.statistics import ModuleStatistics
from ..errors import RecipeError
from ..methods import Method
from .options import NORM
from .recipes.recipe import Recipe
from .recipes.schedule import Schedule, count_layers

# From this ratio of norms on a warning is given; benchmarks/retention.py measures what is left of the smaller adapter.
UNEQUAL = 3.0
ELECTED = "The method elects signs, by which the small one loses most entries. "


@dataclass(frozen=True)
class Member:
    """One adapter of a merge.

    Attributes:
        name: short and unique in the merge, for tables.
        adapter: its files.
        weight: w, one number or one for every module; never 0 everywhere.
        density: used instead of the method's; None if none was set for this adapter.
        layers: the number of layers of the merge's modules, over which a gradient of weights or densities runs.
    """

    name: str
    adapter: Adapter
    weight: Schedule
    density: Schedule | None = None
    layers: int = 1

    def has(self, module: str) -> bool:
        """Return whether it adapts a module."""
        return module in self.adapter.layout

    def weight_at(self, module: str) -> float:
        """Return w on one module, which the adapter need not have."""
        return self.weight.at(module, self.layers)

    def density_at(self, module: str, default: float) -> float:
        """Return the density on one module: the adapter's own, else the default."""
        return default if self.density is None else self.density.at(module, self.layers, default)


def make_members(
    recipe: Recipe, adapters: Sequence[Adapter], densities: Sequence[Schedule | None], warnings: list[str]
) -> tuple[Member, ...]:
    """Return the adapters with a weight other than 0, in order.

    Raises: RecipeError where a weight is no finite number, they are not one per adapter, or all are 0.
    """
    weights = _read_weights(recipe, adapters)
    names = short_names([adapter.label for adapter in adapters])
    present = _present(weights, adapters)
    absent = [name for name, stays in zip(names, present, strict=True) if not stays]
    if absent:
        what = "norm" if recipe.weights == NORM else "weight"
        warnings.append(f"{', '.join(absent)}: left out of the merge, because the {what} is 0.")
    given = map(Member, names, adapters, weights, densities)
    members = [member for stays, member in zip(present, given, strict=True) if stays]
    layers = count_layers(module for member in members for module in member.adapter.layout)
    return tuple(replace(member, layers=layers) for member in members)


def _read_weights(recipe: Recipe, adapters: Sequence[Adapter]) -> list[Schedule]:
    """Return the weight of each adapter."""
    given, count = recipe.weights, len(adapters)
    if isinstance(given, str):
        if given != NORM:
            raise RecipeError(f"the weights are {given!r}; expected norm, or one weight per adapter.")
        weights: Sequence[object] = equal_norm_weights([adapter.norm() for adapter in adapters])
        if count and not any(weights):
            raise RecipeError(
                "weights are 'norm', which divides by the adapters' norms, and all of them are 0. Leave it out."
            )
    else:
        weights = (1.0,) * count if given is None else given
    if len(weights) != count:
        raise RecipeError(
            f"{len(weights)} weight{'s' * (len(weights) != 1)} for {count} adapter{'s' * (count != 1)}. Give one weight per adapter, in their order."
        )
    bad = [weight for weight in weights if isinstance(weight, float) and not math.isfinite(weight)]
    if bad:
        raise RecipeError(f"the weights contain {bad[0]}; expected finite numbers.")
    return [Schedule.read(weight, f"weight {place + 1}") for place, weight in enumerate(weights)]


def _present(weights: Sequence[Schedule], adapters: Sequence[Adapter]) -> list[bool]:
    """Return for each adapter whether its weight is other than 0 on any module that it has."""
    named = [name for a, w in zip(adapters, weights, strict=True) if any(w.numbers()) for name in a.modules]
    layers = count_layers(named)
    found = [
        any(weight.at(name, layers) != 0 for name in adapter.modules)
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    if not any(found):
        raise RecipeError("every weight is 0, so nothing is left to merge. Give at least one adapter a weight.")
    return found


def written_base_name(recipe: Recipe, members: Sequence[Member]) -> str | None:
    """Return the base model's name in the config of the result: the recipe's, else the first that an adapter has."""
    return recipe.base_model or next((m.adapter.base_name for m in members if m.adapter.base_name), None)


def short_names(labels: Sequence[str]) -> list[str]:
    """Return the shortest ends of some paths that tell them apart; equal paths are numbered.

    >>> short_names(["a/lora/x", "b/lora/y", "c/lora/x"])
    ['a/lora/x', 'y', 'c/lora/x']
    """
    parts = [label.rstrip("/").split("/") for label in labels]
    names = []
    for own in parts:
        length = next(
            (n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1), len(own)
        )
        names.append("/".join(own[-length:]))
    return [f"{n} ({names[: i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def equal_norm_weights(norms: Sequence[float]) -> list[float]:
    """Return the weights that scale task vectors to one norm, the mean of their norms.

        wᵢ = mean ‖τ‖ / ‖τᵢ‖, the mean over the adapters whose norm is not 0; wᵢ = 0 where ‖τᵢ‖ = 0

    ‖τᵢ‖ is the Frobenius norm of the whole, unweighted task vector, over all modules of adapter i.

    Law: all wᵢ·‖τᵢ‖ > 0 are equal, and Σ wᵢ·‖τᵢ‖ = Σ ‖τᵢ‖; equal norms give weights of 1.
    Source: weights in 1/‖τ‖ are NAN's (arXiv 2505.16148); the factor in front keeps the total length.

    >>> equal_norm_weights([1.0, 3.0, 0.0])
    [2.0, 0.6666666666666666, 0.0]
    """
    mean = statistics.fmean([norm for norm in norms if norm] or [0.0])
    return [mean / norm if norm else 0.0 for norm in norms]


def unequal_norms(norms: Mapping[str, float], weighted: bool = False, elects: bool = False) -> list[str]:
    """Return a warning if the largest norm is at least `UNEQUAL` times the smallest one that is not 0.

    Args:
        norms: of the task vectors, by adapter.
        weighted: whether they are norms of w·τ.
        elects: whether the method elects signs.
    """
    there = {name: norm for name, norm in norms.items() if norm > 0}
    if len(there) < 2:
        return []
    large, small = max(there, key=there.__getitem__), min(there, key=there.__getitem__)
    times = there[large] / there[small]
    if round(times, 1) < UNEQUAL:
        return []
    return [
        f"{'weighted norms' if weighted else 'norms'} differ {times:.1f}-fold: {large} ({there[large]:.3g}), {small} "
        f'({there[small]:.3g}). {ELECTED if elects else ""}If they count equally, --weights norm (weights="norm") brings all '
        "to one norm."
    ]


def module_statistics(method: Method, members: Sequence[Member], module: str) -> list[ModuleStatistics]:
    """Return the statistics of one module that the method needs, one for each adapter; none if it needs none."""
    found = []
    for adapter in (member.adapter for member in members if method.needs):
        statistics = adapter.statistics(method.needs or "")
        one = None if statistics is None else statistics.of_module(module, adapter.modules)
        if one is not None:
            found.append(one)
    return found
