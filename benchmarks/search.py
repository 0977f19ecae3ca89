"""Compare a search from a few examples with its controls, on a task that no adapter was trained on.

    python benchmarks/search.py [--data ../shared/data] [--kinds lora ia3] [--rows 5 20 50] [--seeds 10] [--judged 1000]

The adapters are the six samples, the task is mr. For each number of examples and each seed, examples are drawn from mr's
train split (equally many of each label), the search makes its 40 trials, and its result and every control are scored on
mr's test rows. The result of every (kind, rows, seed) is stored in benchmarks/results/search.json and not measured again,
so that a stopped run continues. Printed are the mean over seeds, the standard deviation between seeds, and the paired
difference of the search from each control with its standard error.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "adapters"))

import minilm  # noqa: E402

import ties_peft  # noqa: E402
from ties_peft.evaluation.evaluate import make_scorer  # noqa: E402
from ties_peft.evaluation.task import read_task  # noqa: E402
from ties_peft.search import CONTROLS, TRAINED  # noqa: E402

RESULTS = HERE / "results" / "search.json"
TASK = "mr"


def examples(data: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Return random labelled rows of the train split, with the labels in turn."""
    rows = minilm.read_rows(TASK, "train", data)
    order = list(range(len(rows.texts)))
    random.Random(seed).shuffle(order)
    by_label = {label: [place for place in order if rows.labels[place] == label] for label in sorted(set(rows.labels))}
    chosen = [by_label[place % len(by_label)][place // len(by_label)] for place in range(count)]
    return [{"text": rows.texts[place], "label": rows.labels[place]} for place in chosen]


def task(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a task of some rows."""
    return {"measure": "descriptions", "descriptions": list(minilm.SENTIMENT), "rows": rows, "name": TASK}


class Judge:
    """The accuracy on the first test rows of mr; each adapter is scored once, also if several seeds have it."""

    def __init__(self, bench: ties_peft.Bench, data: Path, judged: int) -> None:
        rows = minilm.read_rows(TASK, "test", data, judged)
        labelled = [{"text": text, "label": label} for text, label in zip(rows.texts, rows.labels, strict=True)]
        self.scorer = make_scorer(bench, read_task(task(labelled)))
        self._known: dict[str, float] = {}

    def __call__(self, adapter: ties_peft.Adapter) -> float:
        """Return the accuracy of an adapter, in [0, 1]."""
        if adapter.digest not in self._known:
            with self.scorer.bench.applied(adapter):
                self._known[adapter.digest] = self.scorer.score().value
        return self._known[adapter.digest]


def measure(
    judge: Judge, data: Path, kind: str, count: int, seed: int, budget: int, controls: Sequence[str]
) -> dict[str, float]:
    """Search, and return the accuracy in percent of the result and of each control."""
    found = ties_peft.search(
        [HERE.parent / "adapters" / kind / name for name in minilm.TASKS],
        task(examples(data, count, seed)),
        budget=budget,
        judge=judge,
        controls=controls,
        seed=seed,
        bench=judge.scorer.bench,
        method="task_arithmetic",  # LoRAHub's weighted sum
        scale=1.0,
        rank="max" if kind == "lora" else "auto",  # (IA)³ vectors have none
    )
    return {"search": 100 * (found.judged or 0), **{c.name: 100 * (c.judged or 0) for c in found.controls}}


def table(results: dict[str, dict[str, float]], kind: str, count: int, asked: argparse.Namespace) -> list[str]:
    """Return the lines for one kind and number of examples, with the same test rows and budget."""
    keys = [f"{kind} {count} {seed} {asked.judged} {asked.budget}" for seed in range(asked.seeds)]
    seeds = [results[key] for key in keys if key in results]
    if not seeds:
        return []
    lines = [f"\n{kind}, {count} examples, {len(seeds)} seeds     mean    sd   search − it"]
    for name in seeds[0]:
        values = [row[name] for row in seeds]
        gaps = [row["search"] - row[name] for row in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        beside = "" if name == "search" else f"   {statistics.fmean(gaps):+5.1f} ± {error:.1f}"
        lines.append(f"{name:<26}{statistics.fmean(values):8.1f}{spread:6.1f}{beside}")
    return lines


def main() -> None:
    """Measure what is not stored yet, and print all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="folder of the tasks")
    parser.add_argument("--kinds", nargs="+", default=["lora", "ia3"], help="of adapters (lora ia3)")
    parser.add_argument("--rows", type=int, nargs="+", default=[5, 20, 50], help="numbers of examples (5 20 50)")
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (10)")
    parser.add_argument("--judged", type=int, default=1000, help="largest number of test rows (1000)")
    parser.add_argument("--budget", type=int, default=40, help="number of trials (40)")
    parser.add_argument(
        "--trained", action="store_true", help="compare with a LoRA trained on the same examples as well"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the results")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, dict[str, float]] = json.loads(asked.out.read_text("utf-8")) if asked.out.exists() else {}
    judge = Judge(ties_peft.Bench.load(minilm.base_source(), "encoder"), asked.data, asked.judged)
    controls = (*CONTROLS, TRAINED) if asked.trained else CONTROLS
    for seed in range(asked.seeds):
        for kind in asked.kinds:
            for count in asked.rows:
                key = f"{kind} {count} {seed} {asked.judged} {asked.budget}"
                if key in results:
                    continue
                results[key] = measure(judge, asked.data, kind, count, seed, asked.budget, controls)
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                staged = asked.out.with_suffix(".part")
                staged.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
                staged.replace(asked.out)
                print(key, {name: round(value, 1) for name, value in results[key].items()}, flush=True)
    for kind in asked.kinds:
        for count in asked.rows:
            print("\n".join(table(results, kind, count, asked)))


if __name__ == "__main__":
    main()
