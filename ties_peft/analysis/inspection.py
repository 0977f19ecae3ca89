"""Inspection: what some adapters hold, and whether they can be merged; nothing is merged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Column

from ..adapters.adapter import Adapter
from ..adapters.base_model import BaseModel
from ..adapters.extra_tensors import (
    describe_extra_tensors,
    missing_layers,
    unused_copies,
)
from ..adapters.image_files import describe_metadata
from ..adapters.recognise import UnsupportedAdapter, describe_unsupported
from ..adapters.sources import ADAPTER_CONFIG, adapter_subfolders, expand_patterns, find_files, local_path
from ..adapters.tokenizer_files import collect_tokenizer_files
from ..errors import TiesPeftError
from ..merging.measure import MAX_PAIRED
from ..merging.members import unequal_norms
from ..merging.plan import Plan, make_plan
from ..merging.recipes.recipe import Recipe
from ..merging.report import Cosines, shown_ranks
from ..merging.tables import make_facts, make_table, make_text, number_column
from ..task_vectors.delta import inner_with_each, norm


@dataclass(frozen=True)
class AdapterSummary:
    """A summary of one adapter. The names of the attributes are keys of `ties-peft inspect --json`.

    Attributes:
        source: the folder or Hub id, as given.
        kind: the PEFT type.
        base, task_type, dtype: as in its files.
        modules: the number of adapted modules.
        ranks, scalings: all that occur.
        numbers: the number of entries of its tensors.
        norm: the Frobenius norm of its task vector.
        largest: the module with the task vector of largest norm.
        riders: its extra tensors: heads, embeddings, biases.
        unusual: what distinguishes it from most adapters.
        model: the architecture of the image model that it is a LoRA of; empty if it is of none, or unknown.
        parts: of the pipeline that it adapts; empty if it is of no image model.
        training: what the file's metadata says of its training: trigger words, frequent tags, rank, ….
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
    model: str = ""
    parts: tuple[str, ...] = ()
    training: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`. The names of the attributes are keys of `ties-peft inspect --json`.

    Attributes:
        adapters: summaries of the adapters that can be read.
        faults: for each of the others, the message of the error.
        verdict: whether the readable ones can be merged, or why not; None for fewer than two.
        mergeable: whether all given adapters can be merged; None for fewer than two readable ones.
        rank: the rank that `auto` would choose.
        cosines: between the task vectors of every pair; None unless they can be merged, or for more than `MAX_PAIRED`.
        warnings: the warnings of a merge by the defaults.
        notes: the adapters that a pattern, or a folder of several adapters, stands for.
        losses: what a merge by the defaults would lose.
        refused: what is known of the adapters that cannot be read.
    """

    adapters: tuple[AdapterSummary, ...]
    faults: tuple[str, ...]
    verdict: str | None = None
    mergeable: bool | None = None
    rank: int | None = None
    cosines: tuple[tuple[float, ...], ...] | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    refused: tuple[UnsupportedAdapter, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = list(map(make_text, self.notes))
        parts += _set_tables(self.adapters) if len(self.adapters) > 1 else map(_summary_table, self.adapters)
        if self.cosines is not None:
            parts.append(Cosines([summary.source for summary in self.adapters], self.cosines))
        parts += [_refused_table(one) for one in self.refused if one.what]
        if self.verdict is not None:
            colour = "green" if self.mergeable else "red"
            parts += [make_text(line, colour) for line in self.verdict.split("\n")]
        parts += [make_text(f"would be lost: {loss}", "yellow") for loss in self.losses]
        parts += [make_text(f"! {warning}", "yellow") for warning in self.warnings]
        return Group(*parts)


def _expand_sources(given: Sequence[str], faults: list[str]) -> tuple[list[str], list[str]]:
    """Return (the adapters that the sources stand for, a note on each pattern and each folder of several adapters)."""
    names, notes = [], []
    for source in given:
        try:
            found, remarks = expand_patterns([source])
        except TiesPeftError as error:
            faults.append(str(error))
            continue
        notes += remarks
        for name in found:
            folder = local_path(name)
            inside = adapter_subfolders(folder) if folder is not None and folder.is_dir() else []
            if folder is not None and inside and not (folder / ADAPTER_CONFIG).is_file():
                notes.append(f"{name} holds {len(inside)} adapters: {', '.join(inside)}.")
                names += [f"{name.rstrip('/')}/{own}" for own in inside]
            else:
                names.append(name)
    return names, notes


def _losses(opened: Sequence[Adapter], plan: Plan) -> list[str]:
    """Return what a merge by the defaults would lose, as far as names and sizes tell."""
    found = []
    if plan.rank is not None:
        total = max(sum(a.layout[n].rank for a in opened if n in a.layout) for n in plan.modules)
        if plan.rank < min(total, max(min(module.shape) for module in plan.modules.values())):
            found.append(
                f"rank {plan.rank} of up to {total}: some energy (--rank max keeps all; the report says how much)"
            )
    tasks = sorted({str(a.config.get("task_type")) for a in opened})
    if len(tasks) > 1:
        found.append(f"task_type, which differs: {', '.join(tasks)}")
    beside = collect_tokenizer_files((adapter.label, adapter.folder) for adapter in opened)
    return [*found, *([beside.remark.removesuffix(".")] if beside.remark else [])]


def inspect(sources: Sequence[str], base: str | None = None) -> Inspection:
    """Summarise adapters, and check whether they can be merged; an error in one does not hide the others.

    Args:
        sources: folders or Hub ids.
        base: folder or Hub id of the base model, for adapters whose task vectors depend on its weights.
    """
    weights = BaseModel.load(base) if base is not None else None
    faults: list[str] = []
    names, notes = _expand_sources(sources, faults)
    opened: list[Adapter] = []
    refused: list[UnsupportedAdapter] = []
    for source in names:
        found = _open(source, weights)
        if isinstance(found, Adapter):
            opened.append(found)
        else:
            refused.append(found)
    inspection = Inspection(
        adapters=tuple(map(_summarize, opened)),
        faults=(*faults, *(one.fault for one in refused)),
        notes=tuple(notes),
        refused=tuple(refused),
    )
    return inspection if len(opened) < 2 else _with_merge_check(inspection, opened, base)


def _open(source: str, weights: BaseModel | None) -> Adapter | UnsupportedAdapter:
    """Return the adapter if its tensors can be read; else what is known of it."""
    try:
        found = find_files(source)
    except TiesPeftError as error:
        return UnsupportedAdapter(source, str(error))
    try:
        adapter = Adapter.load(source, base=weights)
        adapter.check()
    except TiesPeftError as error:
        return describe_unsupported(source, found, str(error))
    return adapter


def _with_merge_check(inspection: Inspection, opened: Sequence[Adapter], base: str | None) -> Inspection:
    """Return the inspection with whether the readable adapters can be merged, what is lost and what is warned of."""
    rest = f"; {len(inspection.faults)} cannot be read" if inspection.faults else ""
    subject = f"The {len(opened)} that can be read" if rest else "They"
    try:
        plan = make_plan(Recipe(tuple(str(a.source) for a in opened), base=base), opened, checked=True)
    except TiesPeftError as error:
        return replace(inspection, verdict=f"{subject} cannot be merged: {error}", mergeable=False)
    shared = sum(len(plan.holders(name)) == len(opened) for name in plan.modules)
    rank = f", at rank {plan.rank}" if plan.rank is not None else ""
    return replace(
        inspection,
        verdict=f"{subject} can be merged: {len(plan.modules)} modules, {shared} of them in every adapter{rank}{rest}.",
        mergeable=not inspection.faults,
        rank=plan.rank,
        cosines=_cosines(opened) if len(opened) <= MAX_PAIRED else None,
        warnings=(*plan.warnings, *_warnings_of_set(inspection.adapters, opened)),
        losses=tuple(_losses(opened, plan)),
    )


def _cosines(opened: Sequence[Adapter]) -> tuple[tuple[float, ...], ...]:
    """Return the cosine between the task vectors of every pair; 0 where one of them is 0."""
    products = np.zeros((len(opened), len(opened)))
    for name in sorted({name for adapter in opened for name in adapter.layout}):
        places = [place for place, adapter in enumerate(opened) if name in adapter.layout]
        deltas = [opened[place].read(name) for place in places]
        for number, (place, delta) in enumerate(zip(places, deltas, strict=True)):
            products[place, places[: number + 1]] += inner_with_each(delta, deltas[: number + 1])
    products += np.tril(products, -1).T
    norms = np.sqrt(np.diagonal(products))
    norms = np.where(norms > 0, norms, np.inf)
    cosines = products / np.outer(norms, norms)
    return tuple(tuple(1.0 if i == j else row[j] for j in range(len(row))) for i, row in enumerate(cosines.tolist()))


def _warnings_of_set(summaries: Sequence[AdapterSummary], opened: Sequence[Adapter]) -> list[str]:
    """Return the warnings about norms that differ much and about an adapter that is given twice."""
    found = unequal_norms({one.source: one.norm for one in summaries})
    for i, adapter in enumerate(opened):
        duplicate = next((other for other in opened[:i] if other.digest == adapter.digest), None)
        if duplicate is not None:
            found.append(f"{adapter.label} and {duplicate.label} hold the same task vectors. Leave one out.")
    return found


def _summarize(adapter: Adapter) -> AdapterSummary:
    norms = {name: norm(adapter.read(name)) for name in adapter.modules}
    task = adapter.config.get("task_type")
    return AdapterSummary(
        source=adapter.label,
        kind=adapter.peft_type.title,
        base=adapter.base_name or None,
        task_type=str(task) if task else None,
        dtype=str(adapter.dtype).removeprefix("torch."),
        modules=len(adapter.layout),
        ranks=adapter.ranks,
        scalings=tuple(sorted({module.scaling for module in adapter.layout.values()})),
        numbers=sum(math.prod(adapter.tensors.info(key).shape) for key in adapter.tensors.names),
        norm=math.hypot(*norms.values()),
        largest=max(norms, key=norms.__getitem__),
        riders=tuple(describe_extra_tensors(adapter.extra_tensors(), len(unused_copies(adapter.extra_keys)))),
        unusual=_unusual(adapter, norms),
        model=adapter.origin.architecture if adapter.origin else "",
        parts=adapter.origin.parts if adapter.origin else (),
        training=describe_metadata(adapter.origin.metadata) if adapter.origin else {},
    )


FORM_NAMES = {
    "conv": "convolutions",
    "embedding": "LoRA on embeddings",
    "bias": "a bias on lora_B",
    "expert": "experts (target_parameters)",
}


def _special_modules(adapter: Adapter) -> list[str]:
    """Return what adapted layers there are beside linear ones, and whether their task vectors need the base model."""
    forms = [module.layer_type for module in adapter.layout.values()]
    found = [f"{forms.count(form)} × {text}" for form, text in FORM_NAMES.items() if form in forms]
    if any(module.base_tensors for module in adapter.layout.values()):
        kind = "DoRA" if adapter.peft_type.name == "lora" else adapter.peft_type.title
        found.append(f"{kind}: its task vector is of full rank and depends on the base's weights")
    if adapter.config.get("layer_replication"):
        found.append("replicated layers")
    return found


def _unusual(adapter: Adapter, norms: dict[str, float]) -> tuple[str, ...]:
    """Return what distinguishes an adapter from most others."""
    config = adapter.config
    found = _special_modules(adapter)
    if config.get("use_rslora"):
        found.append("rsLoRA (scaling alpha/√r)")
    full_rank = any(module.base_tensors for module in adapter.layout.values())
    if len(adapter.ranks) > 1 and not full_rank:
        found.append(f"mixed ranks {', '.join(map(str, adapter.ranks))}")
    if config.get("alpha_pattern"):
        found.append("alpha pattern")
    if (
        adapter.peft_type.name == "lora"
        and not full_rank
        and isinstance(config.get("r"), int)
        and config["r"] not in adapter.ranks
    ):
        found.append(f"the config says r = {config['r']}, the tensors {', '.join(map(str, adapter.ranks))}")
    zeros = sum(value == 0 for value in norms.values())
    if zeros:
        found.append(f"{zeros} of {len(norms)} modules do nothing (zero task vector)")
    found += [text.removesuffix(".") for text in missing_layers(config, adapter.extra_tensors())]
    if adapter.base_name is None:
        found.append("names no base model")
    inside = adapter_subfolders(adapter.folder) if adapter.folder is not None else []
    if inside:
        found.append(f"its folder holds other adapters too: {', '.join(inside)}")
    return tuple(found)


def _summary_table(summary: AdapterSummary) -> RenderableType:
    """Return all that is known of one adapter."""
    rank = f", rank {', '.join(map(str, summary.ranks))}, scaling {_numbers(summary.scalings)}"
    rows = [
        ("kind", summary.kind + (rank if summary.kind == "LoRA" else "")),
        ("base", _base(summary)),
        ("modules", f"{summary.modules}, {summary.numbers:,} numbers in {summary.dtype}"),
        ("norm", f"{summary.norm:.4g}" + (f", most of it in {summary.largest}" if summary.norm else "")),
    ]
    return Group(make_text(summary.source, "bold"), make_facts([*rows, *_details(summary)]))


def _set_tables(summaries: Sequence[AdapterSummary]) -> list[RenderableType]:
    """Return a line for each adapter, then what is the same in all, then what else is known of each."""
    least = min((one.norm for one in summaries if one.norm), default=1.0)
    table = make_table(
        [
            Column("", no_wrap=True),
            Column("adapter", overflow="fold"),
            "kind",
            *map(number_column, ("rank", "scaling", "modules", "norm", "ratio")),
        ],
        [
            (
                str(number),
                one.source,
                one.kind,
                shown_ranks(one.ranks) if one.kind == "LoRA" else "–",
                _numbers(one.scalings) if one.kind == "LoRA" else "–",
                str(one.modules),
                f"{one.norm:.3g}",
                f"{one.norm / least:.1f}",
            )
            for number, one in enumerate(summaries, start=1)
        ],
    )
    rows = [("ratio", "of the norm to the smallest one")]
    for what, read in (("base", _base), ("dtype", lambda one: one.dtype)):
        values = list(dict.fromkeys(map(read, summaries)))
        for value in values:
            holders = [str(number) for number, one in enumerate(summaries, start=1) if read(one) == value]
            rows.append((what, value + (f" ({', '.join(holders)})" if len(values) > 1 else "")))
    for number, one in enumerate(summaries, start=1):
        rows += [(f"{number} {what}".rstrip(), text) for what, text in _details(one)]
    return [table, make_facts(rows)]


def _details(summary: AdapterSummary) -> list[tuple[str, str]]:
    """Return what only some adapters have: parts of an image model, whole layers, notes of the training, oddities."""
    rows = [("model", f"{summary.model or 'unknown'}: {', '.join(summary.parts)}")] if summary.parts else []
    rows += [("" if number else "whole layers", text) for number, text in enumerate(summary.riders)]
    training = [f"{what}: {text}" for what, text in summary.training.items()]
    rows += [("" if number else "training", text) for number, text in enumerate(training)]
    return rows + ([("unusual", "; ".join(summary.unusual))] if summary.unusual else [])


def _base(summary: AdapterSummary) -> str:
    return (summary.base or "not named") + (f", {summary.task_type}" if summary.task_type else "")


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _refused_table(one: UnsupportedAdapter) -> RenderableType:
    """Return what is known of an adapter that cannot be read; the reason is printed on standard error."""
    rows = [("refused", one.what)]
    if one.base or one.task_type:
        rows.append(("base", ", ".join(filter(None, (one.base or "not named", one.task_type)))))
    if one.file is not None:
        held = "which cannot be read"
        if one.tensors is not None:
            held = f"{one.tensors:,} tensors, {one.numbers:,} numbers in {', '.join(one.dtypes) or 'none'}"
        rows.append(("file", f"{one.file}, {held}"))
    for number, (part, count) in enumerate(one.parts.items()):
        rows.append(("" if number else "modules", f"{part}: {count}" if part else str(count)))
    return Group(make_text(one.source, "bold"), make_facts(rows))
