"""Distil the sample LoRAs of a causal language model into one, and score the result: share of the own adapters, time, memory.

    python benchmarks/distil_language_model.py --data DIR --base DIR --prompts 25 100 --log FILE

DIR of `--data` holds a folder with `train.jsonl`, `validation.jsonl` and `test.jsonl` for each task. The prompts are the
first of `train.jsonl`, without labels and completions. A task's share is that of `language_model.py`: the accuracy as
percent of the own adapter's (classification), or how much of the gap between the base's and the own adapter's loss is closed
(generation); `six` is the mean over the tasks. Every distillation runs in a process of its own, so that its peak memory
can be read. With `--log` a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from causal import SPLITS, TEXT, CausalJudge, factors_of, read_rows
from compare import versions
from language_model import Shares, compact

import smollm2  # isort: skip

import ties_peft

PROMPTS, GENERATED, RANDOM = "prompts", "generated", "random"


@dataclass(frozen=True)
class Case:
    """One distillation: the prompts of each task (or rows to be made), and further arguments of `distil`."""

    source: str
    count: int
    extra: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> list[Any]:
        """What tells it from others, in the log."""
        return [self.source, self.count, dict(self.extra)]


def read_prompts(data: Path, task: str, count: int) -> list[str]:
    """Return the texts of the first rows of a task's training set."""
    field = smollm2.prompting(task).text
    with (data / task / "train.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line)[field] for line, _ in zip(lines, range(count), strict=False)]


def work(case: Case, data: Path, base: str, out: Path) -> dict[str, Any]:
    """Distil, in a process of its own; return seconds, peak memory in GB and what the report says."""
    torch.manual_seed(0)
    given: Any = {RANDOM: case.count}.get(case.source, case.source)
    if case.source == PROMPTS:
        given = [read_prompts(data, task, case.count) for task in smollm2.TASKS]
    extra = dict(case.extra) | ({"count": case.count} if case.source == GENERATED else {})
    estimates: list[Any] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, processor = time.perf_counter(), time.process_time()
    made = ties_peft.distil(
        [smollm2.FOLDER / task for task in smollm2.TASKS],
        rows=given,
        tasks=[smollm2.FOLDER / "tasks" / f"{task}.yaml" for task in smollm2.TASKS],
        base=base,
        on_estimate=estimates.append,
        **extra,
    )
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    made.save(out)
    report = made.report
    return {
        "seconds": round(seconds, 1),
        "processor seconds": round(processor, 1),
        "GB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "GB before": round(before / 2**20, 2),
        "estimated": [[round(one.seconds, 1), round((one.memory or 0) / 2**30, 2)] for one in estimates],
        "rank": report.rank,
        "steps": report.steps,
        "kept": report.kept,
        "divergence": report.divergence,
        "history": report.history,
    }


class Log:
    """What is known: scores and facts, one line each, in a file or in memory alone. Several processes may add to one file."""

    def __init__(self, path: Path | None, rows: int) -> None:
        self.path, self.rows = path, rows
        self.known: dict[str, dict[str, Any]] = {}

    def get(self, name: Sequence[Any]) -> dict[str, Any] | None:
        """Return what is known under a name, here or in another process."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path and self.path.exists() else []
        self.known |= {record["key"]: record for record in map(json.loads, lines)}
        return self.known.get(json.dumps([self.rows, *name]))

    def add(self, name: Sequence[Any], record: Mapping[str, Any]) -> None:
        """Keep a record."""
        key = json.dumps([self.rows, *name])
        self.known[key] = {"key": key, **record}
        if self.path:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(self.known[key]) + "\n")


class Table:
    """Scores adapters and turns the scores into shares; what is known is not scored again."""

    def __init__(self, data: Path, base: str, log: Log) -> None:
        model, tokenizer = smollm2.load_base(base)
        self.judge, self.log = CausalJudge(model, read_rows(data, tokenizer, log.rows)), log
        self.scores("base", None)
        for task in smollm2.TASKS:
            self.scores(task, smollm2.FOLDER / task, [task])

    def scores(self, name: str, folder: Path | None, tasks: Sequence[str] = (*smollm2.TASKS, TEXT)) -> dict[str, Any]:
        """Return the scores of both splits of an adapter (None: of the base)."""
        known = self.log.get(["scores", name])
        if known is None:
            factors = {} if folder is None else factors_of(ties_peft.Adapter.load(folder))
            keys = [key for key in self.judge.rows if key[1] in tasks]
            found: dict[str, Any] = {split: {} for split in SPLITS}
            for (split, task), scored in self.judge.score(factors, keys).items():
                found[split][task] = compact(scored)
            known = {"scores": found}
            self.log.add(["scores", name], known)
        result: dict[str, Any] = known["scores"]
        return result

    def line(self, name: str, folder: Path) -> dict[str, Any]:
        """Return the shares of an adapter on both splits."""
        found, row = self.scores(name, folder), {}
        for split in SPLITS:
            own = {task: self.scores(task, None)[split][task] for task in smollm2.TASKS}
            tokens = {
                task: [len(one.completion) for one in rows.examples]
                for (of, task), rows in self.judge.rows.items()
                if of == split and rows.choices is None
            }
            shares = Shares(self.scores("base", None)[split], own, tokens)
            each = shares.shares(found[split], smollm2.TASKS)
            row[split] = {
                "six": mean(each.values()),
                "classification": mean(each[task] for task in smollm2.CLASSIFICATION),
                "generation": mean(each[task] for task in smollm2.GENERATION),
                **{task: round(share, 1) for task, share in each.items()},
                "text": shares.perplexity(found[split]),
            }
        return row


def mean(values: Any) -> float:
    """Return the mean, to two digits."""
    numbers = list(values)
    return round(sum(numbers) / len(numbers), 2)


def results(log: Log, label: str, cases: Sequence[Case]) -> dict[str, Any]:
    """Return what is stored: of each distillation how it was asked for and what came out."""
    counts = {
        source: [str(case.count) for case in cases if case.source == source] for source in (PROMPTS, GENERATED, RANDOM)
    }
    options = " ".join(f"--{source} {' '.join(some)}" for source, some in counts.items() if some)
    found = [{"source": case.source, "count": case.count, **without_steps(log, label, case)} for case in cases]
    command = f"python benchmarks/distil_language_model.py --data DIR --base DIR {options} --rows {log.rows}"
    return {"command": command, "rows": log.rows, **versions(), "cases": found}


def without_steps(log: Log, label: str, case: Case) -> dict[str, Any]:
    """Return what is known of a distillation, without its key in the log and without the loss of each step."""
    known = log.get([label, *case.name]) or {}
    return {key: value for key, value in known.items() if key not in ("key", "history")}


def main() -> None:
    """Distil and score what is not known yet, and print every result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", required=True, help="a folder of the base model, such as smollm2.py --save writes")
    parser.add_argument("--prompts", type=int, nargs="*", default=[], help="numbers of prompts a task")
    parser.add_argument("--generated", type=int, nargs="*", default=[], help="numbers of rows that each adapter writes")
    parser.add_argument("--random", type=int, nargs="*", default=[], help="numbers of rows of random tokens")
    parser.add_argument("--rows", type=int, default=100, help="to score by, of each task and split")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="further arguments of distil")
    parser.add_argument("--label", default="", help="part of the names in the log")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--adapters", type=Path, help="keep the adapters in this folder")
    parser.add_argument("--json", type=Path, help="write the results there")
    asked = parser.parse_args()
    extra = tuple(sorted((name, yaml.safe_load(value)) for name, _, value in (one.partition("=") for one in asked.set)))
    cases = [
        Case(source, count, extra)
        for source, counts in ((PROMPTS, asked.prompts), (GENERATED, asked.generated), (RANDOM, asked.random))
        for count in counts
    ]
    log, table = Log(asked.log, asked.rows), None
    for case in cases:
        name = [asked.label, *case.name]
        if log.get(name) is None:
            with tempfile.TemporaryDirectory() as temporary:
                out = Path(temporary) / "made"
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    facts = pool.apply(work, (case, asked.data, asked.base, out))
                table = table or Table(asked.data, asked.base, log)
                log.add(name, {**facts, **table.line(json.dumps(name), out)})
                if asked.adapters:
                    out.rename(asked.adapters / "-".join(map(str, name[:3])))
        print(json.dumps(log.get(name)), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(results(log, asked.label, cases), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
