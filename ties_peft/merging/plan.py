"""Plan a merge: make every check that needs no arithmetic, and fill in every default.

After `make_plan` a merge does not fail for a reason that could have been known before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from ..adapters.adapter import Adapter, check_adapters
from ..adapters.base_model import BaseModel
from ..adapters.targets import check_heads, check_modules, fit_rank
from ..adapters.types import ModuleInfo, WritablePeftType, output_type
from ..errors import CompatibilityError, MethodError, RecipeError
from ..methods import Method, Stages, Trim, make_method
from ..spaces import Space, find_space
from ..task_vectors.processes import SINGLE_PROCESS, ProcessGroup
from ..task_vectors.trim import Densities, Scope
from . import compatibility
from .extra_task_vectors import make_extra_tensor_merge
from .extra_tensors import ExtraTensors, plan_extra_tensors
from .members import Member, make_members, written_base_name
from .options import DEVICE, MERGE, NORM, check_options
from .pipeline import Pipeline, check_pipeline, choose_pipeline, without_absent_parts
from .ranks import output_rank, total_rank
from .recipes.recipe import Recipe
from .recipes.scale import Scale
from .recipes.schedule import Schedule
from .recipes.settings import make_settings
from .values import check_device, output_dtype

Progress = Callable[[str, int, int], None]  # progress(stage, done, of)


@dataclass(frozen=True)
class Plan:
    """A merge that has passed every check.

    Attributes:
        members: the adapters with a weight other than 0, in order.
        modules: the union of their modules, sorted by name.
        stages: the methods before the one that merges, that one, and those after it.
        space: the coordinates that were asked for.
        arithmetic: the coordinates to compute in: `core` for a spectral method in space `delta`, else `space`.
        scale, seed: as asked for, defaults filled in.
        formula: of the scale, if it depends on the number of adapters; None for a number.
        trim: that the method declares; None for none.
        rank: r of the output; None for PEFT types that have none.
        dtype: of the tensors written.
        extra_tensors: what becomes of the adapters' extra tensors.
        task_type: of the result.
        device: where to compute.
        signs: the adapter that decides the signs, if one was given.
        restore_norm: whether a truncated result is scaled to the norm it had.
        weighting: `norm` for equal-norm weights, else `given`.
        pipeline: of image models, if the result is a LoRA of one.
        warnings: known from names and shapes alone.
        chosen: why the method that was asked for, `auto`, chose this one; empty if this one was asked for.
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
    task_type: compatibility.TaskType
    device: torch.device
    seed: int
    signs: Adapter | None = None
    restore_norm: bool = False
    weighting: str = "given"
    formula: str | None = None
    pipeline: Pipeline | None = None
    warnings: list[str] = field(default_factory=list)
    chosen: str = ""
    _weights: dict[str, list[float]] = field(default_factory=dict, init=False, compare=False)  # by module

    @property
    def peft_type(self) -> WritablePeftType:
        """The PEFT type of the result."""
        return output_type(self.members[0].adapter.peft_type)

    @property
    def title(self) -> str:
        """The PEFT types of the adapters, as text."""
        return ", ".join(sorted({member.adapter.peft_type.title for member in self.members}))

    @property
    def method(self) -> Method:
        """The method that merges."""
        return self.stages.method

    @property
    def finishing_methods(self) -> tuple[Method, ...]:
        """The methods that change the result of the one that merges: those before it that also finish, and those after it."""
        return (*(stage for stage in self.stages.before if stage.finishes()), *self.stages.after)

    @cached_property
    def scope(self) -> Scope | None:
        """Over what the method ranks entries; None if it ranks none."""
        if self.trim is not None:
            return self.trim.scope
        return next((one.scope for one in self.method.order_statistics()), None)

    @property
    def own_density(self) -> float | None:
        """The method's own density; None if it has none."""
        return getattr(self.method, "density", None)

    def part(self, module: str) -> str:
        """Return the part of a pipeline that a module belongs to, which is ranked by itself; empty if there are no parts."""
        return "" if self.pipeline is None else module.partition(".")[0]

    def weight(self, place: int, module: str) -> float:
        """Return w of one adapter on one module."""
        return self.weights(module)[place]

    def mean_weight(self, place: int) -> float:
        """Return w of one adapter; the mean over its modules if they differ."""
        names = self.members[place].adapter.modules
        return sum(self.weight(place, name) for name in names) / len(names)

    def density(self, place: int, module: str, default: float) -> float:
        """Return the density of one adapter on one module; the default if none was set for it."""
        return self.members[place].density_at(module, default)

    def densities(self, module: str, places: Iterable[int]) -> Densities | None:
        """Return the method's own density, if it has one, and those of some adapters on one module."""
        own = self.own_density
        return None if own is None else Densities(own, [self.density(place, module, own) for place in places])

    def weights(self, module: str) -> list[float]:
        """Return w of all adapters on one module, also of those that lack it."""
        if module not in self._weights:
            self._weights[module] = [member.weight_at(module) for member in self.members]
        return self._weights[module]

    def total_weight(self, module: str) -> float:
        """Return Σw over all adapters, also those that lack the module."""
        return sum(self.weights(module))

    def cost(self, module: str) -> int:
        """Return how much work a module is: the entries of its task vectors and of the result."""
        return math.prod(self.modules[module].shape) * (1 + len(self.holders(module)))

    def holders_of_weight_zero(self, module: str) -> list[tuple[int, Member]]:
        """Return (place, member) of those that have a module but weight 0 on it."""
        return [(i, m) for i, m in enumerate(self.members) if m.has(module) and self.weight(i, module) == 0]

    @property
    def bytes(self) -> int:
        """The size of the tensors of the modules that will be written, without whole layers."""
        shapes = [module.shape for module in self.modules.values()]
        entries = [(s[0] + math.prod(s[1:])) * self.rank if self.rank else math.prod(s) for s in shapes]
        return sum(entries) * self.dtype.itemsize

    def holders(self, module: str) -> list[tuple[int, Member]]:
        """Return (place, member) of those that have a module and a weight other than 0 on it."""
        return [(i, m) for i, m in enumerate(self.members) if m.has(module) and self.weight(i, module) != 0]


def make_plan(
    recipe: Recipe,
    adapters: Sequence[Adapter],
    device: str = DEVICE,
    checked: bool = False,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Plan:
    """Check everything that can be checked without arithmetic, and fill in every default.

    Args:
        recipe: what was asked for.
        adapters: the recipe's adapters, open.
        device: where to compute.
        checked: whether the adapters' tensors were checked already.
        processes: that share this check.

    Raises: RecipeError, MethodError, CompatibilityError or AdapterError.
    """
    check_options(recipe)
    warnings = list(recipe.notes)
    space, stages, densities, chosen = _settings(recipe, adapters)
    signs = _load_signs(stages.method, recipe.base)
    deciding = [signs] if signs is not None else []
    where = check_device(device)
    compatibility.check_types([*adapters, *deciding], space, stages)
    check_adapters(deciding if checked else [*adapters, *deciding], processes)

    recipe, adapters, pipeline = _with_pipeline(recipe, adapters, warnings)
    members = make_members(recipe, compatibility.unify_module_names(adapters, warnings), densities, warnings)
    compatibility.check_statistics(stages.method, members)
    dtype = output_dtype(recipe.dtype, [member.adapter for member in members])
    modules = compatibility.union_of_modules(members, signs)
    pipeline, modules = _with_modules(pipeline, members, modules)
    _check_modules(recipe, members, modules, warnings)
    _check_weights(stages, space, members, modules)

    arithmetic = _space_to_compute_in(space, stages)
    _check_ranks(arithmetic, [*(member.adapter for member in members), *deciding], modules)
    rank = _rank(recipe, stages, arithmetic, members, modules, warnings)
    _check_target(recipe, members, modules, warnings)
    compatibility.warn_base_names(members, recipe, warnings)
    compatibility.warn_single_adapter(members, stages, warnings)

    scale = _scale(recipe.scale, stages)
    value = scale.at(len(members))
    _warn_published_scale(value, stages, len(members), warnings)
    extra_tensors = _extra_tensors(recipe, stages, chosen, value, members, modules, where, warnings)
    compatibility.warn_orientation(members, warnings)
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
        task_type=compatibility.choose_task_type(members, extra_tensors.loads, warnings),
        device=where,
        seed=recipe.seed,
        signs=signs,
        restore_norm=bool(recipe.restore_norm),
        weighting=NORM if recipe.weights == NORM else "given",
        formula=scale.formula,
        pipeline=pipeline,
        warnings=warnings,
        chosen=chosen,
    )


def _settings(recipe: Recipe, adapters: Sequence[Adapter]) -> tuple[Space, Stages, tuple[Schedule | None, ...], str]:
    """Return the space, the methods, the adapters' own densities, and why a method that chooses chose another."""
    count = len(adapters)
    if count == 0:
        raise RecipeError("no adapters were given. Name at least one folder or Hub id.")
    densities = recipe.densities if recipe.densities is not None else (None,) * count
    if len(densities) != count:
        raise RecipeError(f"{len(densities)} densities for {count} adapters. Give one per adapter, or None.")
    made = make_settings(recipe.method, recipe.space, recipe.parameters, densities)
    choice = made.stages.method.choose(
        output_type(adapters[0].peft_type).name,
        made.space.name,
        any(density is not None for density in made.densities),
        recipe.rank if isinstance(recipe.rank, int) else None,
        total_rank(adapters),
    )
    return made.space, replace(made.stages, method=choice.method), made.densities, choice.reason


def _load_signs(method: Method, base: str | None) -> Adapter | None:
    """Return the adapter that decides the signs, if the method was given one."""
    given = getattr(method, "sign_from", None)
    return Adapter.load(given, base=base) if isinstance(given, (str, Path)) else given


def _check_modules(
    recipe: Recipe, members: Sequence[Member], modules: dict[str, ModuleInfo], warnings: list[str]
) -> None:
    """Check that the adapters' modules fit together, and warn of filters that fit none of them."""
    if not recipe.allow_disjoint:
        compatibility.check_shared_modules(members)
    compatibility.check_one_config(members, modules)
    compatibility.warn_unused_filters(members, modules, warnings)


def _check_weights(stages: Stages, space: Space, members: Sequence[Member], modules: Iterable[str]) -> None:
    """Call the check of every method on its weights, for every module if they differ between modules."""
    constant = all(member.weight.constant for member in members)
    for module in list(modules)[:1] if constant else modules:
        weights = [member.weight_at(module) for member in members]
        for stage in stages.all if any(weights) else ():
            fault = stage.check([weight for weight in weights if weight != 0], space.name)
            if fault:
                raise MethodError(f"method '{stage.name}': {fault}.")


def _with_pipeline(
    recipe: Recipe, adapters: Sequence[Adapter], warnings: list[str]
) -> tuple[Recipe, list[Adapter], Pipeline | None]:
    """Return the recipe with the target, the adapters and the pipeline of a merge of LoRAs of image models."""
    warnings += [remark for one in adapters if one.origin is not None for remark in one.origin.assumptions]
    found, pipeline = choose_pipeline(recipe.target, adapters, recipe.base_model, warnings)
    return (recipe if pipeline is None else replace(recipe, target=pipeline.target)), found, pipeline


def _with_modules(
    pipeline: Pipeline | None, members: Sequence[Member], modules: dict[str, ModuleInfo]
) -> tuple[Pipeline | None, dict[str, ModuleInfo]]:
    """Return the pipeline and the modules that its target is written with; without a pipeline all modules."""
    if pipeline is None:
        return None, modules
    weighs = {name: any(m.has(name) and m.weight_at(name) != 0 for m in members) for name in modules}
    pipeline, left = without_absent_parts(pipeline, modules, weighs)
    check_pipeline(pipeline, left)
    return pipeline, left


def _space_to_compute_in(space: Space, stages: Stages) -> Space:
    """Return the space to compute in: `core` for spectral methods in `delta`; same result, small matrices."""
    if space.name != "delta" or not any(stage.spectral for stage in stages.all):
        return space
    entrywise = [stage.name for stage in stages.all if stage.entrywise]
    spectral = [stage.name for stage in stages.all if stage.spectral]
    if not entrywise:
        return find_space("core")()
    advice = "Use one of them alone."
    if all("core" in stage.spaces for stage in stages.all):
        advice = "Use space 'core' (--space core), whose entries are not those of 'delta'."
    raise MethodError(
        f"'{entrywise[0]}' works on entries and '{spectral[0]}' on singular vectors. Together they cannot work in space "
        f"'delta'. {advice}"
    )


def _check_ranks(space: Space, adapters: Sequence[Adapter], modules: Iterable[str]) -> None:
    """Call the space's check on the ranks of all task vectors."""
    ranks = {name: [a.layout[name].rank for a in adapters if name in a.layout] for name in modules}
    fault = space.check(ranks)
    if fault:
        raise CompatibilityError(f"space '{space.name}': {fault}.")


def _rank(
    recipe: Recipe,
    stages: Stages,
    space: Space,
    members: Sequence[Member],
    modules: dict[str, ModuleInfo],
    warnings: list[str],
) -> int | None:
    """Return the rank of the output, at most what the target loads."""
    alone = not stages.before and not stages.after
    linear = alone and stages.method.linear(len(members)) and all(member.density is None for member in members)
    # In a space that compresses every adapter to the output's rank first, the rank cuts off nothing after the merge.
    compresses = getattr(space, "compress_first", False)
    flat = not compresses and any(stage.has_flat_spectrum() for stage in stages.all)
    adapters = {member.name: member.adapter for member in members}
    rank = output_rank(recipe.rank, adapters, modules, space.lossless_rank or linear, flat, warnings)
    return fit_rank(recipe.target, rank, recipe.rank, members[0].adapter.peft_type.title, warnings)


def _check_target(
    recipe: Recipe, members: Sequence[Member], modules: dict[str, ModuleInfo], warnings: list[str]
) -> None:
    """Check that the program that shall load the result can."""
    base = written_base_name(recipe, members)
    replicates = any(member.adapter.config.get("layer_replication") for member in members)
    check_modules(recipe.target, modules, base, replicates, warnings)


def _scale(scale: float | str | None, stages: Stages) -> Scale:
    """Return the scale that was asked for, else the default of the last method."""
    if scale is not None:
        return Scale.read(scale)
    last = stages.last
    return Scale.read(last.default_scale, f"the default scale of method '{last.name}'")


def _warn_published_scale(scale: float, stages: Stages, adapters: int, warnings: list[str]) -> None:
    """Warn of a published λ if the default was measured to be better."""
    last = stages.last
    if adapters > 1 and scale == last.published_scale:
        warnings.append(
            f"scale {scale:g} is the published scale of '{last.name}'. On sets of two, four and six sample adapters it was on "
            f"average less accurate than the default, {last.default_scale}. To use the default, leave the scale out."
        )


def _trim(method: Method, space: Space) -> Trim | None:
    """Return the trim that the method declares, with a scope that the space offers."""
    asked = method.trims()
    if asked is None or asked.scope in space.scopes:
        return asked
    if "scope" in method.model_fields_set:
        raise MethodError(
            f"method '{method.name}': scope '{asked.scope}' is not offered in space '{space.name}'; use scope "
            f"'{space.scopes[0]}'."
        )
    return replace(asked, scope=space.scopes[0])


def _extra_tensors(
    recipe: Recipe,
    stages: Stages,
    chosen: str,
    scale: float,
    members: Sequence[Member],
    modules: Iterable[str],
    device: torch.device,
    warnings: list[str],
) -> ExtraTensors:
    """Decide what becomes of the extra tensors."""
    base = compatibility.common_base(members)
    merging = None
    if recipe.heads == MERGE:
        if chosen and "ia3" not in stages.method.kinds:
            # The method that `auto` takes for (IA)³ fits tensors of every shape.
            stages = replace(stages, method=make_method(recipe.method, {}).choose("ia3").method)
        base = base or (BaseModel.load(recipe.base) if recipe.base is not None else None)
        merging = make_extra_tensor_merge(stages, base, members, scale, recipe.seed, device)
    extra_tensors = plan_extra_tensors(recipe, members, modules, merging, base, warnings)
    check_heads(recipe.target, extra_tensors.kept, warnings)
    return extra_tensors
