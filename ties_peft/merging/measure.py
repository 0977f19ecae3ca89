"""Account: the sums that a merge keeps while it runs, and the report that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from ..adapters.sources import hub_url
from ..adapters.tensors import MemoryTensors
from ..adapters.types import ModuleInfo
from ..errors import printable_lines
from ..spaces import Encoding
from ..task_vectors.delta import Delta, distance, inner, inner_with_each
from ..task_vectors.factorise import MAX_GRAM_SIDE, Factors
from ..task_vectors.kernels.backends import Loops
from ..task_vectors.subspace import SQUARE
from .encoding import Coordinates
from .members import unequal_norms
from .options import NORM
from .plan import Plan
from .report import AdapterLine, ModuleLine, Report, figure
from .thresholds import Kept, trimmed_apart

PAIRS = 64  # up to so many adapters every pair's cosine is computed
LEFT = 0.34  # a projection under this: little is left of an adapter; chosen by benchmarks/retention.py
ALIKE = 0.97  # a cosine above this: two adapters that say the same
LITTLE = 0.5  # energy kept under this deserves a word
VISIBLE = 1e-3  # energy lost of a flat spectrum that deserves a word
EQUAL = 1e-5  # relative difference of two singular values under which they are one, to float32's rounding
TIED = 0.01  # energy lost among equal singular values that deserves a word; less happens by chance


@dataclass(frozen=True)
class Record:
    """What one module adds to the sums.

    Attributes:
        line: of the report.
        places: of the adapters that have it; those with a weight of 0 on it come last.
        products: ⟨τᵢ, τⱼ⟩ of their unweighted task vectors; beyond `PAIRS` adapters only those with i = j.
        overlaps: ⟨τ, τᵢ⟩, with τ the merged task vector as it is written.
        square: ‖τ‖².
        kept, total: see `Factors`.
        lost: ‖written − computed‖².
        tied: the energy that the rank cut off, where it cut through equal singular values; else 0.
        conflicting, shared: entries with both signs, and entries that two or more keep.
        lost_energy: the share of the task vectors' energy that the space's coordinates had no room for.
    """

    line: ModuleLine
    places: Sequence[int]
    products: Sequence[Mapping[int, float]]
    overlaps: Sequence[float]
    square: float
    kept: float
    total: float
    lost: float
    tied: float
    conflicting: int
    shared: int
    lost_energy: float


def record(
    coordinates: Coordinates,
    module: ModuleInfo,
    encoding: Encoding | None,
    factors: Factors,
    written: Mapping[str, Tensor],
    counts: Mapping[str, int],
) -> Record:
    """What became of one module; `encoding` is None where nobody has a weight on it."""
    plan = coordinates.plan
    holders, silent = plan.holders(module.name), plan.silent(module.name)
    conflicting, shared = counts.get("conflicting"), counts.get("shared", 0)
    merged = plan.kind.read(plan.kind.written(module, plan.rank or 1), MemoryTensors(written), None)
    lost = 0.0
    if plan.dtype != torch.float32:
        lost = distance(merged, factors.delta.to(torch.device("cpu"))) ** 2
    readers: list[Callable[[], Delta]] = []
    if encoding is not None:
        readers += [partial(encoding.deltas.__getitem__, i) for i in range(len(holders))]
    readers += [partial(coordinates.delta, place, module.name) for place, _ in silent]
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
    tied = factors.total - factors.kept if factors.edge >= 1 - EQUAL else 0.0
    return Record(
        line=line,
        places=[place for place, _ in (*holders, *silent)],
        products=_products(encoding, readers, len(holders), len(plan.members) <= PAIRS),
        overlaps=overlaps,
        square=square,
        kept=factors.kept,
        total=factors.total,
        lost=lost,
        tied=tied,
        conflicting=conflicting or 0,
        shared=shared,
        lost_energy=0.0 if encoding is None else encoding.lost_energy,
    )


def _products(
    encoding: Encoding | None, readers: Sequence[Callable[[], Delta]], encoded: int, pairs: bool
) -> list[Mapping[int, float]]:
    """⟨τᵢ, τⱼ⟩ for j ≤ i, or for j = i alone: of those encoded by their encoding, of the others from what is read."""
    found: list[Mapping[int, float]] = []
    if encoding is not None and pairs:
        found += [dict(enumerate(row[: i + 1])) for i, row in enumerate(encoding.products[:encoded].tolist())]
    elif encoding is not None:
        found += [{i: square} for i, square in enumerate(encoding.squares()[:encoded])]
    for i in range(encoded, len(readers)):
        found.append({j: inner(readers[i](), readers[j]()) for j in (range(i + 1) if pairs else (i,))})
    return found


class Account:
    """What is added up, module by module."""

    def __init__(self, plan: Plan, loops: Loops | None = None) -> None:
        self.loops = loops
        count = len(plan.members)
        self.plan = plan
        self.squares = [0.0] * count
        self.products = [[0.0] * count for _ in range(count)] if count <= PAIRS else None
        self.overlaps = [0.0] * count
        self.lines: list[ModuleLine] = []
        self.kept = self.total = self.lost = self.tied = self.written = 0.0
        self.conflicting = self.shared = 0
        self.lost_energy: dict[str, float] = {}

    def add(self, record: Record) -> None:
        """Take in one module; in the order of the modules, so that the sums have the same bits in any division."""
        for i, first in enumerate(record.places):
            self.squares[first] += record.products[i][i]
            self.overlaps[first] += record.overlaps[i]
            for j in range(i) if self.products is not None else ():
                low, high = sorted((first, record.places[j]))
                self.products[high][low] += record.products[i][j]  # type: ignore[index]
        self.written += record.square
        self.kept += record.kept
        self.total += record.total
        self.lost += record.lost
        self.tied += record.tied
        self.conflicting += record.conflicting
        self.shared += record.shared
        self.lines.append(record.line)
        if record.lost_energy:
            self.lost_energy[record.line.name] = record.lost_energy

    def report(self, kept: Sequence[Kept], seconds: float) -> Report:
        """The report, at the end."""
        plan = self.plan
        cosines = self._cosines()
        inputs = [
            AdapterLine(
                name=member.name,
                digest=member.adapter.digest,
                weight=plan.mean_weight(place),
                modules=len(member.adapter.layout),
                ranks=member.adapter.ranks,
                norm=math.sqrt(self.squares[place]),
                kept=kept[place].kept,
                entries=kept[place].entries,
                **retention(self.overlaps[place], self.squares[place], self.written),
                page=hub_url(member.adapter.source),
                base=member.adapter.base_name,
            )
            for place, member in enumerate(plan.members)
        ]
        energy = _share(self.kept, self.total) if self.total else 1.0
        return Report(
            method="+".join(stage.name for stage in plan.stages.all),
            space=plan.space.name,
            kind=plan.title,
            scale=plan.scale,
            rank=plan.rank,
            dtype=str(plan.dtype).removeprefix("torch."),
            rounding=math.sqrt(self.lost / self.kept) if self.kept else 0.0,
            energy=energy,
            norm=math.sqrt(self.total),
            conflict=None
            if all(line.conflict is None for line in self.lines)
            else _share(self.conflicting, self.shared),
            cosines=cosines,
            adapters=inputs,
            modules=self.lines,
            warnings=[printable_lines(w) for w in (*plan.warnings, *self._warnings(inputs, cosines, energy))],
            riders=plan.heads.lines(),
            task_type=plan.task.said,
            weights=plan.weighting,
            formula=plan.formula,
            seconds=seconds,
            loops=self.loops.name if self.loops is not None else "torch",
        )

    def _cosines(self) -> list[list[float]] | None:
        if self.products is None:
            return None
        count = len(self.squares)
        table = [[1.0] * count for _ in range(count)]
        for i in range(count):
            for j in range(i):
                norms = math.sqrt(self.squares[i] * self.squares[j])
                table[i][j] = table[j][i] = self.products[i][j] / norms if norms else 0.0
        return table

    def _warnings(self, inputs: Sequence[AdapterLine], cosines: list[list[float]] | None, energy: float) -> list[str]:
        found, plan = [], self.plan
        apart = trimmed_apart(plan)
        if apart:
            found.append(f"trimmed on its own, being as large as the vocabulary: {', '.join(apart)}.")
        if self.lost_energy:
            worst = max(self.lost_energy, key=self.lost_energy.__getitem__)
            found.append(
                f"of a side longer than {SQUARE} space '{plan.arithmetic.name}' keeps the {MAX_GRAM_SIDE} leading directions, and on "
                f"{len(self.lost_energy)} module(s) the adapters have more: up to {self.lost_energy[worst]:.2%} of their energy "
                f"({worst}) has no place there. Space 'delta' has no such limit."
            )
        empty = [line.name for line in inputs if line.entries and line.kept == 0]
        if empty:
            found.append(f"the density keeps no entry at all of {', '.join(empty)}.")
        silent = [line.name for line in inputs if not line.norm]
        if silent:
            found.append(
                f"the task vector of {', '.join(silent)} is 0 everywhere and has nothing to add. Leave it out."
            )
        found += unequal_norms({line.name: line.norm * abs(line.weight) for line in inputs}, weighted=True)
        found += little_left(inputs, plan)
        for i in range(len(inputs)):
            twins = [inputs[j].name for j in range(i) if cosines is not None and cosines[i][j] > ALIKE]
            if twins:
                found.append(f"{inputs[i].name} is nearly the same as {', '.join(twins)} (cosine over {ALIKE}).")
        return found + self._cut(energy)

    def _cut(self, energy: float) -> list[str]:
        """Say where the rank leaves out what counts as much as what it keeps."""
        rank, most = self.plan.rank, max(min(line.rank, *line.shape) for line in self.lines)
        flat = [stage.name for stage in self.plan.stages.all if stage.has_flat_spectrum()]
        if flat and 1 - energy > VISIBLE:
            return [
                f"rank {rank} cuts the flat spectrum that '{flat[-1]}' makes: {1 - energy:.1%} of the merged energy is "
                f"lost, in directions that count as much as those that are kept. Give rank {most}, the sum of the "
                "adapters' ranks, or a method whose spectrum falls, such as tsv."
            ]
        if self.tied > TIED * self.total:
            return [
                f"rank {rank} cuts through equal singular values, so that which directions stay is arbitrary: "
                f"{self.tied / self.total:.1%} of the merged energy is lost that way. Give a larger rank, up to {most}."
            ]
        if energy < LITTLE:
            return [f"rank {rank} keeps {energy:.0%} of the merged energy; a larger rank keeps more."]
        return []


def little_left(inputs: Sequence[AdapterLine], plan: Plan) -> list[str]:
    """Return a warning if the result holds little of some adapters; of one alone the energy tells."""
    lost = [
        line
        for line in inputs
        if line.projection is not None
        and line.projection < LEFT
        and line.weight > 0
        and (line.kept or not line.entries)
    ]
    if not lost or len(inputs) < 2:
        return []
    lost.sort(key=lambda line: line.projection or 0)
    shown = ", ".join(f"{line.name} ({figure(line.projection)})" for line in lost[:8])
    more = f" and {len(lost) - 8} more" if len(lost) > 8 else ""
    even = "" if plan.weighting == NORM else ' (--weights norm, weights="norm", brings all to one length)'
    if len(lost) == len(inputs):
        advice = f"Raise the scale, which is {plan.scale:g}."
    elif plan.method.linear(len(inputs)):
        advice = f"Raise its weight{even}, or the scale, which is {plan.scale:g}."
    else:
        advice = f"Use a method that adds, such as task_arithmetic, or raise its weight{even}."
    return [
        f"little is left of {shown}{more}: in brackets the projection, the share of its task vector that the result holds; "
        f"under {LEFT} an adapter has likely lost half of what it had learnt. {advice}"
    ]


def retention(overlap: float, own: float, merged: float) -> dict[str, float | None]:
    """Return how much of one adapter is in the merged one; None for what a norm of 0 leaves undefined.

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
