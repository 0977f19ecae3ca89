"""`ties-peft evaluate`: measure adapters on labelled rows, on one loaded base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import RecipeError
from ..evaluation import BATCH_SIZE
from ..merging.options import DEVICE
from ..merging.tables import make_table, make_text, number_column
from .base import (
    Json,
    ModelDevice,
    Precision,
    base_option,
    print_json,
    print_rich,
    print_warnings,
    progress_and_warnings,
)

if TYPE_CHECKING:
    from ..evaluation.score import Score

BASE_LABEL = "base"
ACCURACY = "accuracy in percent"
UNITS = {  # of measures other than accuracies
    "loss": "mean −log p per token",
    "chrf": "chrF from 0 to 100",
    "bleu": "BLEU from 0 to 100",
}
Tasks = Annotated[
    list[Path] | None, typer.Option("--task", help="A task's YAML or JSON file. Repeatable.", show_default=False)
]
Harness = Annotated[
    list[str] | None,
    typer.Option(help="Names of tasks of lm-evaluation-harness, with commas between. Repeatable.", show_default=False),
]
HarnessPath = Annotated[
    Path | None, typer.Option(help="A folder with task files of your own for the harness.", show_default=False)
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="The number of rows of each task of the harness.", show_default="all")
]


def evaluate(
    adapters: Annotated[list[str] | None, typer.Argument(help="Folders or Hub ids.", show_default=False)] = None,
    task: Tasks = None,
    base: Annotated[str | None, base_option("the task's or adapters'")] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Also measure the base model without an adapter.")] = False,
    device: ModelDevice = DEVICE,
    batch_size: Annotated[int, typer.Option(min=1, help="The number of rows in a batch.")] = BATCH_SIZE,
    precision: Precision = None,
    harness: Harness = None,
    harness_path: HarnessPath = None,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Measure adapters on labelled rows, or by the tasks of lm-evaluation-harness."""
    _check_tasks(task, harness, harness_path, limit)
    names = list(adapters or [])
    if not names and not bare:
        raise RecipeError("no adapter was named. Name at least one folder or Hub id, or measure the base: --bare.")
    from ..evaluation.evaluate import evaluate_all
    from ..evaluation.harness import harness as evaluate_harness
    from ..merging.members import short_names

    labels = [*([BASE_LABEL] if bare else []), *(short_names(names) if names else [])]
    measured = [*([None] if bare else []), *names]
    common: dict[str, Any] = {"base": base, "device": device, "batch_size": batch_size, "dtype": precision}
    with progress_and_warnings() as progress:
        if task:
            scores = evaluate_all(measured, task, progress=progress, **common)
        else:
            chosen = [name for names in harness or [] for name in names.split(",") if name]
            common |= {"include_path": harness_path, "limit": limit}
            results = evaluate_harness(measured, chosen, progress=progress, **common)
    if task:
        _show_scores(labels, scores, as_json)
    else:
        _show_harness(labels, results, as_json)


def _check_tasks(
    task: list[Path] | None, harness: list[str] | None, harness_path: Path | None, limit: int | None
) -> None:
    """Refuse options of both kinds of tasks together, and neither."""
    if not task and not harness:
        raise RecipeError("no task was named. Name the rows to measure on: --task FILE.yaml, or --harness TASK.")
    if task and harness:
        raise RecipeError("--task and --harness cannot be combined. Run the command once for each.")
    if not harness and (limit or harness_path):
        raise RecipeError(
            "--limit and --harness-path are for --harness. Leave them out; a task file has its own limit."
        )


def _show_scores(labels: list[str], scores: list[list[Score]], as_json: bool) -> None:
    """Print the scores as a table or as JSON."""
    _warn_about_rows(scores[0])
    if as_json:
        lines = [
            {"adapter": label, "scores": [score.to_dict() for score in own]}
            for label, own in zip(labels, scores, strict=True)
        ]
        print_json({"evaluated": lines})
        return
    print_rich(_table(labels, scores))
    print_rich(make_text(_legend(scores), "dim"))


def _show_harness(labels: list[str], results: list[dict[str, dict[str, float]]], as_json: bool) -> None:
    """Print a row for each task and metric and a column for each adapter, or JSON."""
    if as_json:
        print_json({"harness": [{"adapter": a, "results": r} for a, r in zip(labels, results, strict=True)]})
        return
    rows = [
        (name, metric, *(f"{line[name][metric]:.4f}" for line in results))
        for name, metrics in results[0].items()
        for metric in metrics
    ]
    print_rich(make_table(["task", "metric", *map(number_column, labels)], rows))


def _warn_about_rows(line: list[Score]) -> None:
    """Warn of rows that were cut or whose text is blank; these are the same for every adapter."""
    for score in line:
        where, of = f"task {score.task!r}", f"of {score.rows} rows"
        if score.cut:
            text = f"{where}: {score.cut} {of} were cut, because they exceed max_tokens or the model's positions."
            print_warnings([text])
        if score.blank:
            print_warnings([f"{where}: the texts of {score.blank} {of} are blank; they were scored like others."])


def _table(labels: list[str], scores: list[list[Score]]) -> Table:
    """Return a table with a row for each adapter and a column for each task, and with the mean where all are in percent."""
    tasks = [score.task for score in scores[0]]
    mean = len(tasks) > 1 and all(score.accuracy is not None for score in scores[0])
    rows = []
    for label, line in zip(labels, scores, strict=True):
        cells = [_cell(score) for score in line]
        cells += [f"{100 * sum(s.value for s in line) / len(line):.1f}"] if mean else []
        rows.append((label, *cells))
    return make_table(["adapter", *map(number_column, [*tasks, *(["mean"] if mean else [])])], rows)


def _cell(score: Score) -> str:
    return f"{score.loss:.4f}" if score.accuracy is None else f"{100 * score.value:.1f}"


def _legend(scores: list[list[Score]]) -> str:
    """Return the units of the table's numbers, the standard errors, the base's precision and the speed."""
    line = scores[0]
    errors = [score.error for own in scores for score in own if score.error and score.measure not in UNITS]
    units = [UNITS.get(score.measure, ACCURACY) for score in line]
    parts = [
        units[0] if len(set(units)) == 1 else ", ".join(f"{s.task}: {u}" for s, u in zip(line, units, strict=True)),
        f"rows: {', '.join(str(score.rows) for score in line)}",
    ]
    if errors:
        least, most = (f"{100 * error:.1f}" for error in (min(errors), max(errors)))
        parts.append(f"standard error of an accuracy: {least}{f' to {most}' if most != least else ''}")
    parts += [f"base in {line[0].dtype}"] if line[0].dtype else []
    if seconds := sum(score.seconds for own in scores for score in own):
        parts.append(f"{sum(score.rows for own in scores for score in own) / seconds:.3g} rows a second")
    return "; ".join(parts)
