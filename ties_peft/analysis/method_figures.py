"""Merge by several methods and measure what each result holds of every adapter, by module and by rank."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..adapters.tensors import MemoryTensors
from ..merging.encoding import KEPT_BYTES, MergeCache
from ..merging.loop import merge_modules
from ..merging.measure import ModuleMeasurement, read_merged, retention
from ..merging.merged import Merged
from ..merging.plan import Plan, Progress, make_plan
from ..merging.recipes.recipe import Recipe
from ..merging.report import Report
from ..merging.tables import method_title
from ..spaces import Space
from ..task_vectors.delta import Delta, LowRank
from ..task_vectors.factorise import squared_singular_values
from ..task_vectors.processes import SINGLE_PROCESS
from ..task_vectors.tiles import thread_pool, threads_fixed
from .figure_kinds import Array

SIDE_BY_SIDE = 1 << 28  # entries of all task vectors up to which a merge takes a few seconds with one thread


@dataclass(frozen=True)
class MethodResult:
    """What one method makes of the adapters, by the merge's own defaults.

    Attributes:
        method: as asked.
        used: the method that merged, which differs from `method` where that chooses another.
        space, scale, rank: of the merge.
        energy: the share of the squared norm that the rank keeps.
        energies: that share for every rank from 1 to `rank`; empty for vectors, which have none.
        projection, cosine, others: of each adapter, see `merging.measure.retention`.
        module_projections, module_cosines: the same of each module, (M, N); NaN where an adapter lacks the module.
        norms: of the merged task vector on each module, before truncation, (M,).
        flat: whether the spectrum is flat, so that a smaller rank leaves out directions that count.
    """

    method: str
    used: str
    space: str
    scale: float
    rank: int | None
    energy: float
    energies: Array
    projection: list[float | None]
    cosine: list[float | None]
    others: list[float | None]
    module_projections: Array
    module_cosines: Array
    norms: Array
    flat: bool = False

    @property
    def title(self) -> str:
        """The method, and in brackets the one that it chose."""
        return method_title(self.method, self.used)

    def rank_for(self, share: float) -> int | None:
        """Return the smallest rank that keeps a share of the energy; None if that of the result does not."""
        reached = np.flatnonzero(self.energies >= share)
        return int(reached[0]) + 1 if len(reached) else None


def measure_methods(recipes: Sequence[Recipe], plan: Plan, progress: Progress) -> list[MethodResult]:
    """Merge by several methods and measure the results; small merges side by side, one thread for each.

    Args:
        recipes: each with the method and the rank.
        plan: of the adapters that are analysed; its members are merged.
        progress: as in `merge`; of merges side by side it is told how many are done.
    """
    caches: dict[Space, MergeCache] = {}
    if len(recipes) < 2 or sum(plan.cost(name) for name in plan.modules) > SIDE_BY_SIDE:
        return [measure_method(recipe, plan, progress, caches) for recipe in recipes]
    done, one_at_a_time = itertools.count(1), threading.Lock()

    def measure(recipe: Recipe) -> MethodResult:
        result = measure_method(recipe, plan, lambda stage, done, of: None, caches)
        with one_at_a_time:  # so that the numbers are told in their order
            progress("methods", next(done), len(recipes))
        return result

    with thread_pool() as pool:
        return pool.map(measure, recipes)


def measure_method(recipe: Recipe, plan: Plan, progress: Progress, caches: dict[Space, MergeCache]) -> MethodResult:
    """Merge by one method and measure the result as it is written.

    Args:
        recipe: with the method and the rank.
        plan: of the adapters that are analysed; its members are merged.
        progress: as in `merge`.
        caches: the encodings that earlier methods left, by space, for the methods that follow; empty for the first.
    """
    adapters = [member.adapter for member in plan.members]
    own = make_plan(recipe, adapters, str(plan.device), checked=True)
    cache = caches.setdefault(own.arithmetic, MergeCache()) if _keeps_encodings(own) else None
    tensors, totals, kept = merge_modules(own, cache, progress, SINGLE_PROCESS)
    report = totals.report(kept, seconds=0.0)
    written = MemoryTensors(tensors)
    by_rank = _energies_by_rank(report, lambda name: read_merged(own, own.modules[name], written))
    norms = np.array([line.norm for line in report.modules])
    projections, cosines = _retention_by_module(totals.modules, len(plan.members))
    return MethodResult(
        method=recipe.method,
        used=report.method,
        space=report.space,
        scale=report.scale,
        rank=report.rank,
        energy=report.energy,
        energies=_shares(by_rank.sum(0), float((norms**2).sum())),
        projection=[line.projection for line in report.adapters],
        cosine=[line.cosine for line in report.adapters],
        others=[line.others for line in report.adapters],
        module_projections=projections,
        module_cosines=cosines,
        norms=norms,
        flat=any(stage.has_flat_spectrum() for stage in own.stages.all),
    )


def _keeps_encodings(plan: Plan) -> bool:
    """Return whether what a merge encodes is small, and the same for each method in its space."""
    reusable = (
        plan.arithmetic.shared and not plan.stages.before and not getattr(plan.arithmetic, "compress_first", False)
    )
    ranks = (
        (module.shape, member.adapter.layout[name].rank)
        for name, module in plan.modules.items()
        for _, member in plan.holders(name)
    )
    return reusable and 4 * sum(sum(shape) * rank for shape, rank in ranks) <= KEPT_BYTES


def whole_energies(merged: Merged) -> Array:
    """Return the share of the energy of a merge that each rank from 1 to the result's keeps, over all modules."""
    by_rank = _energies_by_rank(merged.report, merged.read)
    return _shares(by_rank.sum(0), sum(line.norm**2 for line in merged.report.modules))


def _shares(sums: Array, total: float) -> Array:
    shares: Array = np.minimum(1.0, sums / total) if total else np.ones(len(sums))
    return shares


def _energies_by_rank(report: Report, read: Callable[[str], Delta]) -> Array:
    """Return the sum of the r largest squared singular values of each module for r = 1 … rank, (M, rank).

    Args:
        report: of the merge.
        read: returns the merged task vector of a module by its name.
    """
    rank = report.rank or 0
    found = np.zeros((len(report.modules), rank))
    with threads_fixed():  # small matrices: threads would wait for each other longer than they compute
        for number, line in enumerate(report.modules if rank else ()):
            delta = read(line.name)
            if not isinstance(delta, LowRank) or not line.norm:
                continue
            B, A = delta.B.double(), delta.A.double()
            sums = squared_singular_values(B.T @ B, A @ A.T).cumsum(0).numpy()
            found[number, : len(sums)] = sums
            found[number, len(sums) :] = sums[-1] if len(sums) else 0.0
    return found


def _retention_by_module(modules: Sequence[ModuleMeasurement], adapters: int) -> tuple[Array, Array]:
    """Return the projection and the cosine of each adapter on each module, (M, N)."""
    projections, cosines = np.full((2, len(modules), adapters), np.nan)
    for number, module in enumerate(modules):
        for i, place in enumerate(module.places):
            figures = retention(module.overlaps[i], module.products[i][i], module.square)
            for into, key in ((projections, "projection"), (cosines, "cosine")):
                into[number, place] = np.nan if figures[key] is None else figures[key]
    return projections, cosines
