"""TIES-Merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field

from ..task_vectors.delta import Delta
from ..task_vectors.elect import DisjointRule, ElectRule
from ..task_vectors.trim import Scope
from .base import Density, Method, TaskVectors, scope_fault


class Ties(Method):
    """Trim each task vector, elect one sign per entry, average the entries that agree.

        xᵢ = trim(wᵢ·τᵢ, density)
        γ  = sign(Σ xᵢ)
        τ  = Σ_{i: sign(xᵢ) = γ} xᵢ / Σ_{i: sign(xᵢ) = γ} |wᵢ|

    Weights come first: trim, election and merge see w·τ, and the mean divides by the agreeing
    weights, so (2, 1) and (10, 5) mean the same. With unit weights this is TIES as published.

    The trim keeps exactly k = ⌊density·n⌋ entries, density being the decimal that was written (0.29 of 100 is 29); n
    counts the adapter's entries in all its modules with scope `adapter`, in one module with scope `module`. Of equal
    magnitudes the first by position stay: modules by name, then row by row. A sum of exactly zero elects +.

    The paper's ablations are parameters: no trim is density 1; no election is elect `none`, the mean
    of what is kept of both signs; no disjoint mean is disjoint `mean_elected`, the sum of the
    agreeing values over Σ|w| of all adapters, as the paper words it, or `mean_all`, that of the
    values of both signs, as the authors' code computes it. Its oracle is `sign_from`.

    Law: one adapter with a positive weight and density 1 comes back unchanged; the order of the
        adapters does not matter; an adapter of zeros equals an absent one; at density 1 with
        agreeing signs and unit weights it is the mean; at density 1 with `mean_all` and positive
        weights it is the average.
    Source: Yadav, Tam, Choshen, Raffel and Bansal, TIES-Merging: Resolving Interference When Merging
        Models, NeurIPS 2023 (arXiv 2306.01708), algorithm 1. PEFT's `ties_svd` is this with scope
        `module` and unit weights (it elects before weighting and divides by the count); PEFT's
        `ties` is space `factors` for equal lora scalings and unit weights; mergekit trims a module at a time.
    """

    name: ClassVar[str] = "ties"
    spaces: ClassVar[tuple[str, ...]] = ("delta", "core", "knots", "factors")
    source: ClassVar[str] = "Yadav et al., NeurIPS 2023, arXiv 2306.01708"
    entrywise: ClassVar[bool] = True

    density: Density = Field(0.2, description="share of entries that the trim keeps, in (0, 1]")
    scope: Scope = Field("adapter", description="rank magnitudes over the whole adapter (the paper) or each module")
    elect: ElectRule = Field(
        "mass", description="sign of the sum of the values (mass) or of their signs (count); or none"
    )
    disjoint: DisjointRule = Field(
        "mean",
        description="how the agreeing entries are combined: mean, sum or max; "
        "mean_elected divides them by all adapters, mean_all takes both signs",
    )
    normalize: bool = Field(True, description="divide the mean by the agreeing weights; false: by their number")
    sign_from: Any = Field(None, description="an adapter (path, Hub id or Adapter) whose signs are taken, untrimmed")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Trim, elect, merge."""
        kept = task_vectors.trim(self.density, self.scope)
        signs = kept.elect(self.elect)
        return kept.disjoint_merge(signs, self.disjoint, self.normalize)

    def linear(self, adapters: int) -> bool:
        """True of untrimmed vectors where nobody is there to disagree, or is asked to agree."""
        both = self.disjoint == "mean_all" or (self.elect == "none" and self.disjoint in ("sum", "mean_elected"))
        return self.density == 1 and self.sign_from is None and (adapters == 1 or both)

    def check(self, weights: Sequence[float], space: str) -> str | None:
        """In `factors` only scope `module` has a meaning; without an election there are no signs to give."""
        if self.sign_from is not None and (self.elect == "none" or self.disjoint == "mean_all"):
            return "sign_from gives the signs of an election, and elect 'none' and disjoint 'mean_all' have none"
        return scope_fault(self, self.scope, space)
