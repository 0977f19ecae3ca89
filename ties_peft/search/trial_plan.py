"""TrialPlan: how many trials a search has and what chooses their settings, where the caller leaves that open.

A grid tries each combination of choices once. Where all tuned parameters are choices and the budget allows for every
combination, no other sampler finds more: it would try some of them twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import AUTO, BUDGET, GRID
from .tuning import Tuning


@dataclass(frozen=True)
class TrialPlan:
    """The number of trials of a search, and its sampler.

    Attributes:
        sampler: as `search` takes it, but never None.
        budget: the number of trials.
        combinations: the number of combinations of choices that a grid has; None for another sampler.
    """

    sampler: str
    budget: int
    combinations: int | None = None

    @classmethod
    def read(cls, sampler: str | None, budget: int | None, tuning: Tuning) -> TrialPlan:
        """Return the plan for what was asked for; None stands for the default.

        Raises: RecipeError for a grid where a range is tuned.
        """
        count = tuning.combination_count
        if sampler is None:
            sampler = GRID if count is not None and count <= (budget or BUDGET) else AUTO
        if sampler != GRID:
            return cls(sampler, budget or BUDGET)
        count = count or len(tuning.combinations(1))  # the latter raises where a range is tuned
        return cls(sampler, min(budget or count, count), count)

    @property
    def warnings(self) -> list[str]:
        """What is unwise about it: a grid that is cut off."""
        if self.combinations is None or self.budget == self.combinations:
            return []
        return [
            f"the budget is {self.budget}, so the grid tries only the first {self.budget} of its {self.combinations} combinations. "
            f"To try all, leave the budget out (budget=, --budget) or raise it to {self.combinations}."
        ]
