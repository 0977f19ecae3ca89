"""Measure distil on the sample adapters: `python benchmarks/learn.py --data DIR`.

One adapter imitates N = 2 … 6 of the samples, at their largest rank. It is fitted on 50 or 200 rows a task without labels, on
rows of other tasks, or on random tokens mixed with words of the labels' descriptions; on these also with gains, at the
sum of the adapters' ranks (LoRA only). Each of three seeds chooses its own adapters (of five, seed s leaves out task s). The
rows are of the validation split, on which no adapter was trained (its first 300 rows chose the best epoch of each). The
result is scored on test rows of all tasks, with the left-out ones and mr, beside the start, the own adapters and the
adapter trained on all tasks, with standard errors paired by row.

Every finished run is a line of the log, from which a stopped run continues. `--json FILE` writes the table.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import multitask, pack, unpack
from judge import ROOT, minilm, own_adapters
from records import Record, Records, make_parser, versions, write_json
from rich.console import Console

import ties_peft
from ties_peft.evaluation.evaluate import make_scorer
from ties_peft.evaluation.scorers import Scorer
from ties_peft.learning.start import DEFAULTS
from ties_peft.learning.teacher_specs import RANDOM_ROWS
from ties_peft.merging.tables import make_table, number_column

RANDOM = "random tokens and words of the labels"
GAINS = f"{RANDOM}, gains"
SOURCES = ("50 rows", "200 rows", "200 rows of other tasks", RANDOM, GAINS)
TASKS = (*minilm.TASKS, *minilm.HELD_OUT)
LOG = ROOT / "benchmarks" / "learn.jsonl"
Rights = dict[str, str]  # by task, which rows were right, one character per row


class Evaluator:
    """The loaded base, the test rows, and the scores of the adapters that were evaluated on them.

    Args:
        data: folder with one for each task.
        rows: the largest number of test rows of each task.
    """

    def __init__(self, data: Path, rows: int) -> None:
        self.data, self.rows = data, rows
        model, tokenizer = minilm.load_base()
        self.bench = ties_peft.Bench(model, tokenizer, minilm.BASE)
        self.scorers: dict[str, Scorer] = {t: make_scorer(self.bench, self.task(t, "test", rows)) for t in TASKS}
        self._scored: dict[tuple[str, str], str] = {}  # by digest and task

    def task(self, name: str, split: str, limit: int | None = None) -> ties_peft.Task:
        """Return a task with the rows of one split."""
        described = tuple(minilm.descriptions(name, self.data))
        path = str(self.data / name / f"{split}.jsonl")
        return ties_peft.Task(
            "descriptions", path, name, limit=limit, descriptions=described, max_tokens=minilm.MAX_TOKENS
        )

    def score(self, adapter: ties_peft.Adapter | None, tasks: Sequence[str] = TASKS) -> Rights:
        """Return which rows an adapter, or the base alone, gets right; each adapter is scored once."""
        digest = adapter.digest if adapter else ""
        with self.bench.applied(adapter):
            for task in tasks:
                if (digest, task) not in self._scored:
                    self._scored[digest, task] = pack(torch.tensor(self.scorers[task].score().right))
        return {task: self._scored[digest, task] for task in tasks}

    def add(self, adapter: ties_peft.Adapter, right: Rights) -> None:
        """Add the scores of an adapter from an earlier run."""
        self._scored |= {(adapter.digest, task): own for task, own in right.items()}

    def texts(self, task: str, count: int, seed: int) -> list[str]:
        """Return random rows of the validation split, without labels."""
        rows = self.task(task, "validation").texts()
        return random.Random(f"{seed} {task}").sample(rows, min(count, len(rows)))

    def distil(self, kind: str, source: str, tasks: Sequence[str], seed: int) -> ties_peft.Distilled:
        """Return one adapter that imitates those of some tasks."""
        return ties_peft.distil(
            adapters(kind, tasks),
            rows=self._rows(source, tasks, seed),
            tasks=[self.task(task, "validation") for task in tasks],
            bench=self.bench,
            seed=seed,
            fit="gains" if source == GAINS else "factors",
        )

    def _rows(self, source: str, tasks: Sequence[str], seed: int) -> list[Any] | None:
        """Return the rows of each adapter."""
        if source in (RANDOM, GAINS):
            return [RANDOM_ROWS] * len(tasks)
        count = int(source.split()[0])
        if "other" not in source:
            return [self.texts(task, count, seed) for task in tasks]
        others = [[t for t in minilm.TASKS if t != task] for task in tasks]
        return [
            random.Random(seed).sample([text for t in rest for text in self.texts(t, count, seed)], count)
            for rest in others
        ]


class Runs:
    """The finished runs of distil in a log, and the runs that are missing.

    Args:
        log: a file with one JSON object a line.
        evaluator: for runs that are missing.
    """

    def __init__(self, log: Path, evaluator: Evaluator) -> None:
        self.records, self.evaluator = Records(log), evaluator
        for row in self.records.known.values():
            if row["judged"] == evaluator.rows:
                evaluator.add(together(row["kind"]), row["right"]["multitask"])
                for task, adapter in zip(row["tasks"], adapters(row["kind"], row["tasks"]), strict=True):
                    evaluator.add(adapter, {task: row["right"]["own"][task]})

    def find(self, kind: str, source: str, size: int, seed: int) -> Record:
        """Return one run, from the log or by making it."""
        key = (kind, source, size, seed, self.evaluator.rows)
        return self.records.find(lambda: self._make(kind, source, size, seed), *key)

    def _make(self, kind: str, source: str, size: int, seed: int) -> Record:
        """Distil, and score the result and its references."""
        tasks, score = chosen(size, seed), self.evaluator.score
        made = self.evaluator.distil(kind, source, tasks, seed)
        own = adapters(kind, tasks)
        start = ties_peft.merge(own, **start_options(kind, source, own), dtype="float32")
        right = {"distil": score(made), "start": score(start), "multitask": score(together(kind))}
        right["own"] = {task: score(adapter, [task])[task] for task, adapter in zip(tasks, own, strict=True)}
        report = made.report
        return {
            "kind": kind,
            "source": source,
            "size": size,
            "seed": seed,
            "judged": self.evaluator.rows,
            "tasks": list(tasks),
            "seconds": report.seconds,
            "steps": report.steps,
            "divergence": report.divergence,
            "right": right,
        }


def start_options(kind: str, source: str, own: Sequence[ties_peft.Adapter]) -> dict[str, Any]:
    """Return the arguments of the merge that distil starts from."""
    if kind == "ia3" or source == GAINS:
        return DEFAULTS["ia3" if kind == "ia3" else "gains"]
    return {**DEFAULTS["factors"], "rank": max(adapter.ranks[-1] for adapter in own)}


def sources(kind: str, asked: Sequence[str]) -> list[str]:
    """Return those of the sources that apply to a kind: (IA)³ has no gains."""
    return [source for source in asked if kind == "lora" or source != GAINS]


def chosen(size: int, seed: int) -> tuple[str, ...]:
    """Return the tasks of a run: of five all but one, by the seed; of other sizes a random choice by the seed."""
    if size == len(minilm.TASKS) - 1:
        return tuple(task for place, task in enumerate(minilm.TASKS) if place != seed % len(minilm.TASKS))
    return random.Random(f"{size} {seed}").choice(list(itertools.combinations(minilm.TASKS, size)))


def adapters(kind: str, tasks: Sequence[str]) -> list[ties_peft.Adapter]:
    """Return the own adapters of some tasks."""
    return [ties_peft.Adapter.load(own_adapters(kind)[task]) for task in tasks]


def together(kind: str) -> ties_peft.Adapter:
    """Return the adapter trained on all tasks."""
    return ties_peft.Adapter.load(multitask(kind))


def mean(right: Mapping[str, str], tasks: Sequence[str]) -> float:
    """Return the mean accuracy over tasks, in percent."""
    return 100 * sum(float(unpack(right[task]).double().mean()) for task in tasks) / len(tasks)


def normalised(row: dict[str, Any], name: str) -> float:
    """Return the mean over tasks of the share of the own adapter's accuracy, in percent."""
    own = row["right"]["own"]
    return 100 * sum(row["right"][name][t].count("1") / own[t].count("1") for t in own) / len(own)


def paired_error(row: dict[str, Any], one: str, other: str) -> float:
    """Return the standard error of the difference of two mean accuracies on the same rows, in points."""
    variances = []
    for task in row["tasks"]:
        gaps = unpack(row["right"][one][task]).double() - unpack(row["right"][other][task]).double()
        variances.append(float(gaps.var()) / len(gaps))
    return 100 * math.sqrt(sum(variances)) / len(variances)


def summary(own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the runs of one kind, size and source: means over seeds, and the range of the normalised accuracy."""

    def average(values: Sequence[float]) -> float | None:
        return round(sum(values) / len(values), 2) if values else None

    levels = {name: average([mean(r["right"][name], r["tasks"]) for r in own]) for name in ("start", "distil", "own")}
    trained = [mean(r["right"]["multitask"], r["tasks"]) for r in own]
    gaps = [mean(r["right"]["distil"], r["tasks"]) - m for r, m in zip(own, trained, strict=True)]
    shares = [normalised(r, "distil") for r in own]
    first = own[0]
    return {
        "kind": first["kind"],
        "N": first["size"],
        "rows": first["source"],
        "seeds": len(own),
        "judged": first["judged"],
        **levels,
        "multitask": average(trained),
        "difference": average(gaps),
        "error": average([paired_error(r, "distil", "multitask") for r in own]),
        "normalised": average(shares),
        "lowest": round(min(shares), 2),
        "highest": round(max(shares), 2),
        "multitask normalised": average([normalised(r, "multitask") for r in own]),
        "mr": average([mean(r["right"]["distil"], ["mr"]) for r in own if "mr" in r["right"]["distil"]]),
        "seconds": average([r["seconds"] for r in own]),
        "steps": average([r["steps"] for r in own]),
    }


def summaries(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a summary for each kind, size, source and number of test rows."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["kind"] == "ia3", -row["size"], SOURCES.index(row["source"]), row["judged"])
        groups.setdefault(key, []).append(row)
    return [summary(groups[key]) for key in sorted(groups)]


def show(found: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the summaries; ± is the standard error over rows, paired with the adapter trained on all tasks."""
    columns = ("kind", "N", "rows", "seeds", "judged", "start", "distil", "multitask", "own", "mr", "seconds")
    headings = [*columns, "distil − multitask", "normalised", "of seeds"]
    lines = []
    for row in found:
        cells = [f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c] or "") for c in columns]
        spread = f"{row['lowest']:.1f} … {row['highest']:.1f}" if row["seeds"] > 1 else ""
        gap = f"{row['difference']:+.1f} ± {row['error']:.1f}"
        lines.append([*cells, gap, f"{row['normalised']:.1f}", spread])
    console.print(make_table([h if h in ("kind", "rows") else number_column(h) for h in headings], lines))


def main() -> None:
    """Make the runs that are missing, and print all."""
    parser = make_parser(__doc__, 300, LOG)
    parser.add_argument("--kinds", nargs="*", default=["lora", "ia3"], choices=["lora", "ia3"])
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--sizes", nargs="*", type=int, default=[6, 5, 4, 3, 2])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=160)
    runs = Runs(asked.log, Evaluator(asked.data, asked.rows))
    wanted = [
        (kind, *case)
        for kind in asked.kinds
        for case in itertools.product(sources(kind, asked.sources), asked.sizes, asked.seeds)
    ]
    for number, (kind, source, size, seed) in enumerate(wanted):
        row = runs.find(kind, source, size, seed)
        change = f"{mean(row['right']['start'], row['tasks']):.1f} → {mean(row['right']['distil'], row['tasks']):.1f}"
        console.print(
            f"{number + 1}/{len(wanted)} {kind}, N {size}, {source}, seed {seed}: {change} in {row['seconds']:.0f} s"
        )
    found = summaries(list(runs.records.known.values()))
    show(found, console)
    about = {"command": "python benchmarks/learn.py --data DIR", "split": "test", "versions": versions()}
    write_json(asked.json, {**about, "runs": found})


if __name__ == "__main__":
    main()
