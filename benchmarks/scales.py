"""Compare values of λ, and ranks that truncate flat spectra, on the sample LoRAs: `python benchmarks/scales.py --data DIR`.

The first table compares candidates for the default λ of a method on two, four and six adapters: the mean accuracy with that
of each own adapter as 100, by the number of adapters, the mean over these numbers, and its difference from the
method's published λ with the paired standard error. The second table has the accuracy of all six adapters merged at
ranks below and at Σrᵢ = 56, and the difference from the same method at Σrᵢ.

The rows are of the validation split, because defaults are chosen by them. With `--log FILE` a run that was stopped
continues; `--json FILE` writes the tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from cases import Measurements, Set, Setting
from compare import UNLIKE, group, relative, rights, sets, show
from judge import minilm, paired
from records import make_parser, versions, write_json
from rich.console import Console

KIND = "lora"
PUBLISHED = 1.0
SIZES = (2, 4, 6)
METHODS: list[tuple[Setting, tuple[float | str, ...]]] = [
    (Setting("tsv"), (0.4, 0.6, "1/sqrt(N)", "N^-1/3", "N^-1/4", "0.8*N^-1/4")),
    (Setting("boosting"), (0.2, 0.3, 0.4, 0.6, "1/sqrt(N)", "0.7/sqrt(N)", "N^-1/4", "0.7*N^-1/4")),
    (Setting("ties+boosting", space="core"), (0.4, "1/sqrt(N)", "0.7/sqrt(N)", "0.7*N^-1/4")),
]
CUT = [Setting("iso_c"), Setting("iso_cts"), Setting("flat_tsv"), Setting("boosting", scale="0.7/sqrt(N)")]
WHOLE = [Setting("tsv", scale="1/sqrt(N)"), Setting("ties")]  # for comparison, with spectra that are not flat
RANKS = ("max", 42, 28, 16)


def scales(measurements: Measurements) -> list[dict[str, Any]]:
    """Return a row for every candidate of every method."""
    chosen = [one for one in sets() if one not in UNLIKE and len(one) in SIZES]
    rows = []
    for method, candidates in METHODS:
        published = replace(method, scale=PUBLISHED)
        against = scored(measurements, chosen, published)
        settings = (published, *(replace(method, scale=scale) for scale in candidates))
        rows += [scale_row(measurements, chosen, setting, against) for setting in settings]
    return rows


def scored(measurements: Measurements, chosen: Sequence[Set], setting: Setting) -> list[dict[str, Any]]:
    """Return the scores of a setting on each set, on the tasks of the set."""
    return [measurements.merged(KIND, one, setting, list(one)) for one in chosen]


def scale_row(
    measurements: Measurements, chosen: Sequence[Set], setting: Setting, against: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return one row of the first table."""
    records = scored(measurements, chosen, setting)
    columns: dict[str, list[float]] = {}
    for one, record in zip(chosen, records, strict=True):
        columns.setdefault(group(one), []).append(relative(measurements, KIND, one, record))
    means = {name: sum(values) / len(values) for name, values in columns.items()}
    pairs = [
        (rights(record, list(one)), rights(other, list(one)))
        for one, record, other in zip(chosen, records, against, strict=True)
    ]
    difference, error = paired(pairs)
    return {
        "method": setting.method,
        "scale": str(setting.scale),
        **{name: round(value, 2) for name, value in means.items()},
        "mean": round(sum(means.values()) / len(means), 2),
        "difference": round(difference, 2),
        "error": round(error, 2),
    }


def ranks(measurements: Measurements) -> list[dict[str, Any]]:
    """Return a row for every method and rank, with all six adapters."""
    everyone = dict.fromkeys(minilm.TASKS, 1.0)
    rows = []
    for method in (*CUT, *WHOLE):
        records = [measurements.merged(KIND, everyone, replace(method, rank=rank), minilm.TASKS) for rank in RANKS]
        for record in records:
            difference, error = paired([(rights(record, minilm.TASKS), rights(records[0], minilm.TASKS))])
            accuracy = record["accuracy"]
            rows.append(
                {
                    "method": method.label,
                    "rank": record["rank"],
                    "energy": round(record["energy"], 4),
                    "mean": round(sum(accuracy[task] for task in minilm.TASKS) / len(minilm.TASKS), 2),
                    "difference": round(difference, 2),
                    "error": round(error, 2),
                }
            )
    return rows


def main() -> None:
    """Print both tables."""
    parser = make_parser(__doc__, 150)
    parser.add_argument("--split", default="validation", help="split of the rows (validation)")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=160)
    measurements = Measurements(asked.data, asked.split, asked.rows, asked.log)
    found: dict[str, Any] = {
        "command": f"python benchmarks/scales.py --data DIR --rows {asked.rows} --split {asked.split}",
        "split": asked.split,
        "rows": asked.rows,
        "versions": versions(),
    }
    for name, table in (("scales", scales), ("ranks", ranks)):
        found[name] = table(measurements)
        show(found[name], console, f"{name}, {asked.rows} {asked.split} rows a task")
    write_json(asked.json, found)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
