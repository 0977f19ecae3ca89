"""Distilled: the adapter that `distil` makes, with a report on how well it imitates its teachers, and its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..adapters import writer
from ..adapters.adapter import Adapter
from ..adapters.tensors import MemoryTensors
from ..merging.card import (
    PROJECT,
    TYPE_TAGS,
    adapter_link,
    code_block,
    loading_block,
    markdown_list,
    markdown_table,
    model_card,
    public,
    public_text,
)
from ..merging.loading import Loading
from ..merging.merged import versions
from ..merging.recipes.yaml_document import dump
from ..merging.tables import Printed, make_facts, make_table, number_column
from .teachers import MATCHED
from .token_teachers import TOP_K
from .written_rows import WrittenCount

ALL_PROBABILITY = 0.99995  # prints as 100.00%
BASE_KIND = "model"  # stands in place of a PEFT type where the teacher is the base model


@dataclass(frozen=True)
class TeacherResult:
    """How well one teacher is imitated.

    Attributes:
        name, digest: of the adapter.
        kind: its PEFT type, LoRA or (IA)³; `BASE_KIND` for the base model.
        origin: where its rows come from, with the column of a file or a data set.
        rows, held: the number of rows that are fitted, and of held-out rows.
        divergence: KL(teacher ‖ adapter) on the held-out rows in nats, of the start and of the result.
        agreement: the share of predictions there whose likeliest answer is the teacher's, of the start and of the result.
        page: its address on the Hub; None for a local adapter.
        weight: of the teacher in the fit.
        kept_probability: the mean share of its probability that belongs to the answers compared one by one; the others are
            compared as one sum (see `learning.token_teachers`).
        matched: what of the predictions is compared: a key of `learning.teachers.MATCHED`.
        written: how much the rows differ that the adapter wrote; None where it wrote none.
    """

    name: str
    digest: str
    kind: str
    origin: str
    rows: int
    held: int
    divergence: tuple[float, float]
    agreement: tuple[float, float]
    page: str | None = None
    kept_probability: float = 1.0
    weight: float = 1.0
    matched: str = "labels"
    written: WrittenCount | None = None

    @property
    def worse(self) -> list[str]:
        """What is worse of the result than of the start, with both figures; a difference counts where it can be seen in print."""
        pairs = (("KL", "{:.3f}", self.divergence, 1), ("agrees", "{:.1%}", self.agreement, -1))
        return [
            f"{name} {form.format(before)} → {form.format(after)}"
            for name, form, (before, after), sign in pairs
            if sign * after > sign * before and form.format(before) != form.format(after)
        ]


@dataclass(frozen=True, repr=False)
class DistilReport(Printed):
    """What `distil` imitated, and how well.

    Attributes:
        kind, rank: of the result; rank None for (IA)³.
        fit: what was fitted: factors, gains or vectors.
        base: the base model.
        start: how the start was made.
        steps, of: the number of steps taken, and the largest possible one.
        kept: the step whose parameters are the result; 0 for the start.
        rate: the learning rate at the end.
        retries: the number of times that the fit restarted with a lower rate.
        history: (step, divergence on the held-out rows).
        lessons: the result for each teacher.
        warnings: of what is possible but unwise.
        improved: whether the result is better than the start on the held-out rows; if not, it is the start.
        dtype: of the tensors written.
        seconds: that the work took.
        licence, licence_note: as in the report of a merge.
    """

    WIDTH: ClassVar[int] = 110

    kind: str
    rank: int | None
    fit: str
    base: str
    start: str
    steps: int
    of: int
    kept: int
    rate: float
    retries: int
    history: list[tuple[int, float]]
    lessons: list[TeacherResult]
    warnings: list[str]
    improved: bool
    dtype: str
    seconds: float = field(default=0.0)
    licence: dict[str, Any] = field(default_factory=dict)
    licence_note: str = ""

    @property
    def divergence(self) -> tuple[float, float]:
        """The weighted mean divergence over teachers, of the start and of the result."""
        total = sum(line.weight for line in self.lessons)
        before, after = (sum(line.weight * line.divergence[at] for line in self.lessons) / total for at in (0, 1))
        return before, after

    @property
    def adapters(self) -> int:
        """The number of adapters imitated, without the base."""
        return sum(line.kind != BASE_KIND for line in self.lessons)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without the time, which differs from run to run.

        `worse` names the adapters that the result imitates worse than the start does.
        """
        values = asdict(self) | {"worse": [line.name for line in self.lessons if line.worse]}
        del values["seconds"]
        return values

    def tables(self) -> RenderableType:
        """Return the teachers, what was compared and the outcome, without the warnings."""
        return Group(self._teachers(), Text(), self._compared(), Text(), self._outcome())

    def _teachers(self) -> Table:
        numbers = ("rows", "held", "KL start", "result", "agrees start", "result")
        rows = [
            (
                line.name,
                line.kind,
                str(line.rows),
                str(line.held),
                *(f"{value:.3f}" for value in line.divergence),
                *(f"{value:.1%}" for value in line.agreement),
            )
            for line in self.lessons
        ]
        title = f"imitates {self.adapters} adapters, measured on held-out rows"
        return make_table(["adapter", "kind", *map(number_column, numbers)], rows, title)

    def _compared(self) -> Table:
        """Return the legend of the teachers' table, and the rows on which they were compared."""
        tokens = any(line.matched != "labels" for line in self.lessons)
        facts = [
            (
                "held",
                "rows kept out of the training, on which the start and the step are chosen and the figures measured; few rows "
                "give rough figures",
            ),
            ("start, result", "the merge before the training, and the adapter that is written"),
            ("KL", "distance of their predictions from the adapter's, in nats: 0 where they are equal"),
            ("agrees", f"share of their predictions whose likeliest {'token' if tokens else 'label'} is the adapter's"),
            *self._by_teacher("rows from", [line.origin for line in self.lessons]),
            *self._by_teacher("matched", [MATCHED[line.matched] for line in self.lessons]),
        ]
        kept = sum(line.kept_probability for line in self.lessons) / len(self.lessons)
        if kept < ALL_PROBABILITY:
            facts.append(
                (
                    "compared",
                    f"of each prediction the {TOP_K} likeliest tokens one by one, with {kept:.2%} of the probability; the others "
                    "as one sum",
                )
            )
        for line in self.lessons:
            facts += _written_facts(line)
        return make_facts(facts)

    def _by_teacher(self, heading: str, texts: Sequence[str]) -> list[tuple[str, str]]:
        """Return a line for each text with the teachers it belongs to; only the text where all have the same."""
        names = {
            text: [line.name for line, own in zip(self.lessons, texts, strict=True) if own == text] for text in texts
        }
        if len(names) == 1:
            return [(heading, texts[0])]
        lines = [f"{', '.join(own)}: {text}" for text, own in names.items()]
        return [(heading if place == 0 else "", line) for place, line in enumerate(lines)]

    def _outcome(self) -> Table:
        before, after = self.divergence
        rank = "" if self.rank is None else f", rank {self.rank}"
        outcome = (
            f"{before:.4f} → {after:.4f}"
            if self.improved
            else f"{before:.4f}; no step improved it, so the result is the start"
        )
        equal = len({line.weight for line in self.lessons}) == 1
        worse = [f"{line.name}: {', '.join(line.worse)}" for line in self.lessons if line.worse]
        return make_facts(
            [
                ("start", self.start),
                ("fitted", f"{self.fit} of one {self.kind} adapter{rank}"),
                ("steps", f"{self.steps} of {self.of}; the result is of step {self.kept}"),
                *([] if equal else [("weights", ", ".join(f"{line.weight:g}" for line in self.lessons))]),
                ("mean KL" if equal else "mean KL by weight", outcome),
                *(("worse" if place == 0 else "", text) for place, text in enumerate(worse)),
                ("written as", self.dtype),
                ("licence", self.licence_note),
                ("time", f"{self.seconds:.1f} s"),
            ]
        )


def _written_facts(line: TeacherResult) -> list[tuple[str, str]]:
    """Return how much the rows differ that an adapter wrote, and the first of them."""
    if line.written is None:
        return []
    found = line.written
    said = f"{found.rows} rows: {found.distinct} distinct, {found.empty} empty; for example"
    return [(f"{line.name} wrote", said), *(("", f"“{text}”") for text in found.examples)]


class Distilled(Adapter):
    """An adapter made by `distil`.

    Attributes:
        report: which adapters it imitates, and how well; it prints as tables.
        recipe: what was asked for, as plain values.
        loading: the class of the base model, and the lines of Python that load the adapter on it.
    """

    def __init__(
        self,
        config: dict[str, Any],
        tensors: Mapping[str, Tensor],
        report: DistilReport,
        recipe: dict[str, Any],
        loading: Loading,
        inputs: Sequence[Path] = (),
    ) -> None:
        super().__init__(config, MemoryTensors(tensors))
        self.report = report
        self.recipe = recipe
        self.loading = loading
        self._inputs = list(inputs)

    def files(self) -> dict[str, writer.Content]:
        """Return the config, the weights, the card and the provenance."""
        provenance = {"versions": versions(), "distil": self.recipe, "report": self.report.to_dict()}
        return {
            **super().files(),
            "README.md": _card(self.report, self.recipe, self.loading),
            "provenance.json": writer.json_text(provenance),
        }

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write a folder that `PeftModel.from_pretrained` loads, completely or not at all.

        Args:
            folder: must not exist, or be empty.
            force: whether to replace an existing folder that holds nothing but files of ours and is none of the inputs.
        Raises: RecipeError where the folder must not be replaced or cannot be written.
        """
        return writer.write_folder(Path(folder), self.files(), force, self._inputs)

    def __repr__(self) -> str:
        rank = "" if self.report.rank is None else f", rank {self.report.rank}"
        return (
            f"Distilled({self.peft_type.name}, {len(self.layout)} modules{rank}, {len(self.report.lessons)} teachers)"
        )


def _card(report: DistilReport, recipe: Mapping[str, Any], loading: Loading) -> str:
    """Return the model card."""
    rank = "" if report.rank is None else f" of rank {report.rank}"
    rows = [
        (
            adapter_link(line.name, line.page),
            line.kind,
            f"{line.rows} + {line.held}",
            f"{line.divergence[1]:.4f}",
            f"{line.agreement[1]:.1%}",
            f"`{line.digest[:12]}`",
        )
        for line in report.lessons
    ]
    return model_card(
        loading,
        ["merge", "ties_peft", "distil", TYPE_TAGS.get(report.kind, "peft")],
        report.licence,
        [
            f"# One {report.kind} adapter that imitates {report.adapters}",
            f"Made by {PROJECT}: a merge{rank} whose {report.fit} were then fitted to the predictions of the source adapters, "
            "without labels. On held-out rows, the table gives KL(adapter ‖ this one) in nats and how often the likeliest "
            "prediction is the same.",
            markdown_table(("adapter", "kind", "rows + held out", "KL", "agrees", "digest"), rows),
            "Load it:",
            loading_block(loading),
            "What was asked for:",
            code_block(dump(public(recipe)), "yaml"),
            markdown_list("Warnings:", [public_text(warning, recipe) for warning in report.warnings]),
        ],
    )
