"""SearchProblem: the adapters of a search, merged as a setting of the domains says, and what that is worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import CompatibilityError
from ..merging.merged import Merged
from ..merging.prepare import Prepared, prepare
from ..merging.recipes.recipe import Recipe
from .tuning import Tuning, space_parameters


class SearchProblem:
    """Adapters, and what a setting of the domains is worth on them.

    Args:
        adapters: that are merged.
        tuning: the recipe, and what of it is set.
        score: the objective, the larger the better.
        penalty: on the mean of |w|, where weights are set.
        seed: of every draw.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        tuning: Tuning,
        score: Callable[[Adapter], float],
        penalty: float,
        seed: int,
    ) -> None:
        self.adapters, self.tuning, self.score = list(adapters), tuning, score
        self.penalty, self.seed = penalty, seed
        self._prepared: dict[str, Prepared] = {}

    def check(self) -> None:
        """Merge the first start, so that what cannot be merged is refused before any model is run.

        Raises: TiesPeftError.
        """
        recipe = self.tuning.to_recipe(self.initial_settings()[-1])
        try:
            self.merge(recipe)
        except CompatibilityError:
            if not any(adapter.extra_keys for adapter in self.adapters):
                raise
            prepare(self.adapters, recipe.space, allow_disjoint=recipe.allow_disjoint, heads="drop")  # or it says why
            raise CompatibilityError(
                "the adapters hold whole layers (task heads, embeddings, biases) that differ, and a search has no rule "
                "for them. Search over copies without them, on a base whose own layers fit the examples: ties-peft merge "
                "ADAPTER --method task_arithmetic --rank max --heads drop --out COPY."
            ) from None

    def initial_settings(self) -> list[dict[str, Any]]:
        """Nothing and the mean for LoRAHub's weights; else the recipe as it is, as far as it lies in the ranges."""
        settings: list[dict[str, Any]] = [self.tuning.initial_setting()]
        if not self.tuning.has_weights or self.tuning.recipe.method != "task_arithmetic":
            return settings
        share = 1 / len(self.adapters)
        return [self.tuning.initial_setting(weight) for weight in (0.0, share)]

    def asked(self, objective: Mapping[str, Any]) -> dict[str, Any]:
        """What makes it this search and no other."""
        recipe = {k: v for k, v in self.tuning.recipe.to_dict().items() if k != "adapters"}
        return {
            "adapters": [adapter.digest for adapter in self.adapters],
            "recipe": recipe,
            "tuned": {name: repr(domain) for name, domain in self.tuning.domains.items()},
            **objective,
            "penalty": self.penalty,
            "seed": self.seed,
        }

    def merge(self, recipe: Recipe) -> Merged:
        """By the plan of its space, whose bases are made once."""
        own = {name: value for name, value in recipe.parameters.items() if name in space_parameters(recipe.space)}
        key = repr((recipe.space, own))
        if key not in self._prepared:
            self._prepared[key] = prepare(self.adapters, recipe.space, allow_disjoint=recipe.allow_disjoint, **own)
            self._prepared[key].warns = False
        rest = {name: value for name, value in recipe.parameters.items() if name not in own}
        return self._prepared[key].merge(
            recipe.method,
            recipe.weights,
            recipe.scale,
            recipe.rank,
            recipe.seed,
            recipe.dtype,
            densities=recipe.densities,
            **rest,
        )

    def evaluate(self, setting: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """(score less the penalty, {score})."""
        score = float(self.score(self.merge(self.tuning.to_recipe(setting))))
        weights = [abs(value) for name, value in setting.items() if name.startswith("weights.")]
        return score - self.penalty * (sum(weights) / len(weights) if weights else 0.0), {"score": score}
