"""Analyze adapters before a merge: how they interfere, and what each method would keep of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.base_model import BaseModel
from ..errors import RecipeError
from ..merging.encoding import EncodedModules
from ..merging.measure import MAX_PAIRED
from ..merging.merge import has_causal_base, make_recipe, open_adapters
from ..merging.options import DROP, Options, Rank
from ..merging.plan import Plan, Progress, make_plan
from ..methods import find_method
from ..task_vectors.tiles import threads_fixed
from .analysis import Analysis
from .entry_figures import counted_share, measure_entries
from .factor_figures import measure_factors
from .figures import Measured
from .method_figures import measure_methods
from .module_places import module_places

COMPARED = ("ties", "task_arithmetic", "iso_c", "tsv")  # beside the default method of `merge`, if none are asked for

MOST_WORK = 5e10  # of `_factor_work`, for several methods; 20 adapters of an 8B model at rank 16 are five times as much


def analyze(
    adapters: Sequence[str | Path | Adapter],
    density: float = 0.2,
    rank: Rank = Options.rank,
    methods: Sequence[str] | None = None,
    *,
    exact: bool | None = None,
    base: str | Path | BaseModel | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Measure how adapters interfere, before a merge, from their files alone.

    Norms, cosines, ranks and subspaces come from the factors. Sign conflicts, overlaps of what is kept and redundancy need
    the entries, which are streamed as in a merge.

    Args:
        adapters: folders, files, Hub ids, patterns (see `sources`) or `Adapter`s.
        density: the share of the entries of each adapter that the trim keeps, for `sign_conflict` and `kept_overlap`.
        rank: of the methods' results, as in `merge`.
        methods: that are compared, each with the defaults of `merge`; by default its default method and those of `COMPARED`
            that the adapters allow and that take seconds; a warning names those left out. An empty list compares none.
        exact: whether every entry is counted. By default all are up to two thousand million, and beyond that as many, from
            a random part of the rows of each module; the result says so in `counted`. False counts a tenth at most.
        base: the base model, for adapters whose task vectors depend on its weights.
        progress: called as progress(stage, done, of) while it works.
    Raises: as `merge`.
    """
    started = time.perf_counter()
    tell = progress or (lambda stage, done, of: None)
    known, opened = open_adapters(adapters, base)
    if len(opened) > MAX_PAIRED:
        raise RecipeError(
            f"{len(opened)} adapters were given, which makes {len(opened) * (len(opened) - 1) // 2} pairs; expected at most "
            f"{MAX_PAIRED} adapters. Analyze some of them."
        )
    shared: dict[str, Any] = {"heads": DROP, "allow_disjoint": True, "base": known.label if known is not None else None}
    plan = make_plan(make_recipe(opened, method="ties", parameters={"density": density}, **shared), opened)
    share = counted_share(plan, exact)
    warnings = list(plan.warnings)
    chosen = _default_methods(plan, share, warnings) if methods is None else list(methods)
    members = [member.adapter for member in plan.members]
    recipes = [make_recipe(members, method=name, rank=rank, **shared) for name in chosen]
    measured = _measure(plan, share, tell)
    return Analysis(
        names=[member.name for member in plan.members],
        sources=[member.adapter.label for member in plan.members],
        kind=plan.title,
        density=density,
        counted=share,
        modules=list(plan.modules),
        shapes=[module.shape for module in plan.modules.values()],
        places=module_places(list(plan.modules)),
        measured=measured,
        methods=measure_methods(recipes, plan, tell),
        causal_lm=has_causal_base(plan),
        warnings=warnings,
        seconds=time.perf_counter() - started,
    )


def _measure(plan: Plan, share: float, progress: Progress) -> Measured:
    """Return the figures of all modules: first those of the factors, then those of the entries."""
    measured = Measured(len(plan.modules), len(plan.members))
    modules = EncodedModules(plan)
    with torch.no_grad(), threads_fixed():  # small matrices: threads would wait for each other longer than they compute
        for number, name in enumerate(plan.modules):
            places = [place for place, _ in plan.holders(name)]
            measure_factors(measured, number, places, [modules.read(place, name) for place in places])
            progress("factors", number + 1, len(plan.modules))
    measure_entries(measured, plan, share, progress)
    return measured


def _default_methods(plan: Plan, share: float, warnings: list[str]) -> list[str]:
    """Return the methods that are compared by default: those for this type of adapter that take seconds."""
    names = [
        name for name in dict.fromkeys((Options.method, *COMPARED)) if plan.peft_type.name in find_method(name).kinds
    ]
    if _factor_work(plan) > MOST_WORK:
        warnings.extend(_not_compared(names, "adapters of this size and number take minutes for each method"))
        return []
    many = share < 1  # entries
    by_entry = [
        n for n in names if many and find_method(n).entrywise and not find_method(n)().linear(len(plan.members))
    ]
    warnings.extend(_not_compared(by_entry, "a merge goes through every entry of these adapters, which takes minutes"))
    return [name for name in names if name not in by_entry]


def _not_compared(names: Sequence[str], reason: str) -> list[str]:
    """Return a warning that methods were left out, with the option that compares them; nothing if there are none."""
    if not names:
        return []
    return [
        f"{', '.join(names)}: not compared, because {reason}. Ask with --methods {','.join(names)} (methods={list(names)})."
    ]


def _factor_work(plan: Plan) -> float:
    """Return Σ K²·(out + in) over the modules, with K the sum of the ranks: what the products of factors take."""
    work = 0.0
    for name, module in plan.modules.items():
        columns = sum(member.adapter.layout[name].rank for _, member in plan.holders(name))
        work += columns**2 * sum(module.shape) if len(module.shape) > 1 else 0
    return work
