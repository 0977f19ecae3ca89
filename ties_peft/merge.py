"""Merge: for each module, read → encode → merge → decode → write."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .account import Account
from .adapter import Adapter
from .delta import Delta, Dense, LowRank, inner
from .errors import RecipeError, TiesPeftWarning, printable
from .factorise import OVERSAMPLE, Factors, compress, factorise, row_space
from .kinds import Module
from .merged import Merged
from .methods import TaskVectors
from .plan import Plan, make_plan
from .recipe import Rank, Recipe
from .survey import Cuts, find_cuts
from .tiles import Workers, tiles, workers

Progress = Callable[[str, int, int], None]


def merge(
    adapters: Sequence[str | Path | Adapter],
    method: str = "ties",
    space: str = "delta",
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    rank: Rank = "auto",
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    allow_disjoint: bool = False,
    base_model: str | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Merged:
    """Merge adapters into one.

    Args:
        adapters: folders, Hub ids or `Adapter`s, of one kind and for one base model.
        method: how they are combined; see `ties_peft.methods()`.
        space: in which coordinates; `delta` is where an adapter's effect lives.
        weights: one finite number per adapter, applied first; 1 each by default. A negative one
            negates, 0 is as absent.
        scale: λ, on the merged task vector; by default the method's own.
        rank: of the output: a whole number, `max` (what loses nothing, or all there is) or `auto`
            (min(Σrᵢ, max(64, largest rᵢ))). (IA)³ vectors have none.
        seed: of every random draw.
        device: where the arithmetic is done.
        dtype: of the tensors written; by default that of the inputs, float32 if they differ.
        allow_disjoint: merge adapters that share no module.
        base_model: the base's name to write; by default the inputs'.
        progress: called as progress(stage, done, of) while it works.
        **parameters: the method's own, such as density and scope.
    Returns: the merged adapter, in memory; all work is done.
    Raises: TiesPeftError, before any work wherever it can be known by then.
    Law: one adapter with weight 1, scale 1, density 1 and enough rank computes the same function.
    """
    if isinstance(adapters, (str, Path, Adapter)):
        raise RecipeError("the adapters are one adapter; expected a list of them: merge([...]).")
    if weights is not None and not isinstance(weights, Iterable):
        raise RecipeError(f"the weights are {weights!r}; expected a list of numbers, one per adapter.")
    opened = [a if isinstance(a, Adapter) else Adapter.load(a) for a in adapters]
    recipe = Recipe(
        adapters=tuple(adapter.source or "in memory" for adapter in opened),
        weights=None if weights is None else tuple(weights),
        method=method,
        parameters=parameters,
        space=space,
        scale=scale,
        rank=rank,
        seed=seed,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        base_model=base_model,
        allow_disjoint=allow_disjoint,
    )
    return merge_recipe(recipe, opened, device, progress)


def merge_recipe(
    recipe: Recipe,
    adapters: Sequence[Adapter] | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Merged:
    """Do what a recipe says.

    Args:
        recipe: what to merge, and how.
        adapters: the recipe's adapters where they are open already.
        device, progress: as in `merge`.
    """
    started = time.perf_counter()
    opened = [Adapter.load(name) for name in recipe.adapters] if adapters is None else list(adapters)
    plan = make_plan(recipe, opened, device)
    tell = progress or (lambda stage, done, of: None)
    tensors: dict[str, Tensor] = {}
    account = Account(plan)
    with torch.no_grad(), workers() as crew:
        cuts, kept = find_cuts(plan, crew, tell)
        for done, module in enumerate(plan.modules.values()):
            tensors |= _one_module(plan, module, cuts, crew, account)
            tell("merge", done + 1, len(plan.modules))
    report = account.report(kept, time.perf_counter() - started)
    for warning in report.warnings:
        warnings.warn(warning, TiesPeftWarning, stacklevel=3)
    return Merged(_config(plan, recipe), tensors, report, recipe)


def _one_module(plan: Plan, module: Module, cuts: Cuts, crew: Workers, account: Account) -> dict[str, Tensor]:
    """The tensors of one module of the result."""
    holders = plan.holders(module.name)
    deltas = [member.adapter.read(module.name).to(plan.device) for _, member in holders]
    account.add_inputs([place for place, _ in holders], deltas)
    tally: dict[str, int] = {}
    merged = _merge_parts(plan, module.name, deltas, cuts, crew, tally)
    factors = _at_rank(merged, plan, deltas)
    factors = factors.scaled(plan.scale)
    tensors = plan.kind.pack(module, factors.delta.to(torch.device("cpu")), plan.rank or 0)
    written = {name: tensor.to(plan.dtype).contiguous() for name, tensor in tensors.items()}
    if not all(torch.isfinite(tensor).all() for tensor in written.values()):
        raise RecipeError(
            f"module '{printable(module.name)}': the merged values are beyond {str(plan.dtype).removeprefix('torch.')} "
            "with this scale and these weights. Lower them, or write float32 or bfloat16 (--dtype)."
        )
    account.add_result(module, deltas, factors, written, tally)
    return written


def _merge_parts(
    plan: Plan, name: str, deltas: Sequence[Delta], cuts: Cuts, crew: Workers, tally: dict[str, int]
) -> Delta:
    """The merged task vector of one module, part by part."""
    holders = plan.holders(name)
    frame = plan.space.frame(deltas)
    encoded = [frame.encode(delta, member.weight) for delta, (_, member) in zip(deltas, holders, strict=True)]
    signs = None
    if plan.signs is not None and name in plan.signs.layout:
        signs = frame.encode(plan.signs.read(name).to(plan.device), 1.0)
    merged = []
    for part in range(len(encoded[0])):
        tasks = TaskVectors(
            deltas=[parts[part] for parts in encoded],
            weights=[frame.weights(member.weight)[part] for _, member in holders],
            cuts=[cuts[place, name][part] for place, _ in holders] if cuts else [],
            total_weight=plan.total_weight,
            signs=None if signs is None else signs[part],
            room=lambda purpose, shape: crew.scratch(purpose, shape, plan.device),
        )
        merged.append(_merge_part(plan, tasks, crew, tally))
    return frame.decode(merged)


def _merge_part(plan: Plan, tasks: TaskVectors, crew: Workers, tally: dict[str, int]) -> Delta:
    """One part: whole, or tile by tile where the method works entry by entry."""
    method = plan.method
    if not method.entrywise or method.linear(len(tasks)):
        merged = method.merge(tasks)
        return Dense(merged) if isinstance(merged, Tensor) else merged
    result = torch.empty(tasks.deltas[0].shape, device=plan.device)
    grid = tiles(result.shape)

    def tile(number: int) -> dict[str, int]:
        start, stop = grid[number]
        part = TaskVectors(**{**vars(tasks), "rows": (start, stop), "tile": number, "tally": {}})
        merged = method.merge(part)
        result[start:stop] = merged if isinstance(merged, Tensor) else merged.dense()
        return part.tally

    for counts in crew.map(tile, range(len(grid))):
        for key, value in counts.items():
            tally[key] = tally.get(key, 0) + value
    return Dense(result)


def _at_rank(merged: Delta, plan: Plan, deltas: Sequence[Delta]) -> Factors:
    """The merged task vector at the rank asked for; as it is where its kind has none."""
    if plan.rank is None:
        energy = inner(merged, merged)
        return Factors(merged, energy, energy)
    if isinstance(merged, LowRank):
        return compress(merged, plan.rank)
    lora = [delta for delta in deltas if isinstance(delta, LowRank)]
    return factorise(merged.dense(), plan.rank, row_space(lora, plan.rank + OVERSAMPLE))


def _config(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """adapter_config.json: as few keys as every loader needs, so that old releases load it too."""
    configs = [member.adapter.config for member in plan.members]
    named = recipe.base_model or next((a.base for a in (m.adapter for m in plan.members) if a.base), None)
    tasks = [config.get("task_type") for config in configs]
    task = tasks[0] if isinstance(tasks[0], str) and all(other == tasks[0] for other in tasks) else None
    return {
        "peft_type": plan.kind.peft_type,
        "base_model_name_or_path": named,
        **({"task_type": task} if task else {}),
        "inference_mode": True,
        **plan.kind.config(list(plan.modules.values()), plan.rank or 0),
        **({"fan_in_fan_out": True} if any(config.get("fan_in_fan_out") for config in configs) else {}),
    }
