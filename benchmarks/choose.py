"""Compare the ways to one adapter, by what they need, on the sample adapters: `python benchmarks/choose.py --data DIR`.

A way needs nothing beside the adapters, or text and the base, or labels, or all training data. For every way from all six
adapters to one, of LoRA and of (IA)³, the table has: the accuracy on the test rows of each task, their mean, the mean with
each own adapter's accuracy as 100 (normalised), the difference of the mean from that of TIES by its defaults with the
paired standard error, the accuracy on mr, which no adapter was trained on, and leave-one-out: the mean accuracy on each
task with its own adapter and its texts left out. Ways that use an adapter trained on all tasks have no leave-one-out, and
distil has it only with the rows that `--apart` names, because it takes six runs.

Texts and labels are of the validation split, on which no adapter was trained. The scores of distil are means over the seeds
(see `learn.py`, whose log is used and filled); those of other ways are of seed 0.

Every finished way is a line of `--log`, from which a stopped run continues; `--json FILE` writes the table.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cases import FOURTH_ROOT_N, ROOT_N, Setting, multitask, unpack
from compare import SIGNS, show
from judge import ROOT, minilm, own_adapters, paired
from learn import GAINS, LOG, RANDOM, SOURCES, TASKS, Evaluator, Rights, Runs
from learn import sources as sources_of
from records import Records, make_parser, versions, write_json
from rich.console import Console

import ties_peft
from ties_peft.evaluation.evaluate import make_scorer

FEW = 32  # labelled rows of a task
STATISTICS_ROWS = 100  # of a task
NOTHING, TEXT, LABELS, TRAINING = "nothing", "text, base", "labels, base", "all training data"
REFERENCE = "ties"


@dataclass(frozen=True)
class Way:
    """One way to an adapter.

    Attributes:
        name: for the table.
        needs: what it needs beside the adapters.
        make: returns the adapter of some tasks.
        apart: whether it is also scored with each adapter left out.
    """

    name: str
    needs: str
    make: Callable[[Sequence[str]], ties_peft.Adapter]
    apart: bool = True


class Ways:
    """The ways to one adapter from adapters of one kind; statistics are gathered once."""

    def __init__(self, evaluator: Evaluator, kind: str) -> None:
        self.evaluator, self.kind = evaluator, kind
        self._with_statistics: dict[tuple[str, str], ties_peft.Adapter] = {}

    def every(self) -> list[Way]:
        """Return all ways except distil."""
        lora = self.kind == "lora"
        best = Setting("tsv", scale=FOURTH_ROOT_N) if lora else Setting("task_arithmetic", scale=ROOT_N)
        plain = [Setting("average"), Setting("task_arithmetic"), Setting(REFERENCE), best]
        made = [Way(setting.label, NOTHING, self._merging(setting)) for setting in plain]
        made.append(Way("fisher", TEXT, self._merging_by_statistics("fisher")))
        normalised = self._merging_by_statistics("fisher", normalize_fisher=True)
        made.append(Way("fisher, normalize_fisher", TEXT, normalised))
        if lora:
            made.append(Way("regmean", TEXT, self._merging_by_statistics("regmean")))
        made += [
            Way("ties, signs of 32 rows a task", LABELS, self._signs),
            Way("search of weights, 32 rows a task", LABELS, self._search),
            Way("ties, signs of the multitask adapter", TRAINING, self._merging(Setting("ties", extra=SIGNS)), apart=False),
            Way("multitask adapter", TRAINING, lambda tasks: ties_peft.Adapter.load(multitask(self.kind)), apart=False),
        ]  # fmt: skip
        return made

    def own(self, tasks: Sequence[str]) -> list[ties_peft.Adapter]:
        """Return the adapters of some tasks."""
        return [ties_peft.Adapter.load(own_adapters(self.kind)[task]) for task in tasks]

    def _merging(self, setting: Setting) -> Callable[[Sequence[str]], ties_peft.Adapter]:
        return lambda tasks: setting.merge(self.kind, self.own(tasks))[0]

    def _merging_by_statistics(self, method: str, **parameters: Any) -> Callable[[Sequence[str]], ties_peft.Adapter]:
        def make(tasks: Sequence[str]) -> ties_peft.Adapter:
            adapters = [self._own_with_statistics(task, "fisher" if method == "fisher" else "gram") for task in tasks]
            return ties_peft.merge(adapters, method, dtype="float32", **parameters)

        return make

    def _own_with_statistics(self, task: str, statistic: str) -> ties_peft.Adapter:
        """Return a task's own adapter with statistics attached."""
        if (task, statistic) not in self._with_statistics:
            (adapter,) = self.own([task])
            rows = tuple({"text": text} for text in self.evaluator.texts(task, STATISTICS_ROWS, 0))
            asked = replace(self.evaluator.task(task, "validation"), rows=rows)
            labels = {"labels": "sampled"} if statistic == "fisher" else {}
            ties_peft.gather_statistics(adapter, asked, statistic, bench=self.evaluator.bench, save=False, **labels)
            self._with_statistics[task, statistic] = adapter
        return self._with_statistics[task, statistic]

    def _few_rows(self, task: str) -> ties_peft.Task:
        """Return a task with a few labelled rows."""
        asked = self.evaluator.task(task, "validation")
        rows = asked.read()
        return replace(asked, rows=tuple(random.Random(f"few {task}").sample(rows, FEW)))

    def _signs(self, tasks: Sequence[str]) -> ties_peft.Adapter:
        few = [self._few_rows(task) for task in tasks]
        signs = ties_peft.few_shot_signs(self.own(tasks), few, bench=self.evaluator.bench)
        return ties_peft.merge(self.own(tasks), "ties", sign_from=signs, dtype="float32")

    def _search(self, tasks: Sequence[str]) -> ties_peft.Adapter:
        scorers = [make_scorer(self.evaluator.bench, self._few_rows(task)) for task in tasks]

        def objective(adapter: ties_peft.Adapter) -> float:
            with self.evaluator.bench.applied(adapter):
                return -sum(scorer.score().loss or 0.0 for scorer in scorers) / len(scorers)

        rank = {"rank": "max"} if self.kind == "lora" else {}  # (IA)³ vectors have none
        found = ties_peft.search(self.own(tasks), objective, controls=(), method="task_arithmetic", scale=1.0, **rank)
        return found.adapter


def whole(
    ways: Ways, log: Records, runs: Runs, seeds: Sequence[int], sources: Sequence[str], apart: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row for every way of one kind."""
    kind = ways.kind
    own: Rights = {}
    for task in minilm.TASKS:
        own |= score(ways, log, [kind, "own", task], lambda task=task: ways.own([task])[0], [task])  # type: ignore[misc]
    base = score(ways, log, ["base"], lambda: None)
    found = {"base": (NOTHING, _rights(base)), "own adapter of each task": (NOTHING, _rights(own))}
    left = {"base": sum(map(_accuracy, [_rights(base)[task] for task in minilm.TASKS])) / len(minilm.TASKS)}
    for way in ways.every():
        made = score(ways, log, [kind, way.name], lambda way=way: way.make(minilm.TASKS))  # type: ignore[misc]
        found[way.name] = (way.needs, _rights(made))
        if way.apart:
            left[way.name] = _left_out(ways, way, log)
    for source in sources_of(kind, sources) if seeds else ():
        needs = "base" if source in (RANDOM, GAINS) else TEXT
        lines = [runs.find(kind, source, len(minilm.TASKS), seed)["right"]["distil"] for seed in seeds]
        found[f"distil, {source}"] = (needs, _mean([_rights(line) for line in lines]))
        if source in apart:
            left[f"distil, {source}"] = _distilled_apart(kind, source, runs)
    against, singles = found[REFERENCE][1], found["own adapter of each task"][1]
    return [row(name, *way, singles, against, left.get(name)) for name, way in found.items()]


def score(
    ways: Ways,
    log: Records,
    key: Sequence[str],
    make: Callable[[], ties_peft.Adapter | None],
    tasks: Sequence[str] = TASKS,
) -> Rights:
    """Return which rows an adapter gets right, from the log or by making and scoring it."""
    evaluator = ways.evaluator
    right: Rights = log.find(lambda: {"right": evaluator.score(make(), tasks)}, evaluator.rows, *key)["right"]
    return right


def _left_out(ways: Ways, way: Way, log: Records) -> float:
    """Return the mean over tasks of the accuracy without the task's own adapter, in percent."""
    total = 0.0
    for task in minilm.TASKS:
        rest = [other for other in minilm.TASKS if other != task]
        key = [ways.kind, way.name, f"without {task}"]
        found = score(ways, log, key, lambda rest=rest: way.make(rest), [task])  # type: ignore[misc]
        total += _accuracy(unpack(found[task]))
    return total / len(minilm.TASKS)


def _distilled_apart(kind: str, source: str, runs: Runs) -> float:
    """Return the same for distil, from the runs of `learn.py` with five adapters, in which seed s leaves out task s."""
    count = len(minilm.TASKS)
    made = [runs.find(kind, source, count - 1, seed)["right"]["distil"] for seed in range(count)]
    return sum(_accuracy(unpack(one[task])) for one, task in zip(made, minilm.TASKS, strict=True)) / count


def row(
    name: str,
    needs: str,
    rights: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    against: Mapping[str, torch.Tensor],
    left: float | None,
) -> dict[str, Any]:
    """Return one row of the table, in percent and points."""
    accuracy = {task: _accuracy(rights[task]) for task in TASKS if task in rights}
    difference, error = paired([({t: rights[t] for t in minilm.TASKS}, {t: against[t] for t in minilm.TASKS})])
    count = len(minilm.TASKS)
    return {
        "way": name,
        "needs": needs,
        **{task: round(value, 1) for task, value in accuracy.items()},
        "mean": round(sum(accuracy[task] for task in minilm.TASKS) / count, 2),
        "normalised": round(100 * sum(accuracy[task] / _accuracy(own[task]) for task in minilm.TASKS) / count, 2),
        **({} if left is None else {"left out": round(left, 2)}),
        "difference": round(difference, 2),
        "error": round(error, 2),
    }


def _rights(packed: Mapping[str, str]) -> dict[str, torch.Tensor]:
    return {task: unpack(text).double() for task, text in packed.items()}


def _mean(several: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the mean over seeds, row by row."""
    scored = {task: [one[task] for one in several if task in one] for one in several for task in one}
    return {task: torch.stack(found).mean(0) for task, found in scored.items()}


def _accuracy(right: torch.Tensor) -> float:
    return 100.0 * float(right.double().mean())


def main() -> None:
    """Make the adapters that are missing, and print the tables."""
    parser = make_parser(__doc__, 300, ROOT / "benchmarks" / "choose.jsonl")
    parser.add_argument("--kinds", nargs="*", default=["lora", "ia3"], choices=["lora", "ia3"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of distil (0 1 2); none leaves it out")
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=SOURCES, help="of distil's rows (all)")
    parser.add_argument(
        "--apart",
        nargs="*",
        default=["200 rows"],
        choices=SOURCES,
        help="sources of rows with which distil has leave-one-out (200 rows)",
    )
    parser.add_argument("--learn-log", type=Path, default=LOG, help="log of learn.py")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=220)
    evaluator = Evaluator(asked.data, asked.rows)
    log, runs = Records(asked.log), Runs(asked.learn_log, evaluator)
    command = f"python benchmarks/choose.py --data DIR --rows {asked.rows} --seeds {' '.join(map(str, asked.seeds))}"
    if asked.sources != list(SOURCES):
        command += f" --sources {' '.join(map(repr, asked.sources))}"
    found: dict[str, Any] = {"command": command, "split": "test", "rows": asked.rows, "versions": versions()}
    for kind in asked.kinds:
        found[kind] = whole(Ways(evaluator, kind), log, runs, asked.seeds, asked.sources, asked.apart)
        show(found[kind], console, f"{kind}, {asked.rows} test rows a task")
    write_json(asked.json, found)


if __name__ == "__main__":
    main()
