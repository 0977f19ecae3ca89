"""SearchProblem: the value of a setting of the tuned parameters, which a search maximises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import CompatibilityError, TiesPeftError
from ..merging.merged import Merged
from ..merging.plan import make_plan
from ..merging.prepare import Prepared, prepare
from ..merging.recipes.recipe import Recipe
from ..merging.recipes.settings import find_space
from .tuning import Setting, Tuning


@dataclass(frozen=True)
class Trial:
    """A setting that was tried.

    Attributes:
        number: of the trial in its study.
        setting: the values of the tuned parameters, by name.
        value: that the search maximises.
        facts: other results, such as the score without the penalty.
    """

    number: int
    setting: Setting
    value: float
    facts: Mapping[str, Any]


Evaluate = Callable[[Setting], tuple[float, Mapping[str, Any]]]  # (value, facts) of a setting
TrialCallback = Callable[[Trial, list[Trial]], None]  # called with a trial, and with all complete trials
MERGE_OPTIONS = ("method", "weights", "scale", "rank", "seed", "dtype", "densities")  # of a prepared merge


def check_choices(tuning: Tuning, adapters: Sequence[Adapter]) -> None:
    """Check, without arithmetic, that each choice can be merged from these adapters.

    Whole layers are left out, because an objective may drop them; `SearchProblem.check` checks them.

    Raises: TiesPeftError naming the first choice that cannot, and why.
    """
    for place, (named, recipe) in enumerate(tuning.recipes_of_choices()):
        try:
            make_plan(replace(recipe, heads="drop"), adapters, checked=place > 0)
        except TiesPeftError as error:
            if not named:
                raise
            raise type(error)(f"tune: {named} cannot be merged: {error} Or leave this choice out.") from None


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
        """Merge once, so that adapters that cannot be merged are refused before the first trial.

        Raises: TiesPeftError.
        """
        recipe = self.tuning.to_recipe(self.initial_settings()[-1])
        try:
            self.merge(recipe)
        except CompatibilityError:
            if not any(adapter.extra_keys for adapter in self.adapters):
                raise
            # Where the merge fails without the whole layers too, this raises the error that they did not cause.
            prepare(self.adapters, recipe.space, allow_disjoint=recipe.allow_disjoint, heads="drop")
            raise CompatibilityError(
                "the adapters hold whole layers (task heads, embeddings, biases) that differ, and a search cannot merge "
                "these. Make copies without them (ties-peft merge ADAPTER --method task_arithmetic --rank max --heads drop "
                "--out COPY), and search over the copies on a base that has the layers that the examples need."
            ) from None

    def initial_settings(self) -> list[dict[str, Any]]:
        """Return the settings to try first: that of the recipe, or, for the weights of a sum, zeros and 1/N."""
        if self.tuning.has_weights and self.tuning.recipe.method == "task_arithmetic":
            return [self.tuning.initial_setting(weight) for weight in (0.0, 1 / len(self.adapters))]
        return [self.tuning.initial_setting()]

    def identity(self, objective: Mapping[str, Any]) -> dict[str, Any]:
        """Return plain values that identify this search.

        Args:
            objective: plain values that identify the objective.
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
        known = find_space(recipe.space).model_fields
        own = {name: value for name, value in recipe.parameters.items() if name in known}
        key = repr((recipe.space, own))
        if key not in self._prepared:
            self._prepared[key] = prepare(
                self.adapters, recipe.space, allow_disjoint=recipe.allow_disjoint, heads=recipe.heads, **own
            )
            self._prepared[key].warns = False
        options = {name: getattr(recipe, name) for name in MERGE_OPTIONS}
        return self._prepared[key].merge(**options, **recipe.parameters)

    def merge_setting(self, setting: Setting) -> Merged:
        """Merge by the recipe of a setting."""
        return self.merge(self.tuning.to_recipe(setting))

    def evaluate(self, setting: Setting) -> tuple[float, dict[str, Any]]:
        """Return (score − penalty · mean |w|, {"score": score}) of a setting."""
        score = float(self.score(self.merge_setting(setting)))
        weights = [abs(value) for name, value in setting.items() if name.startswith("weights.")]
        return score - self.penalty * (sum(weights) / len(weights) if weights else 0.0), {"score": score}
