"""Inspection: what is in some adapters, and whether they can be merged, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .adapter import Adapter
from .base_model import BaseModel
from .companions import gather
from .delta import inner_root
from .errors import TiesPeftError, printable
from .plan import Plan, make_plan
from .recipe import Recipe
from .riders import copies, describe, entries, read_riders, unfulfilled
from .sources import CONFIG, adapters_inside, expand_all, local


@dataclass(frozen=True)
class Facts:
    """What one adapter is.

    Attributes:
        source: as it was asked for.
        kind, base, task_type, dtype: as its files say.
        modules: how many it adapts.
        ranks, scalings: those that occur.
        numbers: how many numbers its tensors hold.
        norm: Frobenius norm of its task vector.
        largest: the module whose task vector is the longest.
        riders: the layers that it holds whole: heads, embeddings, biases.
        unusual: what most adapters are not.
    """

    source: str
    kind: str
    base: str | None
    task_type: str | None
    dtype: str
    modules: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    numbers: int
    norm: float
    largest: str
    riders: tuple[str, ...]
    unusual: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        adapters: facts of those that can be read.
        faults: why the others cannot, a message each.
        verdict: for two or more readable ones, whether they can be merged, else why not.
        mergeable: the same as a yes or no; None for fewer than two.
        rank: what `--rank auto` would give.
        warnings: what merging them would warn of.
        notes: what patterns and folders of several adapters stand for.
        losses: what merging them would lose.
    """

    adapters: tuple[Facts, ...]
    faults: tuple[str, ...]
    verdict: str | None
    mergeable: bool | None
    rank: int | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [Text(note) for note in self.notes]
        parts += [_table(facts) for facts in self.adapters]
        if self.verdict is not None:
            parts.append(Text(self.verdict, style="green" if self.mergeable else "red"))
        parts += [Text(f"would be lost: {loss}", style="yellow") for loss in self.losses]
        parts += [Text(f"! {warning}", style="yellow") for warning in self.warnings]
        return Group(*parts)


def _all_of(given: Sequence[str], faults: list[str]) -> tuple[list[str], list[str]]:
    """(the adapters that are meant, a remark on each pattern and on each folder that holds several)."""
    names, notes = [], []
    for source in given:
        try:
            found, remarks = expand_all([source])
        except TiesPeftError as error:
            faults.append(str(error))
            continue
        notes += remarks
        for name in found:
            folder = local(name)
            inside = adapters_inside(folder) if folder is not None and folder.is_dir() else []
            if folder is not None and inside and not (folder / CONFIG).is_file():
                notes.append(f"{printable(name)} holds {len(inside)} adapters: {printable(', '.join(inside))}.")
                names += [f"{name.rstrip('/')}/{own}" for own in inside]
            else:
                names.append(name)
    return names, notes


def _losses(opened: Sequence[Adapter], plan: Plan) -> list[str]:
    """What a merge of them at the defaults would lose, as far as names and sizes tell."""
    found = []
    if plan.rank is not None:
        total = max(sum(a.layout[n].rank for a in opened if n in a.layout) for n in plan.modules)
        if plan.rank < min(total, max(min(module.shape) for module in plan.modules.values())):
            found.append(
                f"rank {plan.rank} of up to {total}: some energy (--rank max keeps all; the report says how much)"
            )
    tasks = sorted({printable(str(a.config.get("task_type"))) for a in opened})
    if len(tasks) > 1:
        found.append(f"task_type, which differs: {', '.join(tasks)}")
    beside = gather((adapter.label, adapter.folder) for adapter in opened)
    return [*found, *([beside.remark.removesuffix(".")] if beside.remark else [])]


def inspect(sources: Sequence[str], base: str | None = None) -> Inspection:
    """Look at adapters; a fault in one does not hide the others.

    Args:
        sources: folders or Hub ids.
        base: the base model's, for adapters whose task vectors depend on its weights.
    """
    weights = BaseModel.load(base) if base is not None else None
    opened: list[Adapter] = []
    faults: list[str] = []
    sources, notes = _all_of(sources, faults)
    for source in sources:
        try:
            adapter = Adapter.load(source, base=weights)
            adapter.check()
            opened.append(adapter)
        except TiesPeftError as error:
            faults.append(str(error))
    facts = tuple(_facts(adapter) for adapter in opened)
    if len(sources) < 2 or len(opened) < 2:
        return Inspection(facts, tuple(faults), None, None, None, (), tuple(notes))
    try:
        plan = make_plan(Recipe(tuple(str(a.source) for a in opened)), opened)
    except TiesPeftError as error:
        return Inspection(facts, tuple(faults), f"They cannot be merged: {error}", False, None, (), tuple(notes))
    shared = sum(len(plan.holders(name)) == len(opened) for name in plan.modules)
    rank = f", at rank {plan.rank}" if plan.rank is not None else ""
    verdict = f"They can be merged: {len(plan.modules)} modules, {shared} of them in all{rank}."
    return Inspection(
        facts, tuple(faults), verdict, True, plan.rank, tuple(plan.warnings), tuple(notes), tuple(_losses(opened, plan))
    )


def _facts(adapter: Adapter) -> Facts:
    norms = {name: inner_root(adapter.read(name)) for name in adapter.modules}
    task = adapter.config.get("task_type")
    return Facts(
        source=adapter.label,
        kind=adapter.kind.title,
        base=printable(adapter.base) if adapter.base else None,
        task_type=printable(str(task)) if task else None,
        dtype=str(adapter.dtype).removeprefix("torch."),
        modules=len(adapter.layout),
        ranks=adapter.ranks,
        scalings=tuple(sorted({module.scaling for module in adapter.layout.values()})),
        numbers=sum(math.prod(adapter.tensors.info(key).shape) for key in adapter.tensors.names),
        norm=math.hypot(*norms.values()),
        largest=printable(max(norms, key=norms.__getitem__)),
        riders=_riders(adapter),
        unusual=_unusual(adapter, norms),
    )


def _riders(adapter: Adapter) -> tuple[str, ...]:
    found = read_riders(adapter.riders, adapter.config, adapter.tensors, entries([adapter.config]), adapter.label)
    return tuple(describe(found, len(copies(adapter.riders))))


FORMS = {
    "conv": "convolutions",
    "embedding": "LoRA on embeddings",
    "bias": "a bias on lora_B",
    "expert": "experts (target_parameters)",
}


def _forms(adapter: Adapter) -> list[str]:
    """What its modules are the task vectors of, where it is not linear layers; whether they need the base."""
    forms = [module.form for module in adapter.layout.values()]
    found = [f"{forms.count(form)} × {text}" for form, text in FORMS.items() if form in forms]
    if any(module.needs for module in adapter.layout.values()):
        kind = "DoRA" if adapter.kind.name == "lora" else adapter.kind.title
        found.append(f"{kind}: its task vector is of full rank and depends on the base's weights")
    if adapter.config.get("layer_replication"):
        found.append("replicated layers")
    return found


def _unusual(adapter: Adapter, norms: dict[str, float]) -> tuple[str, ...]:
    """What most adapters are not, in words."""
    config = adapter.config
    found = _forms(adapter)
    if config.get("use_rslora"):
        found.append("rsLoRA (scaling alpha/√r)")
    full = any(module.needs for module in adapter.layout.values())
    if len(adapter.ranks) > 1:
        found.append(f"mixed ranks {', '.join(map(str, adapter.ranks))}")
    if config.get("alpha_pattern"):
        found.append("alpha pattern")
    if (
        adapter.kind.name == "lora"
        and not full
        and isinstance(config.get("r"), int)
        and config["r"] not in adapter.ranks
    ):
        found.append(f"the config says r = {config['r']}, the tensors {', '.join(map(str, adapter.ranks))}")
    silent = [name for name, norm in norms.items() if norm == 0]
    if silent:
        found.append(f"{len(silent)} of {len(norms)} modules do nothing (zero task vector)")
    riders = read_riders(adapter.riders, config, adapter.tensors, entries([config]), adapter.label)
    found += [text.removesuffix(".") for text in unfulfilled(config, riders)]
    if adapter.base is None:
        found.append("names no base model")
    inside = adapters_inside(adapter.folder) if adapter.folder is not None else []
    if inside:
        found.append(f"its folder holds other adapters too: {printable(', '.join(inside))}")
    return tuple(found)


def _table(facts: Facts) -> Table:
    table = Table(
        title=escape(facts.source),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        show_header=False,
    )
    rank = f", rank {', '.join(map(str, facts.ranks))}, scaling {', '.join(f'{s:g}' for s in facts.scalings)}"
    table.add_row("kind", facts.kind + (rank if facts.kind == "LoRA" else ""))
    table.add_row(
        "base", escape(facts.base or "not named") + (f", {escape(facts.task_type)}" if facts.task_type else "")
    )
    table.add_row("modules", f"{facts.modules}, {facts.numbers:,} numbers in {facts.dtype}")
    table.add_row("norm", f"{facts.norm:.4g}, most of it in {escape(facts.largest)}")
    for number, text in enumerate(facts.riders):
        table.add_row("" if number else "whole layers", escape(text))
    if facts.unusual:
        table.add_row("unusual", escape("; ".join(facts.unusual)))
    return table
