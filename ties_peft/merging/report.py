"""The report of a merge: numbers that print as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ..errors import some
from .tables import Printed, make_facts, make_table, make_text, number_column

COSINE_WIDTH = 6  # columns of text for one cosine and the blank before it
LISTED_PAIRS = 5  # pairs that are shown from each end of the order
LISTED_RANKS = 3  # of one adapter, that are shown one by one
CONVERTED = "average"  # the method by which `convert` merges one adapter: nothing is averaged

OUTCOMES = {
    "identical": "kept, the same in",
    "only": "kept, held by",
    "kept": "kept from",
    "average": "the weighted mean of",
    "merged": "merged as task vectors of",
    "unchanged": "left out, unchanged in",
    "left out": "left out, held by",
}
EVALUATE = "ties-peft evaluate ADAPTERS merged --bare --task FILE.yaml"  # measures a merge; capitals stand for names
FORMS = {"tokens": "trained tokens of ", "base": "the base's own under "}


@dataclass(frozen=True)
class AdapterLine:
    """One input.

    Attributes:
        name, digest, weight: which, and how much of it.
        modules: how many it adapts.
        ranks: the ranks that occur in it.
        norm: Frobenius norm of its unweighted task vector.
        kept, entries: how many entries the trim kept, of how many; 0 of 0 where nothing is trimmed.
        projection: ⟨τ, τᵢ⟩/‖τᵢ‖², with τ the merged task vector as written and τᵢ this adapter's, unweighted. It is 1
            if all of τᵢ is in the result, and 0 if nothing is.
        cosine: ⟨τ, τᵢ⟩/(‖τ‖·‖τᵢ‖).
        others: ‖τ − projection·τᵢ‖/‖τᵢ‖, the norm of what is not this adapter's, relative to its own norm.
            These three are None if a norm of 0 leaves them undefined.
        page: its address on the Hub; None for an adapter on this machine.
        base: the base model's name in its config; None for none.
    """

    name: str
    digest: str
    weight: float
    modules: int
    ranks: tuple[int, ...]
    norm: float
    kept: int
    entries: int
    projection: float | None
    cosine: float | None
    others: float | None
    page: str | None = None
    base: str | None = None


@dataclass(frozen=True)
class ModuleLine:
    """One module of the result.

    Attributes:
        name, shape: which.
        adapters: how many of the inputs have it.
        rank: Σrᵢ of those.
        norm: Frobenius norm of the merged task vector, scaled, before truncation.
        energy: share of its square that the output's rank keeps, in [0, 1].
        conflict: of the entries that two adapters or more keep, the share whose signs differ; None if the method does
            not elect signs.
    """

    name: str
    shape: tuple[int, ...]
    adapters: int
    rank: int
    norm: float
    energy: float
    conflict: float | None


@dataclass(frozen=True)
class ExtraTensorLine:
    """One layer that an adapter stores as a whole, and what became of it.

    Attributes:
        module: its path in the base model.
        form: layer, plain, bias, base or tokens; see `adapters.extra_tensors`.
        tensors: the name and shape of each of its tensors.
        fate: identical, only, kept, average, merged, unchanged or left out.
        adapters: whose values the result has; if the layer is left out, who has it.
    """

    module: str
    form: str
    tensors: list[str]
    fate: str
    adapters: list[str]


def describe_outcomes(lines: Sequence[ExtraTensorLine]) -> list[str]:
    """Return what became of the layers stored as a whole, one line for all with the same outcome."""
    groups: dict[tuple[str, str], list[ExtraTensorLine]] = {}
    for line in lines:
        groups.setdefault((line.fate, some(line.adapters, 8)), []).append(line)
    return [f"{_layers(own)}: {OUTCOMES[fate]} {names}" for (fate, names), own in groups.items()]


def _layers(lines: Sequence[ExtraTensorLine]) -> str:
    """Return the names of some layers and the number of biases."""
    biases = sum(line.form == "bias" for line in lines)
    named = [f"{FORMS.get(line.form, '')}{line.module}" for line in lines if line.form != "bias"]
    counted = f"{biases} bias{'es' * (biases != 1)}" if biases else ""
    return ", ".join(filter(None, (some(named), counted)))


@dataclass(frozen=True, repr=False)
class Report(Printed):
    """The adapters, the result and what was lost.

    Attributes:
        method, space: of the merge.
        chosen: why the default, `auto`, chose the method; empty if it was named.
        kind: the PEFT type of the adapters.
        scale: λ.
        formula: gives λ from the number of adapters; None if λ is a number.
        rank: of the output; None if it has none.
        dtype: of the tensors written.
        rounding: ‖written − computed‖ / ‖computed‖, the error of that dtype.
        energy: share of the merged squared norm that the rank keeps, over all modules.
        norm: Frobenius norm of the merged task vector, before the rank cuts it.
        conflict: as in a module's line, over all modules.
        cosines: between the adapters' task vectors, (N, N); None for very many adapters.
        adapters, modules: a line for each.
        warnings: also the notes of the recipe.
        copied: tokenizer files that are equal beside all adapters and are copied to the result.
        riders: a line for each layer that an adapter stores as a whole (heads, embeddings, biases).
        weights: `given`, or `norm` if they bring all adapters to one norm.
        seconds: how long the merge took.
        loops: what ran the inner loops, torch or a compiler; the numbers agree within float32.
        task_type: of the result, or why it is left out.
        licence: of the result's card, taken from the adapters' cards.
        licence_note: the licence as text, or why none is taken.
        causal_lm: whether the adapters are those of a causal language model.
    """

    method: str
    space: str
    kind: str
    scale: float
    rank: int | None
    dtype: str
    rounding: float
    energy: float
    norm: float
    conflict: float | None
    cosines: list[list[float]] | None
    adapters: list[AdapterLine]
    modules: list[ModuleLine]
    warnings: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    riders: list[ExtraTensorLine] = field(default_factory=list)
    weights: str = "given"
    formula: str | None = None
    seconds: float = 0.0
    loops: str = "torch"
    task_type: str = ""
    licence: dict[str, Any] = field(default_factory=dict)
    licence_note: str = ""
    chosen: str = ""
    causal_lm: bool = False

    @property
    def remarks(self) -> list[str]:
        """What is said below the tables, and is no warning."""
        if len(self.adapters) == 1:
            return [] if self.method == CONVERTED else ["There is only one adapter, and nothing to merge it with."]
        if not self.causal_lm:
            return []
        found = [f"The projections are not a measure of accuracy; measure it: {EVALUATE}"]
        if self.method == "ties":
            found.append(
                "On six adapters of the project's language model the default method, auto, kept more accuracy than ties: "
                "docs/measurements.md."
            )
        return found

    @property
    def scale_text(self) -> str:
        """λ and its formula, as text."""
        if self.formula is None:
            return f"{self.scale:g}"
        count = len(self.adapters)
        return f"{self.scale:.3g} = {self.formula.strip()} for {count} adapter{'s' * (count != 1)}"

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values, except the time, which differs between runs."""
        values = asdict(self)
        del values["seconds"]
        return values

    def tables(self) -> RenderableType:
        """Return the adapters and the result as tables, without the warnings."""
        count = len(self.adapters)
        several = [Cosines([line.name for line in self.adapters], self.cosines)] if self.cosines and count > 2 else []
        below = [Text(), *map(make_text, self.remarks)] if self.remarks else []
        return Group(self._inputs(), Text(), *several, *([Text()] if several else []), self._outcome(), *below)

    def _inputs(self) -> Table:
        shares = [_share(line.kept, line.entries) for line in self.adapters]
        mixed = len(set(shares)) > 1
        numbers = ("weight", "modules", "rank", "norm", *(["trim keeps"] if mixed else []), "projection")
        return make_table(
            [Column("", no_wrap=True), Column("adapter", overflow="fold"), *map(number_column, numbers)],
            [
                (
                    str(number),
                    line.name,
                    f"{float(f'{line.weight:.3g}'):g}",
                    str(line.modules),
                    shown_ranks(line.ranks) if self.rank is not None else "–",
                    f"{line.norm:.3g}",
                    *([share] if mixed else []),
                    figure(line.projection),
                )
                for number, (line, share) in enumerate(zip(self.adapters, shares, strict=True), start=1)
            ],
            title=f"{len(self.adapters)} {self.kind} adapter{'s' * (len(self.adapters) != 1)}",
        )

    def _outcome(self) -> Table:
        rows = [("merged", f"{self.method} in space {self.space}, scale {self.scale_text}")]
        if len(self.adapters) == 1 and self.method == CONVERTED:
            rows = [("converted", f"one adapter, scale {self.scale_text}")]
        if self.chosen:
            rows.append(("method", f"{self.method}, chosen by auto because {self.chosen}"))
        if self.weights == "norm":
            rows.append(("weights", "norm: the mean of the adapters' norms, divided by each one's own"))
        rows.append(("modules", self._modules_text()))
        if self.cosines is not None and len(self.adapters) == 2:
            rows.append(("cosine", f"{_cosine(self.cosines[1][0])} between the two task vectors"))
        trimmed = {_share(line.kept, line.entries) for line in self.adapters}
        if len(trimmed) == 1 and trimmed != {"all"}:
            rows.append(("trim", f"keeps {trimmed.pop()} of the entries of each task vector"))
        rows.append(("projection", "share of each adapter's own task vector in the result: 1 is all of it, 0 nothing"))
        if self.conflict is not None:
            rows.append(("sign conflict", f"{self.conflict:.1%} of the entries that two or more adapters keep"))
        if self.rank is not None:
            worst = min(self.modules, key=lambda line: line.energy)
            note = "" if worst.energy > 0.9995 else f" (least: {worst.energy:.1%} in {worst.name})"
            rows.append(
                (
                    "rank",
                    f"{self.rank}, which keeps {self.energy:.1%} of the energy, the square of the norm above{note}",
                )
            )
        rows += [("" if i else "whole layers", text) for i, text in enumerate(describe_outcomes(self.riders))]
        rows += [("task type", self.task_type)] if self.task_type else []
        rows += [("licence", self.licence_note)] if self.licence_note else []
        rounding = f", rounding {self.rounding:.1e}" if self.rounding else ""
        rows.append(("written as", f"{self.dtype}{rounding}"))
        rows += [("copied files", ", ".join(self.copied))] if self.copied else []
        rows.append(("time", f"{self.seconds:.1f} s, inner loops by {self.loops}"))
        return make_facts(rows)

    def _modules_text(self) -> str:
        """Return the number of modules, how many of them the adapters share, and the norm."""
        shared = sum(line.adapters == len(self.adapters) for line in self.modules)
        alone = sum(line.adapters == 1 for line in self.modules)
        sharing = "" if shared == len(self.modules) else f" ({shared} in all adapters, {alone} in one alone)"
        return (
            f"{len(self.modules)}{sharing}, norm {self.norm:.3g}{'' if self.rank is None else ' before the rank cut'}"
        )


@dataclass(frozen=True)
class Cosines:
    """The cosines between the task vectors, as a table that fits the console.

    If a triangle of all pairs is too wide, the largest and the smallest cosines are listed.

    Attributes:
        names: of the adapters, in their order.
        values: the cosine of each pair, (N, N).
    """

    names: Sequence[str]
    values: Sequence[Sequence[float]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        room = options.max_width - COSINE_WIDTH * (len(self.names) - 1)
        yield self._triangle(room) if room >= len("cosine ") else self._extremes(options.max_width)

    def _triangle(self, room: int) -> Table:
        """Return a row for each adapter but the first and a column for each but the last.

        Args:
            room: how many columns of text are left for the adapters' names.
        """
        count = len(self.names)
        names = Column("cosine", width=min(room, max(map(cell_len, self.names)) + 5), no_wrap=True, overflow="ellipsis")
        numbers = [Column(str(number), justify="right", width=COSINE_WIDTH, no_wrap=True) for number in range(1, count)]
        rows = [
            (f"{place + 1:<3}{self.names[place]}", *(_cosine(value) for value in self.values[place][:place]))
            for place in range(1, count)
        ]
        return make_table([names, *numbers], rows, padding=0, header_style="", pad_edge=True)

    def _extremes(self, width: int) -> RenderableType:
        """Return the pairs with the largest and the smallest cosines, one a line."""
        pairs = [(self.values[i][j], j, i) for i in range(len(self.names)) for j in range(i)]
        pairs.sort(key=lambda pair: -pair[0])
        lines = [
            f"cosine of {len(pairs)} pairs: the {LISTED_PAIRS} largest and the {LISTED_PAIRS} smallest (--json has all)"
        ]
        for value, first, second in (*pairs[:LISTED_PAIRS], *pairs[-LISTED_PAIRS:]):
            numbers = f"{_cosine(value):>5}  {first + 1} and {second + 1}"
            names = f"{self.names[first]}, {self.names[second]}"
            lines.append(numbers + (f"  {names}" if cell_len(numbers + names) + 2 <= width else ""))
        return Group(*map(make_text, lines))


def _cosine(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")


def shown_ranks(ranks: Sequence[int]) -> str:
    """Return some ranks, sorted; of many the least and the largest."""
    return ", ".join(map(str, ranks)) if len(ranks) <= LISTED_RANKS else f"{ranks[0]}–{ranks[-1]}"


def figure(value: float | None) -> str:
    """Return a figure of an adapter's retention as text; a dash where it is undefined."""
    return "–" if value is None else f"{value:.3f}"


def _share(part: int, whole: int) -> str:
    return "all" if part == whole else f"{part / whole:.1%}"
