"""Merge the sample adapters, load the results with PEFT, and judge them: what `make demo` runs.

    python adapters/demo.py [--out demo-out] [--score-own] [--data DIR | hub] [--rows 300]

First the six LoRA and then the six (IA)³ adapters of a sentence encoder are merged with the defaults, saved, loaded with
`PeftModel.from_pretrained` on the real base, and their forward pass is compared with a copy of the base to whose weights
the merged task vectors were added by hand. Then these LoRAs and six of a language model are merged in three ways and scored on
rows that lie in the repository. The scores of the base and of each task's own adapter on these rows, which no merge changes, are
stored in own_scores.json; --score-own computes them anew and writes that file. With --data the encoder's adapters are judged on all six tasks as well.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import minilm
import smollm2
import torch
from peft import PeftModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import ties_peft
from ties_peft.evaluation.loaded_model import Bench as LoadedModel
from ties_peft.evaluation.task import Task, read_task

HERE = Path(__file__).resolve().parent
KINDS = {"lora": "LoRA", "ia3": "(IA)³"}
METHODS = {"average": "average", "ties": "TIES", "auto": "auto, the default"}
JUDGED = ("snips_json", "disfl_qa")  # of the language model, with rows beside its adapters
OWN = "own adapter of each task"
ROWS = 50  # of each task
STORED = HERE / "own_scores.json"  # of the base and the own adapters, written with --score-own
STORED_BY = "python adapters/demo.py --score-own"
BATCH = 8  # rows; on a CPU larger batches only add padding
BAR = 24  # columns of a bar of 100 percent
TOLERANCE = 1e-4
PROBES = (
    "a gripping film from the first minute to the last",
    "Who wrote the novel that the film is based on ?",
    "My card was swallowed by the machine this morning.",
    "Shares fell sharply after the company cut its forecast for the year.",
)
console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def main() -> int:
    """Run the demonstration; 1 where a loaded adapter does not compute what was merged."""
    started, asked = time.perf_counter(), arguments()
    console.rule("merge, save, load with PEFT, compare", align="left")
    base, tokenizer = load_base()
    faithful = [merge_and_check(kind, base, tokenizer, asked.out) for kind in KINDS]
    judge_samples(base, tokenizer, asked.out, asked.score_own)
    if asked.data is not None:
        judge_all(base, tokenizer, asked.data, asked.rows, asked.out)
    console.print(f"\n{time.perf_counter() - started:.0f} s in all; the merged adapters are in {asked.out}")
    return 0 if all(faithful) else 1


def arguments() -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the results (demo-out)")
    parser.add_argument(
        "--score-own", action="store_true", help=f"score the base and the own adapters too, and write {STORED.name}"
    )
    parser.add_argument("--data", help="folder with one sub-folder a task, or 'hub': judge the encoder's adapters too")
    parser.add_argument("--rows", type=int, default=300, help="test rows judged in each task (300)")
    asked = parser.parse_args()
    if asked.rows < 1:
        parser.error("--rows: expected 1 or more")
    if asked.data not in (None, minilm.HUB) and not Path(asked.data).is_dir():
        parser.error(f"--data: there is no folder {asked.data}")
    return asked


def load_base() -> tuple[Any, Any]:
    """The base and its tokenizer, without the noise of loading."""
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", ties_peft.TiesPeftWarning)  # the reports print them
    with console.status("loading the base model"):
        return minilm.load_base()


def samples(kind: str) -> list[str]:
    """The folders of the six adapters of one kind, as seen from here."""
    return [os.path.relpath(HERE / kind / task) for task in minilm.TASKS]


@contextmanager
def adapted(base: Any, folder: Path) -> Iterator[Any]:
    """The base with an adapter on it, as PEFT loads it; the base is itself again afterwards."""
    model = PeftModel.from_pretrained(base, folder).eval()
    try:
        yield model
    finally:
        model.unload()


def merge_and_check(kind: str, base: Any, tokenizer: Any, out: Path) -> bool:
    """Merge one kind's adapters with the defaults; whether PEFT computes base + merged task vectors."""
    with console.status(f"merging {KINDS[kind]}"):
        merged = ties_peft.merge(samples(kind))
    folder = merged.save(out / kind, force=True)
    console.print(merged.report)
    batch = tokenizer(list(PROBES), padding=True, return_tensors="pt")
    before, by_hand = hidden(base, batch), hidden(with_deltas(base, merged), batch)
    with adapted(base, folder) as model:
        loaded = hidden(model, batch)
    difference, effect = largest(loaded - by_hand), largest(loaded - before)
    same = difference <= TOLERANCE
    verdict = "[green]the same[/]" if same else f"[red]not the same[/], being over {TOLERANCE:g}"
    console.print(
        f"loaded         PeftModel.from_pretrained(base, '{escape(str(folder))}')\n"
        f"forward pass   {difference:.1e} at most from base + merged by hand, {effect:.2g} from the base: {verdict}\n"
    )
    return same


def hidden(model: Any, batch: Any) -> torch.Tensor:
    """The last hidden states of one batch."""
    with torch.no_grad():
        states: torch.Tensor = model(**batch).last_hidden_state
    return states


def largest(difference: torch.Tensor) -> float:
    """The largest entry in magnitude."""
    return float(difference.abs().max())


def with_deltas(base: Any, merged: ties_peft.Adapter) -> Any:
    """A copy of the base with the task vectors of an adapter in its weights, put there without PEFT."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name in merged.modules:
            layer, delta = model.get_submodule(name), merged.delta(name)
            if merged.peft_type.name == "lora":
                layer.weight += delta
            elif merged.module(name).on_input:
                layer.weight *= 1 + delta  # each column
            else:
                layer.weight *= 1 + delta[:, None]  # each row
                layer.bias *= 1 + delta
    return model


@dataclass(frozen=True)
class Scored:
    """The scores on one task, by what was scored.

    Attributes:
        measure: the heading of the column.
        values: accuracies in percent, or losses per token.
    """

    measure: str
    values: dict[str, float]

    def gain(self, title: str) -> float:
        """Return the gain over the base, as percent of the own adapter's gain."""
        base = self.values["base"]
        return 100 * (self.values[title] - base) / (self.values[OWN] - base)


def judge_samples(base: Any, tokenizer: Any, out: Path, score_own: bool = False) -> None:
    """Print what the base, the merges and each task's own adapter score on rows that lie in the repository."""
    console.rule(f"six adapters in one, {ROWS} test rows of each of {len(JUDGED) + 1} tasks", align="left")
    folders = {task: HERE / "lora" / task for task in minilm.TASKS}
    task = replace(read_task(HERE.parent / "examples" / "tasks" / "banking77.yaml"), limit=ROWS)
    stored = {} if score_own else read_stored()
    scored = score_merges(LoadedModel(base, tokenizer), folders, {"banking77": task}, out / "lora", stored)
    try:
        with console.status("loading the language model"), redirect_stderr(io.StringIO()):  # a bar of its own
            model = LoadedModel(*smollm2.load_base())
    except OSError as error:
        console.print(
            f"The language model {smollm2.BASE} cannot be loaded, so its adapters are not scored: {escape(str(error))}"
        )
    else:
        folders = {task: smollm2.FOLDER / task for task in smollm2.TASKS}
        read = {name: read_task(smollm2.FOLDER / "tasks" / f"{name}.yaml") for name in JUDGED}
        tasks = {name: replace(one, limit=ROWS) for name, one in read.items()}
        scored |= score_merges(model, folders, tasks, out / "smollm2", stored)
    if score_own:
        write_stored(scored)
    console.print(chart(scored))
    console.print(
        "banking77: six adapters of a sentence encoder in one. The other tasks: six adapters of a language model in one; the loss is in nats "
        "per token, and lower is better. gain: 0 is the base, 100 is each task's own adapter, which one adapter for all tasks does not reach; "
        "the mean over the tasks. So few rows show what to expect; docs/measurements.md has more."
        + (
            f" The rows of the base and of the own adapters are stored scores: {STORED_BY} computes them anew."
            if stored
            else ""
        ),
        style="dim",
    )


def read_stored() -> dict[str, dict[str, float]]:
    """Return the stored scores of the base and the own adapter by task; none if they are of another number of rows."""
    found = json.loads(STORED.read_text(encoding="utf-8"))
    scores: dict[str, dict[str, float]] = found["scores"] if found["rows"] == ROWS else {}
    return scores


def write_stored(scored: Mapping[str, Scored]) -> None:
    """Write the scores of the base and the own adapters."""
    scores = {task: {title: round(one.values[title], 4) for title in ("base", OWN)} for task, one in scored.items()}
    text = json.dumps({"command": STORED_BY, "rows": ROWS, "scores": scores}, indent=1, ensure_ascii=False)
    STORED.write_text(text + "\n", encoding="utf-8")


def score_merges(
    model: LoadedModel,
    folders: Mapping[str, Path],
    tasks: Mapping[str, Task],
    out: Path,
    stored: Mapping[str, Mapping[str, float]],
) -> dict[str, Scored]:
    """Return by task the scores of the base, of each way of merging all folders, and of the task's own adapter."""

    def values(adapter: Any, names: Iterable[str]) -> dict[str, float]:
        scores = {name: ties_peft.evaluate(adapter, tasks[name], bench=model, batch_size=BATCH) for name in names}
        return {name: (s.loss or 0.0) if s.accuracy is None else 100 * s.accuracy for name, s in scores.items()}

    if all(name in stored for name in tasks):
        found = {"base": {name: stored[name]["base"] for name in tasks}}
        own = {name: stored[name][OWN] for name in tasks}
    else:
        with console.status("scoring the base and the own adapters"):
            found = {"base": values(None, tasks)}
            own = {name: values(folders[name], [name])[name] for name in tasks}
    for method, title in METHODS.items():
        with console.status(f"merging and scoring: {title}"):
            merged = ties_peft.merge([os.path.relpath(folder) for folder in folders.values()], method=method)
            found[title] = values(merged.save(out.with_name(f"{out.name}-{method}"), force=True), tasks)
    found[OWN] = own
    measures = {name: "loss" if task.measure == "loss" else "accuracy, %" for name, task in tasks.items()}
    return {name: Scored(measures[name], {title: one[name] for title, one in found.items()}) for name in tasks}


def chart(scored: Mapping[str, Scored]) -> Table:
    """Return a table with a row for each thing that was scored, a column a task, and a bar for the mean gain."""
    result = Table(box=None, pad_edge=False)
    result.add_column("")
    for task, column in scored.items():
        result.add_column(f"{task}\n{column.measure}", justify="right")
    result.add_column("mean\ngain, %", justify="right")
    result.add_column("")
    for title in ("base", *METHODS.values(), OWN):
        cells = [f"{column.values[title]:.{2 if column.measure == 'loss' else 1}f}" for column in scored.values()]
        mean = sum(column.gain(title) for column in scored.values()) / len(scored)
        result.add_row(title, *cells, f"{mean:.0f}", "█" * max(0, round(mean * BAR / 100)))
    return result


@dataclass(frozen=True)
class Bench:
    """The base, its frozen heads, and the rows that everything is judged on."""

    base: Any
    tokenizer: Any
    heads: dict[str, torch.Tensor]
    rows: dict[str, minilm.Rows]

    def judge(self, model: Any, *tasks: str) -> dict[str, float]:
        """Accuracy in percent on each of some tasks (default: all)."""
        return {
            task: minilm.accuracy(model, self.tokenizer, self.heads[task], self.rows[task])
            for task in tasks or minilm.TASKS
        }

    def judge_folder(self, folder: Path, *tasks: str) -> dict[str, float]:
        """The same for the base with an adapter on it."""
        with adapted(self.base, folder) as model:
            return self.judge(model, *tasks)

    def error(self, scores: dict[str, float]) -> float:
        """Standard error of a mean accuracy, from the number of rows alone."""
        variances = [p * (100 - p) / len(self.rows[task].labels) for task, p in scores.items()]
        return math.sqrt(sum(variances)) / len(variances)


def judge_all(base: Any, tokenizer: Any, data: Path | str, rows: int, out: Path) -> None:
    """Print one table a kind."""
    with console.status("reading labelled rows"):
        heads = minilm.make_heads(base, tokenizer, minilm.TASKS, data)
        bench = Bench(base, tokenizer, heads, {t: minilm.read_rows(t, "test", data, rows) for t in minilm.TASKS})
    console.rule(f"accuracy in percent, up to {rows} test rows a task", align="left")
    with console.status("judging the base"):
        untouched = bench.judge(base)
    for kind in KINDS:
        scores = {"base": untouched, **judge_kind(kind, bench, out)}
        console.print(table(f"{KINDS[kind]} adapters", scores))
        console.print(
            f"a mean is known to about ± {bench.error(scores[OWN]):.1f} from so many rows\n",
            style="dim",
        )
    if data == minilm.HUB:
        console.print(f"{' and '.join(minilm.SEEN_ON_HUB)}: some of the Hub's rows were trained on.", style="dim")


def judge_kind(kind: str, bench: Bench, out: Path) -> dict[str, dict[str, float]]:
    """Accuracies by what is judged: each task's own adapter, the merged ones, the one trained on all tasks."""
    scores = {}
    with console.status(f"judging {KINDS[kind]}"):
        own = [bench.judge_folder(HERE / kind / task, task) for task in minilm.TASKS]
        scores[OWN] = {task: value for one in own for task, value in one.items()}
        for method, title in METHODS.items():
            folder = ties_peft.merge(samples(kind), method=method).save(out / f"{kind}-{method}", force=True)
            scores[title] = bench.judge_folder(folder)
        scores["trained on all tasks"] = bench.judge_folder(HERE / "multitask" / kind)
    return scores


def table(title: str, scores: dict[str, dict[str, float]]) -> Table:
    """One row for each thing judged, one column a task, and the mean."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False)
    result.add_column("")
    for heading in (*minilm.TASKS, "mean"):
        result.add_column(heading, justify="right")
    for name, row in scores.items():
        mean = sum(row.values()) / len(row)
        cells = [f"{row[task]:.1f}" for task in minilm.TASKS]
        result.add_row(escape(name), *cells, f"{mean:.1f}", style="bold" if name in METHODS.values() else None)
    return result


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ties_peft.TiesPeftError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")
