"""Measure what a merge keeps of each adapter and of its accuracy: `python benchmarks/retention.py --data DIR`.

Two questions are asked. Under which `projection` (the share of an adapter's task vector that the merged one holds, as in
every merge's report) has an adapter lost most of its gain? And what helps where norms differ? The adapters are

- the six sample adapters of each type, merged by several methods;
- three of them (trec, subj, cr), one of which has a half, a third, a sixth or a tenth of the mean norm of the other two:
  because it was scaled down (trec; `lora_alpha`, or l − 1), or because its training, that of `adapters/train.py`, was
  stopped when it had that norm (trec, then cr).

The result has for every adapter of every merge: its norm, its own accuracy at that norm, projection, cosine and others,
and the share of its gain over the base that the merged adapter keeps. A threshold for the projection is chosen on
validation rows and evaluated on test rows. Trained adapters and scores are stored in `--work`, from which a stopped run
continues.
"""

from __future__ import annotations

import argparse
import functools
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import FOURTH_ROOT_N, Measurements, Setting
from judge import ROOT, minilm, own_adapters, stretched
from records import Record, versions, write_json
from rich.console import Console

import ties_peft
from ties_peft.merging.tables import make_table, number_column

TOGETHER = ("trec", "subj", "cr")
RATIOS = (2, 3, 6, 10)
SCALED, TRAINED = "scaled down", "trained less"
SMALL = {SCALED: ("trec",), TRAINED: ("trec", "cr")}
NORM = {"weights": "norm"}
SAMPLES = {
    "lora": [Setting(name) for name in ("ties", "task_arithmetic", "average", "iso_c")]
    + [Setting("tsv", scale=FOURTH_ROOT_N)],
    "ia3": [Setting(name) for name in ("ties", "task_arithmetic", "average")],
}
UNEQUAL = [Setting("ties"), Setting("task_arithmetic")]  # on every set of unequal norms
FURTHER = {"lora": [Setting("tsv", scale=FOURTH_ROOT_N)], "ia3": []}  # on the ratios of FEW
REMEDIES = {  # on the ratios of FEW, where one was trained less
    "lora": [
        Setting("ties", extra=NORM),
        Setting("task_arithmetic", extra=NORM),
        Setting("iso_c"),
    ],
    "ia3": [Setting("ties", extra=NORM), Setting("task_arithmetic", extra=NORM)],
}
FEW = (3, 10)
GAIN = 10.0  # points over the base; the share of a smaller gain is not evaluated
HALF = 0.5  # of the gain; an adapter that keeps less counts as lost
ALARMS = 0.05  # the largest share of the adapters that kept half which may be under the threshold


@dataclass(frozen=True)
class Source:
    """One adapter: a sample, or one of smaller norm.

    Attributes:
        kind, task: of the sample.
        way: how it was made smaller; "" for the sample itself.
        ratio: the mean norm of the other adapters, divided by its own.
    """

    kind: str
    task: str
    way: str = ""
    ratio: int = 1

    @property
    def key(self) -> list[Any]:
        """The key of the adapter in the log."""
        return [self.kind, self.task, self.way, self.ratio]

    @property
    def goal(self) -> float:
        """The norm that it should have."""
        others = [norm(self.kind, task) for task in TOGETHER if task != self.task]
        return sum(others) / len(others) / self.ratio

    def open(self, trained: Path) -> ties_peft.Adapter:
        """Open the adapter."""
        path = own_adapters(self.kind)[self.task]
        if self.way == TRAINED:
            return ties_peft.Adapter.load(trained / f"{self.kind}-{self.task}-{self.ratio}")
        return stretched(path, self.goal / norm(self.kind, self.task) if self.way else 1.0)


@functools.cache
def norm(kind: str, task: str) -> float:
    """Return the norm of a sample adapter."""
    return ties_peft.Adapter.load(own_adapters(kind)[task]).norm()


def train(kind: str, task: str, data: Path, folder: Path) -> None:
    """Train a sample adapter as it was trained, save it whenever it reaches the next goal, and stop at the last."""
    import train as samples
    from peft import get_peft_model, get_peft_model_state_dict

    from ties_peft.adapters.adapter import Adapter

    goals = [Source(kind, task, TRAINED, ratio) for ratio in sorted(RATIOS, reverse=True)]
    if all((folder / f"{kind}-{task}-{goal.ratio}").exists() for goal in goals):
        return
    job = next(job for job in samples.JOBS if (job.kind, job.name) == (kind, task))
    torch.manual_seed(job.seed)
    random.seed(job.seed)
    base, tokenizer = minilm.load_base()
    heads = minilm.make_heads(base, tokenizer, job.tasks, data)
    model = get_peft_model(base, job.config())
    with torch.enable_grad():
        for number, _ in enumerate(samples.steps(job, model, tokenizer, heads, data), 1):
            now = Adapter.from_tensors(model.peft_config["default"].to_dict(), get_peft_model_state_dict(model))
            while goals and now.norm() >= goals[0].goal:
                save(now, folder / f"{kind}-{task}-{goals[0].ratio}")
                print(f"{kind}/{task}: norm {now.norm():.2f} after {number} steps", flush=True)
                goals.pop(0)
            if not goals:
                return


def save(adapter: ties_peft.Adapter, folder: Path) -> None:
    """Save an adapter whose config PEFT keeps in sets."""
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in adapter.config.items()}
    adapter.config = plain
    adapter.save(folder, force=True)


class BothSplits:
    """Scores on validation and on test rows, in one log."""

    def __init__(self, data: Path, work: Path, rows: int, chosen_on: int) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.trained = work
        self.splits = {
            split: Measurements(data, split, count, work / "log.jsonl")
            for split, count in (("validation", chosen_on), ("test", rows))
        }

    def _find(self, key: list[Any], tasks: Sequence[str], make: Any) -> dict[str, Record]:
        """Return the records of both splits; the adapter is made once."""
        once = functools.cache(make)
        return {split: own.find(key, tasks, once) for split, own in self.splits.items()}

    def base(self, tasks: Sequence[str]) -> dict[str, Record]:
        """Return the scores of the base alone."""
        return self._find(["base", list(tasks)], tasks, lambda: (None, {}))

    def own(self, source: Source) -> dict[str, Record]:
        """Return the scores of one adapter on its own task, and its norm."""

        def make() -> tuple[ties_peft.Adapter, dict[str, Any]]:
            adapter = source.open(self.trained)
            return adapter, {"norm": adapter.norm()}

        return self._find(["own", *source.key], [source.task], make)

    def merged(self, sources: Sequence[Source], setting: Setting) -> dict[str, Record]:
        """Return the scores of a merge, and what its report says is kept of each adapter.

        If one adapter is smaller than the others, only its task is scored, except for the settings of `UNEQUAL` on the
        ratios of `FEW`.
        """
        small = [source for source in sources if source.way]
        everyone = not small or (setting in UNEQUAL and small[0].ratio in FEW)

        def make() -> tuple[ties_peft.Adapter, dict[str, Any]]:
            merged, _ = setting.merge(sources[0].kind, [source.open(self.trained) for source in sources])
            lines = merged.report.adapters
            return merged, {key: [getattr(line, key) for line in lines] for key in ("projection", "cosine", "others")}

        tasks = [source.task for source in (sources if everyone else small)]
        return self._find(["merged", setting.label, *(source.key for source in sources)], tasks, make)


def cases(kind: str) -> Iterator[tuple[list[Source], list[Setting]]]:
    """Yield every set of adapters of a type with the settings of its merges."""
    yield [Source(kind, task) for task in minilm.TASKS], SAMPLES[kind]
    yield [Source(kind, task) for task in TOGETHER], [*UNEQUAL, *FURTHER[kind]]
    for way in (SCALED, TRAINED):
        for ratio in RATIOS:
            for small in SMALL[way]:
                further = FURTHER[kind] if ratio in FEW else []
                remedies = REMEDIES[kind] if ratio in FEW and way == TRAINED else []
                sources = [Source(kind, t, way, ratio) if t == small else Source(kind, t) for t in TOGETHER]
                yield sources, [*UNEQUAL, *further, *remedies]


def rows_of(measured: BothSplits, kind: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each adapter of each merge of one type."""
    base = measured.base(minilm.TASKS)
    for sources, settings in cases(kind):
        small = next((source for source in sources if source.way), None)
        for setting in settings:
            merged = measured.merged(sources, setting)
            for place, source in enumerate(sources):
                own = measured.own(source)
                row: dict[str, Any] = {
                    "type": kind,
                    "adapters": len(sources),
                    "way": small.way if small else "samples",
                    "ratio": small.ratio if small else 1,
                    "method": setting.label,
                    "task": source.task,
                    "small": source is small,
                    "norm": round(own["test"]["norm"], 3),
                }
                row |= {key: round(merged["test"][key][place], 4) for key in ("projection", "cosine", "others")}
                for split in merged if source.task in merged["test"]["accuracy"] else ():
                    accuracy = [found[split]["accuracy"][source.task] for found in (base, own, merged)]
                    row[split] = dict(zip(("base", "own", "merged"), (round(a, 1) for a in accuracy), strict=True))
                    gain = accuracy[1] - accuracy[0]
                    row[split]["kept"] = round((accuracy[2] - accuracy[0]) / gain, 3) if gain >= GAIN else None
                yield row


def threshold(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the projection under which an adapter has likely lost half of its gain, and the errors on both splits.

    It is the largest, in hundredths, under which lie at most `ALARMS` of the adapters that kept half or more on
    validation rows.
    """
    fitting = [at for at in range(1, 100) if _under(rows, at / 100, "validation")["false alarms"] <= ALARMS]
    chosen = max(fitting) / 100
    return {"threshold": chosen, **{split: _under(rows, chosen, split) for split in ("validation", "test")}}


def _under(rows: Sequence[Mapping[str, Any]], at: float, split: str) -> dict[str, Any]:
    """Count the adapters under a projection, among those that lost half of their gain and among the others."""
    known = [row for row in rows if split in row and row[split]["kept"] is not None]
    lost = [row["projection"] < at for row in known if row[split]["kept"] < HALF]
    rest = [row["projection"] < at for row in known if row[split]["kept"] >= HALF]
    return {
        "lost half": len(lost),
        "of them under it": sum(lost),
        "kept half": len(rest),
        "under it all the same": sum(rest),
        "false alarms": round(sum(rest) / max(1, len(rest)), 3),
    }


def bins(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each interval of the projection the mean share of the gain kept on test rows, and how many lost half."""
    edges = [(-9.0, 0.0), *((low / 10, (low + 1) / 10) for low in range(7)), (0.7, 9.0)]
    found = []
    for low, high in edges:
        kept = [row["test"]["kept"] for row in rows if "test" in row and low <= row["projection"] < high]
        kept = [share for share in kept if share is not None]
        lost = sum(share < HALF for share in kept)
        found.append({"from": low, "to": high, "adapters": len(kept), "kept": _mean(kept, 2), "lost half": lost})
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return means over the adapters of each kind of merge: over those of smaller norm, and over the others."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("type", "way", "ratio", "adapters", "method", "small"))
        groups.setdefault(key, []).append(row)
    found = []
    for (kind, way, ratio, adapters, method, small), own in groups.items():
        line = {"type": kind, "way": way, "ratio": ratio, "adapters": adapters, "method": method, "small": small}
        line |= {key: _mean([row[key] for row in own], 3) for key in ("norm", "projection", "cosine", "others")}
        judged = [row["test"] for row in own if "test" in row]
        line |= {key: _mean([one[key] for one in judged], 1) for key in ("base", "own", "merged")}
        line["kept"] = _mean([one["kept"] for one in judged if one["kept"] is not None], 2)
        found.append(line)
    return found


def _mean(values: Sequence[float], digits: int) -> float | None:
    return round(sum(values) / len(values), digits) if values else None


def show(lines: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the summary as a table."""
    headings = [key if key in ("type", "way", "method") else number_column(key) for key in lines[0]]
    cells = [["–" if value is None else str(value) for value in line.values()] for line in lines]
    console.print(make_table(headings, cells))


def main() -> None:
    """Train the adapters that are missing, merge, score, and choose the threshold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with one for each task")
    parser.add_argument("--types", nargs="*", default=list(SAMPLES), choices=list(SAMPLES))
    parser.add_argument("--rows", type=int, default=300, help="number of test rows of each task (300)")
    parser.add_argument("--chosen-on", type=int, default=100, help="number of validation rows of each task (100)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "demo-out" / "retention", help="folder of trained adapters and the log"
    )
    parser.add_argument("--json", type=Path, help="file to write every row to")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    measured = BothSplits(asked.data, asked.work, asked.rows, asked.chosen_on)
    rows: list[dict[str, Any]] = []
    for kind in asked.types:
        for small in SMALL[TRAINED]:
            train(kind, small, asked.data, asked.work)
        rows += rows_of(measured, kind)
    console = Console(width=160)
    lines = summary(rows)
    show(lines, console)
    found = threshold(rows)
    console.print(found, bins(rows))
    about = {
        "command": "python benchmarks/retention.py --data DIR",
        "rows": asked.rows,
        "chosen on": asked.chosen_on,
        "versions": versions(),
    }
    results = {"threshold": found, "by projection": bins(rows), "means": lines, "every": rows}
    write_json(asked.json, {**about, **results})


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
