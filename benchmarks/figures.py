"""Draw the pictures of the README and of the guide to `analyze`: `python benchmarks/figures.py` (needs the extra `plots`).

The README's is drawn from stored tables, the guide's from an analysis of the six sample LoRAs of the sentence encoder.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

import ties_peft
from ties_peft.analysis import plots

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks" / "results" / "language_model.json"
DISTILLED = ROOT / "benchmarks" / "results" / "distil_language_model.json"
PICTURE = ROOT / "docs" / "images" / "language-model.svg"
ANALYSIS = ROOT / "docs" / "images" / "analysis.svg"
BARS = {  # (method, space) in the table: what the picture calls it
    ("own adapters", ""): "each task's own adapter",
    ("auto", "delta"): "ties_peft, the default",
    ("average", "delta"): "average",
    ("peft_ties", "delta"): "PEFT's ties",
    ("base", ""): "no adapter",
    ("ties", "delta"): "TIES on the deltas, as published",
}
TASKS = ("ag_news", "trec", "subj", "snips_json", "wikisql", "disfl_qa")
GENERATED = "distil: the base, no text"
COLOURS = [
    "#999999",
    "#0072b2",
    "#0072b2",
    "#56b4e9",
    "#56b4e9",
    "#999999",
    "#56b4e9",
]  # Okabe and Ito, for all kinds of sight


def bars() -> dict[str, tuple[float, float]]:
    """Return the mean and the worst share of each bar, on test rows, at rank `auto`: the first of each in the table."""
    found = json.loads(TABLE.read_text(encoding="utf-8"))["test"]["six"]
    rows = [next(row for row in found if (row["method"], row["space"]) == name) for name in BARS]
    merged = {title: (row["six"], row["worst"]) for title, row in zip(BARS.values(), rows, strict=True)}
    own = next(iter(merged))
    cases = json.loads(DISTILLED.read_text(encoding="utf-8"))["cases"]
    shares = next(case["test"] for case in cases if case["source"] == "generated")
    worst = min(shares[task] for task in TASKS)
    return {own: merged.pop(own), GENERATED: (shares["six"], worst), **merged}


def draw_language_model() -> None:
    """Write the README's picture."""
    found = bars()
    figure, axes = plt.subplots(figsize=(8, 2.9), layout="constrained")
    drawn = axes.barh(list(found), [mean for mean, _ in found.values()], color=COLOURS)
    axes.bar_label(drawn, [f"{mean:.0f}" for mean, _ in found.values()], padding=3)
    axes.plot([worst for _, worst in found.values()], range(len(found)), "k|", markersize=14, label="worst task")
    axes.invert_yaxis()
    axes.set_xlabel("share of what each own adapter reaches, mean of six tasks, percent")
    axes.set_title("Six LoRAs of SmolLM2-135M-Instruct in one adapter", loc="left")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(PICTURE, metadata={"Date": None})


def draw_analysis() -> None:
    """Write the guide's picture: energy by rank, and the overlap of two adapters' outputs by module."""
    folders = sorted(path.parent for path in (ROOT / "adapters" / "lora").glob("*/adapter_config.json"))
    analysis = ties_peft.analyze(folders, methods=["ties", "task_arithmetic", "iso_c", "tsv"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    plots.plot_energy(analysis, ax=left)
    plots.plot_modules(analysis, "overlap_out", ("cr", "sst2"), ax=right)
    figure.savefig(ANALYSIS, metadata={"Date": None})


def main() -> None:
    """Write both pictures."""
    plt.rcParams["svg.hashsalt"] = "ties_peft"  # the same bytes each time
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw_language_model()
    draw_analysis()


if __name__ == "__main__":
    main()
