"""Do the figures of a report say how much an adapter keeps? `python benchmarks/prediction.py`.

For every adapter of the stored merges of three worlds (LoRA and (IA)³ on a sentence encoder, LoRA on a language model):
`projection`, `cosine` and `others` of the merged adapter, and the share of its gain over the base that was measured. A
figure alone, and a linear fit of all three, are compared with what was kept, by Spearman's rank correlation. The fit that a
world is judged by is made on the two other worlds. Intervals are of 1000 bootstrap samples of merges.

What was measured is read from `results/retention.json` and `results/language_model.json`. The merges of the language
model's adapters are made anew for their figures (a minute or two of processor time; `--work` keeps them); no model is run.
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
from cases import FOURTH_ROOT_N, ROOT_N, Setting
from compare import versions
from judge import ROOT
from scipy.stats import spearmanr

from ties_peft.merging.recipes.scale import Scale

RESULTS = Path(__file__).parent / "results"
TASKS = ("ag_news", "trec", "subj", "snips_json", "wikisql", "disfl_qa")  # the language model's
# The settings whose merges are made anew; others of them differ only in λ, by which the figures are scaled.
MERGED = (
    *(Setting(name) for name in ("iso_c", "flat_tsv", "tsv", "average", "task_arithmetic", "iso_cts", "boosting")),
    *(Setting(name) for name in ("karcher", "model_stock", "ties")),
    Setting("ties", "core"),
    Setting("ties", "knots"),
)
SCALES = {ROOT_N: "1/sqrt(N)", FOURTH_ROOT_N: "N^-1/4"}
FIGURES = ("projection", "cosine", "others")
SHOWN = 0.7  # a smaller correlation on a world that was not fitted is not shown by `analyze`
SAMPLES = 1000


def encoder_rows() -> list[dict[str, Any]]:
    """A row for each adapter of each stored merge on the sentence encoder."""
    stored = json.loads((RESULTS / "retention.json").read_text(encoding="utf-8"))["every"]
    found = []
    for row in stored:
        kept = row.get("test", {}).get("kept")
        if kept is not None:
            merge = f"{row['method']} of {row['adapters']}, {row['way']} {row['ratio']}"
            found.append({"world": row["type"], "merge": merge, "kept": kept} | {key: row[key] for key in FIGURES})
    return found


def language_model_figures(work: Path) -> dict[str, dict[str, Any]]:
    """λ and, for each task's adapter, the figures of each merge in `MERGED`, by method and space."""
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
    """A row for each adapter of each stored merge of all six, of the methods that were merged anew."""
    stored = json.loads((RESULTS / "language_model.json").read_text(encoding="utf-8"))["test"]["six"]
    base = next(row for row in stored if row["method"] == "base")
    found = []
    for row in stored:
        method, _, scale = row["method"].partition(" λ ")
        own = figures.get(f"{method}|{row['space']}")
        if own is None:
            continue
        factor = Scale.read(SCALES.get(scale) or float(scale)).at(len(TASKS)) / own["scale"] if scale else 1.0
        for task in TASKS:
            values = own["adapters"][task]
            scaled = {key: values[key] * (1.0 if key == "cosine" else factor) for key in FIGURES}
            kept = (row[task] - base[task]) / (100 - base[task])
            name = f"{row['method']} in {row['space']}"
            found.append({"world": "language model", "merge": name, "task": task, "kept": round(kept, 4)} | scaled)
    return found


def features(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The figures as columns, with a constant."""
    return np.array([[1.0, row["projection"], row["cosine"], math.log(max(1e-3, row["others"]))] for row in rows])


def fitted(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The coefficients of a least-squares fit of what was kept, which is cut to [0, 1]; worlds weigh the same."""
    kept = np.clip([row["kept"] for row in rows], 0, 1)
    names = [row["world"] for row in rows]
    weight = np.sqrt([1 / names.count(name) for name in names])
    return np.linalg.lstsq(features(rows) * weight[:, None], kept * weight, rcond=None)[0]


def correlation(rows: Sequence[Mapping[str, Any]], predicted: Sequence[float]) -> dict[str, float]:
    """Spearman's ρ between a prediction and what was kept, with a 95 % interval over merges."""
    kept, predicted = np.array([row["kept"] for row in rows]), np.array(predicted)
    merges = sorted({row["merge"] for row in rows})
    places = {name: [i for i, row in enumerate(rows) if row["merge"] == name] for name in merges}
    draw, found = np.random.default_rng(0), []
    for _ in range(SAMPLES):
        at = [i for name in draw.choice(merges, len(merges)) for i in places[name]]
        found.append(spearmanr(kept[at], predicted[at]).statistic)
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return {"rho": round(float(spearmanr(kept, predicted).statistic), 3), "from": round(low, 3), "to": round(high, 3)}


def judged(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each world: its size, the correlation of each figure, and that of the fit on the two other worlds."""
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
    """What was kept against the prediction of the fit on the two other worlds, a panel for each world."""
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
    """Collect the rows, judge the predictions, and say whether one is good enough to be shown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "demo-out" / "prediction", help="figures made so far")
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--figure", type=Path, help="write the scatter plot there (needs matplotlib)")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [*encoder_rows(), *language_model_rows(language_model_figures(asked.work))]
    lines = judged(rows)
    for line in lines:
        print(json.dumps(line))
    worst = min(line["fit on the other worlds"]["rho"] for line in lines)
    verdict = "shown" if worst >= SHOWN else "not shown"
    print(f"least correlation on a world that was not fitted: {worst:.2f}; a prediction is {verdict} by analyze")
    if asked.json:
        about = {"command": "python benchmarks/prediction.py", "versions": versions()}
        result = {**about, "worlds": lines, "least held-out correlation": worst, "verdict": verdict, "every": rows}
        asked.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if asked.figure:
        draw(rows, asked.figure)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
