"""What to use with nothing, with text, with labels: `python benchmarks/choose.py --data DIR`, on the sample adapters.

Every way to one adapter from all six, LoRA and (IA)³: accuracy on the test rows of each task, their mean, the same with each
own adapter's accuracy as 100 (normalised), the mean's difference from TIES as it comes with its paired standard
error, accuracy on mr, which no adapter was trained on, and leave-one-out: each task judged with its own adapter and its
texts left out, in the mean over the six. What rests on an adapter trained on all tasks has none, and of distil only the
sources that `--apart` names, since each is learnt six times over.

Text is from the validation split, labels from its rows too: no adapter was trained on them. What distil gives is the mean over
the seeds that were asked for (see `learn.py`, whose log is used and filled), of all else seed 0.

Every finished way is a line of `--log`, so that a run which was stopped goes on where it was; `--json FILE` writes the table.
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cases import FOURTH_ROOT_N, ROOT_N, Setting, multitask, unpack
from compare import SIGNS, show, versions
from judge import ROOT, minilm, own_adapters, paired
from learn import GAINS, LOG, RANDOM, SOURCES, TASKS, Bench, Runs
from learn import sources as sources_of
from rich.console import Console

import ties_peft
from ties_peft.evaluation.evaluate import make_scorer

FEW = 32  # labelled rows of a task
READ = 100  # rows of a task for statistics
NOTHING, TEXT, LABELS, TRAINING = "nothing", "text, base", "labels, base", "all training data"
REFERENCE = "ties"
Rights = dict[str, str]


@dataclass(frozen=True)
class Way:
    """One way to an adapter.

    Attributes:
        name: for the table.
        needs: what one has to have beside the adapters.
        make: the adapter of some tasks.
        apart: whether it is judged with each adapter left out, too.
    """

    name: str
    needs: str
    make: Callable[[Sequence[str]], ties_peft.Adapter]
    apart: bool = True


class Kitchen:
    """Adapters of one kind, and what of them is made once."""

    def __init__(self, bench: Bench, kind: str) -> None:
        self.bench, self.kind = bench, kind
        self._read: dict[tuple[str, str], ties_peft.Adapter] = {}

    def ways(self) -> list[Way]:
        """All but what distil gives."""
        lora = self.kind == "lora"
        best = Setting("tsv", scale=FOURTH_ROOT_N) if lora else Setting("task_arithmetic", scale=ROOT_N)
        plain = [Setting("average"), Setting("task_arithmetic"), Setting(REFERENCE), best]
        made = [Way(setting.label, NOTHING, self._merging(setting)) for setting in plain]
        made.append(Way("fisher", TEXT, self._knowing("fisher")))
        made.append(Way("fisher, normalize_fisher", TEXT, self._knowing("fisher", normalize_fisher=True)))
        if lora:
            made.append(Way("regmean", TEXT, self._knowing("regmean")))
        made += [
            Way("ties, signs of 32 rows a task", LABELS, self._signs),
            Way("search of weights, 32 rows a task", LABELS, self._search),
            Way("ties, signs of the multitask adapter", TRAINING, self._merging(Setting("ties", extra=SIGNS)), apart=False),
            Way("multitask adapter", TRAINING, lambda tasks: ties_peft.Adapter.load(multitask(self.kind)), apart=False),
        ]  # fmt: skip
        return made

    def own(self, tasks: Sequence[str]) -> list[ties_peft.Adapter]:
        """The adapters of some tasks."""
        return [ties_peft.Adapter.load(own_adapters(self.kind)[task]) for task in tasks]

    def _merging(self, setting: Setting) -> Callable[[Sequence[str]], ties_peft.Adapter]:
        return lambda tasks: setting.merge(self.kind, self.own(tasks))[0]

    def _knowing(self, method: str, **parameters: Any) -> Callable[[Sequence[str]], ties_peft.Adapter]:
        """A merge by statistics, which are gathered once."""

        def make(tasks: Sequence[str]) -> ties_peft.Adapter:
            adapters = [self._informed(task, "fisher" if method == "fisher" else "gram") for task in tasks]
            return ties_peft.merge(adapters, method, dtype="float32", **parameters)

        return make

    def _informed(self, task: str, statistic: str) -> ties_peft.Adapter:
        if (task, statistic) not in self._read:
            (adapter,) = self.own([task])
            rows = tuple({"text": text} for text in self.bench.texts(task, READ, 0))
            asked = replace(self.bench.task(task, "validation"), rows=rows)
            labels = {"labels": "sampled"} if statistic == "fisher" else {}
            ties_peft.gather_statistics(adapter, asked, statistic, bench=self.bench.bench, save=False, **labels)
            self._read[task, statistic] = adapter
        return self._read[task, statistic]

    def _few(self, task: str) -> ties_peft.Task:
        """Some labelled rows."""
        asked = self.bench.task(task, "validation")
        rows = asked.read()
        return replace(asked, rows=tuple(random.Random(f"few {task}").sample(rows, FEW)))

    def _signs(self, tasks: Sequence[str]) -> ties_peft.Adapter:
        few = [self._few(task) for task in tasks]
        signs = ties_peft.few_shot_signs(self.own(tasks), few, bench=self.bench.bench)
        return ties_peft.merge(self.own(tasks), "ties", sign_from=signs, dtype="float32")

    def _search(self, tasks: Sequence[str]) -> ties_peft.Adapter:
        scorers = [make_scorer(self.bench.bench, self._few(task)) for task in tasks]

        def objective(adapter: ties_peft.Adapter) -> float:
            with self.bench.bench.applied(adapter):
                return -sum(scorer.score().loss or 0.0 for scorer in scorers) / len(scorers)

        rank = {"rank": "max"} if self.kind == "lora" else {}  # (IA)³ vectors have none
        found = ties_peft.search(self.own(tasks), objective, controls=(), method="task_arithmetic", scale=1.0, **rank)
        return found.adapter


class Log:
    """What was judged, a line each."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path, self.rows = path, rows
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.known: dict[str, Rights] = {record["key"]: record["right"] for record in map(json.loads, lines)}

    def find(self, what: Sequence[str], make: Callable[[], Rights]) -> Rights:
        """From the file, or by doing it."""
        key = json.dumps([self.rows, *what], ensure_ascii=False)
        if key not in self.known:
            self.known[key] = make()
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"key": key, "right": self.known[key]}, ensure_ascii=False) + "\n")
        return self.known[key]


def whole(
    kitchen: Kitchen, log: Log, runs: Runs, seeds: Sequence[int], sources: Sequence[str], apart: Sequence[str]
) -> list[dict[str, Any]]:
    """A row for every way of one kind."""
    kind, judge = kitchen.kind, kitchen.bench.judge
    own: Rights = {}
    for task in minilm.TASKS:
        own |= log.find([kind, "own", task], lambda task=task: judge(kitchen.own([task])[0], [task]))  # type: ignore[misc]
    base = log.find(["base"], lambda: judge(None))
    found = {"base": (NOTHING, _rights(base)), "own adapter of each task": (NOTHING, _rights(own))}
    left = {"base": sum(map(_accuracy, [_rights(base)[task] for task in minilm.TASKS])) / len(minilm.TASKS)}
    for way in kitchen.ways():
        made = log.find([kind, way.name], lambda way=way: judge(way.make(minilm.TASKS)))  # type: ignore[misc]
        found[way.name] = (way.needs, _rights(made))
        if way.apart:
            left[way.name] = _left_out(kind, way, log, judge)
    for source in sources_of(kind, sources) if seeds else ():
        needs = "base" if source in (RANDOM, GAINS) else TEXT
        lines = [runs.find(kind, source, len(minilm.TASKS), seed)["right"]["distil"] for seed in seeds]
        found[f"distil, {source}"] = (needs, _mean([_rights(line) for line in lines]))
        if source in apart:
            left[f"distil, {source}"] = _learnt_apart(kind, source, runs)
    against, singles = found[REFERENCE][1], found["own adapter of each task"][1]
    return [row(name, *way, singles, against, left.get(name)) for name, way in found.items()]


def _left_out(kind: str, way: Way, log: Log, judge: Callable[..., Rights]) -> float:
    """Each task judged with its own adapter left out: the mean accuracy, in percent."""
    total = 0.0
    for task in minilm.TASKS:
        rest = [other for other in minilm.TASKS if other != task]
        found = log.find([kind, way.name, f"without {task}"], lambda r=rest, t=task: judge(way.make(r), [t]))  # type: ignore[misc]
        total += _accuracy(unpack(found[task]))
    return total / len(minilm.TASKS)


def _learnt_apart(kind: str, source: str, runs: Runs) -> float:
    """The same for distil, from the runs of `learn.py` with five adapters: seed s leaves out task s."""
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
    """One line of the table, in percent and points."""
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
    """Row by row, over seeds."""
    judged = {task: [one[task] for one in several if task in one] for one in several for task in one}
    return {task: torch.stack(found).mean(0) for task, found in judged.items()}


def _accuracy(right: torch.Tensor) -> float:
    return 100.0 * float(right.double().mean())


def main() -> None:
    """Make what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="a folder for each task")
    parser.add_argument("--kinds", nargs="*", default=["lora", "ia3"], choices=["lora", "ia3"])
    parser.add_argument("--rows", type=int, default=300, help="test rows judged in each task, at most (300)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of distil (0 1 2); none leaves it out")
    parser.add_argument("--sources", nargs="*", default=list(SOURCES), choices=SOURCES, help="of distil's rows")
    parser.add_argument("--apart", nargs="*", default=["200 rows"], choices=SOURCES, help="with each adapter left out")
    parser.add_argument("--log", type=Path, default=ROOT / "benchmarks" / "choose.jsonl", help="a line for every way")
    parser.add_argument("--learn-log", type=Path, default=LOG, help="that of learn.py")
    parser.add_argument("--json", type=Path, help="write the tables there")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=220)
    bench = Bench(asked.data, asked.rows)
    log, runs = Log(asked.log, asked.rows), Runs(asked.learn_log, bench)
    command = f"python benchmarks/choose.py --data DIR --rows {asked.rows} --seeds {' '.join(map(str, asked.seeds))}"
    if asked.sources != list(SOURCES):
        command += f" --sources {' '.join(map(repr, asked.sources))}"
    found: dict[str, Any] = {"command": command, "split": "test", "rows": asked.rows, "versions": versions()}
    for kind in asked.kinds:
        found[kind] = whole(Kitchen(bench, kind), log, runs, asked.seeds, asked.sources, asked.apart)
        show(found[kind], console, f"{kind}, {asked.rows} test rows a task")
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
