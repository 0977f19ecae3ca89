"""Found: the result of a search, with its controls and trials; it prints as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..merging.merged import Merged
from ..merging.recipes.recipe import Recipe
from ..merging.tables import Printed, make_facts, make_table, make_text, number_column
from .problem import Trial

LISTED = 20  # the largest number of combinations that are printed one by one


@dataclass(frozen=True)
class Control:
    """The scores of a control, which the result of the search is compared with.

    Attributes:
        name: as in `controls`.
        score: on the examples, without the penalty.
        judged: the value by the judge, if there is one.
    """

    name: str
    score: float
    judged: float | None = None


@dataclass(frozen=True, repr=False)
class Found(Printed):
    """The result of a search; it prints as tables.

    Attributes:
        adapter: the merge by the best recipe.
        score: of the adapter on the examples, without the penalty.
        judged: its value by the judge, if there is one.
        trials: all trials, by number.
        controls: the controls.
        warnings: of a grid that was cut off, of controls that score better, of the adapter's report and, with "imitate", of
            the source adapters' rows.
        sampler: what chose the settings of the trials.
        combinations: the number of combinations of choices, with the sampler `grid`; None for another one.
        measures: what `score` and, with a judge, `judged` are, in words.
    """

    adapter: Merged
    score: float
    judged: float | None
    trials: tuple[Trial, ...]
    controls: tuple[Control, ...]
    warnings: list[str]
    sampler: str
    combinations: int | None
    measures: Mapping[str, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The best recipe."""
        return self.adapter.recipe

    @property
    def tried(self) -> str:
        """The number of trials, and of combinations where each is tried once, as text."""
        count = len(self.trials)
        if self.combinations is None:
            return f"{count} trial{'s' * (count != 1)}"
        some = "all" if count == self.combinations else f"{count} of"
        return f"{some} {self.combinations} combination{'s' * (self.combinations != 1)}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the adapter and the warnings."""
        return {
            "score": self.score,
            "judged": self.judged,
            "trials": [
                {"number": t.number, "setting": dict(t.setting), **t.facts, "value": t.value} for t in self.trials
            ],
            "controls": [vars(control) for control in self.controls],
            "recipe": self.recipe.to_dict(),
            "sampler": self.sampler,
            "combinations": self.combinations,
            "measures": dict(self.measures),
        }

    def tables(self) -> RenderableType:
        """Return the scores of the result and of each control, those of the combinations of a small grid, and a legend."""
        small = self.combinations is not None and 1 < self.combinations <= LISTED
        facts = [*self.measures.items(), ("tried", f"{self.tried}, by the sampler {self.sampler}")]
        heading = make_text("combinations, the best first")
        combinations: list[Table | Text] = [heading, self._combinations(), Text()] if small else []
        return Group(self._scores(), Text(), *combinations, make_facts(facts))

    def _scores(self) -> Table:
        names = ["score", *([] if self.judged is None else ["judged"])]
        lines = [Control("found", self.score, self.judged), *self.controls]
        rows = [[one.name, *(f"{v:.4f}" for v in (one.score, one.judged) if v is not None)] for one in lines]
        return make_table(["", *map(number_column, names)], rows)

    def _combinations(self) -> Table:
        """Return the settings that were tried, the best first."""
        ordered = sorted(self.trials, key=lambda trial: (-trial.value, trial.number))
        names = list(ordered[0].setting)
        rows = [[*(_shown(trial.setting[name]) for name in names), f"{trial.value:.4f}"] for trial in ordered]
        return make_table([*names, number_column("score")], rows)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def better_controls(score: float, controls: Sequence[Control]) -> list[str]:
    """Return a warning where controls score better than what was found, as far as that can be seen in print."""
    better = [one for one in controls if one.score > score and f"{one.score:.4f}" != f"{score:.4f}"]
    if not better:
        return []
    named = ", ".join(f"{one.name} ({one.score:.4f})" for one in better)
    some, those = ("a control scores", "that control") if len(better) == 1 else ("controls score", "those controls")
    return [
        f"what was found scores {score:.4f}, and {some} better: {named}. The search found nothing better than {those}. Tune "
        "other values or give more rows, and compare on rows that were not searched on (judge=, --judge)."
    ]
