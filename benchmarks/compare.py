"""Methods on real tasks: `python benchmarks/compare.py --data DIR`, on the sample adapters.

For every method, space and rank: accuracy on the rows of each task, their mean, the same with each own
adapter's accuracy as 100 (normalised), the mean's difference from TIES as it comes with its paired
standard error, accuracy on mr, which no adapter was trained on (held out), seconds of processor time
for the merge, and energy kept. `--subsets` tries the rules that need no tuning on pairs, triples, … of
the adapters instead, and on adapters whose task vectors were stretched or shrunk.

`--world lm` judges LoRAs of a causal language model instead, on validation and on test rows (see `language_model`): all
six, then pairs and fours of them; `--split` says which table is printed, `--json` has both.

With `--log FILE` a run that was stopped goes on where it was; `--json FILE` writes the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import language_model
import torch
from cases import FOURTH_ROOT_N, ROOT_N, Bench, Set, Setting, unpack
from causal import SPLITS
from judge import ROOT, minilm, paired
from rich.console import Console
from rich.table import Table

import ties_peft

LEFT = ("method", "space", "way", "needs")
REFERENCE = Setting("ties")
SIGNS = {"sign_from": "multitask"}
LORA = [
    REFERENCE,
    Setting("average"),
    Setting("task_arithmetic"),
    Setting("task_arithmetic", scale=ROOT_N),
    Setting("auto"),
    *(Setting("auto", rank=rank) for rank in (32, 16)),
    Setting("flat_tsv"),
    Setting("flat_tsv", rank=32),
    Setting("flat_tsv", rank=16),
    Setting("tsv", scale=1.0),
    Setting("tsv", scale=ROOT_N),
    Setting("tsv", scale=FOURTH_ROOT_N),
    *(Setting("tsv", scale=FOURTH_ROOT_N, rank=rank) for rank in (32, 16)),
    Setting("tsv", scale=FOURTH_ROOT_N, rank=16, extra={"restore_norm": True}),
    Setting("tsv", scale=0.6),
    Setting("tsv", scale=0.6, rank=32),
    Setting("tsv", scale=0.6, rank=16),
    Setting("tsv", scale=0.6, rank=16, extra={"restore_norm": True}),
    Setting("iso_c"),
    Setting("iso_c", scale=1.3),
    Setting("iso_cts", scale=1.3),
    *(Setting("ties", rank=rank) for rank in (16, 32, "max")),
    Setting("ties", rank=16, extra={"restore_norm": True}),
    Setting("ties", rank=32, extra={"restore_norm": True}),
    Setting("ties", extra={"scope": "module"}),
    Setting("ties", extra=SIGNS),
    Setting("ties", space="core"),
    Setting("ties", space="core", extra={"balanced": False}),
    Setting("ties", space="core", rank=16, extra={"compress_first": True}),
    Setting("ties", space="knots"),
    Setting("ties", space="knots", scale=1.5),
    Setting("ties", extra={"density": 1}),
    Setting("ties", extra={"elect": "none"}),
    Setting("ties", extra={"disjoint": "mean_elected"}),
    Setting("magnitude_prune"),
    Setting("dare"),
    Setting("dare_ties"),
    Setting("dare_ties", space="core"),
    Setting("della"),
    Setting("della_linear"),
    Setting("breadcrumbs"),
    Setting("breadcrumbs_ties"),
    Setting("sce"),
    Setting("consensus"),
    Setting("pcb"),
    Setting("emr"),
    Setting("karcher"),
    Setting("model_stock"),
    Setting("pico"),
    Setting("pico+ties", space="core"),
    Setting("boosting", scale=0.4),
    Setting("boosting", scale="0.7/sqrt(N)"),
    Setting("svc"),
    Setting("wudi"),
    Setting("lego"),
]
IA3 = [
    REFERENCE,
    Setting("auto"),
    Setting("average"),
    Setting("task_arithmetic"),
    Setting("task_arithmetic", scale=ROOT_N),
    Setting("power_mean"),
    Setting("product"),
    Setting("ties", extra=SIGNS),
    Setting("ties", extra={"scope": "module"}),
    Setting("ties", extra={"density": 1}),
    Setting("ties", extra={"elect": "none"}),
    Setting("ties", extra={"disjoint": "mean_elected"}),
    *(Setting(name) for name in ("magnitude_prune", "dare", "dare_ties", "della", "della_linear")),
    *(Setting(name) for name in ("breadcrumbs", "breadcrumbs_ties", "sce", "consensus", "pcb", "emr")),
    *(Setting(name) for name in ("karcher", "model_stock")),
]
TABLES = {"lora": LORA, "ia3": IA3}
CANDIDATES = {
    "lora": [
        REFERENCE,
        Setting("task_arithmetic", scale=ROOT_N),
        Setting("tsv", scale=ROOT_N),
        Setting("tsv", scale=FOURTH_ROOT_N),
        Setting("flat_tsv"),
        Setting("iso_c"),
        Setting("auto"),
    ],
    "ia3": [
        REFERENCE,
        Setting("task_arithmetic"),
        Setting("task_arithmetic", scale=ROOT_N),
        Setting("power_mean"),
        Setting("auto"),
    ],
}


def sets() -> list[Set]:
    """Two to six adapters: every task in as many pairs, triples, fours as any other; then unlike lengths."""
    pairs = [("sst2", "trec"), ("subj", "banking77"), ("cr", "ag_news")]
    triples = [("sst2", "subj", "ag_news"), ("trec", "cr", "banking77")]
    fours = [tuple(task for pair in pairs if pair != left for task in pair) for left in pairs]
    plain = [*pairs, *triples, *fours, minilm.TASKS]
    return [dict.fromkeys(tasks, 1.0) for tasks in plain] + UNLIKE


UNLIKE: list[Set] = [
    {"sst2": 1.0, "trec": 0.3, "subj": 1.8, "cr": 1.0, "ag_news": 1.8, "banking77": 0.3},
    {"sst2": 0.3, "trec": 1.8, "subj": 1.0, "cr": 1.8, "ag_news": 0.3, "banking77": 1.0},
    {"trec": 0.3, "subj": 1.8, "ag_news": 1.0},
    {"cr": 1.8, "banking77": 0.3},
]


def rights(record: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, torch.Tensor]:
    """Which rows of some tasks were right."""
    return {task: unpack(record["right"][task]) for task in tasks}


def line(label: str, record: Mapping[str, Any], own: Mapping[str, float], against: Mapping[str, Any]) -> dict[str, Any]:
    """One row of a table of all six tasks.

    Args:
        label: what it is.
        record: what came of it.
        own: what each own adapter reaches, in percent.
        against: the record of what it is compared with, row by row.
    """
    accuracy = record["accuracy"]
    difference, error = paired([(rights(record, minilm.TASKS), rights(against, minilm.TASKS))])
    return {
        "method": label,
        "space": record.get("space", ""),
        "rank": record.get("rank"),
        **{task: round(value, 1) for task, value in accuracy.items()},
        "mean": round(sum(accuracy[task] for task in minilm.TASKS) / len(minilm.TASKS), 2),
        "normalised": round(100 * sum(accuracy[task] / own[task] for task in minilm.TASKS) / len(minilm.TASKS), 2),
        "difference": round(difference, 2),
        "error": round(error, 2),
        **{key: round(record[key], 3) for key in ("seconds", "energy") if record.get(key) is not None},
    }


def whole(bench: Bench, kind: str, console: Console, methods: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every setting, or those of some methods, on all six adapters, after what merges are measured against."""
    everyone = dict.fromkeys(minilm.TASKS, 1.0)
    against = bench.merged(kind, everyone, REFERENCE, bench.tasks)
    singles = {task: bench.single(kind, task) for task in minilm.TASKS}
    own = {task: single["accuracy"][task] for task, single in singles.items()}
    together = {key: {task: singles[task][key][task] for task in singles} for key in ("right", "accuracy")}
    references = {"base": bench.base(), "own adapters": together, "multitask-trained": bench.multitask(kind)}
    rows = [line(label, record, own, against) for label, record in references.items()]
    for setting in TABLES[kind]:
        if methods and setting.method not in methods:
            continue
        try:
            record = bench.merged(kind, everyone, setting, bench.tasks)
        except ties_peft.TiesPeftError as error:
            console.print(f"{setting.label}, {setting.space}: {error}", style="red")
            continue
        rows.append(line(setting.label, {**record, "space": setting.space}, own, against))
    return rows


def subsets(bench: Bench, kind: str) -> list[dict[str, Any]]:
    """The candidates for a default, one row each: accuracies relative to the own adapters', by groups of sets."""
    rows = []
    chosen = sets()
    against = [bench.merged(kind, one, REFERENCE, list(one)) for one in chosen]
    for setting in CANDIDATES[kind]:
        records = [bench.merged(kind, one, setting, list(one)) for one in chosen]
        columns: dict[str, list[float]] = {}
        for one, record in zip(chosen, records, strict=True):
            columns.setdefault(group(one), []).append(relative(bench, kind, one, record))
        row: dict[str, Any] = {"method": setting.label, "space": setting.space}
        row |= {name: _mean(values) for name, values in columns.items()}
        row["loss"] = _mean([_mean(list(record["loss"].values()), 5) for record in records], 4)
        for name, unlike in (("", False), (", unlike", True)):
            pairs = [
                (rights(record, list(one)), rights(other, list(one)))
                for one, record, other in zip(chosen, records, against, strict=True)
                if (one in UNLIKE) == unlike
            ]
            difference, error = paired(pairs)
            row |= {f"difference{name}": round(difference, 2), f"error{name}": round(error, 2)}
        rows.append(row)
    return rows


def relative(bench: Bench, kind: str, chosen: Set, record: Mapping[str, Any]) -> float:
    """Mean accuracy, each own adapter's, stretched alike, being 100."""
    own = {task: bench.single(kind, task, gain)["accuracy"][task] for task, gain in chosen.items()}
    return 100 * _mean([record["accuracy"][task] / own[task] for task in chosen], 6)


def group(chosen: Set) -> str:
    """The column of a set: how many adapters, and whether their lengths were made unlike."""
    return f"{len(chosen)} adapters" if set(chosen.values()) == {1.0} else "unlike lengths"


def _mean(values: Sequence[float], digits: int = 2) -> float:
    return round(sum(values) / len(values), digits)


def show(rows: Sequence[Mapping[str, Any]], console: Console, title: str) -> None:
    """Print rows as a table; a column for every key."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if not key.startswith("error")]
    for heading in columns:
        table.add_column(heading, justify="left" if heading in LEFT else "right")
    for row in rows:
        table.add_row(*(_cell(row, key) for key in columns))
    console.print(table)


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is not None and key.startswith("difference"):
        return f"{value:+.1f} ± {row[key.replace('difference', 'error')]:.1f}"
    if isinstance(value, float):
        return f"{value:.{ {'seconds': 2, 'energy': 2, 'loss': 3}.get(key, 1) }f}"
    return "–" if value is None else str(value)


def command(asked: argparse.Namespace) -> str:
    """What makes the figures again, wherever the rows are."""
    subsets = " --subsets" if asked.subsets else ""
    return f"python benchmarks/compare.py --data DIR{subsets} --rows {asked.rows} --split {asked.split}"


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import transformers

    return {
        "ties_peft": ties_peft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def parse() -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", default="encoder", choices=["encoder", "lm"], help="the sentence encoder's adapters")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="a folder for each task")
    parser.add_argument("--kinds", nargs="*", default=list(TABLES), choices=list(TABLES), help="of the encoder's")
    parser.add_argument("--rows", type=int, default=300, help="of each task (300)")
    parser.add_argument("--split", default="test", help="validation, when something is to be chosen")
    parser.add_argument(
        "--subsets", action="store_true", help="encoder: two to six adapters, of like and unlike lengths"
    )
    parser.add_argument("--methods", nargs="+", help="no other merges are made (default: all)")
    parser.add_argument("--log", type=Path, help="keep every result there, a line each, and do none twice")
    parser.add_argument("--json", type=Path, help="write the table there")
    of_lm = parser.add_argument_group("language model")
    of_lm.add_argument("--base", help="folder or Hub id of the base model (default: the samples' base)")
    of_lm.add_argument("--adapters", type=Path, default=language_model.smollm2.FOLDER, help="a folder for each adapter")
    of_lm.add_argument("--device", default="cpu", help="where rows are scored; merges are made on the CPU")
    of_lm.add_argument("--tf32", action="store_true", help="let a GPU multiply with 10 bits of mantissa")
    of_lm.add_argument("--processes", type=int, default=1, help="that merge at the same time (1)")
    of_lm.add_argument("--splits", nargs="+", default=SPLITS, choices=SPLITS, help="whose rows are scored (both)")
    of_lm.add_argument("--seconds", type=float, help="stop after so many; 0 makes the tables of what is in the log")
    return parser.parse_args()


def compare_language_model(asked: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print and return the tables of the language model's adapters."""
    wanted = language_model.Asked(
        asked.data,
        asked.base,
        asked.adapters,
        asked.rows,
        asked.device,
        asked.tf32,
        asked.processes,
        asked.seconds,
        asked.log,
        tuple(asked.methods or ()),
        tuple(asked.splits),
    )
    found = language_model.tables(wanted, versions(), lambda text: console.print(text, style="red", markup=False))
    for title, rows in found[asked.split].items():
        show(rows, console, f"language model, {title}, up to {asked.rows} {asked.split} rows a task")
    return {"command": f"python benchmarks/compare.py --world lm --data DIR --rows {asked.rows}", **found}


def compare_encoder(asked: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print and return the tables of the encoder's adapters."""
    bench = Bench(asked.data, asked.split, asked.rows, asked.log)
    found: dict[str, Any] = {
        "command": command(asked),
        "split": asked.split,
        "rows": asked.rows,
        "versions": versions(),
    }
    for kind in asked.kinds:
        found[kind] = subsets(bench, kind) if asked.subsets else whole(bench, kind, console, asked.methods or ())
        show(found[kind], console, f"{kind}, {asked.rows} {asked.split} rows a task")
    return found


def main() -> None:
    """Print the tables that were asked for."""
    asked = parse()
    warnings.simplefilter("ignore")
    console = Console(width=260 if asked.world == "lm" else 200)
    found = compare_language_model(asked, console) if asked.world == "lm" else compare_encoder(asked, console)
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
