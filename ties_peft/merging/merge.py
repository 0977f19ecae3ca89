"""Merge: for each module, read → encode → merge → decode → write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, load_adapters
from ..adapters.base_model import BaseModel
from ..adapters.extra_tensors import is_head
from ..adapters.targets import check_written
from ..adapters.tokenizer_files import collect_tokenizer_files
from ..adapters.types import ModuleInfo
from ..adapters.types.base import EMBEDDING, LINEAR, layer_is_conv1d
from ..errors import RecipeError, warn_caller
from ..methods import TaskVectors
from ..methods.base import merged
from ..task_vectors.delta import zero
from ..task_vectors.factorise import Factors
from ..task_vectors.kernels.backends import load
from ..task_vectors.order_statistics import Group, Levels, find_levels, with_own_levels
from ..task_vectors.processes import SINGLE_PROCESS, ProcessGroup
from ..task_vectors.tiles import ThreadPool, thread_pool
from .card import shared_licence
from .encoding import Coordinates, Memory
from .loading import VOCABULARY, Evidence, find_loading
from .measure import Account, Record, record
from .members import statistics_of
from .merged import Merged
from .options import DEVICE, Options, Rank, Weights, options_in
from .plan import Plan, make_plan
from .recipes.recipe import IN_MEMORY, Recipe
from .recipes.schedule import plain_schedule
from .recipes.settings import recipe_parameters
from .thresholds import Kept, Survey, trimmed_apart

Progress = Callable[[str, int, int], None]


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
        adapters: folders, files, Hub ids, patterns (see `sources`) or `Adapter`s, of one kind and for one base model.
        method: how they are combined; see `ties_peft.methods()`.
        space: in which coordinates; `delta` is where an adapter's effect lives.
        weights: one per adapter, applied first; 1 each by default. A negative one negates, 0 is as
            absent; in place of a number a schedule over the modules (see `ties_peft.merging.recipes.schedule`), such as
            {"over_layers": [1.0, 0.5]}, straight from the first layer's number to the last one's.
            `norm` weighs all to one length, the mean of theirs: wᵢ = mean ‖τ‖ / ‖τᵢ‖.
        scale: λ, on the merged task vector: a number, or a formula in N, the number of adapters with a weight other
            than 0, such as `1/sqrt(N)` or `N^-1/4` (see `scale`); by default the method's own.
        rank: of the output: a whole number, `max` (what loses nothing, or all there is) or `auto`
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
            (DoRA, say) and for heads `merge`; just the tensors that are needed are read.
        target: the loader that the result is for: `peft`, `vllm` or `llama.cpp` (see `targets`).
        heads: what becomes of whole layers that ride along (task heads, embeddings, biases) where the
            adapters differ: `error`, `drop`, `keep=NAME` (an adapter's short name), `average` or `merge`, which
            needs `base`; see `ties_peft.merging.extra_tensors`.
        progress: called as progress(stage, done, of) while it works.
        **parameters: the method's own, such as density and scope; density, for all adapters, may be a schedule,
            such as {"over_layers": [0.2, 0.9]}.
    Returns: the merged adapter, in memory; all work is done.
    Raises: TiesPeftError, before any work wherever it can be known by then.
    Law: one adapter with weight 1, scale 1, density 1 and enough rank computes the same function.
    """
    asked = options_in(locals())
    known, opened = open_adapters(adapters, base)
    recipe = make_recipe(opened, **{**asked, "base": known.label if known is not None else None})
    return merge_recipe(recipe, opened, device, progress)


def open_adapters(
    adapters: Sequence[str | Path | Adapter], base: str | Path | BaseModel | None
) -> tuple[BaseModel | None, list[Adapter]]:
    """Return the base model, if one is given, and the adapters, whose task vectors may depend on it."""
    known = BaseModel.load(base) if isinstance(base, (str, Path)) else base
    return known, load_adapters(adapters, known)


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
    return run_plan(make_plan(recipe, opened, device, processes=processes), recipe, started, None, progress, processes)


def open_recipe(recipe: Recipe) -> list[Adapter]:
    """Return a recipe's adapters, with the base model that it names."""
    base = BaseModel.load(recipe.base) if recipe.base is not None else None
    return [Adapter.load(name, base=base) for name in recipe.adapters]


def run_plan(
    plan: Plan,
    recipe: Recipe,
    started: float,
    memory: Memory | None = None,
    progress: Progress | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    warns: bool = True,
) -> Merged:
    """Do the work of a checked plan; `warns` says whether what the report warns of is also given as warnings."""
    tensors, account, kept = _merge_all(plan, memory, progress or (lambda stage, done, of: None), processes)
    tensors |= plan.heads.tensors([member.adapter for member in plan.members], plan.weight)
    companions = memory.companions if memory is not None else None
    companions = companions or collect_tokenizer_files((member.name, member.adapter.folder) for member in plan.members)
    if memory is not None:
        memory.companions = companions
    plan.warnings.extend([companions.remark] if companions.remark else [])
    licence, note = shared_licence([(member.name, member.adapter.folder) for member in plan.members])
    report = replace(
        account.report(kept, time.perf_counter() - started),
        copied=sorted(companions.files),
        licence=licence,
        licence_note=note,
    )
    warn_caller(report.warnings if warns else ())
    config = _config(plan, recipe)
    check_written(recipe.target, config, tensors)
    loading = find_loading(_evidence(plan, recipe, config))
    return Merged(config, tensors, report, recipe, loading, companions)


def _merge_all(
    plan: Plan, memory: Memory | None, tell: Progress, processes: ProcessGroup
) -> tuple[dict[str, Tensor], Account, list[Kept]]:
    """For each module: read, encode, merge, decode; then what all processes made, in the modules' order."""
    costs = {name: plan.cost(name) for name in plan.modules}
    mine = processes.share(costs)
    own: dict[str, tuple[dict[str, Tensor], Record]] = {}
    compiled = plan.method.entrywise and not plan.arithmetic.shared
    loops = load(sum(costs.values()), plan.device.type) if compiled else None
    with torch.no_grad(), thread_pool(None if memory is None else memory.pool, loops) as pool:
        coordinates = Coordinates(plan, memory)
        survey = Survey(coordinates, pool, tell, processes, mine)
        levels = _levels_over_adapters(coordinates, survey, pool, tell, processes, mine)
        for done, name in enumerate(mine):
            coordinates.prefetch(mine[done + 1] if done + 1 < len(mine) else None)
            own[name] = _merge_module(coordinates, plan.modules[name], survey, levels, pool)
            tell("merge", done + 1, len(mine))
    tensors: dict[str, Tensor] = {}
    account = Account(plan, loops)
    everything = {name: made for part in processes.gather(own) for name, made in part.items()}
    for name in plan.modules:
        made, what = everything[name]
        tensors |= made
        account.add(what)
    return plan.kind.join(list(plan.modules.values()), tensors), account, survey.kept()


def _merge_module(
    coordinates: Coordinates, module: ModuleInfo, survey: Survey, levels: Levels, pool: ThreadPool
) -> tuple[dict[str, Tensor], Record]:
    """The tensors of one module of the result, and what the report shall say of it."""
    plan = coordinates.plan
    encoding = coordinates.encoding(module.name) if plan.holders(module.name) else None
    counts: dict[str, int] = {}
    factors = Factors(zero(module.shape), 0.0, 0.0)
    if encoding is not None:
        factors = _merge_parts(coordinates, module.name, survey, levels, pool, counts)
    factors = (factors.restored() if plan.restore_norm else factors).scaled(plan.scale)
    tensors = plan.kind.pack(module, factors.delta.to(torch.device("cpu")), plan.rank or 0)
    written = {name: tensor.to(plan.dtype).contiguous() for name, tensor in tensors.items()}
    if not all(_all_finite(tensor) for tensor in written.values()):
        raise RecipeError(
            f"module {module.name!r}: the merged values are beyond {str(plan.dtype).removeprefix('torch.')} "
            "with this scale and these weights. Lower them, or write float32 or bfloat16 (--dtype)."
        )
    return written, record(coordinates, module, encoding, factors, written, counts)


def _all_finite(tensor: Tensor) -> bool:
    """Whether all values are; a finite sum says so at a fraction of the cost of asking each."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _merge_parts(
    coordinates: Coordinates, name: str, survey: Survey, levels: Levels, pool: ThreadPool, counts: dict[str, int]
) -> Factors:
    """Return the merged task vector of one module: encode, merge part by part, decode."""
    plan = coordinates.plan
    encoding = coordinates.encoding(name)
    places = list(coordinates.prepared(name))
    dense = plan.method.entrywise and not plan.method.linear(len(places))
    work = encoding.prepare_decode(plan.rank) if dense and plan.rank is not None else None
    begun = pool.submit(work) if work is not None else None
    results = []
    for part, task_vectors in enumerate(_parts(coordinates, name, survey, pool, counts)):
        result = merged(plan.method, _with_levels(plan, name, task_vectors, levels, pool))
        if plan.finishes:
            plain = [encoding.weighted(i, plan.weight(place, name))[part] for i, place in enumerate(places)]
            for stage in plan.finishes:
                result = stage.finish(result, replace(task_vectors, deltas=plain))
        results.append(result)
    if begun is not None:
        begun()
    return encoding.decode(results, plan.rank, pool.map)


def _parts(
    coordinates: Coordinates, name: str, survey: Survey, pool: ThreadPool, counts: dict[str, int]
) -> list[TaskVectors]:
    """Return the task vectors of one module, part by part."""
    plan = coordinates.plan
    encoding = coordinates.encoding(name)
    prepared = coordinates.prepared(name)
    places, seen = list(prepared), list(prepared.values())
    signs = encoding.parts[len(places)] if len(encoding.parts) > len(places) else None
    thresholds = survey.of_module(name, places)
    return [
        TaskVectors(
            deltas=[parts[part] for parts in seen],
            weights=[encoding.weights(plan.weight(place, name))[part] for place in places],
            trim_asked=plan.method.trims(),
            thresholds=thresholds,
            part=part,
            density=getattr(plan.method, "density", None),
            densities=_densities(plan, name, places),
            total_weight=plan.total_weight(name),
            total_magnitude=sum(abs(encoding.weights(w)[part]) for w in plan.weights(name)),
            adapters=len(plan.members),
            signs=None if signs is None else signs[part],
            statistics=statistics_of(plan.method, [plan.members[place] for place in places], name),
            inputs=encoding.inputs if plan.method.needs else None,
            streams=[coordinates.stream(place, name, part) for place in places],
            pool=pool,
            counts=counts,
        )
        for part in range(len(seen[0]))
    ]


def _levels_over_adapters(
    coordinates: Coordinates,
    survey: Survey,
    pool: ThreadPool,
    tell: Progress,
    processes: ProcessGroup,
    mine: Sequence[str],
) -> Levels:
    """What the method asks to be ranked over whole adapters, by place and module; found before any module is merged."""
    plan = coordinates.plan
    rankings = plan.method.rankings()
    if not rankings or plan.scope != "adapter":
        return {}
    apart, density = trimmed_apart(plan), getattr(plan.method, "density", 1.0)
    groups = {
        (place, name): (place, name if name in apart else "", plan.density(place, name, density))
        for name in plan.modules
        for place, _ in plan.holders(name)
    }
    here = [name for name in mine if plan.holders(name)]

    def walk() -> Iterator[tuple[TaskVectors, list[Group]]]:
        for done, name in enumerate(here):
            own: list[Group] = [groups[place, name] for place in coordinates.prepared(name)]
            yield from ((part, own) for part in _parts(coordinates, name, survey, pool, {}))
            tell("rank", done + 1, len(here))

    found = find_levels(rankings, walk, {group: group[2] for group in groups.values()}, pool, processes.gather)
    return {spot: found[group] for spot, group in groups.items()}


def _with_levels(plan: Plan, name: str, part: TaskVectors, levels: Levels, pool: ThreadPool) -> TaskVectors:
    """One part of a module with the levels that the method asks for, over the adapters or over the part alone."""
    if levels:
        return replace(part, levels=[levels[place, name] for place, _ in plan.holders(name)])
    rankings = plan.method.rankings()
    return with_own_levels(rankings, part, pool) if rankings else part


def _densities(plan: Plan, name: str, places: Sequence[int]) -> list[float]:
    """The share to keep of each adapter that has a module; none if the method has no density."""
    own = getattr(plan.method, "density", None)
    return [] if own is None else [plan.density(place, name, own) for place in places]


def _config(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """adapter_config.json: as few keys as every loader needs, so that old releases load it too."""
    configs = [member.adapter.config for member in plan.members]
    named = recipe.base_model or next((a.base_name for a in (m.adapter for m in plan.members) if a.base_name), None)
    own = plan.kind.config(list(plan.modules.values()), plan.rank or 0)
    return {
        "peft_type": plan.kind.config_name,
        "base_model_name_or_path": named,
        **({"task_type": plan.task.kept} if plan.task.kept else {}),
        "inference_mode": True,
        **own,
        **{key: value for key, value in plan.heads.config().items() if key != "bias" or key in own},  # (IA)³ has none
        **({"fan_in_fan_out": True} if _has_conv1d(plan) else {}),
        **({"layer_replication": configs[0]["layer_replication"]} if configs[0].get("layer_replication") else {}),
    }


def _evidence(plan: Plan, recipe: Recipe, config: Mapping[str, Any]) -> Evidence:
    """What tells the class of the base model that the result is put on."""
    mappings = [member.adapter.config.get("auto_mapping") for member in plan.members]
    pairs = [(m.get("base_model_class"), m.get("parent_library")) for m in mappings if isinstance(m, dict)]
    layers = {layer.module: {name: r.shape for name, r in layer.tensors.items()} for layer in plan.heads.kept}
    rows = [layer["weight"][0] for name, layer in layers.items() if VOCABULARY.fullmatch(name) and layer.get("weight")]
    rows += [m.shape[1] for m in plan.modules.values() if m.layer_type == EMBEDDING and VOCABULARY.fullmatch(m.name)]
    rows += [m.shape[0] for m in plan.modules.values() if m.layer_type == LINEAR and VOCABULARY.fullmatch(m.name)]
    return Evidence(
        base=config["base_model_name_or_path"],
        weights=recipe.base,
        tasks=plan.task.named,
        mappings=tuple((str(name), str(module)) for name, module in pairs if name and module),
        paths=tuple(sorted({module.path for module in plan.modules.values()})),
        heads={name: layer for name, layer in layers.items() if is_head(name)},
        vocabulary=max(rows, default=None),
    )


def _has_conv1d(plan: Plan) -> bool:
    """Whether a module of the result may be a Conv1D, as far as the bases and the adapters' configs tell."""
    adapters = [member.adapter for member in plan.members]
    return any(layer_is_conv1d(a.config, a.base_model, module.path) for a in adapters for module in a.layout.values())
