"""Check that the adapters of a merge fit each other and fit into one adapter."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..adapters.adapter import Adapter
from ..adapters.base_model import CONV1D_LAYERS, BaseModel
from ..adapters.contents import PREFIX
from ..adapters.module_names import match_names, newer_name, tower_prefix, without_tower_prefix
from ..adapters.statistics import gather_command
from ..adapters.types import ModuleInfo, output_type
from ..adapters.types.base import EXPERT, LINEAR
from ..errors import CompatibilityError, MethodError, first_rows, some
from ..methods import Method, Stages, method_classes
from ..spaces import Space, find_space
from .members import Member
from .recipes.recipe import Recipe

SEPARATE_EXPERT = re.compile(r"\.experts\.\d+\.(w[123]|(gate|up|down)_proj)$")  # a layer of its own for each expert


def check_types(adapters: Sequence[Adapter], space: Space, stages: Stages) -> None:
    """Check that all adapters can be written as one PEFT type, which the methods and the space take.

    Raises: CompatibilityError or MethodError.
    """
    types = {adapter.peft_type.output_name: output_type(adapter.peft_type) for adapter in adapters}
    if len(types) > 1:
        table = "\n".join(f"  {adapter.peft_type.title:<8} {adapter.label}" for adapter in adapters)
        raise CompatibilityError(
            f"the adapters are of {len(types)} types, which have no common form:\n{table}\nMerge each type separately."
        )
    (peft_type,) = types.values()
    for stage in stages.all:
        if peft_type.name not in stage.kinds:
            others = ", ".join(name for name, cls in method_classes().items() if peft_type.name in cls.kinds)
            raise MethodError(
                f"method '{stage.name}' is not for {peft_type.title} adapters. Methods that are: {others}."
            )
    for stage in stages.all:
        if space.name not in stage.spaces:
            fitting = [name for name in stage.spaces if peft_type.name in find_space(name).kinds]
            raise MethodError(
                f"method '{stage.name}' is not offered in space '{space.name}'. Choose one of {', '.join(fitting)}."
            )
    if peft_type.name not in space.kinds:
        raise MethodError(
            f"space '{space.name}' is for {', '.join(space.kinds)}; the adapters are {peft_type.title}. Use space 'delta'."
        )


def union_of_modules(members: Sequence[Member], signs: Adapter | None) -> dict[str, ModuleInfo]:
    """Return all modules of the adapters by name, sorted.

    Args:
        members: of the merge.
        signs: the adapter that decides the signs; its own modules are compared but not merged.
    Raises: CompatibilityError if the same module has different shapes.
    """
    modules: dict[str, ModuleInfo] = {}
    first: dict[str, str] = {}  # the adapter in which a module was seen first
    faults = []
    named = [(member.name, member.adapter) for member in members] + ([("sign_from", signs)] if signs else [])
    for name, adapter in named:
        for module in adapter.layout.values():
            known = modules.get(module.name, module)
            if adapter is not signs:
                modules[module.name] = known
            first.setdefault(module.name, name)
            if known.signature != module.signature:
                forms = f"{first[module.name]} has {_form(known)}, {name} has {_form(module)}"
                faults.append(f"  {module.name}: {forms}")
    if faults:
        raise CompatibilityError(
            f"the adapters disagree on the shape of {len(faults)} module(s):\n{first_rows(faults)}\n"
            "They were trained on different base models, so their task vectors cannot be added. Leave some out."
        )
    return dict(sorted(modules.items()))


def _form(module: ModuleInfo) -> str:
    """Return the shape of a module and what else tells it from others, as text."""
    side = " on the input" if module.on_input else ""
    layer = "" if module.layer_type == LINEAR else f" ({module.layer_type})"
    kernel = f", kernel {' × '.join(map(str, module.kernel_size))}" if module.kernel_size else ""
    experts = f", {module.expert[1]} experts" if module.expert[1] > 1 else ""
    return f"{' × '.join(map(str, module.shape))}{side}{layer}{kernel}{experts}"


def check_shared_modules(members: Sequence[Member]) -> None:
    """Check that every adapter shares modules with another one, so that together they are one group.

    Raises: CompatibilityError.
    """
    linked, rest = set(members[0].adapter.layout), list(members[1:])
    while near := [member for member in rest if linked & member.adapter.layout.keys()]:
        for member in near:
            linked |= member.adapter.layout.keys()
            rest.remove(member)
    if rest:
        rows = "\n".join(f"  {m.name}: {m.adapter.modules[0]}, … ({len(m.adapter.modules)})" for m in members)
        raise CompatibilityError(
            f"{', '.join(m.name for m in rest)} and {members[0].name} have no module in common:\n{rows}\n"
            "They may belong to different base models. If they do not, use --allow-disjoint (allow_disjoint=True)."
        )


def check_one_config(members: Sequence[Member], modules: dict[str, ModuleInfo]) -> None:
    """Check that one adapter can hold all modules: one config, one order of replicated layers, one form of experts.

    Raises: CompatibilityError.
    """
    _check_expert_forms(members)
    fault = output_type(members[0].adapter.peft_type).fault(list(modules.values()))
    if fault:
        raise CompatibilityError(f"the adapters cannot be written as one adapter: {fault}.")
    replicated = {member.name: member.adapter.config.get("layer_replication") or None for member in members}
    first = next(iter(replicated.values()))
    if any(found != first for found in replicated.values()):
        rows = "\n".join(f"  {name}: {found!r}" for name, found in replicated.items())
        raise CompatibilityError(
            f"the adapters replicate the base's layers differently (layer_replication):\n{rows}\n"
            "One adapter can hold one order of layers. Merge those that agree."
        )


def _check_expert_forms(members: Sequence[Member]) -> None:
    """Check that experts are either all separate layers, as in transformers 4, or all fused, as in transformers 5."""
    separate = [(m.name, n) for m in members for n in m.adapter.modules if SEPARATE_EXPERT.search(n)]
    fused = [(m.name, n) for m in members for n, module in m.adapter.layout.items() if module.layer_type == EXPERT]
    if separate and fused:
        rows = [f"  {', '.join(dict.fromkeys(n for n, _ in own))}: {own[0][1]!r}" for own in (separate, fused)]
        raise CompatibilityError(
            "some adapters have a layer for each expert, others one fused parameter for all experts:\n"
            + "\n".join(rows)
            + "\nTheir task vectors could not be added. Load the former in PEFT with transformers 5, which fuses experts, "
            "save it again, and merge that."
        )


def check_statistics(method: Method, members: Sequence[Member]) -> None:
    """Check that every adapter's folder has the statistics that the method needs.

    Raises: CompatibilityError with the adapters that have none and the command that makes them.
    """
    kind = method.needs
    missing = [member.adapter.label for member in members if kind and member.adapter.statistics(kind) is None]
    if kind and missing:
        raise CompatibilityError(
            f"method '{method.name}' needs {kind} statistics beside every adapter, and {len(missing)} of "
            f"{len(members)} have none: {', '.join(missing)}. Gather them once, with the base model and a few hundred "
            f"rows of text: {gather_command(missing[0], kind)}."
        )


def common_base(members: Sequence[Member]) -> BaseModel | None:
    """Return the base model that the adapters were opened with; None if they were opened without one.

    Raises: CompatibilityError where they were opened with different ones.
    """
    found = {m.adapter.base_model.label: m for m in reversed(members) if m.adapter.base_model is not None}
    if len(found) > 1:
        rows = "\n".join(f"  {member.name}: {label}" for label, member in reversed(found.items()))
        raise CompatibilityError(
            f"the adapters were opened with {len(found)} base models:\n{rows}\nOpen all of them with the base model "
            "that they were trained on (Adapter.load(…, base=…))."
        )
    return next((member.adapter.base_model for member in found.values()), None)


def unify_module_names(adapters: Sequence[Adapter], warnings: list[str]) -> list[Adapter]:
    """Return the adapters with the same name for the same module, if versions of transformers named it differently."""
    found = []
    for adapter in adapters:
        base = adapter.base_model
        table = {} if base is None else without_tower_prefix(adapter.modules, base.modules)
        found.append(_renamed(adapter, table, "of the base", warnings))
    tables = match_names([{name: module.signature for name, module in adapter.layout.items()} for adapter in found])
    found = [_renamed(a, table, "of the others", warnings) for a, table in zip(found, tables, strict=True)]
    _warn_prefix(found, warnings)
    return found


def _renamed(adapter: Adapter, table: Mapping[str, str], whose: str, warnings: list[str]) -> Adapter:
    """Return the adapter with newer names for its modules, and warn of it."""
    if not table:
        return adapter
    old = min(table)
    warnings.append(
        f"{adapter.label} names {len(table)} modules as older versions of transformers do ({old!r}). They are taken to "
        f"be those {whose} ({table[old]!r}) and are written under that name."
    )
    whole = [key for key in adapter.extra_keys if newer_name(key.removeprefix(PREFIX)) is not None]
    if whole:
        warnings.append(
            f"{adapter.label} stores {len(whole)} whole tensors under older names too ({whole[0]!r}). They are written "
            'unchanged, and newer versions of transformers do not find them. Leave them out with --heads drop (heads="drop").'
        )
    return adapter.renamed(table)


def _warn_prefix(adapters: Sequence[Adapter], warnings: list[str]) -> None:
    """Warn of a prefix of module names that newer classes with a single encoder no longer have."""
    tower = tower_prefix(name for adapter in adapters for name in adapter.modules)
    configs = [adapter.base_model.config for adapter in adapters if adapter.base_model is not None]
    classes = [str(name) for config in configs if config for name in config.get("architectures") or ()]
    if tower is None or (classes and not any(name.endswith(("TextModel", "VisionModel")) for name in classes)):
        return
    encoder = tower.partition("_")[0].title()
    warnings.append(
        f"the module names begin with '{tower}' ({adapters[0].modules[0]!r}) and are written so. CLIPModel and "
        f"CLIP{encoder}ModelWithProjection have this prefix; CLIP{encoder}Model and similar classes lost it in transformers 5.6. "
        "For one of those, convert the adapter with a file of that model's module names, --modules FILE (modules=FILE)."
    )


@dataclass(frozen=True)
class TaskType:
    """The task type of a result, PEFT's name for the kind of model that an adapter was trained on.

    Attributes:
        kept: the task type; None for none.
        named: the task types that the adapters name, each once.
        dropped: why the adapters' task type is left out; empty if it is not.
    """

    kept: str | None = None
    named: tuple[str, ...] = ()
    dropped: str = ""

    @property
    def said(self) -> str:
        """The line of the report."""
        return self.kept or (f"left out: {self.dropped}" if self.dropped else "")


def choose_task_type(members: Sequence[Member], loads: Callable[[str], bool], warnings: list[str]) -> TaskType:
    """Return the task type of the result: that of the adapters if they agree and PEFT loads the result with it.

    Args:
        members: of the merge.
        loads: tells whether PEFT loads the result with a task type; some need the head of the task.
        warnings: receives the reason if it is left out.
    """
    holders: dict[str, list[str]] = {}
    for member in members:
        given = member.adapter.config.get("task_type")
        holders.setdefault("none" if given is None else str(given), []).append(member.name)
    named = tuple(dict.fromkeys(t for m in members if isinstance(t := m.adapter.config.get("task_type"), str) and t))
    if holders.keys() <= {"none"}:
        return TaskType()
    if len(holders) == 1 and len(named) == 1 and loads(named[0]):
        return TaskType(named[0], named)
    listed = "; ".join(f"{task}: {some(names)}" for task, names in holders.items())
    if len(holders) > 1:
        why = f"the adapters differ in it ({listed})"
        advice = "If they were trained on the same class of the base model, nothing is lost; otherwise merge them separately."
    elif not named:
        why, advice = f"it is not a name ({listed})", "Correct task_type in their adapter_config.json."
    else:
        why = f"the result lacks a layer that was trained for {named[0]}"
        advice = 'Keep the head of one adapter (--heads keep=NAME, heads="keep=NAME") to have it.'
    warnings.append(f"task_type is left out: {why}. The result is loaded as a plain PeftModel. {advice}")
    return TaskType(None, named, why)


def warn_base_names(members: Sequence[Member], recipe: Recipe, warnings: list[str]) -> None:
    """Warn if the adapters and the recipe name different base models."""
    names = sorted({member.adapter.base_name or "none given" for member in members})
    if len(names) > 1:
        warnings.append(
            f"the adapters name different base models ({', '.join(names)}). Their modules fit each other. Check that "
            "these are names of one model."
        )
    named = recipe.base_model if recipe.notes else None  # by a recipe that was converted, not as a new name
    if named and any(name.rsplit("/", 1)[-1] != named.rsplit("/", 1)[-1] for name in names):
        warnings.append(f"the recipe's base model is {named}, the adapters name {', '.join(names)}.")


def warn_orientation(members: Sequence[Member], warnings: list[str]) -> None:
    """Warn if the base's weights contradict fan_in_fan_out, or if nothing else tells their orientation."""
    for member in members:
        adapter, stated = member.adapter, bool(member.adapter.config.get("fan_in_fan_out"))
        if adapter.base_model is None:
            continue
        says, where = f"fan_in_fan_out={stated}", f"base model '{adapter.base_model.label}'"
        read = [module for module in adapter.layout.values() if module.base_tensors and module.layer_type == LINEAR]
        contradicting = [module.name for module in read if module.conv1d != stated]
        if contradicting:
            here, order = ("Linear", "(out, in)") if stated else ("Conv1D", "(in, out)")
            warnings.append(
                f"{member.name}: its config says {says}, but {len(contradicting)} of its modules ('{contradicting[0]}') are {here} in {where}. "
                f"Their weights are read as {order}, as PEFT reads them."
            )
        doubtful = [
            module.name
            for module in read
            if adapter.base_model.is_conv1d(module.path) is None and (stated or module.path.endswith(CONV1D_LAYERS))
        ]
        if doubtful:
            warnings.append(
                f"{member.name}: {where} has no config.json that names its architecture, so the weights of "
                f"{len(doubtful)} modules ('{doubtful[0]}') are read as the adapter's {says} says."
            )


def warn_unused_filters(members: Sequence[Member], modules: Iterable[str], warnings: list[str]) -> None:
    """Warn of filters that match no module; most likely they are misspelt."""
    names = list(modules)
    filters = dict.fromkeys(
        part for m in members for schedule in (m.weight, m.density) if schedule is not None for part in schedule.filters
    )
    unused = [part for part in filters if not any(part in name for name in names)]
    if unused:
        warnings.append(
            f"no module's name contains {', '.join(unused)}, so these filters have no effect. Check their spelling."
        )


def warn_single_adapter(members: Sequence[Member], stages: Stages, warnings: list[str]) -> None:
    """Warn if a single adapter is merged and the method drops some of its entries."""
    if len(members) > 1:
        return
    for stage in stages.all:
        own = members[0].density if stage is stages.method else None
        shares = [getattr(stage, "density", 1.0)] if own is None else own.numbers()
        if min(shares) < 1:
            more = " or more" if len(set(shares)) > 1 else ""
            warnings.append(
                f"only one adapter is merged, and '{stage.name}' keeps {100 * min(shares):.4g} %{more} of its entries. "
                f"To keep all of them, set density 1 ({_flag(stage, stages)})."
            )


def _flag(stage: Method, stages: Stages) -> str:
    """Return the flag that sets one stage's density to 1."""
    several = sum(hasattr(other, "density") for other in stages.all) > 1
    return f"--set {stage.name}.density=1" if several else "--density 1"
