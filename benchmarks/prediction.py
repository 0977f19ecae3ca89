"""Test whether the figures of a report predict how much an adapter keeps: `python benchmarks/prediction.py`.

The adapters are those of stored merges in three worlds: LoRA and (IA)³ on a sentence encoder, and LoRA on a language
model. Each has its `projection`, `cosine` and `others` in the report, and the share of its gain over the base that the
merge was measured to keep. Each figure, and a linear fit of all three, is compared with this share by Spearman's rank
correlation. The fit for a world is made on the two other worlds. Intervals are from 1000 bootstrap samples of merges.

The measurements are read from `results/retention.json` and `results/language_model.json`. The merges of the language
model's adapters are repeated for their figures (a minute or two of processor time; `--work` stores them); no model runs.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import FORMULAS, Setting
from judge import ROOT
from records import versions, write_json
from scipy.stats import spearmanr

from ties_peft.merging.recipes.scale import Scale

RESULTS = Path(__file__).parent / "results"
TASKS = ("ag_news", "trec", "subj", "snips_json", "wikisql", "disfl_qa")  # the language model's
# The settings whose merges are repeated. Stored merges that differ from these in λ have their figures scaled by λ.
MERGED = (
    *(Setting(name) for name in ("iso_c", "flat_tsv", "tsv", "average", "task_arithmetic", "iso_cts", "boosting")),
    *(Setting(name) for name in ("karcher", "model_stock", "ties")),
    Setting("ties", "core"),
    Setting("ties", "knots"),
)
FIGURES = ("projection", "cosine", "others")
SHOWN = 0.7  # the smallest correlation, on worlds that were not fitted, with which `analyze` would show a prediction
SAMPLES = 1000


def encoder_rows() -> list[dict[str, Any]]:
    """Return a row for each adapter of each stored merge on the sentence encoder."""
    stored = json.loads((RESULTS / "retention.json").read_text(encoding="utf-8"))["every"]
    found = []
    for row in stored:
        kept = row.get("test", {}).get("kept")
        if kept is not None:
            merge = f"{row['method']} of {row['adapters']}, {row['way']} {row['ratio']}"
            found.append({"world": row["type"], "merge": merge, "kept": kept} | {key: row[key] for key in FIGURES})
    return found


def language_model_figures(work: Path) -> dict[str, dict[str, Any]]:
    """Return λ and each adapter's figures for each merge in `MERGED`, by method and space."""
    path = work / "figures.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for setting in MERGED:
        key = f"{setting.method}|{setting.space}"
        if key not in known:
            merged, seconds = setting.merge("lora", [ROOT / "adapters" / "smollm2" / task for task in TASKS])
            lines = merged.report.adapters
            own = {
                task: {name: getattr(line, name) for name in FIGURES} for task, line in zip(TASKS, lines, strict=True)
            }
            known[key] = {"scale": merged.report.scale, "adapters": own}
            print(f"{key}: {seconds:.1f} s", flush=True)
            work.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known), encoding="utf-8")
    return known


def language_model_rows(figures: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each adapter of each stored merge of all six, for the methods in `MERGED`."""
    stored = json.loads((RESULTS / "language_model.json").read_text(encoding="utf-8"))["test"]["six"]
    base = next(row for row in stored if row["method"] == "base")
    found = []
    for row in stored:
        method, _, scale = row["method"].partition(" λ ")
        own = figures.get(f"{method}|{row['space']}")
        if own is None:
            continue
        factor = Scale.read(FORMULAS.get(scale) or float(scale)).at(len(TASKS)) / own["scale"] if scale else 1.0
        for task in TASKS:
            values = own["adapters"][task]
            scaled = {key: values[key] * (1.0 if key == "cosine" else factor) for key in FIGURES}
            kept = (row[task] - base[task]) / (100 - base[task])
            name = f"{row['method']} in {row['space']}"
            found.append({"world": "language model", "merge": name, "task": task, "kept": round(kept, 4)} | scaled)
    return found


def features(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the figures as columns, with a constant."""
    return np.array([[1.0, row["projection"], row["cosine"], math.log(max(1e-3, row["others"]))] for row in rows])


def fitted(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Fit the kept share, clipped to [0, 1], by least squares, all worlds with equal weight; return the coefficients."""
    kept = np.clip([row["kept"] for row in rows], 0, 1)
    names = [row["world"] for row in rows]
    weight = np.sqrt([1 / names.count(name) for name in names])
    return np.linalg.lstsq(features(rows) * weight[:, None], kept * weight, rcond=None)[0]


def correlation(rows: Sequence[Mapping[str, Any]], predicted: Sequence[float]) -> dict[str, float]:
    """Return Spearman's ρ of a prediction and the kept share, with a 95 % interval over merges."""
    kept, predicted = np.array([row["kept"] for row in rows]), np.array(predicted)
    merges = sorted({row["merge"] for row in rows})
    places = {name: [i for i, row in enumerate(rows) if row["merge"] == name] for name in merges}
    draw, found = np.random.default_rng(0), []
    for _ in range(SAMPLES):
        at = [i for name in draw.choice(merges, len(merges)) for i in places[name]]
        found.append(spearmanr(kept[at], predicted[at]).statistic)
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return {"rho": round(float(spearmanr(kept, predicted).statistic), 3), "from": round(low, 3), "to": round(high, 3)}


def by_world(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each world its size, the correlation of each figure, and that of the fit on the two other worlds."""
    found = []
    for world in dict.fromkeys(row["world"] for row in rows):
        own = [row for row in rows if row["world"] == world]
        others = [row for row in rows if row["world"] != world]
        line: dict[str, Any] = {"world": world, "adapters": len(own), "merges": len({row["merge"] for row in own})}
        for key in FIGURES:
            line[key] = correlation(own, [row[key] * (-1 if key == "others" else 1) for row in own])
        line["fit on the other worlds"] = correlation(own, list(features(own) @ fitted(others)))
        found.append(line)
    return found


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the kept share against the prediction of the fit on the two other worlds, in a panel for each world."""
    import matplotlib.pyplot as plt

    worlds = list(dict.fromkeys(row["world"] for row in rows))
    figure, panels = plt.subplots(1, len(worlds), figsize=(4 * len(worlds), 3.6), layout="constrained")
    for panel, world in zip(panels, worlds, strict=True):
        own, others = ([row for row in rows if (row["world"] == world) == same] for same in (True, False))
        panel.scatter(features(own) @ fitted(others), [max(-2, row["kept"]) for row in own], s=12, alpha=0.6)
        panel.set(
            title=world, xlabel="predicted by the fit on the other worlds", ylabel="share of the gain kept (≥ −2)"
        )
    figure.savefig(path, dpi=110)


def main() -> None:
    """Collect the rows, evaluate the predictions, and print whether one is good enough to be shown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "demo-out" / "prediction", help="folder that stores figures"
    )
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument("--figure", type=Path, help="file to write the scatter plot to (needs matplotlib)")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [*encoder_rows(), *language_model_rows(language_model_figures(asked.work))]
    lines = by_world(rows)
    for line in lines:
        print(json.dumps(line))
    worst = min(line["fit on the other worlds"]["rho"] for line in lines)
    verdict = "shown" if worst >= SHOWN else "not shown"
    print(f"smallest correlation on a world that was not fitted: {worst:.2f}; a prediction is {verdict} by analyze")
    about = {"command": "python benchmarks/prediction.py", "versions": versions()}
    result = {"worlds": lines, "least held-out correlation": worst, "verdict": verdict, "every": rows}
    write_json(asked.json, {**about, **result})
    if asked.figure:
        draw(rows, asked.figure)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
