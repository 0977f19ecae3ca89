"""Plan: which adapters have which modules, and every check that can be made before any work.

After `make_plan` the merge cannot fail for a reason that could have been known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .adapter import Adapter
from .errors import CompatibilityError, MethodError, RecipeError, printable, unknown
from .kinds import Kind, Module
from .methods import Method, make_method
from .recipe import Rank, Recipe, is_number
from .spaces import Space, find_space
from .trim import Scope

AUTO_RANK = 64
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
VOCABULARY = ("lm_head", "embed_out", "embed_tokens", "wte", "shared")  # as large as the vocabulary: trimmed apart


@dataclass(frozen=True)
class Member:
    """One adapter of a merge.

    Attributes:
        name: short and unique in the merge, for tables.
        adapter: its files.
        weight: w, never 0.
    """

    name: str
    adapter: Adapter
    weight: float

    def has(self, module: str) -> bool:
        """Whether it adapts a module."""
        return module in self.adapter.layout


@dataclass(frozen=True)
class Plan:
    """A merge that has passed every check.

    Attributes:
        members: the adapters with a weight other than 0, in order.
        modules: the union of their modules, sorted by name.
        method, space, scale, seed: as asked for, defaults filled in.
        trim: (density, scope) of the trim that the method wants; None for none.
        rank: r of the output; None for kinds that have none.
        dtype: of the tensors written.
        device: where the arithmetic is done.
        signs: the adapter that decides the signs, if one was given.
        warnings: what is unwise, known from names and shapes alone.
    """

    members: tuple[Member, ...]
    modules: dict[str, Module]
    method: Method
    space: Space
    scale: float
    trim: tuple[float, Scope] | None
    rank: int | None
    dtype: torch.dtype
    device: torch.device
    seed: int
    signs: Adapter | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        """The kind of all its adapters."""
        return self.members[0].adapter.kind

    @property
    def total_weight(self) -> float:
        """Σ w."""
        return sum(member.weight for member in self.members)

    def holders(self, module: str) -> list[tuple[int, Member]]:
        """The members that have a module, with their places."""
        return [(place, member) for place, member in enumerate(self.members) if member.has(module)]


def make_plan(recipe: Recipe, adapters: Sequence[Adapter], device: str = "cpu") -> Plan:
    """Check everything that can be checked without arithmetic, and settle every default.

    Raises: RecipeError, MethodError, CompatibilityError or AdapterError, with one clear message.
    """
    warnings: list[str] = []
    space = find_space(recipe.space)
    method = make_method(recipe.method, dict(recipe.parameters))
    weights = _weights(recipe, len(adapters))
    _check_method(method, space, weights)
    signs = _signs(method)
    where = _device(device)
    _check_kinds([*adapters, *([signs] if signs else [])], space)
    for adapter in [*adapters, *([signs] if signs else [])]:
        adapter.check()
    dtype = _dtype(recipe.dtype, adapters)
    members = _members(adapters, weights, warnings)
    modules = _modules(members, signs, recipe.allow_disjoint)
    _check_ranks(space, [*members, *([Member("sign_from", signs, 1.0)] if signs else [])], modules)
    rank = _rank(recipe.rank, method, space, members, modules, warnings)
    _compare_bases(members, warnings)
    return Plan(
        members=members,
        modules=modules,
        method=method,
        space=space,
        scale=_scale(recipe.scale, method),
        trim=_trim(method, space),
        rank=rank,
        dtype=dtype,
        device=where,
        seed=_seed(recipe.seed),
        signs=signs,
        warnings=warnings,
    )


def _weights(recipe: Recipe, count: int) -> tuple[float, ...]:
    if count == 0:
        raise RecipeError("no adapters were given. Name at least one folder or Hub id.")
    weights = recipe.weights if recipe.weights is not None else (1.0,) * count
    if len(weights) != count:
        raise RecipeError(f"{len(weights)} weights for {count} adapters. Give one weight per adapter, in their order.")
    wrong = [str(weight) for weight in weights if not is_number(weight)]
    if wrong:
        raise RecipeError(f"the weights hold {printable(', '.join(wrong))}; expected finite numbers.")
    if not any(weights):
        raise RecipeError("every weight is 0, so nothing is left to merge. Give at least one adapter a weight.")
    return tuple(float(weight) for weight in weights)


def _check_method(method: Method, space: Space, weights: Sequence[float]) -> None:
    if space.name not in method.spaces:
        raise MethodError(
            f"method '{method.name}' is not offered in space '{space.name}'; it works in {', '.join(method.spaces)}."
        )
    fault = method.check([weight for weight in weights if weight != 0], space.name)
    if fault:
        raise MethodError(f"method '{method.name}': {fault}.")


def _signs(method: Method) -> Adapter | None:
    given = getattr(method, "sign_from", None)
    if given is None or isinstance(given, Adapter):
        return given
    if not isinstance(given, (str, Path)):
        raise MethodError(
            f"sign_from is {printable(repr(given))}; expected an adapter's path, its Hub id or an Adapter."
        )
    return Adapter.load(given)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (TypeError, RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"device '{printable(str(name))}' cannot be used: {printable(first)}. Try cpu.") from None
    return device


def _dtype(name: str | None, adapters: Sequence[Adapter]) -> torch.dtype:
    if name is None:
        found = {adapter.dtype for adapter in adapters}
        return found.pop() if len(found) == 1 else torch.float32
    if not isinstance(name, str) or name not in DTYPES:
        raise RecipeError(unknown("dtype", str(name), DTYPES))
    return DTYPES[name]


def _seed(seed: int) -> int:
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise RecipeError(f"the seed is {printable(repr(seed))}; expected a whole number, 0 or more.")
    return seed


def _scale(scale: float | None, method: Method) -> float:
    if scale is None:
        return method.default_scale
    if not is_number(scale):
        raise RecipeError(f"the scale is {printable(repr(scale))}; expected a finite number.")
    return float(scale)


def _trim(method: Method, space: Space) -> tuple[float, Scope] | None:
    asked = method.trims()
    if asked is None:
        return None
    density, scope = asked
    return density, scope if scope in space.scopes else space.scopes[0]


def _check_kinds(adapters: Sequence[Adapter], space: Space) -> None:
    found = {adapter.kind.name: adapter.kind for adapter in adapters}
    if len(found) > 1:
        table = "\n".join(f"  {adapter.kind.title:<8} {adapter.label}" for adapter in adapters)
        raise CompatibilityError(
            f"the adapters are of {len(found)} types, which have no common form:\n{table}\nMerge each type on its own."
        )
    (kind,) = found.values()
    if kind.name not in space.kinds:
        raise MethodError(
            f"space '{space.name}' is for {', '.join(space.kinds)}; these are {kind.title}. Use space 'delta'."
        )


def _members(adapters: Sequence[Adapter], weights: Sequence[float], warnings: list[str]) -> tuple[Member, ...]:
    names = short_names([adapter.label for adapter in adapters])
    dropped = [name for name, weight in zip(names, weights, strict=True) if weight == 0]
    if dropped:
        warnings.append(f"weight 0, so as absent: {', '.join(dropped)}.")
    return tuple(Member(n, a, w) for n, a, w in zip(names, adapters, weights, strict=True) if w != 0)


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


def _modules(members: Sequence[Member], signs: Adapter | None, allow_disjoint: bool) -> dict[str, Module]:
    modules: dict[str, Module] = {}
    faults = []
    givers = [(member.name, member.adapter) for member in members] + ([("sign_from", signs)] if signs else [])
    first: dict[str, str] = {}
    for name, adapter in givers:
        for module in adapter.layout.values():
            known = modules.setdefault(module.name, module) if name != "sign_from" else modules.get(module.name, module)
            first.setdefault(module.name, name)
            if (known.shape, known.on_input) != (module.shape, module.on_input):
                faults.append((printable(module.name), first[module.name], known, name, module))
    if faults:
        rows = "\n".join(f"  {n}: {a} has {_form(m)}, {b} has {_form(o)}" for n, a, m, b, o in faults[:8])
        more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CompatibilityError(
            f"the adapters disagree on the shape of {len(faults)} module(s):\n{rows}{more}\n"
            "They were trained on different base models, so their task vectors cannot be added. Leave some out."
        )
    if not allow_disjoint:
        _refuse_strangers(members)
    return dict(sorted(modules.items()))


def _check_ranks(space: Space, givers: Sequence[Member], modules: dict[str, Module]) -> None:
    for name in modules:
        fault = space.check([giver.adapter.layout[name].rank for giver in givers if giver.has(name)])
        if fault:
            raise CompatibilityError(f"module '{printable(name)}': {fault}.")


def _form(module: Module) -> str:
    side = {True: " on the input", False: ""}[module.on_input]
    return f"{' × '.join(map(str, module.shape))}{side}"


def _refuse_strangers(members: Sequence[Member]) -> None:
    """Every adapter must be linked to every other through shared modules."""
    linked, rest = set(members[0].adapter.layout), list(members[1:])
    while near := [member for member in rest if linked & member.adapter.layout.keys()]:
        for member in near:
            linked |= member.adapter.layout.keys()
            rest.remove(member)
    if rest:
        rows = "\n".join(
            f"  {m.name}: {printable(m.adapter.modules[0])}, … ({len(m.adapter.modules)})" for m in members
        )
        raise CompatibilityError(
            f"{', '.join(m.name for m in rest)} and {members[0].name} have no module in common:\n{rows}\n"
            "They may be for different base models. If they are for one, say --allow-disjoint (allow_disjoint=True)."
        )


def _rank(
    asked: Rank,
    method: Method,
    space: Space,
    members: Sequence[Member],
    modules: dict[str, Module],
    warnings: list[str],
) -> int | None:
    if not members[0].adapter.kind.has_rank:
        if asked != "auto":
            raise MethodError(
                f"rank is {asked!r}, but {members[0].adapter.kind.title} vectors have no rank. Leave it out."
            )
        return None
    total = max(sum(m.adapter.layout[name].rank for m in members if m.has(name)) for name in modules)
    largest = max(member.adapter.ranks[-1] for member in members)
    full = max(min(module.shape) for module in modules.values())
    if asked == "auto":
        rank = min(total, max(AUTO_RANK, largest))
    elif asked == "max":
        rank = total if space.lossless_rank or method.linear(len(members)) else full
    elif isinstance(asked, int) and not isinstance(asked, bool) and asked >= 1:
        rank = asked
    else:
        raise RecipeError(f"the rank is {printable(repr(asked))}; expected a whole number from 1 up, 'max' or 'auto'.")
    if rank < largest:
        warnings.append(f"rank {rank} is under the largest of the inputs' own, {largest}.")
    return max(min(rank, *module.shape) for module in modules.values())


def _compare_bases(members: Sequence[Member], warnings: list[str]) -> None:
    names = sorted({member.adapter.base or "none given" for member in members})
    if len(names) > 1:
        warnings.append(
            f"the adapters name different base models ({printable(', '.join(names))}). Their modules fit each other, "
            "but only you can tell whether it is one model under several names."
        )
