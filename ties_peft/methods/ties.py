"""TIES-Merging."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from ..delta import Delta
from ..elect import Ballot, Disjoint, Elect
from ..trim import Scope
from .base import Density, Method, TaskVectors, Trim


class Ties(Method):
    """Trim each task vector, elect one sign per entry, average the entries that agree.

        xᵢ = trim(wᵢ·τᵢ, density)
        γ  = sign(Σ xᵢ)
        τ  = Σ_{i: sign(xᵢ) = γ} xᵢ / Σ_{i: sign(xᵢ) = γ} |wᵢ|

    Weights come first: trim, election and merge see w·τ, and the mean divides by the agreeing
    weights, so (2, 1) and (10, 5) mean the same. With unit weights this is TIES as published.

    Law: one adapter with a positive weight and density 1 comes back unchanged; the order of the
        adapters does not matter; an adapter of zeros equals an absent one; at density 1 with
        agreeing signs and unit weights it is the mean.
    Source: Yadav, Tam, Choshen, Raffel and Bansal, TIES-Merging: Resolving Interference When Merging
        Models, NeurIPS 2023 (arXiv 2306.01708), algorithm 1. PEFT's `ties_svd` is this with scope
        `module` and unit weights (it elects before weighting and divides by the count); PEFT's
        `ties` is space `factors`; mergekit trims a module at a time.
    """

    name: ClassVar[str] = "ties"
    spaces: ClassVar[tuple[str, ...]] = ("delta", "core", "knots", "factors")
    source: ClassVar[str] = "Yadav et al., NeurIPS 2023, arXiv 2306.01708"
    entrywise: ClassVar[bool] = True

    density: Density = Field(0.2, description="share of entries that the trim keeps, in (0, 1]")
    scope: Scope = Field("adapter", description="rank magnitudes over the whole adapter (the paper) or each module")
    elect: Elect = Field("mass", description="sign of the sum of the values, or of the count of their signs")
    disjoint: Disjoint = Field("mean", description="how the agreeing entries are combined: mean, sum or max")
    normalize: bool = Field(True, description="divide the mean by the agreeing weights; false: by their number")
    sign_from: Any = Field(None, description="an adapter (path, Hub id or Adapter) whose signs are taken, untrimmed")

    def merge(self, tasks: TaskVectors) -> Tensor | Delta:
        """One pass over the task vectors, with accumulators for the election."""
        if self.linear(len(tasks)) and tasks.rows is None:
            mean = self.disjoint == "mean" and self.normalize
            return tasks.sum(1 / abs(tasks.weights[0]) if mean else 1.0)
        ballot = Ballot(tasks.room("ballot", (5, *tasks.shape)), self.elect, self.disjoint, self.normalize)
        for task in tasks:
            ballot.cast(task.trimmed(), task.weight)
        conflicting, shared = ballot.conflicts()
        tasks.tally["conflicting"] = tasks.tally.get("conflicting", 0) + conflicting
        tasks.tally["shared"] = tasks.tally.get("shared", 0) + shared
        return ballot.result(tasks.sign_vector())

    def trims(self) -> Trim:
        """One cut, at the density."""
        return Trim((self.density,), self.scope)

    def linear(self, adapters: int) -> bool:
        """True of one adapter that is not trimmed: there is nobody to disagree with."""
        return adapters == 1 and self.density == 1 and self.sign_from is None

    def check(self, weights: list[float], space: str) -> str | None:  # type: ignore[override]
        """In `factors` only scope `module` has a meaning."""
        if space == "factors" and self.scope == "adapter" and "scope" in self.model_fields_set:
            return "scope 'adapter' is not offered in space 'factors', where A and B are each ranked on their own; use scope 'module'"
        return None
