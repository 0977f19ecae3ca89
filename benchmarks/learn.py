"""What distil gives: `python benchmarks/learn.py --data DIR`, on the sample adapters.

One adapter that imitates N = 2 … 6 of the samples, at their own largest rank, from 50 or 200 rows a task without labels,
from rows of other tasks, and from random tokens; three seeds, each with adapters of its own choice. The rows
are of the validation split: no adapter was trained on them (the first 300 chose its best epoch). Judged on test rows,
beside the start, the own adapters and the multitask-trained one, with standard errors paired by row.

Every finished run is a line of the JSON file; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ties_peft
from ties_peft.evaluate import make_exam
from ties_peft.exam import Exam, Score

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "adapters"))
import minilm  # noqa: E402  (the samples' setting lies beside the adapters)

SOURCES = ("50 rows", "200 rows", "200 rows of other tasks", "random tokens")
STARTS = {"lora": {"method": "tsv", "scale": 0.6, "restore_norm": True}, "ia3": {"method": "power_mean"}}


class Bench:
    """The loaded base, the test rows, and what the references reach on them."""

    def __init__(self, data: Path, rows: int) -> None:
        self.data = data
        model, tokenizer = minilm.load_base()
        self.bench = ties_peft.Bench(model, tokenizer, minilm.BASE)
        self.exams: dict[str, Exam] = {t: make_exam(self.bench, self.task(t, "test", rows)) for t in minilm.TASKS}

    def task(self, name: str, split: str, limit: int | None = None) -> ties_peft.Task:
        described = tuple(minilm.descriptions(name, self.data))
        path = str(self.data / name / f"{split}.jsonl")
        return ties_peft.Task(
            "descriptions", path, name, limit=limit, descriptions=described, max_tokens=minilm.MAX_TOKENS
        )

    def judge(self, adapter: ties_peft.Adapter, tasks: Sequence[str]) -> dict[str, Score]:
        with self.bench.wear(adapter):
            return {task: self.exams[task].score() for task in tasks}

    def texts(self, task: str, count: int, seed: int) -> list[str]:
        rows = self.task(task, "validation").texts()
        return random.Random(f"{seed} {task}").sample(rows, min(count, len(rows)))

    def rows(self, source: str, tasks: Sequence[str], seed: int) -> list[Any]:
        """What each adapter learns from."""
        if source == "random tokens":
            return [200] * len(tasks)
        count = int(source.split()[0])
        if "other" not in source:
            return [self.texts(task, count, seed) for task in tasks]
        others = [[t for t in minilm.TASKS if t != task] for task in tasks]
        return [
            random.Random(seed).sample([text for t in rest for text in self.texts(t, count, seed)], count)
            for rest in others
        ]


def chosen(size: int, seed: int) -> tuple[str, ...]:
    """Which adapters: of each size the seed's own draw."""
    return random.Random(f"{size} {seed}").choice(list(itertools.combinations(minilm.TASKS, size)))


def adapters(kind: str, tasks: Sequence[str]) -> list[ties_peft.Adapter]:
    return [ties_peft.Adapter.load(ROOT / "adapters" / kind / task) for task in tasks]


def line(bench: Bench, kind: str, source: str, tasks: Sequence[str], seed: int) -> dict[str, Any]:
    """One run: distil, and judge it beside its references."""
    own = adapters(kind, tasks)
    made = ties_peft.distil(
        own,
        rows=bench.rows(source, tasks, seed),
        tasks=[bench.task(task, "validation") for task in tasks],
        bench=bench.bench,
        seed=seed,
    )
    rank = {"rank": max(adapter.ranks[-1] for adapter in own)} if kind == "lora" else {}
    givers = {
        "distil": made,
        "start": ties_peft.merge(own, **STARTS[kind], **rank),
        "multitask": ties_peft.Adapter.load(ROOT / "adapters" / "multitask" / kind),
    }
    found = {name: bench.judge(adapter, tasks) for name, adapter in givers.items()}
    found["own"] = {task: bench.judge(adapter, [task])[task] for task, adapter in zip(tasks, own, strict=True)}
    return {
        "kind": kind,
        "source": source,
        "size": len(tasks),
        "seed": seed,
        "tasks": list(tasks),
        "seconds": made.report.seconds,
        "steps": made.report.steps,
        "divergence": made.report.divergence,
        "right": {name: {t: [int(r) for r in s.right] for t, s in scores.items()} for name, scores in found.items()},
    }


def mean(scores: dict[str, list[int]]) -> float:
    return 100 * sum(sum(right) / len(right) for right in scores.values()) / len(scores)


def normalised(row: dict[str, Any], name: str) -> float:
    """The mean share of its own adapter's accuracy, in percent."""
    own = row["right"]["own"]
    return 100 * sum(sum(row["right"][name][t]) / sum(own[t]) for t in own) / len(own)


def paired_error(row: dict[str, Any], one: str, other: str) -> float:
    """The standard error of the difference of two mean accuracies on the same rows, in points."""
    variances = []
    for task in row["tasks"]:
        gaps = torch.tensor(row["right"][one][task]).double() - torch.tensor(row["right"][other][task])
        variances.append(float(gaps.var()) / len(gaps))
    return 100 * math.sqrt(sum(variances)) / len(variances)


def print_table(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Means over the seeds; ± is the standard error over rows, paired with the multitask-trained adapter."""
    table = Table(box=None, pad_edge=False)
    headings = (
        "kind",
        "N",
        "rows",
        "seeds",
        "start",
        "distil",
        "multitask",
        "own",
        "distil − multitask",
        "normalised",
        "s",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("kind", "rows") else "right")
    groups = dict.fromkeys((row["kind"], row["size"], row["source"]) for row in rows)
    for kind, size, source in sorted(groups, key=lambda g: (g[0] == "ia3", -g[1], SOURCES.index(g[2]))):
        own = [r for r in rows if (r["kind"], r["size"], r["source"]) == (kind, size, source)]
        average = lambda values: sum(values) / len(own)  # noqa: E731, B023
        cells = [f"{average([mean(r['right'][n]) for r in own]):.1f}" for n in ("start", "distil", "multitask", "own")]
        gap = average([mean(r["right"]["distil"]) - mean(r["right"]["multitask"]) for r in own])
        error = average([paired_error(r, "distil", "multitask") for r in own])
        shares = [normalised(r, "distil") for r in own]
        spread = f"{min(shares):.1f} … {max(shares):.1f}" if len(shares) > 1 else ""
        share = f"{average(shares):.1f} {spread}".strip()
        seconds = f"{average([r['seconds'] for r in own]):.0f}"
        table.add_row(kind, str(size), source, str(len(own)), *cells, f"{gap:+.1f} ± {error:.1f}", share, seconds)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--kinds", nargs="*", default=["lora", "ia3"])
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=SOURCES)
    parser.add_argument("--sizes", nargs="*", type=int, default=[6, 5, 4, 3, 2])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=1000, help="test rows judged in each task, at most")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "learn.jsonl", help="a line for every run")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=160)
    lines = asked.json.read_text(encoding="utf-8").splitlines() if asked.json.exists() else []
    done = [json.loads(text) for text in lines]
    known = {(row["kind"], row["source"], row["size"], row["seed"]) for row in done}
    wanted = [k for k in itertools.product(asked.kinds, asked.sources, asked.sizes, asked.seeds) if k not in known]
    bench = Bench(asked.data, asked.rows) if wanted else None
    for number, (kind, source, size, seed) in enumerate(wanted):
        assert bench is not None
        row = line(bench, kind, source, chosen(size, seed), seed)
        done.append(row)
        with asked.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        told = f"{mean(row['right']['start']):.1f} → {mean(row['right']['distil']):.1f}"
        console.print(
            f"{number + 1}/{len(wanted)} {kind}, N {size}, {source}, seed {seed}: {told} in {row['seconds']:.0f} s"
        )
    print_table(done, console)


if __name__ == "__main__":
    main()
