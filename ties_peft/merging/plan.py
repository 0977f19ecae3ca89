"""Plan: which adapters have which modules, and every check that can be made before any work.

After `make_plan` the merge cannot fail for a reason that could have been known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from ..adapters.adapter import Adapter, check_adapters
from ..adapters.base_model import BaseModel
from ..adapters.targets import check_heads, check_modules, fit_rank
from ..adapters.types import ModuleInfo, WritablePeftType, output_type
from ..errors import CompatibilityError, MethodError, RecipeError
from ..methods import Method, Stages, Trim, method_classes
from ..spaces import Space, find_space
from ..task_vectors.processes import SINGLE_PROCESS, ProcessGroup
from ..task_vectors.trim import Scope
from .extra_task_vectors import make_extra_tensor_merge
from .extra_tensors import ExtraTensors, plan_extra_tensors
from .members import (
    Member,
    TaskType,
    check_one_config,
    check_shared_modules,
    check_statistics,
    choose_task_type,
    common_base,
    make_members,
    unify_module_names,
    warn_base_names,
    warn_orientation,
    warn_single_adapter,
    warn_unused_filters,
)
from .options import DEVICE, MERGE, NORM, Rank
from .ranks import output_rank
from .recipes.recipe import Recipe
from .recipes.scale import Scale
from .recipes.schedule import Schedule, count_layers
from .recipes.settings import make_settings
from .values import check_device, output_dtype

Progress = Callable[[str, int, int], None]  # progress(stage, done, of)


@dataclass(frozen=True)
class Plan:
    """A merge that has passed every check.

    Attributes:
        members: the adapters with a weight other than 0, in order.
        modules: the union of their modules, sorted by name.
        stages: what prepares, merges and finishes.
        space: the coordinates that were asked for.
        arithmetic: those in which it is done: `core` for a spectral method in space `delta`.
        scale, seed: as asked for, defaults filled in.
        formula: of the scale, where it depends on the number of adapters; None for a number.
        trim: the cuts that the method wants; None for none.
        rank: r of the output; None for kinds that have none.
        dtype: of the tensors written.
        extra_tensors: what becomes of the adapters' extra tensors.
        task_type: the task types of the adapters, and what the result's is.
        device: where the arithmetic is done.
        signs: the adapter that decides the signs, if one was given.
        restore_norm: whether what the rank truncates is brought back to the norm it had.
        weighting: `norm` for equal-norm weights, else `given`.
        warnings: what is unwise, known from names and shapes alone.
        read_weights: those read from the schedules so far, by module.
    """

    members: tuple[Member, ...]
    modules: dict[str, ModuleInfo]
    stages: Stages
    space: Space
    arithmetic: Space
    scale: float
    trim: Trim | None
    rank: int | None
    dtype: torch.dtype
    extra_tensors: ExtraTensors
    task_type: TaskType
    device: torch.device
    seed: int
    signs: Adapter | None = None
    restore_norm: bool = False
    weighting: str = "given"
    formula: str | None = None
    warnings: list[str] = field(default_factory=list)
    read_weights: dict[str, list[float]] = field(default_factory=dict, init=False, compare=False)

    @property
    def kind(self) -> WritablePeftType:
        """The kind that it is written as."""
        return output_type(self.members[0].adapter.peft_type)

    @property
    def title(self) -> str:
        """The kinds that it is made of, as text says them."""
        return ", ".join(sorted({member.adapter.peft_type.title for member in self.members}))

    @property
    def method(self) -> Method:
        """The method that merges."""
        return self.stages.method

    @property
    def finishes(self) -> tuple[Method, ...]:
        """The methods that change the result: those after it, and those before it that close what they opened."""
        return (*(stage for stage in self.stages.before if stage.finishes()), *self.stages.after)

    @property
    def preparations(self) -> tuple[Method, ...]:
        """The methods that stand before it."""
        return self.stages.before

    @cached_property
    def scope(self) -> Scope | None:
        """Over what the method ranks entries; None where it ranks none."""
        if self.trim is not None:
            return self.trim.scope
        return next((ranking.scope for ranking in self.method.rankings()), None)

    @property
    def own_density(self) -> float | None:
        """The method's own density; None if it has none."""
        return getattr(self.method, "density", None)

    @cached_property
    def layers(self) -> int:
        """How many layers the modules' names speak of."""
        return count_layers(self.modules)

    def weight(self, place: int, module: str) -> float:
        """w of one adapter on one module."""
        return self.weights(module)[place]

    def mean_weight(self, place: int) -> float:
        """w of one adapter, the mean over its modules where they differ."""
        names = self.members[place].adapter.modules
        return sum(self.weight(place, name) for name in names) / len(names)

    def density(self, place: int, module: str, default: float) -> float:
        """The density of one adapter on one module, the method's where none was set."""
        return self.members[place].density_at(module, self.layers, default)

    def weights(self, module: str) -> list[float]:
        """w of all adapters on one module, also of those that lack it."""
        if module not in self.read_weights:
            self.read_weights[module] = [member.weight.at(module, self.layers) for member in self.members]
        return self.read_weights[module]

    def total_weight(self, module: str) -> float:
        """Σ w over all adapters, also those that lack the module."""
        return sum(self.weights(module))

    def cost(self, module: str) -> int:
        """How much work a module is: entries of its task vectors, multiplied out, and of the result."""
        return math.prod(self.modules[module].shape) * (1 + len(self.holders(module)))

    def silent(self, module: str) -> list[tuple[int, Member]]:
        """The members that have a module but a weight of 0 on it, with their places."""
        return [(i, m) for i, m in enumerate(self.members) if m.has(module) and self.weight(i, module) == 0]

    def holders(self, module: str) -> list[tuple[int, Member]]:
        """The members that have a module and a weight on it, with their places."""
        return [(i, m) for i, m in enumerate(self.members) if m.has(module) and self.weight(i, module) != 0]


def make_plan(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    device: str = DEVICE,
    checked: bool = False,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Plan:
    """Check everything that can be checked without arithmetic, and settle every default.

    Args:
        recipe: what was asked.
        adapters: its adapters, open.
        device: where the arithmetic shall be done.
        checked: whether the adapters' tensors were looked through already.
        processes: the processes that share that.

    Raises: RecipeError, MethodError, CompatibilityError or AdapterError, with one clear message.
    """
    warnings = list(recipe.notes)
    space, stages, densities = _settings(recipe, len(adapters))
    signs = _signs(stages.method, recipe.base)
    where = check_device(device)
    _check_kinds([*adapters, *([signs] if signs else [])], space, stages)
    check_adapters([*(() if checked else adapters), *([signs] if signs else [])], processes)
    members = make_members(recipe, unify_module_names(adapters, warnings), densities, warnings)
    check_statistics(stages.method, members)
    dtype = output_dtype(recipe.dtype, [member.adapter for member in members])
    modules = _modules(members, signs, recipe.allow_disjoint)
    check_one_config(members, modules)
    warn_unused_filters(members, modules, warnings)
    _check_weights(stages, space, members, modules)
    arithmetic = _arithmetic(space, stages)
    _check_ranks(arithmetic, [*(m.adapter for m in members), *([signs] if signs else [])], modules)
    rank = _rank(recipe.rank, stages, arithmetic, members, modules, warnings)
    base = recipe.base_model or next((m.adapter.base_name for m in members if m.adapter.base_name), None)
    rank = fit_rank(recipe.target, rank, recipe.rank, members[0].adapter.peft_type.title, warnings)
    replicates = any(member.adapter.config.get("layer_replication") for member in members)
    check_modules(recipe.target, modules, base, replicates, warnings)
    warn_base_names(members, recipe, warnings)
    warn_single_adapter(members, stages, warnings)
    scale = _scale(recipe.scale, stages)
    value = scale.at(len(members))
    _warn_published(value, stages, len(members), warnings)
    extra_tensors = _extra_tensors(recipe, stages, members, modules, where, warnings)
    warn_orientation(members, warnings)
    return Plan(
        members=members,
        modules=modules,
        stages=stages,
        space=space,
        arithmetic=arithmetic,
        scale=value,
        trim=_trim(stages.method, space),
        rank=rank,
        dtype=dtype,
        extra_tensors=extra_tensors,
        task_type=choose_task_type(members, extra_tensors.loads, warnings),
        device=where,
        seed=_seed(recipe.seed),
        signs=signs,
        restore_norm=bool(recipe.restore_norm),
        weighting=NORM if recipe.weights == NORM else "given",
        formula=scale.formula,
        warnings=warnings,
    )


def _extra_tensors(
    recipe: Recipe,
    stages: Stages,
    members: Sequence[Member],
    modules: Iterable[str],
    device: torch.device,
    warnings: list[str],
) -> ExtraTensors:
    layers = count_layers(modules)
    base = common_base(members)
    rule = None
    if recipe.heads == MERGE:
        base = base or (BaseModel.load(recipe.base) if recipe.base is not None else None)
        densities = [partial(member.density_at, layers=layers) for member in members]
        scale = _scale(recipe.scale, stages).at(len(members))
        rule = make_extra_tensor_merge(stages, base, scale, _seed(recipe.seed), densities, device)
    extra_tensors = plan_extra_tensors(
        recipe.heads,
        [member.name for member in members],
        [member.adapter for member in members],
        modules,
        lambda place, module: members[place].weight.at(module, layers),
        None if recipe.dtype is None else output_dtype(recipe.dtype, ()),
        warnings,
        rule,
        base,
    )
    check_heads(recipe.target, extra_tensors.kept, warnings)
    return extra_tensors


def _settings(recipe: Recipe, count: int) -> tuple[Space, Stages, tuple[Schedule | None, ...]]:
    if count == 0:
        raise RecipeError("no adapters were given. Name at least one folder or Hub id.")
    densities = recipe.densities if recipe.densities is not None else (None,) * count
    if len(densities) != count:
        raise RecipeError(f"{len(densities)} densities for {count} adapters. Give one per adapter, or None.")
    settings = make_settings(recipe.method, recipe.space, recipe.parameters, densities)
    return settings.space, settings.stages, settings.densities


def _arithmetic(space: Space, stages: Stages) -> Space:
    """`core` for spectral methods in space `delta`, where the result is the same and the matrices are small."""
    if space.name != "delta" or not any(stage.spectral for stage in stages.all):
        return space
    entrywise = [stage.name for stage in stages.all if stage.entrywise]
    if entrywise:
        together = all("core" in stage.spaces for stage in stages.all)
        raise MethodError(
            f"'{entrywise[0]}' works entry by entry and another stage on singular vectors; together they need small "
            + (
                "coordinates: those of space 'core' (--space core), where entries mean something else than in 'delta'."
                if together
                else "coordinates that all are offered in, and they have none in common. Use one of them alone."
            )
        )
    return find_space("core")()


def _check_space(stages: Stages, space: Space, kind: WritablePeftType) -> None:
    for stage in stages.all:
        if space.name not in stage.spaces:
            fitting = [name for name in stage.spaces if kind.name in find_space(name).kinds]
            raise MethodError(
                f"method '{stage.name}' is not offered in space '{space.name}'; it works in {', '.join(fitting)}."
            )
    if kind.name not in space.kinds:
        raise MethodError(
            f"space '{space.name}' is for {', '.join(space.kinds)}; these are {kind.title}. Use space 'delta'."
        )


def _check_weights(stages: Stages, space: Space, members: Sequence[Member], modules: Iterable[str]) -> None:
    """Ask every method about the weights it will see, on every module where they differ."""
    layers = count_layers(modules)
    even = all(member.weight.constant for member in members)
    for module in list(modules)[:1] if even else modules:
        weights = [member.weight.at(module, layers) for member in members]
        for stage in stages.all:
            fault = stage.check([weight for weight in weights if weight != 0], space.name) if any(weights) else None
            if fault:
                raise MethodError(f"method '{stage.name}': {fault}.")


def _signs(method: Method, base: str | None) -> Adapter | None:
    given = getattr(method, "sign_from", None)
    return Adapter.load(given, base=base) if isinstance(given, (str, Path)) else given


def _seed(seed: int) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise RecipeError(f"the seed is {seed!r}; expected a whole number, 0 or more.")
    return seed


def _scale(scale: float | str | None, stages: Stages) -> Scale:
    if scale is not None:
        return Scale.read(scale)
    last = stages.last
    return Scale.read(last.default_scale, f"the default scale of method '{last.name}'")


def _warn_published(scale: float, stages: Stages, adapters: int, warnings: list[str]) -> None:
    """Say where λ is as published and a smaller one is known to be better."""
    last = stages.last
    if adapters > 1 and scale == last.published_scale:
        warnings.append(
            f"scale {scale:g} is the published scale of '{last.name}'. On sets of two, four and six sample adapters it was on "
            f"average less accurate than the default, {last.default_scale}. To use the default, leave the scale out."
        )


def _trim(method: Method, space: Space) -> Trim | None:
    asked = method.trims()
    if asked is None or asked.scope in space.scopes:
        return asked
    return replace(asked, scope=space.scopes[0])


def _check_ranks(space: Space, adapters: Sequence[Adapter], modules: dict[str, ModuleInfo]) -> None:
    ranks = {name: [a.layout[name].rank for a in adapters if name in a.layout] for name in modules}
    fault = space.check(ranks)
    if fault:
        raise CompatibilityError(f"space '{space.name}': {fault}.")


def _check_kinds(adapters: Sequence[Adapter], space: Space, stages: Stages) -> None:
    found = {adapter.peft_type.output_name: output_type(adapter.peft_type) for adapter in adapters}
    if len(found) > 1:
        table = "\n".join(f"  {adapter.peft_type.title:<8} {adapter.label}" for adapter in adapters)
        raise CompatibilityError(
            f"the adapters are of {len(found)} types, which have no common form:\n{table}\nMerge each type on its own."
        )
    (kind,) = found.values()
    for stage in stages.all:
        if kind.name not in stage.kinds:
            others = ", ".join(name for name, cls in method_classes().items() if kind.name in cls.kinds)
            raise MethodError(f"method '{stage.name}' is not for {kind.title} adapters. These are: {others}.")
    _check_space(stages, space, kind)


def _modules(members: Sequence[Member], signs: Adapter | None, allow_disjoint: bool) -> dict[str, ModuleInfo]:
    modules: dict[str, ModuleInfo] = {}
    faults = []
    givers = [(member.name, member.adapter) for member in members] + ([("sign_from", signs)] if signs else [])
    first: dict[str, str] = {}
    for name, adapter in givers:
        for module in adapter.layout.values():
            known = modules.get(module.name, module)
            if adapter is not signs:
                modules[module.name] = known
            first.setdefault(module.name, name)
            if known.signature != module.signature:
                faults.append((module.name, first[module.name], known, name, module))
    if faults:
        rows = "\n".join(f"  {n}: {a} has {_form(m)}, {b} has {_form(o)}" for n, a, m, b, o in faults[:8])
        more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CompatibilityError(
            f"the adapters disagree on the shape of {len(faults)} module(s):\n{rows}{more}\n"
            "They were trained on different base models, so their task vectors cannot be added. Leave some out."
        )
    if not allow_disjoint:
        check_shared_modules(members)
    return dict(sorted(modules.items()))


def _form(module: ModuleInfo) -> str:
    side = {True: " on the input", False: ""}[module.on_input]
    form = "" if module.layer_type == "linear" else f" ({module.layer_type})"
    kernel = f", kernel {' × '.join(map(str, module.kernel_size))}" if module.kernel_size else ""
    experts = f", {module.expert[1]} experts" if module.expert[1] > 1 else ""
    return f"{' × '.join(map(str, module.shape))}{side}{form}{kernel}{experts}"


def _rank(
    asked: Rank,
    stages: Stages,
    space: Space,
    members: Sequence[Member],
    modules: dict[str, ModuleInfo],
    warnings: list[str],
) -> int | None:
    thinned = any(member.density is not None for member in members)
    lossless = space.lossless_rank or (_linear(stages, len(members)) and not thinned)
    adapters = {member.name: member.adapter for member in members}
    compresses = getattr(space, "compress_first", False)  # to the output's rank: then nothing is cut after the merge
    flat = not compresses and any(stage.has_flat_spectrum() for stage in stages.all)
    return output_rank(asked, adapters, modules, lossless, flat, warnings)


def _linear(stages: Stages, adapters: int) -> bool:
    return not stages.before and not stages.after and stages.method.linear(adapters)
