"""Compare the methods on real tasks, with the sample adapters: `python benchmarks/compare.py --data DIR`.

The table has for every method, space and rank: the accuracy on the rows of each task, their mean, the mean with each
own adapter's accuracy as 100 (normalised), the difference of the mean from that of TIES by its defaults with the paired
standard error, the accuracy on mr, which no adapter was trained on (held out), seconds of processor time of the merge, and
the energy that the rank keeps. `--subsets` compares the rules without parameters to tune on pairs, triples, … of the
adapters instead, and on adapters whose task vectors were multiplied by unequal factors.

`--world lm` compares LoRAs of a causal language model instead, on validation and on test rows (see `language_model`): all
six, then pairs and fours of them. `--split` names the table that is printed; `--json` has both.

With `--log FILE` a run that was stopped continues; `--json FILE` writes the table.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import language_model
import torch
from cases import FOURTH_ROOT_N, ROOT_N, Measurements, Set, Setting, unpack
from causal import SPLITS
from judge import minilm, paired
from records import make_parser, versions, write_json
from rich.console import Console

import ties_peft
from ties_peft.merging.tables import make_table, number_column

LEFT = ("method", "space", "way", "needs")  # columns of text
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
    """Return sets of two to six adapters, in which all tasks are equally often, and those of unequal norms."""
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
    """Return which rows of some tasks were right."""
    return {task: unpack(record["right"][task]) for task in tasks}


def line(label: str, record: Mapping[str, Any], own: Mapping[str, float], against: Mapping[str, Any]) -> dict[str, Any]:
    """Return one row of the table of all six adapters.

    Args:
        label: of the row.
        record: of the merge.
        own: the accuracy of each task's own adapter, in percent.
        against: the record that it is compared with, row by row.
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


def whole(measurements: Measurements, kind: str, console: Console, methods: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return a row for each reference, and for every setting, or those of some methods, on all six adapters."""
    everyone = dict.fromkeys(minilm.TASKS, 1.0)
    against = measurements.merged(kind, everyone, REFERENCE, measurements.tasks)
    singles = {task: measurements.single(kind, task) for task in minilm.TASKS}
    own = {task: single["accuracy"][task] for task, single in singles.items()}
    together = {key: {task: singles[task][key][task] for task in singles} for key in ("right", "accuracy")}
    references = {
        "base": measurements.base(),
        "own adapters": together,
        "multitask-trained": measurements.multitask(kind),
    }
    rows = [line(label, record, own, against) for label, record in references.items()]
    for setting in TABLES[kind]:
        if methods and setting.method not in methods:
            continue
        try:
            record = measurements.merged(kind, everyone, setting, measurements.tasks)
        except ties_peft.TiesPeftError as error:
            console.print(f"{setting.label}, {setting.space}: {error}", style="red")
            continue
        rows.append(line(setting.label, {**record, "space": setting.space}, own, against))
    return rows


def subsets(measurements: Measurements, kind: str) -> list[dict[str, Any]]:
    """Return a row for each candidate for a default: accuracies relative to the own adapters', by groups of sets."""
    rows = []
    chosen = sets()
    against = [measurements.merged(kind, one, REFERENCE, list(one)) for one in chosen]
    for setting in CANDIDATES[kind]:
        records = [measurements.merged(kind, one, setting, list(one)) for one in chosen]
        columns: dict[str, list[float]] = {}
        for one, record in zip(chosen, records, strict=True):
            columns.setdefault(group(one), []).append(relative(measurements, kind, one, record))
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


def relative(measurements: Measurements, kind: str, chosen: Set, record: Mapping[str, Any]) -> float:
    """Return the mean accuracy with that of each own adapter, of the same norm, as 100."""
    own = {task: measurements.single(kind, task, gain)["accuracy"][task] for task, gain in chosen.items()}
    return 100 * _mean([record["accuracy"][task] / own[task] for task in chosen], 6)


def group(chosen: Set) -> str:
    """Return the column of a set: by the number of adapters, or of those whose norms were made unequal."""
    return f"{len(chosen)} adapters" if set(chosen.values()) == {1.0} else "unlike lengths"


def _mean(values: Sequence[float], digits: int = 2) -> float:
    return round(sum(values) / len(values), digits)


def show(rows: Sequence[Mapping[str, Any]], console: Console, title: str) -> None:
    """Print rows as a table with a column for every key."""
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if not key.startswith("error")]
    headings = [key if key in LEFT else number_column(key) for key in columns]
    console.print(make_table(headings, [[_cell(row, key) for key in columns] for row in rows], title))


def _cell(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is not None and key.startswith("difference"):
        return f"{value:+.1f} ± {row[key.replace('difference', 'error')]:.1f}"
    if isinstance(value, float):
        return f"{value:.{ {'seconds': 2, 'energy': 2, 'loss': 3}.get(key, 1) }f}"
    return "–" if value is None else str(value)


def command(asked: argparse.Namespace) -> str:
    """Return the command that makes these figures again."""
    subsets = " --subsets" if asked.subsets else ""
    return f"python benchmarks/compare.py --data DIR{subsets} --rows {asked.rows} --split {asked.split}"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, 300)
    parser.add_argument(
        "--world",
        default="encoder",
        choices=["encoder", "lm"],
        help="adapters of the sentence encoder, or of the language model",
    )
    parser.add_argument(
        "--kinds", nargs="*", default=list(TABLES), choices=list(TABLES), help="of the encoder's adapters"
    )
    parser.add_argument("--split", default="test", help="rows of the table (test); validation to choose settings by")
    parser.add_argument(
        "--subsets", action="store_true", help="encoder: sets of two to six adapters, of equal and unequal norms"
    )
    parser.add_argument("--methods", nargs="+", help="methods of the merges (all)")
    of_lm = parser.add_argument_group("language model")
    of_lm.add_argument("--base", help="folder or Hub id of the base model (the samples' base)")
    of_lm.add_argument(
        "--adapters", type=Path, default=language_model.smollm2.FOLDER, help="folder with one for each adapter"
    )
    of_lm.add_argument("--device", default="cpu", help="device that scores rows (cpu); merges are made on the CPU")
    of_lm.add_argument("--tf32", action="store_true", help="let a GPU multiply with 10 bits of mantissa")
    of_lm.add_argument("--processes", type=int, default=1, help="number of processes that merge (1)")
    of_lm.add_argument(
        "--splits", nargs="+", default=SPLITS, choices=SPLITS, help="splits whose rows are scored (both)"
    )
    of_lm.add_argument("--seconds", type=float, help="time after which to stop; 0 makes the tables from the log alone")
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
    measurements = Measurements(asked.data, asked.split, asked.rows, asked.log)
    found: dict[str, Any] = {
        "command": command(asked),
        "split": asked.split,
        "rows": asked.rows,
        "versions": versions(),
    }
    for kind in asked.kinds:
        found[kind] = (
            subsets(measurements, kind) if asked.subsets else whole(measurements, kind, console, asked.methods or ())
        )
        show(found[kind], console, f"{kind}, {asked.rows} {asked.split} rows a task")
    return found


def main() -> None:
    """Print the tables that were asked for."""
    asked = parse()
    warnings.simplefilter("ignore")
    console = Console(width=260 if asked.world == "lm" else 200)
    found = compare_language_model(asked, console) if asked.world == "lm" else compare_encoder(asked, console)
    write_json(asked.json, found)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
