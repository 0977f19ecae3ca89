"""Prepare: read adapters and find their shared coordinates once, then merge them many times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.base_model import BaseModel
from ..task_vectors.tiles import thread_pool
from .encoding import EncodedModules, MergeCache
from .merge import make_recipe, open_adapters, run_plan
from .merged import Merged
from .options import DEVICE, Options, Rank, Weights, options_in
from .plan import Plan, make_plan
from .recipes.recipe import Recipe
from .sweep import Sweep, sweep

FIXED = ("space", "allow_disjoint", "heads", "base")  # the options that `prepare` takes for every merge


class Prepared:
    """Adapters whose files are read, checked and encoded; a merge then takes only the time of its method.

    Attributes:
        adapters: what is merged.
        recipe: the space and what else every merge shares.
        warns: whether a merge gives the warnings of its report; a search, which makes hundreds of merges, gives only those of
            its result.
    """

    def __init__(self, adapters: Sequence[Adapter], recipe: Recipe, device: str) -> None:
        self.adapters = list(adapters)
        self.recipe = recipe
        self.device = device
        self.warns = True
        self._cache = MergeCache()
        plan = make_plan(replace(recipe, method="ties"), adapters, device)  # a method that every space offers
        self._member_count, self._space = len(plan.members), plan.arithmetic
        self._encode(plan)

    def merge(
        self,
        method: str = Options.method,
        weights: Weights | None = None,
        scale: float | str | None = None,
        rank: Rank = Options.rank,
        seed: int = Options.seed,
        dtype: torch.dtype | str | None = None,
        *,
        densities: Sequence[Any] | None = None,
        restore_norm: bool = False,
        **parameters: Any,
    ) -> Merged:
        """Merge as `ties_peft.merge` does, from the encodings in memory.

        Law: the same tensors as `ties_peft.merge` with the same arguments.
        """
        asked = options_in(locals())
        started = time.perf_counter()
        fixed = {name: getattr(self.recipe, name) for name in FIXED}
        asked["parameters"] = {**self.recipe.parameters, **parameters}
        recipe = make_recipe(self.adapters, **fixed, **asked)
        plan = make_plan(recipe, self.adapters, self.device, checked=True)
        return run_plan(plan, started, self._cache if self._can_reuse(plan) else None, warns=self.warns)

    def sweep(
        self,
        methods: Sequence[str] = (Options.method,),
        densities: Sequence[float | None] = (None,),
        ranks: Sequence[Rank] = (Options.rank,),
    ) -> Sweep:
        """Merge by every method, density and rank, and return a table of what each result keeps.

        Args:
            methods: as `merge` takes them.
            densities: each for the methods that have one; None for the method's own.
            ranks: as `merge` takes them.
        Returns: rows with energy, norm and each adapter's projection; no merged adapter is kept.
        Raises: as `merge`.
        """
        return sweep(self.merge, methods, densities, ranks)

    def _can_reuse(self, plan: Plan) -> bool:
        """Return whether the encodings in memory are those of this merge.

        They are not where a weight is 0, because that adapter then has no part in the shared bases, nor where the parameters
        of the space differ.
        """
        everywhere = all(plan.weight(place, name) != 0 for place in range(len(plan.members)) for name in plan.modules)
        compresses = getattr(plan.arithmetic, "compress_first", False)
        return (
            len(plan.members) == self._member_count
            and everywhere
            and not compresses
            and plan.arithmetic == plan.space == self._space
        )

    def _encode(self, plan: Plan) -> None:
        with torch.no_grad(), thread_pool():
            modules = EncodedModules(plan, self._cache)
            for module in plan.modules:
                modules.encoding(module)


def prepare(
    adapters: Sequence[str | Path | Adapter],
    space: str = Options.space,
    device: str = DEVICE,
    *,
    allow_disjoint: bool = False,
    heads: str = Options.heads,
    base: str | Path | BaseModel | None = None,
    **parameters: Any,
) -> Prepared:
    """Read and check adapters once, and merge them many times: `.merge(method=…, density=…)` takes only its method's time.

    With space="core" or "knots" that is milliseconds for each module, because the adapters' shared bases are computed here,
    and in them a module is small. In space "delta", the default as everywhere, each merge still goes through every entry of
    every module.

    Args:
        adapters: folders, files, Hub ids, patterns (see `sources`) or `Adapter`s.
        space: the coordinates of every merge.
        device: where the arithmetic is done.
        allow_disjoint, heads, base: as in `merge`.
        **parameters: the space's own.
    Raises: as `merge`.
    """
    asked = options_in(locals())
    loaded, opened = open_adapters(adapters, base)
    recipe = make_recipe(opened, **{**asked, "base": None if loaded is None else loaded.label})
    return Prepared(opened, recipe, device)
