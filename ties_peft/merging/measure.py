"""Measure the merged modules and add up what the report states."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from ..adapters.sources import hub_url
from ..adapters.tensors import MemoryTensors
from ..adapters.types import ModuleInfo
from ..errors import printable_lines
from ..spaces import Encoding
from ..task_vectors.delta import Delta, distance, inner, inner_with_each
from ..task_vectors.factorise import MAX_GRAM_SIDE, Factors
from ..task_vectors.subspace import SQUARE
from .encoding import EncodedModules
from .members import unequal_norms
from .options import NORM
from .plan import Plan
from .report import AdapterLine, ModuleLine, Report, figure
from .thresholds import KeptCount, vocabulary_modules

MAX_PAIRED = 64  # adapters for which the cosine of every pair is computed
LOW_PROJECTION = 0.34  # a smaller one is warned of; chosen by benchmarks/retention.py, on a sentence encoder
SAME_COSINE = 0.97  # above it two adapters are nearly the same
LOW_ENERGY = 0.5  # less energy kept is warned of
FLAT_LOSS = 1e-3  # more energy lost from a flat spectrum is warned of
EQUAL = 1e-5  # two singular values that differ by less, relatively, are equal to float32's rounding
TIED_LOSS = 0.01  # more energy lost among equal singular values is warned of; less happens by chance


@dataclass(frozen=True)
class ModuleMeasurement:
    """The measurements of one merged module, and what it adds to the sums of the report.

    Attributes:
        line: of the report.
        places: of the adapters that have the module; those with weight 0 on it come last.
        products: ⟨τᵢ, τⱼ⟩ of their unweighted task vectors; for more than `MAX_PAIRED` adapters only those with i = j.
        overlaps: ⟨τ, τᵢ⟩, with τ the merged task vector as it is written.
        square: ‖τ‖².
        kept, total: see `Factors`.
        rounding: ‖written − computed‖².
        tied: the energy that the rank cut off if it cut through equal singular values, else 0.
        conflicting, shared: how many entries have both signs, and how many are kept of two adapters or more.
        lost_energy: the share of the task vectors' energy that does not fit the coordinates of the space.
    """

    line: ModuleLine
    places: Sequence[int]
    products: Sequence[Mapping[int, float]]
    overlaps: Sequence[float]
    square: float
    kept: float
    total: float
    rounding: float
    tied: float
    conflicting: int
    shared: int
    lost_energy: float


def measure_module(
    modules: EncodedModules,
    module: ModuleInfo,
    factors: Factors,
    written: Mapping[str, Tensor],
    counts: Mapping[str, int],
) -> ModuleMeasurement:
    """Measure the merged task vector of one module.

    Args:
        modules: the encoded task vectors.
        module: that was merged.
        factors: its merged task vector.
        written: the tensors that hold it in the result.
        counts: what the method counted.
    """
    plan = modules.plan
    holders, unused = plan.holders(module.name), plan.holders_of_weight_zero(module.name)
    encoding = modules.encoding(module.name) if holders else None
    conflicting, shared = counts.get("conflicting"), counts.get("shared", 0)
    merged = read_merged(plan, module, MemoryTensors(written))
    rounding = 0.0
    if plan.dtype != torch.float32:
        rounding = distance(merged, factors.delta.to(torch.device("cpu"))) ** 2
    readers: list[Callable[[], Delta]] = []
    if encoding is not None:
        readers += [partial(encoding.deltas.__getitem__, i) for i in range(len(holders))]
    readers += [partial(modules.read, place, module.name) for place, _ in unused]
    merged = merged.to(plan.device)
    square, *overlaps = inner_with_each(merged, chain([merged], (read() for read in readers)))
    line = ModuleLine(
        name=module.name,
        shape=module.shape,
        adapters=len(holders),
        rank=sum(member.adapter.layout[module.name].rank for _, member in holders),
        norm=math.sqrt(factors.total),
        energy=factors.energy,
        conflict=None if conflicting is None else _share(conflicting, shared),
    )
    return ModuleMeasurement(
        line=line,
        places=[place for place, _ in (*holders, *unused)],
        products=_products(encoding, readers, len(holders), len(plan.members) <= MAX_PAIRED),
        overlaps=overlaps,
        square=square,
        kept=factors.kept,
        total=factors.total,
        rounding=rounding,
        tied=factors.total - factors.kept if factors.edge >= 1 - EQUAL else 0.0,
        conflicting=conflicting or 0,
        shared=shared,
        lost_energy=0.0 if encoding is None else encoding.lost_energy,
    )


def read_merged(plan: Plan, module: ModuleInfo, tensors: MemoryTensors) -> Delta:
    """Return the merged task vector of one module from the tensors of the result."""
    return plan.peft_type.read(plan.peft_type.written(module, plan.rank or 1), tensors, None)


def _products(
    encoding: Encoding | None, readers: Sequence[Callable[[], Delta]], encoded: int, pairs: bool
) -> list[Mapping[int, float]]:
    """Return ⟨τᵢ, τⱼ⟩ for j ≤ i, or for j = i alone.

    Args:
        encoding: computes those of the first task vectors.
        readers: read the task vectors.
        encoded: how many are encoded.
        pairs: whether those with j < i are wanted.
    """
    found: list[Mapping[int, float]] = []
    if encoding is not None and pairs:
        found += [dict(enumerate(row[: i + 1])) for i, row in enumerate(encoding.products[:encoded].tolist())]
    elif encoding is not None:
        found += [{i: square} for i, square in enumerate(encoding.squares()[:encoded])]
    for i in range(encoded, len(readers)):
        found.append({j: inner(readers[i](), readers[j]()) for j in (range(i + 1) if pairs else (i,))})
    return found


class Totals:
    """Sums over the modules of a merge, and the report that they make.

    Args:
        plan: the merge.
        kernels: the name of those that were used.
    """

    def __init__(self, plan: Plan, kernels: str) -> None:
        self.plan = plan
        self.kernels = kernels
        self.modules: list[ModuleMeasurement] = []
        count = len(plan.members)
        self.squares = [0.0] * count
        self.overlaps = [0.0] * count
        self.products = [[0.0] * count for _ in range(count)] if count <= MAX_PAIRED else None

    def add(self, module: ModuleMeasurement) -> None:
        """Add one module; always in the modules' order, so that any division of the work gives the same bits."""
        self.modules.append(module)
        for i, first in enumerate(module.places):
            self.squares[first] += module.products[i][i]
            self.overlaps[first] += module.overlaps[i]
            for j in range(i) if self.products is not None else ():
                low, high = sorted((first, module.places[j]))
                self.products[high][low] += module.products[i][j]  # type: ignore[index]

    def report(self, kept: Sequence[KeptCount], seconds: float) -> Report:
        """Return the report.

        Args:
            kept: what each adapter's trim keeps.
            seconds: that the merge took.
        """
        plan, modules, adapters = self.plan, self.modules, self._adapter_lines(kept)
        energy_kept, total = sum(m.kept for m in modules), sum(m.total for m in modules)
        energy, cosines = _share(energy_kept, total) if total else 1.0, self._cosines()
        counted = any(module.line.conflict is not None for module in modules)
        return Report(
            method="+".join(stage.name for stage in plan.stages.all),
            space=plan.space.name,
            kind=plan.title,
            scale=plan.scale,
            rank=plan.rank,
            dtype=str(plan.dtype).removeprefix("torch."),
            rounding=math.sqrt(sum(m.rounding for m in modules) / energy_kept) if energy_kept else 0.0,
            energy=energy,
            norm=math.sqrt(total),
            conflict=_share(sum(m.conflicting for m in modules), sum(m.shared for m in modules)) if counted else None,
            cosines=cosines,
            adapters=adapters,
            modules=[module.line for module in modules],
            # Escaped here too, because users print the list themselves.
            warnings=[printable_lines(w) for w in (*plan.warnings, *self._warnings(adapters, cosines, energy))],
            riders=plan.extra_tensors.lines(),
            task_type=plan.task_type.said,
            weights=plan.weighting,
            chosen=plan.chosen,
            formula=plan.formula,
            seconds=seconds,
            loops=self.kernels,
        )

    def _adapter_lines(self, kept: Sequence[KeptCount]) -> list[AdapterLine]:
        square = sum(module.square for module in self.modules)
        return [
            AdapterLine(
                name=member.name,
                digest=member.adapter.digest,
                weight=self.plan.mean_weight(place),
                modules=len(member.adapter.layout),
                ranks=member.adapter.ranks,
                norm=math.sqrt(self.squares[place]),
                kept=kept[place].kept,
                entries=kept[place].entries,
                **retention(self.overlaps[place], self.squares[place], square),
                page=hub_url(member.adapter.source),
                base=member.adapter.base_name,
            )
            for place, member in enumerate(self.plan.members)
        ]

    def _cosines(self) -> list[list[float]] | None:
        if self.products is None:
            return None
        norms = np.sqrt(np.outer(self.squares, self.squares))
        cosines = np.divide(np.tril(self.products, -1), norms, out=np.zeros_like(norms), where=norms > 0)
        table: list[list[float]] = (cosines + cosines.T + np.eye(len(norms))).tolist()
        return table

    def _warnings(
        self, adapters: Sequence[AdapterLine], cosines: list[list[float]] | None, energy: float
    ) -> Iterator[str]:
        separate = vocabulary_modules(self.plan)
        if separate:
            yield f"trimmed separately, because they are as large as the vocabulary: {', '.join(separate)}."
        cramped = [module for module in self.modules if module.lost_energy]
        if cramped:
            worst = max(cramped, key=lambda module: module.lost_energy)
            yield (
                f"space '{self.plan.arithmetic.name}' keeps the {MAX_GRAM_SIDE} leading directions of a side longer than "
                f"{SQUARE}; on {len(cramped)} module(s) the adapters have more, and up to {worst.lost_energy:.2%} of their "
                f"energy ({worst.line.name}) is lost. Space 'delta' has no such limit."
            )
        empty = [line.name for line in adapters if line.entries and line.kept == 0]
        if empty:
            yield f"the density keeps no entry at all of {', '.join(empty)}. Raise it."
        zero = [line.name for line in adapters if not line.norm]
        if zero:
            yield f"the task vector of {', '.join(zero)} is 0 everywhere and adds nothing. Leave it out."
        norms = {line.name: line.norm * abs(line.weight) for line in adapters}
        yield from unequal_norms(norms, weighted=True, elects=self._elects_signs())
        yield from warn_low_retention(adapters, self.plan)
        for i, line in enumerate(adapters):
            same = [adapters[j].name for j in range(i) if cosines is not None and cosines[i][j] > SAME_COSINE]
            if same:
                yield f"{line.name} is nearly the same as {', '.join(same)} (cosine over {SAME_COSINE})."
        yield from self._warn_low_rank(energy)

    def _elects_signs(self) -> bool:
        """Return whether the method elects signs; one that counts those that differ may still take both."""
        counted = any(module.line.conflict is not None for module in self.modules)
        given = (getattr(self.plan.method, name, None) for name in ("elect", "disjoint"))
        return counted and not {"none", "mean_all"} & {rule for rule in given if isinstance(rule, str)}

    def _warn_low_rank(self, energy: float) -> Iterator[str]:
        """Warn if the rank cuts off directions that count as much as those it keeps, or more than half of the energy."""
        rank, most = self.plan.rank, max(min(module.line.rank, *module.line.shape) for module in self.modules)
        flat = [stage.name for stage in self.plan.stages.all if stage.has_flat_spectrum()]
        tied, total = sum(module.tied for module in self.modules), sum(module.total for module in self.modules)
        if flat and 1 - energy > FLAT_LOSS:
            yield (
                f"rank {rank} cuts the flat spectrum that '{flat[-1]}' makes: {1 - energy:.1%} of the merged energy is "
                f"lost, in directions that count as much as those that are kept. Give rank {most}, the sum of the "
                "adapters' ranks, or a method whose spectrum falls, such as tsv."
            )
        elif tied > TIED_LOSS * total:
            yield (
                f"rank {rank} cuts through equal singular values, so which directions are kept is arbitrary: "
                f"{tied / total:.1%} of the merged energy is lost that way. Give a larger rank, up to {most}."
            )
        elif energy < LOW_ENERGY:
            yield f"rank {rank} keeps {energy:.0%} of the merged energy. A larger rank keeps more."


def warn_low_retention(adapters: Sequence[AdapterLine], plan: Plan) -> list[str]:
    """Return a warning if the result holds little of some adapters; for a single adapter the energy is warned of instead."""
    low = [
        line
        for line in adapters
        if line.projection is not None
        and line.projection < LOW_PROJECTION
        and line.weight > 0
        and (line.kept or not line.entries)
    ]
    if not low or len(adapters) < 2:
        return []
    low.sort(key=lambda line: line.projection or 0)
    shown = ", ".join(f"{line.name} ({figure(line.projection)})" for line in low[:8])
    more = f" and {len(low) - 8} more" if len(low) > 8 else ""
    even = "" if plan.weighting == NORM else ' (--weights norm, weights="norm", brings all to one length)'
    scale = f"the scale, which is {plan.scale:g} (--scale, scale=…)"
    advice = f"Raise {scale}." if len(low) == len(adapters) else f"Raise its weight{even}, or {scale}."
    if not plan.method.linear(len(adapters)):
        rank = "" if plan.rank is None else ', at rank max (--rank max, rank="max")'
        advice += f" Method cat adds the task vectors whole{rank}."
    return [
        f"little is left of {shown}{more}. The number is the projection: the share of the adapter's task vector that the "
        f"result holds. Under {LOW_PROJECTION} most adapters of a sentence encoder had lost over half of their gain in accuracy; "
        f"on a language model it did not predict the accuracy. {advice}"
    ]


def retention(overlap: float, own: float, merged: float) -> dict[str, float | None]:
    """Return how much of one adapter is in the merged one; None where a norm of 0 leaves it undefined.

        projection = ⟨τ, τᵢ⟩ / ‖τᵢ‖²,  cosine = ⟨τ, τᵢ⟩ / (‖τ‖·‖τᵢ‖),  others = ‖τ − projection·τᵢ‖ / ‖τᵢ‖

    Args:
        overlap: ⟨τ, τᵢ⟩, with τ the merged task vector as it is written, τᵢ the adapter's own, unweighted.
        own, merged: ‖τᵢ‖² and ‖τ‖².
    """
    if own <= 0:
        return {"projection": None, "cosine": None, "others": None}
    rest = max(0.0, merged - overlap * (overlap / own))
    cosine = overlap / (math.sqrt(own) * math.sqrt(merged)) if merged > 0 else None
    return {"projection": overlap / own, "cosine": cosine, "others": math.sqrt(rest / own)}


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole else (1.0 if part else 0.0)
