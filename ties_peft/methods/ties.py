"""TIES-Merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from ..task_vectors.delta import Delta
from ..task_vectors.elect import DisjointRule, ElectRule, MergeRule
from ..task_vectors.trim import Scope
from .base import Density, Method, TaskVectors


class Ties(Method):
    """Trim each task vector, elect one sign per entry, average the entries that agree.

        xᵢ = trim(wᵢ·τᵢ, density)
        γ  = sign(Σ xᵢ)
        τ  = Σ_{i: sign(xᵢ) = γ} xᵢ / Σ_{i: sign(xᵢ) = γ} |wᵢ|

    Weights are applied first: trim, election and merge see w·τ, and the mean divides by the agreeing
    weights, so that (2, 1) and (10, 5) mean the same. With unit weights this is TIES as published.

    The trim keeps exactly k = ⌊density·n⌋ entries, where density is the decimal that was written (0.29 of 100 is 29) and n
    counts the entries of all modules of the adapter with scope `adapter`, of one module with scope `module`. Of equal
    magnitudes the first by position are kept: modules by name, then row by row. A sum of exactly 0 elects +.

    The paper's ablations and extension are parameters:

        no trim                density 1
        no election            elect `none`: the mean of the kept values of both signs
        no disjoint mean       disjoint `mean_elected`: the sum of the agreeing values over Σ|w| of all adapters, as in the
                               paper; `mean_all`: the sum of the values of both signs over it, as in the authors' code
        oracle signs           `sign_from`

    Law: one adapter with a positive weight and density 1 comes back unchanged; the order of the
        adapters does not matter; an adapter of zeros equals an absent one; at density 1 with
        agreeing signs and unit weights it is the mean; at density 1 with `mean_all` and positive
        weights it is the average.
    Source: Yadav, Tam, Choshen, Raffel and Bansal, TIES-Merging: Resolving Interference When Merging
        Models, NeurIPS 2023 (arXiv 2306.01708), algorithm 1. PEFT's `ties_svd` is this with scope
        `module` and unit weights (it elects before weighting and divides by the count); PEFT's
        `ties` is space `factors` for equal lora scalings and unit weights; mergekit trims a module at a time.
    """

    name = "ties"
    spaces = ("delta", "core", "knots", "factors")
    source = "Yadav et al., NeurIPS 2023, arXiv 2306.01708"
    entrywise = True

    density: Density = Field(0.2, description="share of the entries that the trim keeps, in (0, 1]")
    scope: Scope = Field("adapter", description="rank magnitudes over the whole adapter (the paper) or each module")
    elect: ElectRule = Field("mass", description="sign of the sum of values (mass) or of signs (count); or none")
    disjoint: DisjointRule = Field(
        "mean",
        description="how the agreeing entries are combined: mean, sum or max; "
        "mean_elected divides them by all adapters, mean_all takes both signs",
    )
    normalize: bool = Field(True, description="divide the mean by the agreeing weights; false: by their number")
    sign_from: Any = Field(None, description="an adapter (path, Hub id or Adapter) whose untrimmed signs are used")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Trim, elect, merge."""
        kept = task_vectors.trim(self.density, self.scope)
        signs = kept.elect(self.elect)
        return kept.disjoint_merge(signs, self.disjoint, self.normalize)

    def linear(self, adapters: int) -> bool:
        """Return whether nothing is trimmed and no sign is elected, or there is one adapter alone."""
        linear = adapters == 1 or MergeRule(self.elect, self.disjoint).sums_both_signs
        return linear and self.density == 1 and self.sign_from is None

    def check(self, weights: Sequence[float], space: str) -> str | None:
        """Refuse `sign_from` without an election."""
        if self.sign_from is not None and (self.elect == "none" or self.disjoint == "mean_all"):
            return (
                "sign_from sets the elected signs, and elect 'none' and disjoint 'mean_all' elect none. Leave one out"
            )
        return None
