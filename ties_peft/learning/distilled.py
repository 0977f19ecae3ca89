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

BASE_KIND = "model"  # stands in place of a PEFT type where the teacher is the base model


@dataclass(frozen=True)
class TeacherResult:
    """How well one teacher is imitated.

    Attributes:
        name, digest: of the adapter.
        kind: its PEFT type, LoRA or (IA)³; `BASE_KIND` for the base model.
        origin: where its rows come from.
        rows, held: the number of rows that are fitted, and of held-out rows.
        divergence: KL(teacher ‖ adapter) on the held-out rows in nats, of the start and of the result.
        agreement: the share of predictions there whose likeliest answer is the teacher's, of the start and of the result.
        page: its address on the Hub; None for a local adapter.
        weight: of the teacher in the fit.
        kept_probability: the mean share of its probability that belongs to the answers compared one by one; the others are
            compared as one sum (see `learning.token_teachers`).
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
        """Return plain values, without the time, which differs from run to run."""
        values = asdict(self)
        del values["seconds"]
        return values

    def tables(self) -> RenderableType:
        """Return the teachers and the outcome, without the warnings."""
        return Group(self._teachers(), Text(), self._outcome())

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
                line.origin,
            )
            for line in self.lessons
        ]
        title = f"imitates {self.adapters} adapters, measured on held-out rows"
        return make_table(["adapter", "kind", *map(number_column, numbers), "from"], rows, title)

    def _outcome(self) -> Table:
        before, after = self.divergence
        kept = sum(line.kept_probability for line in self.lessons) / len(self.lessons)
        rank = "" if self.rank is None else f", rank {self.rank}"
        outcome = (
            f"{before:.4f} → {after:.4f}"
            if self.improved
            else f"{before:.4f}; no step improved it, so the result is the start"
        )
        return make_facts(
            [
                ("start", self.start),
                ("fitted", f"{self.fit} of one {self.kind} adapter{rank}"),
                ("steps", f"{self.steps} of {self.of}; the result is of step {self.kept}"),
                ("mean KL", outcome),
                ("compared", f"{kept:.2%} of the teachers' probability answer by answer, the rest as one sum"),
                ("written as", self.dtype),
                ("licence", self.licence_note),
                ("time", f"{self.seconds:.1f} s"),
            ]
        )


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
