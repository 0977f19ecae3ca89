"""What distil gives: `python benchmarks/learn.py --data DIR`, on the sample adapters.

One adapter that imitates N = 2 … 6 of the samples, at their own largest rank, from 50 or 200 rows a task without labels,
from rows of other tasks, and from random tokens mixed with the words of the labels' descriptions, from these also by the gains
of all directions, at the adapters' ranks together (LoRA alone); three seeds, each with adapters of its own choice (of five,
seed s leaves out task s). The rows are of the validation split: no adapter was trained on them (the first 300 chose its best
epoch). Judged on test rows of all tasks, the left-out ones and mr too, beside the start, the own adapters and the
multitask-trained one, with standard errors paired by row.

Every finished run is a line of the log; the same command goes on where it was stopped. `--json FILE` writes the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import multitask, pack, unpack
from compare import versions
from judge import ROOT, minilm, own_adapters
from rich.console import Console
from rich.table import Table

import ties_peft
from ties_peft.evaluation.evaluate import make_scorer
from ties_peft.evaluation.scorers import Scorer
from ties_peft.learning.start import DEFAULTS
from ties_peft.learning.teacher_specs import RANDOM_ROWS

RANDOM = "random tokens and words of the labels"
GAINS = f"{RANDOM}, gains"
SOURCES = ("50 rows", "200 rows", "200 rows of other tasks", RANDOM, GAINS)
TASKS = (*minilm.TASKS, *minilm.HELD_OUT)
LOG = ROOT / "benchmarks" / "learn.jsonl"
Rights = dict[str, str]  # which rows of each task were right, one character a row


class Bench:
    """The loaded base, the test rows, and what the references reach on them.

    Args:
        data: a folder for each task.
        rows: test rows judged in each task, at most.
    """

    def __init__(self, data: Path, rows: int) -> None:
        self.data, self.rows = data, rows
        model, tokenizer = minilm.load_base()
        self.bench = ties_peft.Bench(model, tokenizer, minilm.BASE)
        self.scorers: dict[str, Scorer] = {t: make_scorer(self.bench, self.task(t, "test", rows)) for t in TASKS}
        self._judged: dict[tuple[str, str], str] = {}

    def task(self, name: str, split: str, limit: int | None = None) -> ties_peft.Task:
        """A task's rows of one split, and how they are read."""
        described = tuple(minilm.descriptions(name, self.data))
        path = str(self.data / name / f"{split}.jsonl")
        return ties_peft.Task(
            "descriptions", path, name, limit=limit, descriptions=described, max_tokens=minilm.MAX_TOKENS
        )

    def judge(self, adapter: ties_peft.Adapter | None, tasks: Sequence[str] = TASKS) -> Rights:
        """Which rows an adapter, or the bare base, gets right; what was judged before is not judged again."""
        digest = adapter.digest if adapter else ""
        with self.bench.applied(adapter):
            for task in tasks:
                if (digest, task) not in self._judged:
                    self._judged[digest, task] = pack(torch.tensor(self.scorers[task].score().right))
        return {task: self._judged[digest, task] for task in tasks}

    def recall(self, adapter: ties_peft.Adapter, right: Rights) -> None:
        """What an earlier run found of an adapter."""
        self._judged |= {(adapter.digest, task): own for task, own in right.items()}

    def texts(self, task: str, count: int, seed: int) -> list[str]:
        """Rows without labels, of the validation split."""
        rows = self.task(task, "validation").texts()
        return random.Random(f"{seed} {task}").sample(rows, min(count, len(rows)))

    def distil(self, kind: str, source: str, tasks: Sequence[str], seed: int) -> ties_peft.Distilled:
        """One adapter that imitates those of some tasks."""
        return ties_peft.distil(
            adapters(kind, tasks),
            rows=self._rows(source, tasks, seed),
            tasks=[self.task(task, "validation") for task in tasks],
            bench=self.bench,
            seed=seed,
            fit="gains" if source == GAINS else "factors",
        )

    def _rows(self, source: str, tasks: Sequence[str], seed: int) -> list[Any] | None:
        """What each adapter learns from."""
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
    """Finished runs, a line of a log each, and the making of those that are missing.

    Args:
        log: the file of lines.
        bench: what makes and judges, once something is missing.
    """

    def __init__(self, log: Path, bench: Bench) -> None:
        self.log, self.bench = log, bench
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        self.known = {_key(row): row for row in map(json.loads, lines)}
        for row in self.known.values():
            if row["judged"] == bench.rows:
                bench.recall(together(row["kind"]), row["right"]["multitask"])
                for task, adapter in zip(row["tasks"], adapters(row["kind"], row["tasks"]), strict=True):
                    bench.recall(adapter, {task: row["right"]["own"][task]})

    def find(self, kind: str, source: str, size: int, seed: int) -> dict[str, Any]:
        """One run, from the log or by doing it."""
        key = (kind, source, size, seed, self.bench.rows)
        if key not in self.known:
            self.known[key] = self._make(kind, source, size, seed)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.known[key]) + "\n")
        return self.known[key]

    def _make(self, kind: str, source: str, size: int, seed: int) -> dict[str, Any]:
        """Distil, and judge it beside its references."""
        tasks, bench = chosen(size, seed), self.bench
        made = bench.distil(kind, source, tasks, seed)
        own = adapters(kind, tasks)
        start = ties_peft.merge(own, **beginning(kind, source, own), dtype="float32")
        right = {"distil": bench.judge(made), "start": bench.judge(start), "multitask": bench.judge(together(kind))}
        right["own"] = {task: bench.judge(adapter, [task])[task] for task, adapter in zip(tasks, own, strict=True)}
        report = made.report
        return {
            "kind": kind,
            "source": source,
            "size": size,
            "seed": seed,
            "judged": bench.rows,
            "tasks": list(tasks),
            "seconds": report.seconds,
            "steps": report.steps,
            "divergence": report.divergence,
            "right": right,
        }


def beginning(kind: str, source: str, own: Sequence[ties_peft.Adapter]) -> dict[str, Any]:
    """The merge that distil starts from."""
    if kind == "ia3" or source == GAINS:
        return DEFAULTS["ia3" if kind == "ia3" else "gains"]
    return {**DEFAULTS["factors"], "rank": max(adapter.ranks[-1] for adapter in own)}


def sources(kind: str, asked: Sequence[str]) -> list[str]:
    """Of the sources asked for, those that a kind has: (IA)³ has no directions to fit the gains of."""
    return [source for source in asked if kind == "lora" or source != GAINS]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("kind", "source", "size", "seed", "judged"))


def chosen(size: int, seed: int) -> tuple[str, ...]:
    """Which adapters: of five all but the seed's, of other sizes the seed's own draw."""
    if size == len(minilm.TASKS) - 1:
        return tuple(task for place, task in enumerate(minilm.TASKS) if place != seed % len(minilm.TASKS))
    return random.Random(f"{size} {seed}").choice(list(itertools.combinations(minilm.TASKS, size)))


def adapters(kind: str, tasks: Sequence[str]) -> list[ties_peft.Adapter]:
    """The own adapters of some tasks."""
    return [ties_peft.Adapter.load(own_adapters(kind)[task]) for task in tasks]


def together(kind: str) -> ties_peft.Adapter:
    """The adapter trained on all tasks."""
    return ties_peft.Adapter.load(multitask(kind))


def mean(right: Mapping[str, str], tasks: Sequence[str]) -> float:
    """The mean accuracy over tasks, in percent."""
    return 100 * sum(float(unpack(right[task]).double().mean()) for task in tasks) / len(tasks)


def normalised(row: dict[str, Any], name: str) -> float:
    """The mean share of its own adapter's accuracy, in percent."""
    own = row["right"]["own"]
    return 100 * sum(row["right"][name][t].count("1") / own[t].count("1") for t in own) / len(own)


def paired_error(row: dict[str, Any], one: str, other: str) -> float:
    """The standard error of the difference of two mean accuracies on the same rows, in points."""
    variances = []
    for task in row["tasks"]:
        gaps = unpack(row["right"][one][task]).double() - unpack(row["right"][other][task]).double()
        variances.append(float(gaps.var()) / len(gaps))
    return 100 * math.sqrt(sum(variances)) / len(variances)


def summary(own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one kind, size and source: means over the seeds, and the lowest and highest of what is normalised."""

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


def groups(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A summary for each kind, size, source and number of rows judged."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault((row["kind"] == "ia3", -row["size"], SOURCES.index(row["source"]), row["judged"]), []).append(
            row
        )
    return [summary(alike[key]) for key in sorted(alike)]


def show(found: Sequence[dict[str, Any]], console: Console) -> None:
    """± is the standard error over rows, paired with the multitask-trained adapter."""
    table = Table(box=None, pad_edge=False)
    columns = ("kind", "N", "rows", "seeds", "judged", "start", "distil", "multitask", "own", "mr", "seconds")
    for heading in (*columns, "distil − multitask", "normalised", "of seeds"):
        table.add_column(heading, justify="left" if heading in ("kind", "rows") else "right")
    for row in found:
        cells = [f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c] or "") for c in columns]
        spread = f"{row['lowest']:.1f} … {row['highest']:.1f}" if row["seeds"] > 1 else ""
        gap = f"{row['difference']:+.1f} ± {row['error']:.1f}"
        table.add_row(*cells, gap, f"{row['normalised']:.1f}", spread)
    console.print(table)


def main() -> None:
    """Make the runs that are missing, and print all that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="a folder for each task")
    parser.add_argument("--kinds", nargs="*", default=["lora", "ia3"], choices=["lora", "ia3"])
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--sizes", nargs="*", type=int, default=[6, 5, 4, 3, 2])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=300, help="test rows judged in each task, at most (300)")
    parser.add_argument("--log", type=Path, default=LOG, help="a line for every run")
    parser.add_argument("--json", type=Path, help="write the table of all runs in the log there")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=160)
    runs = Runs(asked.log, Bench(asked.data, asked.rows))
    wanted = [
        (kind, *case)
        for kind in asked.kinds
        for case in itertools.product(sources(kind, asked.sources), asked.sizes, asked.seeds)
    ]
    for number, (kind, source, size, seed) in enumerate(wanted):
        row = runs.find(kind, source, size, seed)
        told = f"{mean(row['right']['start'], row['tasks']):.1f} → {mean(row['right']['distil'], row['tasks']):.1f}"
        console.print(
            f"{number + 1}/{len(wanted)} {kind}, N {size}, {source}, seed {seed}: {told} in {row['seconds']:.0f} s"
        )
    found = groups(list(runs.known.values()))
    show(found, console)
    if asked.json:
        record = {
            "command": "python benchmarks/learn.py --data DIR",
            "split": "test",
            "versions": versions(),
            "runs": found,
        }
        asked.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
