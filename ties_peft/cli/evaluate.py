"""`ties-peft evaluate`: adapters on labelled rows, on one loaded base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import RecipeError
from ..evaluation import BATCH_SIZE
from ..merging.tables import make_table, make_text, number_column
from .base import Json, print_json, print_rich, print_warnings, print_warnings_after, progress_bar

if TYPE_CHECKING:
    from ..evaluation.score import Score

BASE_LABEL = "base"
ACCURACY = "accuracy in percent"
UNITS = {  # of measures that are no accuracy
    "loss": "mean −log p per token",
    "chrf": "chrF from 0 to 100",
    "bleu": "BLEU from 0 to 100",
}
Harness = Annotated[
    list[str] | None,
    typer.Option(help="Names of tasks of lm-evaluation-harness: A,B, or repeated.", show_default=False),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="The precision in which the base is loaded: float32, bfloat16 or float16.",
        show_default="that of its files",
    ),
]
Path_ = Annotated[Path | None, typer.Option(help="A folder with the harness's task files.", show_default=False)]


def evaluate(
    adapters: Annotated[list[str] | None, typer.Argument(help="Folders or Hub ids.", show_default=False)] = None,
    task: Annotated[
        list[Path] | None, typer.Option("--task", help="A task's YAML or JSON file. Repeatable.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base model.", show_default="the task's")
    ] = None,
    bare: Annotated[bool, typer.Option("--bare", help="Also measure the base model without an adapter.")] = False,
    device: Annotated[str, typer.Option(help="The device that the model runs on.")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="The number of rows in a batch.")] = BATCH_SIZE,
    precision: Precision = None,
    harness: Harness = None,
    harness_path: Path_ = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The number of rows of each task of the harness.", show_default="all")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure adapters on labelled rows, or by the tasks of lm-evaluation-harness."""
    if not task and not harness:
        raise RecipeError("no task was named. Name the rows to measure on: --task FILE.yaml, or --harness TASK.")
    if task and harness:
        raise RecipeError("--task and --harness cannot be combined. Run the command once for each.")
    if not harness and (limit or harness_path):
        raise RecipeError("--limit and --harness-path go with --harness; a task file has its own limit.")
    names = list(adapters or [])
    if not names and not bare:
        raise RecipeError("no adapter was named. Name at least one folder or Hub id, or measure the base: --bare.")
    from ..evaluation.evaluate import evaluate_all
    from ..evaluation.harness import harness as by_harness
    from ..merging.members import short_names

    labels = ([BASE_LABEL] if bare else []) + (short_names(names) if names else [])
    judged = [*([None] if bare else []), *names]
    with print_warnings_after(), progress_bar() as tell:
        if harness:
            tasks = [name for one in harness for name in one.split(",") if name]
            given: dict[str, Any] = {"include_path": harness_path, "batch_size": batch_size, "limit": limit}
            given["dtype"] = precision
            results = by_harness(judged, tasks, base, device, progress=tell, **given)
        else:
            scores = evaluate_all(judged, task or [], base, device, None, batch_size, tell, precision)
    if harness:
        _show_harness(labels, results, as_json)
        return
    _warn_about_rows(scores[0])
    if as_json:
        lines = [
            {"adapter": label, "scores": [s.to_dict() for s in line]}
            for label, line in zip(labels, scores, strict=True)
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
    """Warn of rows that were cut because they are too long, and of rows without text; they are the same for every adapter."""
    texts = [
        (score, count, told)
        for score in line
        for count, told in (
            (score.cut, "longer than max_tokens, or than the model allows, and cut"),
            (score.blank, "without a text but blanks, and judged all the same"),
        )
        if count
    ]
    print_warnings([f"task {s.task!r}: {count} of {s.rows} rows were {told}." for s, count, told in texts])


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
    """Return what the numbers of the table are, their standard errors, the base's precision and the speed."""
    line = scores[0]
    known = [score.error for own in scores for score in own if score.error and UNITS.get(score.measure) is None]
    units = list(dict.fromkeys(UNITS.get(score.measure, ACCURACY) for score in line))
    least, most = (f"{100 * error:.1f}" for error in (min(known, default=0.0), max(known, default=0.0)))
    parts = [
        units[0] if len(units) == 1 else ", ".join(f"{s.task}: {UNITS.get(s.measure, ACCURACY)}" for s in line),
        f"rows: {', '.join(str(score.rows) for score in line)}",
    ]
    if known:
        parts.append(f"an accuracy is known to about ± {least}{f' to {most}' if most != least else ''}")
    parts += [f"base in {line[0].dtype}"] if line[0].dtype else []
    if seconds := sum(score.seconds for own in scores for score in own):
        parts.append(f"{sum(score.rows for own in scores for score in own) / seconds:.3g} rows a second")
    return "; ".join(parts)
