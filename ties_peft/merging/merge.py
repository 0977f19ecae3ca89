"""Merge adapters: make the recipe and the plan, merge the modules (see `loop`), make the result."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ..adapters.adapter import Adapter, load_adapters
from ..adapters.base_model import BaseModel
from ..adapters.extra_tensors import is_head
from ..adapters.tokenizer_files import collect_tokenizer_files
from ..adapters.types.base import EMBEDDING, LINEAR
from ..errors import RecipeError, warn_caller
from ..task_vectors.processes import SINGLE_PROCESS, ProcessGroup
from .card import shared_licence
from .encoding import MergeCache
from .loading import VOCABULARY, AdapterFacts, find_loading, is_causal_lm
from .loop import merge_modules
from .members import written_base_name
from .merged import Merged
from .options import DEVICE, Options, Rank, Weights, options_in
from .plan import Plan, Progress, make_plan
from .recipes.recipe import IN_MEMORY, Recipe
from .recipes.schedule import plain_schedule
from .recipes.settings import recipe_parameters


def merge(
    adapters: Sequence[str | Path | Adapter],
    method: str = Options.method,
    space: str = Options.space,
    weights: Weights | None = None,
    scale: float | str | None = None,
    rank: Rank = Options.rank,
    seed: int = Options.seed,
    device: str = DEVICE,
    dtype: torch.dtype | str | None = None,
    *,
    densities: Sequence[Any] | None = None,
    restore_norm: bool = False,
    allow_disjoint: bool = False,
    base_model: str | None = None,
    base: str | Path | BaseModel | None = None,
    target: str | None = None,
    heads: str = Options.heads,
    progress: Progress | None = None,
    **parameters: Any,
) -> Merged:
    """Merge adapters into one.

    Args:
        adapters: folders, files, Hub ids, patterns (see `sources`) or `Adapter`s, of one PEFT type and for one base model.
        method: how they are combined; see `ties_peft.methods()`.
        space: in which coordinates; `delta` is where an adapter's effect lives.
        weights: one per adapter, applied first; 1 each by default. A negative one negates, 0 is as
            absent; in place of a number a schedule over the modules (see `ties_peft.merging.recipes.schedule`), such as
            {"over_layers": [1.0, 0.5]}, straight from the first layer's number to the last one's.
            `norm` brings all to one norm, the mean of theirs: wᵢ = mean ‖τ‖ / ‖τᵢ‖.
        scale: λ, on the merged task vector: a number, or a formula in N, the number of adapters with a weight other
            than 0, such as `1/sqrt(N)` or `N^-1/4` (see `scale`); by default the method's own.
        rank: of the output: a whole number, `max` (what loses nothing, or else the full rank) or `auto`
            (min(Σrᵢ, max(64, largest rᵢ)), and Σrᵢ where the method's spectrum is flat, as `iso_c`'s is).
            (IA)³ vectors have none.
        seed: of every random draw.
        device: where the arithmetic is done.
        dtype: of the tensors written; by default that of the inputs, float32 if they differ.
        densities: one per adapter, in place of `density`; None in it for `density`, or a schedule as in `weights`.
        restore_norm: bring a result that the rank truncates back to the norm it had.
        allow_disjoint: merge adapters that share no module.
        base_model: the base's name to write; by default the inputs'.
        base: the base model's folder or Hub id, for adapters whose task vectors depend on its weights
            (such as DoRA) and for heads `merge`; only the tensors that are needed are read.
        target: the program that is to load the result: `peft`, `vllm` or `llama.cpp` (see `targets`), or for LoRAs of image
            models `diffusers` or `kohya`.
        heads: what becomes of layers that adapters store as a whole (heads, embeddings, biases) where the adapters
            differ: `error`, `drop`, `keep=NAME` (an adapter's short name), `average` or `merge`, which
            needs `base`; see `ties_peft.merging.extra_tensors`.
        progress: called as progress(stage, done, of) while it works.
        **parameters: the method's own, such as density and scope; density, for all adapters, may be a schedule,
            such as {"over_layers": [0.2, 0.9]}.
    Returns: the merged adapter, in memory; all work is done.
    Raises: TiesPeftError, before any work wherever it can be known by then.
    Law: one adapter with weight 1, scale 1, density 1 and enough rank computes the same function.
    """
    asked = options_in(locals())
    loaded, opened = open_adapters(adapters, base)
    recipe = make_recipe(opened, **{**asked, "base": None if loaded is None else loaded.label})
    return merge_recipe(recipe, opened, device, progress)


def open_adapters(
    adapters: Sequence[str | Path | Adapter], base: str | Path | BaseModel | None
) -> tuple[BaseModel | None, list[Adapter]]:
    """Return the base model, if one is given, and the adapters, whose task vectors may depend on it."""
    loaded = BaseModel.load(base) if isinstance(base, (str, Path)) else base
    return loaded, load_adapters(adapters, loaded)


def make_recipe(
    adapters: Sequence[Adapter],
    weights: Weights | None = None,
    dtype: torch.dtype | str | None = None,
    parameters: Mapping[str, Any] = MappingProxyType({}),
    densities: Sequence[Any] | None = None,
    **options: Any,
) -> Recipe:
    """Return the recipe of a call: what was asked for, in the form that is saved."""
    each = None if densities is None else _one_per_adapter("densities", densities, "one density per adapter")
    if not (weights is None or isinstance(weights, str)):
        weights = _one_per_adapter("weights", weights, "norm, or one weight per adapter")
    return Recipe(
        adapters=tuple(adapter.source or IN_MEMORY for adapter in adapters),
        weights=weights,
        densities=each,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        parameters=recipe_parameters(parameters, each),
        **options,
    )


def _one_per_adapter(name: str, given: Any, expected: str) -> tuple[Any, ...]:
    """Return the numbers or schedules of a call, one for each adapter."""
    if not isinstance(given, Iterable) or isinstance(given, (str, Mapping, Set)):
        raise RecipeError(f"the {name} are {given!r}; expected {expected}, in a list: {name}=[1, 0.5].")
    return tuple(plain_schedule(one) for one in given)


def merge_recipe(
    recipe: Recipe,
    adapters: Sequence[Adapter] | None = None,
    device: str = DEVICE,
    progress: Progress | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Merged:
    """Do what a recipe says.

    Args:
        recipe: what to merge, and how.
        adapters: the recipe's adapters where they are open already.
        device, progress: as in `merge`.
        processes: the processes that share the work; each of them gets the whole result.
    """
    started = time.perf_counter()
    if adapters is None:
        recipe, _ = recipe.expanded()
    opened = open_recipe(recipe) if adapters is None else list(adapters)
    return run_plan(make_plan(recipe, opened, device, processes=processes), started, None, progress, processes)


def open_recipe(recipe: Recipe) -> list[Adapter]:
    """Return a recipe's adapters, with the base model that it names."""
    base = BaseModel.load(recipe.base) if recipe.base is not None else None
    return [Adapter.load(name, base=base) for name in recipe.adapters]


def run_plan(
    plan: Plan,
    started: float,
    cache: MergeCache | None = None,
    progress: Progress | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    warns: bool = True,
) -> Merged:
    """Do the work of a checked plan.

    Args:
        plan: of the merge.
        started: when it began, by `time.perf_counter`.
        cache: of a prepared merge.
        progress, processes: as in `merge_recipe`.
        warns: whether what the report warns of is given as warnings too.
    """
    tensors, totals, kept = merge_modules(plan, cache, progress or (lambda stage, done, of: None), processes)
    tensors |= plan.extra_tensors.tensors()
    folders = [(member.name, member.adapter.folder) for member in plan.members]
    tokenizer_files = None if cache is None else cache.tokenizer_files
    if tokenizer_files is None:  # LoRAs of image models have none
        tokenizer_files = collect_tokenizer_files(folders if plan.pipeline is None else [])
    if cache is not None:
        cache.tokenizer_files = tokenizer_files
    plan.warnings.extend([tokenizer_files.remark] if tokenizer_files.remark else [])
    licence, note = shared_licence(folders)
    report = replace(
        totals.report(kept, time.perf_counter() - started),
        copied=sorted(tokenizer_files.files),
        licence=licence,
        licence_note=note,
        causal_lm=has_causal_base(plan),
    )
    warn_caller(report.warnings if warns else ())
    config, recipe = _config(plan), plan.recipe
    if plan.pipeline is not None:
        return Merged(config, tensors, report, recipe, plan.pipeline.loading(config), None, plan.pipeline)
    loading = find_loading(_adapter_facts(plan, config))
    return Merged(config, tensors, report, recipe, loading, tokenizer_files)


def _config(plan: Plan) -> dict[str, Any]:
    """Return adapter_config.json with only the keys that loaders need, so that old releases of PEFT load it too."""
    configs = [member.adapter.config for member in plan.members]
    extra = plan.extra_tensors.config()
    own = plan.peft_type.config(list(plan.modules.values()), plan.rank or 0)
    return {
        "peft_type": plan.peft_type.config_name,
        "base_model_name_or_path": written_base_name(plan.recipe, plan.members),
        **({"task_type": plan.task_type.kept} if plan.task_type.kept else {}),
        "inference_mode": True,
        **own,
        **{key: value for key, value in extra.items() if key != "bias" or key in own},  # (IA)³ has no such key
        **({"fan_in_fan_out": True} if _has_conv1d(plan) else {}),
        **({"layer_replication": configs[0]["layer_replication"]} if configs[0].get("layer_replication") else {}),
    }


def has_causal_base(plan: Plan) -> bool:
    """Return whether the adapters of a merge are those of a causal language model."""
    return plan.pipeline is None and is_causal_lm(_adapter_facts(plan, _config(plan)))


def _adapter_facts(plan: Plan, config: Mapping[str, Any]) -> AdapterFacts:
    """Return what tells the class of the base model that the result belongs to."""
    mappings = [member.adapter.config.get("auto_mapping") for member in plan.members]
    pairs = [(m.get("base_model_class"), m.get("parent_library")) for m in mappings if isinstance(m, dict)]
    layers = {layer.module: {name: r.shape for name, r in layer.tensors.items()} for layer in plan.extra_tensors.kept}
    rows = [layer["weight"][0] for name, layer in layers.items() if VOCABULARY.fullmatch(name) and layer.get("weight")]
    rows += [m.shape[1] for m in plan.modules.values() if m.layer_type == EMBEDDING and VOCABULARY.fullmatch(m.name)]
    rows += [m.shape[0] for m in plan.modules.values() if m.layer_type == LINEAR and VOCABULARY.fullmatch(m.name)]
    return AdapterFacts(
        base=config["base_model_name_or_path"],
        weights=plan.recipe.base,
        tasks=plan.task_type.named,
        mappings=tuple((str(name), str(module)) for name, module in pairs if name and module),
        paths=tuple(sorted({module.path for module in plan.modules.values()})),
        heads={name: layer for name, layer in layers.items() if is_head(name)},
        vocabulary=max(rows, default=None),
    )


def _has_conv1d(plan: Plan) -> bool:
    """Return whether a module of the result may be a Conv1D, by the base models and the adapters' configs."""
    adapters = [member.adapter for member in plan.members]
    return any(a.contents.is_conv1d(module.path) for a in adapters for module in a.layout.values())
