"""Problem: what a search maximises: the value of the adapters merged by a setting of the tuned parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import CompatibilityError
from ..merging.merged import Merged
from ..merging.prepare import Prepared, prepare
from ..merging.recipes.recipe import Recipe
from .tuning import Setting, Tuning, space_parameters


@dataclass(frozen=True)
class Trial:
    """A setting that was tried.

    Attributes:
        number: of the trial in its study.
        setting: the values of the tuned parameters, by name.
        value: what the search maximises.
        facts: what else is known of it, such as the score without the penalty.
    """

    number: int
    setting: Setting
    value: float
    facts: Mapping[str, Any]


Evaluate = Callable[[Setting], tuple[float, Mapping[str, Any]]]  # (value, facts) of a setting
TrialCallback = Callable[[Trial, list[Trial]], None]  # called with a trial and all complete ones


@dataclass(frozen=True)
class SearchProblem:
    """The adapters of a search, and the value of a setting of the tuned parameters.

    Attributes:
        adapters: to merge.
        tuning: the recipe and its tuned parameters.
        score: the objective, to be maximised.
        penalty: on the mean of |w|, where weights are tuned.
        seed: of every random number.
    """

    adapters: Sequence[Adapter]
    tuning: Tuning
    score: Callable[[Adapter], float]
    penalty: float
    seed: int
    _prepared: dict[str, Prepared] = field(default_factory=dict, init=False)  # by space and its parameters

    def check(self) -> None:
        """Merge by the last of the first settings, so that adapters that cannot be merged are refused before any trial.

        Raises: TiesPeftError.
        """
        recipe = self.tuning.to_recipe(self.initial_settings()[-1])
        try:
            self.merge(recipe)
        except CompatibilityError:
            if not any(adapter.extra_keys for adapter in self.adapters):
                raise
            prepare(
                self.adapters, recipe.space, allow_disjoint=recipe.allow_disjoint, heads="drop"
            )  # or the real reason
            raise CompatibilityError(
                "the adapters hold whole layers (task heads, embeddings, biases) that differ, and a search has no rule "
                "for them. Search over copies without them, on a base whose own layers fit the examples: ties-peft merge "
                "ADAPTER --method task_arithmetic --rank max --heads drop --out COPY."
            ) from None

    def initial_settings(self) -> list[dict[str, Any]]:
        """Return the settings to try first: the recipe itself; for the weights of a sum, zeros and the mean."""
        if self.tuning.has_weights and self.tuning.recipe.method == "task_arithmetic":
            return [self.tuning.initial_setting(weight) for weight in (0.0, 1 / len(self.adapters))]
        return [self.tuning.initial_setting()]

    def identity(self, objective: Mapping[str, Any]) -> dict[str, Any]:
        """Return, in plain values, what tells this search from others.

        Args:
            objective: the same of the objective.
        """
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
        """Merge by a recipe; the adapters are prepared once for each space."""
        own = {name: value for name, value in recipe.parameters.items() if name in space_parameters(recipe.space)}
        key = repr((recipe.space, own))
        if key not in self._prepared:
            self._prepared[key] = prepare(
                self.adapters, recipe.space, allow_disjoint=recipe.allow_disjoint, heads=recipe.heads, **own
            )
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

    def merge_setting(self, setting: Setting) -> Merged:
        """Merge by the recipe of a setting."""
        return self.merge(self.tuning.to_recipe(setting))

    def evaluate(self, setting: Setting) -> tuple[float, dict[str, Any]]:
        """Return (score − penalty · mean |w|, {"score": score}) of a setting."""
        score = float(self.score(self.merge_setting(setting)))
        weights = [abs(value) for name, value in setting.items() if name.startswith("weights.")]
        return score - self.penalty * (sum(weights) / len(weights) if weights else 0.0), {"score": score}
