"""Plan a merge: make every check that needs no arithmetic, and fill in every default.

After `make_plan` a merge does not fail for a reason that could have been known before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..adapters import IMAGE_TARGETS
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
from .ranks import output_rank, total_rank
from .recipes.recipe import Recipe
from .recipes.scale import Scale
from .recipes.schedule import Schedule
from .recipes.settings import make_settings
from .values import check_device, output_dtype

if TYPE_CHECKING:
    from .pipeline import Pipeline

Progress = Callable[[str, int, int], None]  # progress(stage, done, of)


@dataclass(frozen=True)
class Plan:
    """A merge that has passed every check.

    Attributes:
        recipe: what was asked for.
        members: the adapters with a weight other than 0, in order.
        modules: the union of their modules, sorted by name.
        stages: the methods before the one that merges, that one, and those after it.
        space: the coordinates that were asked for.
        arithmetic: the coordinates to compute in: `core` for a spectral method in space `delta`, else `space`.
        scale: as asked for, or the default.
        formula: of the scale, if it depends on the number of adapters; None for a number.
        trim: that the method declares; None for none.
        rank: r of the output; None for PEFT types that have none.
        dtype: of the tensors written.
        extra_tensors: what becomes of the adapters' extra tensors.
        task_type: of the result.
        device: where to compute.
        signs: the adapter that decides the signs, if one was given.
        pipeline: of image models, if the result is a LoRA of one.
        warnings: known from names and shapes alone.
        chosen: why the method that was asked for, `auto`, chose this one; empty if this one was asked for.
    """

    recipe: Recipe
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
    signs: Adapter | None = None
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
    def weighting(self) -> str:
        """`norm` for equal-norm weights, else `given`."""
        return NORM if self.recipe.weights == NORM else "given"

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

    target, adapters, pipeline = _with_pipeline(recipe, adapters, warnings)
    members = make_members(recipe, compatibility.unify_module_names(adapters, warnings), densities, warnings)
    compatibility.check_statistics(stages.method, members)
    pipeline, modules = _with_modules(pipeline, members, compatibility.union_of_modules(members, signs))
    arithmetic = _space_to_compute_in(space, stages)
    draft = _Draft(recipe, target, stages, arithmetic, members, modules, warnings)
    draft.check_modules()
    draft.check_weights(space)
    draft.check_ranks(deciding)
    rank = draft.rank()
    draft.check_target()
    scale = _scale(recipe.scale, stages)
    value = scale.at(len(members))
    draft.warn(value)
    extra_tensors = draft.extra_tensors(chosen, value, where)
    compatibility.warn_orientation(members, warnings)
    return Plan(
        recipe=recipe,
        members=members,
        modules=modules,
        stages=stages,
        space=space,
        arithmetic=arithmetic,
        scale=value,
        trim=_trim(stages.method, space),
        rank=rank,
        dtype=output_dtype(recipe.dtype, [member.adapter for member in members]),
        extra_tensors=extra_tensors,
        task_type=compatibility.choose_task_type(members, extra_tensors.loads, warnings),
        device=where,
        signs=signs,
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


def _with_pipeline(
    recipe: Recipe, adapters: Sequence[Adapter], warnings: list[str]
) -> tuple[str | None, list[Adapter], Pipeline | None]:
    """Return the target, the adapters and the pipeline of a merge of LoRAs of image models."""
    warnings += [remark for one in adapters if one.origin is not None for remark in one.origin.assumptions]
    if recipe.target not in IMAGE_TARGETS and not any(one.origin and one.origin.parts for one in adapters):
        return recipe.target, list(adapters), None
    from .pipeline import choose_pipeline

    found, pipeline = choose_pipeline(recipe.target, adapters, recipe.base_model, warnings)
    return recipe.target if pipeline is None else pipeline.target, found, pipeline


def _with_modules(
    pipeline: Pipeline | None, members: Sequence[Member], modules: dict[str, ModuleInfo]
) -> tuple[Pipeline | None, dict[str, ModuleInfo]]:
    """Return the pipeline and the modules that its target is written with; without a pipeline all modules."""
    if pipeline is None:
        return None, modules
    weighs = {name: any(m.has(name) and m.weight_at(name) != 0 for m in members) for name in modules}
    pipeline, left = pipeline.without_absent_parts(modules, weighs)
    pipeline.check(left)
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
        advice = "Use space 'core' (--space core, space=\"core\"), whose entries are not those of 'delta'."
    raise MethodError(
        f"'{entrywise[0]}' works on entries and '{spectral[0]}' on singular vectors. Together they cannot work in space "
        f"'delta'. {advice}"
    )


def _scale(scale: float | str | None, stages: Stages) -> Scale:
    """Return the scale that was asked for, else the default of the last method."""
    if scale is not None:
        return Scale.read(scale)
    last = stages.last
    return Scale.read(last.default_scale, f"the default scale of method '{last.name}'")


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


@dataclass(frozen=True)
class _Draft:
    """A merge whose adapters, methods and space are chosen, while the rest is checked.

    Attributes:
        target: the program that shall load the result; None for peft.
        space: to compute in.
        warnings: receives what is unwise.

    The others are those of `Plan`.
    """

    recipe: Recipe
    target: str | None
    stages: Stages
    space: Space
    members: tuple[Member, ...]
    modules: dict[str, ModuleInfo]
    warnings: list[str]

    def check_modules(self) -> None:
        """Check that the adapters' modules fit together, and warn of filters that fit none of them."""
        if not self.recipe.allow_disjoint:
            compatibility.check_shared_modules(self.members)
        compatibility.check_one_config(self.members, self.modules)
        compatibility.warn_unused_filters(self.members, self.modules, self.warnings)

    def check_weights(self, space: Space) -> None:
        """Call the check of every method on its weights, for every module if they differ between modules."""
        constant = all(member.weight.constant for member in self.members)
        for module in list(self.modules)[:1] if constant else self.modules:
            weights = [member.weight_at(module) for member in self.members]
            for stage in self.stages.all if any(weights) else ():
                fault = stage.check([weight for weight in weights if weight != 0], space.name)
                if fault:
                    raise MethodError(f"method '{stage.name}': {fault}.")

    def check_ranks(self, deciding: Iterable[Adapter]) -> None:
        """Call the space's check on the ranks of all task vectors, also of an adapter that decides the signs."""
        adapters = [*(member.adapter for member in self.members), *deciding]
        fault = self.space.check(
            {name: [a.layout[name].rank for a in adapters if name in a.layout] for name in self.modules}
        )
        if fault:
            raise CompatibilityError(f"space '{self.space.name}': {fault}.")

    def rank(self) -> int | None:
        """Return the rank of the output, at most what the target loads."""
        stages, asked, adapters = self.stages, self.recipe.rank, {m.name: m.adapter for m in self.members}
        alone = not stages.before and not stages.after and all(member.density is None for member in self.members)
        lossless = self.space.lossless_rank or (alone and stages.method.linear(len(self.members)))
        # In a space that compresses every adapter to the output's rank first, the rank cuts off nothing after the merge.
        compresses = getattr(self.space, "compress_first", False)
        flat = not compresses and any(stage.has_flat_spectrum() for stage in stages.all)
        rank = output_rank(asked, adapters, self.modules, lossless, flat, self.warnings)
        return fit_rank(self.target, rank, asked, self.members[0].adapter.peft_type.title, self.warnings)

    def check_target(self) -> None:
        """Check that the program that shall load the result can."""
        base = written_base_name(self.recipe, self.members)
        replicates = any(member.adapter.config.get("layer_replication") for member in self.members)
        check_modules(self.target, self.modules, base, replicates, self.warnings)

    def warn(self, scale: float) -> None:
        """Warn of base names that differ, of a single adapter, and of a published λ if the default measured better."""
        compatibility.warn_base_names(self.members, self.recipe, self.warnings)
        compatibility.warn_single_adapter(self.members, self.stages, self.warnings)
        last = self.stages.last
        if len(self.members) > 1 and scale == last.published_scale:
            self.warnings.append(
                f"scale {scale:g} is the published scale of '{last.name}'. On sets of two, four and six sample adapters "
                f"it was on average less accurate than the default, {last.default_scale}. To use the default, leave the scale "
                "out."
            )

    def extra_tensors(self, chosen: str, scale: float, device: torch.device) -> ExtraTensors:
        """Decide what becomes of the extra tensors; the arguments are as in `Plan`."""
        recipe, stages, base = self.recipe, self.stages, compatibility.common_base(self.members)
        merging = None
        if recipe.heads == MERGE:
            if chosen and "ia3" not in stages.method.kinds:
                # The method that `auto` takes for (IA)³ fits tensors of every shape.
                stages = replace(stages, method=make_method(recipe.method, {}).choose("ia3").method)
            base = base or (BaseModel.load(recipe.base) if recipe.base is not None else None)
            merging = make_extra_tensor_merge(stages, base, self.members, scale, recipe.seed, device)
        extra_tensors = plan_extra_tensors(recipe, self.members, self.modules, merging, base, self.warnings)
        check_heads(self.target, extra_tensors.kept, self.warnings)
        return extra_tensors
