"""Methods on real tasks: `python benchmarks/compare.py --data DIR`, on the sample adapters.

For every method, space and rank: accuracy on the rows of each task, their mean, the mean of what each
own adapter reaches (normalised), accuracy on mr, which no adapter was trained on (held out), seconds of
merging and energy kept. One base model stays loaded; each merged task vector is added to its weights
and taken out again. `--subsets` asks the same of some pairs, triples, … of the adapters instead.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import ties_peft

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "adapters"))
import minilm  # noqa: E402  (the samples' setting lies beside the adapters)


@dataclass(frozen=True)
class Setting:
    """One way of merging."""

    method: str
    space: str = "delta"
    rank: int | str = "auto"
    scale: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        extra = "".join(f", {key} {value}" for key, value in self.extra.items())
        return f"{self.method}{'' if self.scale is None else f' λ {self.scale:g}'}{extra}"


LORA = [
    Setting("average"),
    Setting("task_arithmetic"),
    *(Setting("ties", rank=rank) for rank in (16, 32, "auto", "max")),
    Setting("ties", rank=16, extra={"restore_norm": True}),
    Setting("ties", extra={"scope": "module"}),
    Setting("ties", space="core"),
    Setting("ties", space="core", extra={"balanced": False}),
    Setting("ties", space="core", rank=16, extra={"compress_first": True}),
    Setting("ties", space="knots"),
    Setting("ties", space="knots", scale=1.5),
    Setting("ties", space="factors"),
    Setting("magnitude_prune"),
    Setting("dare"),
    Setting("dare_ties"),
    Setting("dare_ties", space="core"),
    Setting("della"),
    Setting("breadcrumbs"),
    Setting("breadcrumbs_ties"),
    Setting("sce"),
    Setting("consensus"),
    Setting("pcb"),
    Setting("emr"),
    Setting("karcher"),
    Setting("model_stock"),
    Setting("tsv"),
    Setting("tsv", scale=0.6),
    Setting("tsv", scale=0.6, rank=16),
    Setting("tsv", scale=0.6, rank=16, extra={"restore_norm": True}),
    Setting("flat_tsv"),
    Setting("flat_tsv", rank=16),
    Setting("flat_tsv", rank=32),
    Setting("iso_c"),
    Setting("iso_c", scale=1.3),
    Setting("iso_cts"),
    Setting("pico"),
    Setting("pico+ties", space="core"),
    Setting("boosting", scale=0.4),
    Setting("svc"),
    Setting("wudi"),
    Setting("lego"),
]
IA3 = [
    *(
        Setting(name)
        for name in ("average", "task_arithmetic", "ties", "magnitude_prune", "dare", "dare_ties", "della")
    ),
    *(Setting(name) for name in ("breadcrumbs", "breadcrumbs_ties", "sce", "consensus", "pcb", "emr", "karcher")),
    *(Setting(name) for name in ("model_stock", "power_mean", "product")),
    Setting("ties", extra={"density": 1}),
]
CANDIDATES = {
    "lora": [
        Setting("average"),
        Setting("task_arithmetic"),
        Setting("ties"),
        Setting("ties", space="knots"),
        Setting("tsv", scale=0.6),
        Setting("iso_c"),
        Setting("iso_c", scale=1.3),
        Setting("flat_tsv"),
    ],
    "ia3": [Setting("average"), Setting("task_arithmetic"), Setting("ties"), Setting("power_mean")],
}


class Judge:
    """The base, its heads and the rows to judge by."""

    def __init__(self, data: Path, split: str, rows: int) -> None:
        self.base, self.tokenizer = minilm.load_base()
        self.tasks = (*minilm.TASKS, *minilm.HELD_OUT)
        self.heads = minilm.make_heads(self.base, self.tokenizer, self.tasks, data)
        self.rows = {task: minilm.read_rows(task, split, data, rows) for task in self.tasks}
        self.weights = {name: module.weight for name, module in self.base.named_modules() if hasattr(module, "weight")}

    def score(self, adapter: ties_peft.Adapter | None, tasks: Sequence[str]) -> dict[str, float]:
        """Accuracy on each task with an adapter, or of the bare base."""
        with self.wearing(adapter):
            return {t: minilm.accuracy(self.base, self.tokenizer, self.heads[t], self.rows[t]) for t in tasks}

    @contextmanager
    def wearing(self, adapter: ties_peft.Adapter | None) -> Iterator[None]:
        """The base with the adapter's effect in its weights (and, for (IA)³, biases), put back afterwards."""
        modules = dict(self.base.named_modules())
        names = adapter.modules if adapter else ()
        kept = {n: (modules[n].weight.data.clone(), modules[n].bias.data.clone()) for n in names}
        for name in names:
            wear(modules[name], adapter, name)
        yield
        for name, (weight, bias) in kept.items():
            modules[name].weight.data, modules[name].bias.data = weight, bias


def wear(layer: Any, adapter: ties_peft.Adapter, name: str) -> None:
    """Put one module's task vector into a linear layer."""
    delta = adapter.delta(name)
    if delta.dim() == 2:
        layer.weight.data += delta
    elif adapter.module(name).on_input:
        layer.weight.data *= 1 + delta
    else:
        layer.weight.data *= (1 + delta).unsqueeze(1)
        layer.bias.data *= 1 + delta


def merge(setting: Setting, paths: Sequence[Path]) -> tuple[ties_peft.Merged, float]:
    started = time.perf_counter()
    merged = ties_peft.merge(
        paths, setting.method, setting.space, scale=setting.scale, rank=setting.rank, dtype="float32", **setting.extra
    )
    return merged, time.perf_counter() - started


def line(judge: Judge, setting: Setting, paths: Sequence[Path], own: dict[str, float]) -> dict[str, Any]:
    """One row of the table."""
    merged, seconds = merge(setting, paths)
    scores = judge.score(merged, judge.tasks)
    seen = [task for task in minilm.TASKS if task in own]
    return {
        "method": setting.label,
        "space": setting.space,
        "rank": merged.report.rank,
        **scores,
        "mean": sum(scores[t] for t in seen) / len(seen),
        "normalised": 100 * sum(scores[t] / own[t] for t in seen) / len(seen),
        "seconds": seconds,
        "energy": merged.report.energy,
    }


def references(judge: Judge, kind: str, own: dict[str, float]) -> list[dict[str, Any]]:
    """What merges are measured against: the base, each own adapter, the multitask-trained adapter."""
    rows = []
    multitask = ROOT / "adapters" / "multitask" / kind
    givers: list[tuple[str, dict[str, float]]] = [("base", judge.score(None, judge.tasks)), ("own adapters", own)]
    if multitask.exists():
        givers.append(("multitask-trained", judge.score(ties_peft.Adapter.load(multitask), judge.tasks)))
    for label, scores in givers:
        mean = sum(scores[t] for t in minilm.TASKS) / len(minilm.TASKS)
        normalised = 100 * sum(scores[t] / own[t] for t in minilm.TASKS) / len(minilm.TASKS)
        rows.append({"method": label, "space": "", "rank": None, **scores, "mean": mean, "normalised": normalised})
    return rows


def whole(judge: Judge, kind: str, console: Console) -> list[dict[str, Any]]:
    """Every setting on all six adapters."""
    paths = {task: ROOT / "adapters" / kind / task for task in minilm.TASKS}
    own = {task: judge.score(ties_peft.Adapter.load(path), [task])[task] for task, path in paths.items()}
    rows = references(judge, kind, own)
    for setting in LORA if kind == "lora" else IA3:
        try:
            rows.append(line(judge, setting, list(paths.values()), own))
        except ties_peft.TiesPeftError as error:
            console.print(f"{setting.label}, {setting.space}: {error}", style="red")
    return rows


def subsets(judge: Judge, kind: str, per_size: int) -> list[dict[str, Any]]:
    """The candidates for a default on some subsets of two to six adapters: mean normalised accuracy."""
    paths = {task: ROOT / "adapters" / kind / task for task in minilm.TASKS}
    own = {task: judge.score(ties_peft.Adapter.load(path), [task])[task] for task, path in paths.items()}
    rows = []
    for size in range(2, len(paths) + 1):
        everyone = list(itertools.combinations(paths, size))
        chosen = random.Random(size).sample(everyone, min(per_size, len(everyone)))
        for setting in CANDIDATES[kind]:
            found = []
            for tasks in chosen:
                merged, _ = merge(setting, [paths[task] for task in tasks])
                scores = judge.score(merged, tasks)
                found.append(100 * sum(scores[t] / own[t] for t in tasks) / size)
            rows.append(
                {"method": setting.label, "space": setting.space, "size": size, "sets": chosen, "normalised": found}
            )
    return rows


def print_whole(rows: Sequence[dict[str, Any]], console: Console, title: str) -> None:
    table = Table(title=title, box=None, pad_edge=False)
    columns = (*minilm.TASKS, "mean", "normalised", *minilm.HELD_OUT, "seconds", "energy")
    for heading in ("method", "space", "rank", *columns):
        table.add_column(heading, justify="left" if heading in ("method", "space") else "right")
    for row in rows:
        digits = {"energy": 2, "seconds": 2}
        cells = [f"{row[c]:.{digits.get(c, 1)}f}" if row.get(c) is not None else "–" for c in columns]
        table.add_row(row["method"], row["space"], str(row["rank"] or "–"), *cells)
    console.print(table)


def print_subsets(rows: Sequence[dict[str, Any]], console: Console, title: str) -> None:
    sizes = sorted({row["size"] for row in rows})
    table = Table(title=title, box=None, pad_edge=False)
    for heading in ("method", "space", *(f"N = {size}" for size in sizes)):
        table.add_column(heading, justify="left" if heading in ("method", "space") else "right")
    for label, space in dict.fromkeys((row["method"], row["space"]) for row in rows):
        own = {row["size"]: row["normalised"] for row in rows if (row["method"], row["space"]) == (label, space)}
        table.add_row(label, space, *(f"{sum(own[s]) / len(own[s]):.1f}" for s in sizes))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--kinds", nargs="*", default=["lora", "ia3"])
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--split", default="test", help="validation, when something is to be chosen")
    parser.add_argument("--subsets", type=int, metavar="PER_SIZE", help="so many subsets of each size")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=200)
    judge = Judge(asked.data, asked.split, asked.rows)
    found = {}
    for kind in asked.kinds:
        title = f"{kind}, {asked.rows} {asked.split} rows a task"
        if asked.subsets:
            found[kind] = subsets(judge, kind, asked.subsets)
            print_subsets(found[kind], console, f"{title}: mean accuracy, own adapters = 100")
        else:
            found[kind] = whole(judge, kind, console)
            print_whole(found[kind], console, title)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
