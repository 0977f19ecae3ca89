"""Members: the adapters of a merge, and how much of each goes into it."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..adapters.adapter import Adapter
from ..adapters.base_model import CONV1D_LAYERS, BaseModel
from ..adapters.module_names import match_names, newer_name, tower_prefix, without_tower_prefix
from ..adapters.statistics import ModuleStatistics, gather_command
from ..adapters.types import ModuleInfo, output_type
from ..adapters.types.base import EXPERT, LINEAR, PREFIX
from ..errors import CompatibilityError, RecipeError
from ..methods import Method, Stages
from .options import NORM
from .recipes.recipe import Recipe
from .recipes.schedule import Schedule, count_layers

UNEQUAL = 3.0  # times: benchmarks/retention.py measures what is left of the smaller adapter
APART = re.compile(r"\.experts\.\d+\.(w[123]|(gate|up|down)_proj)$")  # one layer for each expert


@dataclass(frozen=True)
class Member:
    """One adapter of a merge.

    Attributes:
        name: short and unique in the merge, for tables.
        adapter: its files.
        weight: w, one number or one for every module; never 0 everywhere.
        density: in place of the method's, if one was set for this adapter.
    """

    name: str
    adapter: Adapter
    weight: Schedule
    density: Schedule | None = None

    def has(self, module: str) -> bool:
        """Whether it adapts a module."""
        return module in self.adapter.layout

    def density_at(self, module: str, layers: int, default: float) -> float:
        """The density on one module, the method's where none was set."""
        return default if self.density is None else self.density.at(module, layers, default)


@dataclass(frozen=True)
class TaskType:
    """The task type of a result, PEFT's name for the kind of model that an adapter was trained on.

    Attributes:
        kept: that it has; None for none.
        named: those that the adapters name, each once.
        dropped: why the adapters' own is left out, in words; empty where it is not.
    """

    kept: str | None = None
    named: tuple[str, ...] = ()
    dropped: str = ""

    @property
    def said(self) -> str:
        """Return what the report says of it."""
        return self.kept or (f"left out: {self.dropped}" if self.dropped else "")


def equal_norm_weights(norms: Sequence[float]) -> list[float]:
    """Weights that bring task vectors of these norms to one length, the mean of their lengths.

        wᵢ = mean ‖τ‖ / ‖τᵢ‖, the mean over the adapters whose norm is not 0; wᵢ = 0 where ‖τᵢ‖ = 0

    ‖τᵢ‖ is the Frobenius norm of the whole, unweighted task vector, over all modules of adapter i.

    Law: all wᵢ·‖τᵢ‖ > 0 are equal, and Σ wᵢ·‖τᵢ‖ = Σ ‖τᵢ‖; equal norms give 1 each.
    Source: weights in 1/‖τ‖ are NAN's (arXiv 2505.16148); the factor in front keeps the total length.

    >>> equal_norm_weights([1.0, 3.0, 0.0])
    [2.0, 0.6666666666666666, 0.0]
    """
    mean = statistics.fmean([norm for norm in norms if norm] or [0.0])
    return [mean / norm if norm else 0.0 for norm in norms]


def unequal_norms(norms: Mapping[str, float], weighted: bool = False) -> list[str]:
    """Return a warning if the largest norm is about `UNEQUAL` times the smallest or more; a norm of 0 does not count.

    Args:
        norms: of the task vectors, by adapter.
        weighted: whether they are those of w·τ.
    """
    there = {name: norm for name, norm in norms.items() if norm > 0}
    if len(there) < 2:
        return []
    large, small = max(there, key=there.__getitem__), min(there, key=there.__getitem__)
    times = there[large] / there[small]
    if round(times, 1) < UNEQUAL:
        return []
    return [
        f"{'weighted norms' if weighted else 'norms'} differ {times:.1f}-fold: {large} ({there[large]:.3g}), {small} "
        f"({there[small]:.3g}). An election of signs leaves the smallest little. A method that adds, such as "
        'task_arithmetic, leaves it more, and --weights norm (weights="norm") brings all to one length.'
    ]


def make_members(
    recipe: Recipe, adapters: Sequence[Adapter], densities: Sequence[Schedule | None], warnings: list[str]
) -> tuple[Member, ...]:
    """The adapters with a weight other than 0, in order, weighed.

    Raises: RecipeError for what is no weight, or not one per adapter, or 0 everywhere.
    """
    weights = _read_weights(recipe, adapters)
    names = short_names([adapter.label for adapter in adapters])
    here = _present(weights, adapters)
    dropped = [name for name, stays in zip(names, here, strict=True) if not stays]
    if dropped:
        warnings.append(f"{'norm' if recipe.weights == NORM else 'weight'} 0, so as absent: {', '.join(dropped)}.")
    everyone = zip(here, names, adapters, weights, densities, strict=True)
    return tuple(Member(n, a, w, d) for stays, n, a, w, d in everyone if stays)


def short_names(labels: Sequence[str]) -> list[str]:
    """The shortest unlike endings of some paths; numbered where paths are equal.

    >>> short_names(["a/lora/x", "b/lora/y", "c/lora/x"])
    ['a/lora/x', 'y', 'c/lora/x']
    """
    parts = [label.rstrip("/").split("/") for label in labels]
    names = []
    for own in parts:
        length = next(
            (n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1), len(own)
        )
        names.append("/".join(own[-length:]))
    return [f"{n} ({names[: i + 1].count(n)})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def warn_unused_filters(members: Sequence[Member], modules: Iterable[str], warnings: list[str]) -> None:
    """Warn of filters that are part of no module's name: misspelt, most likely."""
    names = list(modules)
    filters = dict.fromkeys(
        part for m in members for schedule in (m.weight, m.density) if schedule is not None for part in schedule.filters
    )
    idle = [part for part in filters if not any(part in name for name in names)]
    if idle:
        warnings.append(f"no module's name contains {', '.join(idle)}, so that such a filter has no effect.")


def common_base(members: Sequence[Member]) -> BaseModel | None:
    """The base that adapters were opened with, if any was; it is one for all of them.

    Raises: CompatibilityError where they were opened with several.
    """
    found = {m.adapter.base_model.label: m for m in reversed(members) if m.adapter.base_model is not None}
    if len(found) > 1:
        rows = "\n".join(f"  {member.name}: {label}" for label, member in reversed(found.items()))
        raise CompatibilityError(
            f"the adapters were opened with {len(found)} base models:\n{rows}\nOpen all of them with the one that they "
            "were trained on (Adapter.load(…, base=…))."
        )
    return next((member.adapter.base_model for member in found.values()), None)


def warn_base_names(members: Sequence[Member], recipe: Recipe, warnings: list[str]) -> None:
    """Warn of several names for the base model."""
    names = sorted({member.adapter.base_name or "none given" for member in members})
    if len(names) > 1:
        warnings.append(
            f"the adapters name different base models ({', '.join(names)}). Their modules fit each other, "
            "but only you can tell whether it is one model under several names."
        )
    named = recipe.base_model if recipe.notes else None  # by a recipe that was converted, not as a new name
    if named and any(name.rsplit("/", 1)[-1] != named.rsplit("/", 1)[-1] for name in names):
        warnings.append(f"the recipe's base model is {named}, the adapters name {', '.join(names)}.")


def warn_single_adapter(members: Sequence[Member], stages: Stages, warnings: list[str]) -> None:
    """Warn where a single adapter is merged, of which a method leaves out entries."""
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
    """What sets one stage's density on the command line."""
    several = sum(hasattr(other, "density") for other in stages.all) > 1
    return f"--set {stage.name}.density=1" if several else "--density 1"


def choose_task_type(members: Sequence[Member], loads: Callable[[str], bool], warnings: list[str]) -> TaskType:
    """Keep the task type where all adapters name the same and PEFT loads the result with it; else warn why not.

    Args:
        members: of the merge.
        loads: whether PEFT loads the result with a task type; it needs the head of a task that has one.
        warnings: why it is left out is added.
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
    listed = "; ".join(f"{task}: {', '.join(names[:4])}{', …' * (len(names) > 4)}" for task, names in holders.items())
    if len(holders) > 1:
        why = f"the adapters differ in it ({listed})"
        advice = "If they were trained on the same class of the base model, nothing is lost; otherwise merge them separately."
    elif not named:
        why, advice = f"PEFT knows none of this form ({listed})", "Mend task_type in their adapter_config.json."
    else:
        why = f"the result lacks a layer that was trained for {named[0]}"
        advice = "Keep the head of one adapter (--heads keep=NAME) to have it."
    warnings.append(f"task_type is left out: {why}. The result is loaded as a plain PeftModel. {advice}")
    return TaskType(None, named, why)


def warn_orientation(members: Sequence[Member], warnings: list[str]) -> None:
    """Warn where the base's weights are not read as fan_in_fan_out says, and where nothing else tells how to read them."""
    for member in members:
        adapter, stated = member.adapter, bool(member.adapter.config.get("fan_in_fan_out"))
        if adapter.base_model is None:
            continue
        says, where = f"fan_in_fan_out={stated}", f"base model '{adapter.base_model.label}'"
        read = [module for module in adapter.layout.values() if module.base_tensors and module.layer_type == LINEAR]
        odd = [module.name for module in read if module.conv1d != stated]
        if odd:
            here, order = ("Linear", "(out, in)") if stated else ("Conv1D", "(in, out)")
            warnings.append(
                f"{member.name}: its config says {says}, but {len(odd)} of its modules ('{odd[0]}') are {here} in {where}; "
                f"their weights are read as {order}, as PEFT does."
            )
        doubtful = [
            module.name
            for module in read
            if adapter.base_model.is_conv1d(module.path) is None and (stated or module.path.endswith(CONV1D_LAYERS))
        ]
        if doubtful:
            warnings.append(
                f"{member.name}: {where} has no config.json that names its architecture, so that the weights of "
                f"{len(doubtful)} modules ('{doubtful[0]}') are read as the adapter's {says} says."
            )


def check_shared_modules(members: Sequence[Member]) -> None:
    """Every adapter must be linked to every other through shared modules."""
    linked, rest = set(members[0].adapter.layout), list(members[1:])
    while near := [member for member in rest if linked & member.adapter.layout.keys()]:
        for member in near:
            linked |= member.adapter.layout.keys()
            rest.remove(member)
    if rest:
        rows = "\n".join(f"  {m.name}: {m.adapter.modules[0]}, … ({len(m.adapter.modules)})" for m in members)
        raise CompatibilityError(
            f"{', '.join(m.name for m in rest)} and {members[0].name} have no module in common:\n{rows}\n"
            "They may be for different base models. If they are for one, say --allow-disjoint (allow_disjoint=True)."
        )


def module_statistics(method: Method, members: Sequence[Member], module: str) -> list[ModuleStatistics]:
    """Of some adapters that have a module, what the method needs to know of it; none if it needs nothing."""
    found = []
    for adapter in (member.adapter for member in members if method.needs):
        statistics = adapter.statistics(method.needs or "")
        one = None if statistics is None else statistics.of_module(module)
        if statistics is not None and one is not None:
            norm = statistics.norm(adapter.modules) if method.normalizes_statistics() else 1.0
            found.append(replace(one, divisor=norm or 1.0))
    return found


def check_statistics(method: Method, members: Sequence[Member]) -> None:
    """Every adapter has, beside it, the statistics that the method needs.

    Raises: CompatibilityError naming those that have none, and what makes them.
    """
    kind = method.needs
    missing = [member.adapter.label for member in members if kind and member.adapter.statistics(kind) is None]
    if kind and missing:
        raise CompatibilityError(
            f"method '{method.name}' needs {kind} statistics beside every adapter, and {len(missing)} of "
            f"{len(members)} have none: {', '.join(missing)}. Gather them once, with the base model and a few hundred "
            f"rows of text: {gather_command(missing[0], kind)}."
        )


def _read_weights(recipe: Recipe, adapters: Sequence[Adapter]) -> list[Schedule]:
    """The weight of each adapter, checked; equal-norm ones computed."""
    given, count = recipe.weights, len(adapters)
    if isinstance(given, str):
        if given != NORM:
            raise RecipeError(f"the weights are {given!r}; expected norm, or one weight per adapter.")
        weights: Sequence[object] = equal_norm_weights([adapter.norm() for adapter in adapters])
        if count and not any(weights):
            raise RecipeError("weights: norm divides by the adapters' norms, and every one is 0. Leave it out.")
    else:
        weights = (1.0,) * count if given is None else given
    if len(weights) != count:
        raise RecipeError(
            f"{len(weights)} weight{'s' * (len(weights) != 1)} for {count} adapter{'s' * (count != 1)}. Give one weight per adapter, in their order."
        )
    endless = [weight for weight in weights if isinstance(weight, float) and not math.isfinite(weight)]
    if endless:
        raise RecipeError(f"the weights hold {endless[0]}; expected finite numbers.")
    return [Schedule.read(weight, f"weight {place + 1}") for place, weight in enumerate(weights)]


def _present(weights: Sequence[Schedule], adapters: Sequence[Adapter]) -> list[bool]:
    """For each adapter, whether its weight is other than 0 on any module that it has."""
    named = [name for a, w in zip(adapters, weights, strict=True) if any(w.numbers()) for name in a.modules]
    layers = count_layers(named)
    found = [
        any(weight.at(name, layers) != 0 for name in adapter.modules)
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    if not any(found):
        raise RecipeError("every weight is 0, so nothing is left to merge. Give at least one adapter a weight.")
    return found


def unify_module_names(adapters: Sequence[Adapter], warnings: list[str]) -> list[Adapter]:
    """The adapters with one name for each module, where versions of transformers gave it several."""
    found = [
        _renamed(
            a,
            {} if a.base_model is None else without_tower_prefix(a.modules, a.base_model.modules),
            "of the base",
            warnings,
        )
        for a in adapters
    ]
    tables = match_names([{name: module.signature for name, module in adapter.layout.items()} for adapter in found])
    found = [_renamed(a, table, "of the others", warnings) for a, table in zip(found, tables, strict=True)]
    _warn_prefix(found, warnings)
    return found


def _renamed(adapter: Adapter, table: Mapping[str, str], whose: str, warnings: list[str]) -> Adapter:
    """The adapter with newer names for its modules, and a warning that says so."""
    if not table:
        return adapter
    old = min(table)
    warnings.append(
        f"{adapter.label} names {len(table)} modules as an older transformers did ({old!r}); they "
        f"are taken for those {whose} ({table[old]!r}), and written under that name."
    )
    whole = [key for key in adapter.extra_keys if newer_name(key.removeprefix(PREFIX)) is not None]
    if whole:
        warnings.append(
            f"{adapter.label} holds {len(whole)} whole tensors under older names too ({whole[0]!r}); they are "
            "written as they are, and a newer transformers does not find them. Leave them out with --heads drop."
        )
    return adapter.renamed(table)


def _warn_prefix(adapters: Sequence[Adapter], warnings: list[str]) -> None:
    """Warn of a prefix that transformers removed from the class that has one encoder alone."""
    tower = tower_prefix(name for adapter in adapters for name in adapter.modules)
    configs = [adapter.base_model.config for adapter in adapters if adapter.base_model is not None]
    classes = [str(name) for config in configs if config for name in config.get("architectures") or ()]
    if tower is None or (classes and not any(name.endswith(("TextModel", "VisionModel")) for name in classes)):
        return
    kind = tower.partition("_")[0].title()
    warnings.append(
        f"the modules' names begin with '{tower}' ({adapters[0].modules[0]!r}) and are written so. In "
        f"CLIPModel and CLIP{kind}ModelWithProjection they still do; CLIP{kind}Model and its like have had no such prefix "
        "since transformers 5.6. For one of those, convert the adapter with --modules and a file of that model's module "
        "names."
    )


def check_one_config(members: Sequence[Member], modules: dict[str, ModuleInfo]) -> None:
    """What one adapter cannot hold: modules that PEFT has no common config for, unequal replicated layers."""
    _check_expert_forms(members)
    fault = output_type(members[0].adapter.peft_type).fault(list(modules.values()))
    if fault:
        raise CompatibilityError(f"the adapters fit no one adapter: {fault}.")
    replicated = {member.name: member.adapter.config.get("layer_replication") or None for member in members}
    first = next(iter(replicated.values()))
    if any(found != first for found in replicated.values()):
        rows = "\n".join(f"  {name}: {found!r}" for name, found in replicated.items())
        raise CompatibilityError(
            f"the adapters replicate the base's layers differently (layer_replication):\n{rows}\n"
            "One adapter can hold one order of layers. Merge those that agree."
        )


def _check_expert_forms(members: Sequence[Member]) -> None:
    """Experts that transformers 4 held as layers of their own and transformers 5 holds fused are not merged apart."""
    apart = [(m.name, n) for m in members for n in m.adapter.modules if APART.search(n)]
    fused = [(m.name, n) for m in members for n, module in m.adapter.layout.items() if module.layer_type == EXPERT]
    if apart and fused:
        rows = [f"  {', '.join(dict.fromkeys(n for n, _ in some))}: {some[0][1]!r}" for some in (apart, fused)]
        raise CompatibilityError(
            "the adapters name the experts of one base in two forms, each a layer and fused into one parameter:\n"
            + "\n".join(rows)
            + "\nMerged so, neither would be added to the other. Load the former in PEFT with transformers 5, which fuses "
            "them, save it again, and merge that."
        )
