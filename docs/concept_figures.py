"""Draw the figures of docs/concepts.md: `python docs/concept_figures.py`; needs matplotlib (the extra `notebooks`).

They are made from the sample adapters and from benchmarks/results, the same bytes each time on one version of matplotlib.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

import ties_peft
from ties_peft.methods import TaskVectors, make_method

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
TASKS = ("sst2", "trec", "subj", "cr", "ag_news", "banking77")
BLUE, SKY, GREY, RED = "#0072b2", "#56b4e9", "#999999", "#d55e00"  # Okabe and Ito, for all kinds of sight


def adapters(names: tuple[str, ...] = TASKS) -> list[Path]:
    """Return the folders of sample adapters."""
    return [ROOT / "adapters" / "lora" / name for name in names]


def spaces() -> None:
    """Draw to scale what a method sees of one module of an adapter in each space."""
    chosen = [ties_peft.Adapter.load(path) for path in adapters(("sst2", "trec", "cr"))]
    rows, columns = chosen[0].delta(chosen[0].modules[0]).shape
    ranks = [adapter.ranks[0] for adapter in chosen]
    rank, total = ranks[0], sum(ranks)
    figure, axes = plt.subplots(figsize=(8, 2.7), layout="constrained")
    shapes = {
        "delta": [(rows, columns)],
        "core": [(total, total)],
        "knots": [(total, columns)],
        "factors": [(rows, rank), (rank, columns)],
    }
    left = 0.0
    for name, parts in shapes.items():
        start = left
        for height, width in parts:
            axes.add_patch(Rectangle((left, rows - height), width, height, facecolor=SKY, edgecolor=BLUE))
            left += width + 30
        count = sum(height * width for height, width in parts)
        sizes = " and ".join(f"{height} × {width}" for height, width in parts)
        axes.text(start, rows + 20, f"{name}\n{sizes}\n{count:,} numbers", va="bottom", fontsize=9)
        left = max(left, start + 330) + 40
    axes.set(xlim=(-10, left), ylim=(-10, rows + 190), aspect="equal")
    axes.set_title(
        f"What a method sees of one {rows} × {columns} module, {len(ranks)} LoRAs of rank {rank}", loc="left"
    )
    axes.axis("off")
    _save(figure, "spaces")


def methods() -> None:
    """Draw the task vectors of three adapters, as TIES trims them, and what three methods make of them."""
    chosen = adapters(("sst2", "trec", "cr"))
    opened = [ties_peft.Adapter.load(path) for path in chosen]
    module = opened[0].modules[0]
    deltas = torch.stack([adapter.delta(module) for adapter in opened])
    where = (deltas.abs().amin(0)).flatten().topk(14).indices.sort().values  # entries that matter to all three
    entries = deltas.flatten(1)[:, where]
    names = {"average": {}, "task_arithmetic": {}, "ties": {"density": 0.5, "scope": "module"}}
    vectors = TaskVectors.of(list(entries))
    merged = {name: _merge(name, values, vectors) for name, values in names.items()}
    lines = {**{path.name: row for path, row in zip(chosen, entries, strict=True)}, **merged}
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    trimmed = torch.stack([row.dense() if hasattr(row, "dense") else row for row in vectors.trim(0.5, "module")])
    bold = torch.cat([trimmed != 0, torch.zeros(len(merged), entries.shape[1], dtype=torch.bool)])
    top = 2 * float(entries.abs().max())  # pale colours, on which numbers can be read
    axes.imshow(torch.stack(list(lines.values())), cmap="RdBu", vmin=-top, vmax=top, aspect="auto")
    for row, values in enumerate(lines.values()):
        for column, value in enumerate(values.tolist()):
            text = f"{1000 * value:.0f}".replace("-", "−")
            weight = "bold" if bold[row, column] else "normal"
            axes.text(column, row, text, ha="center", va="center", fontsize=10, weight=weight)
    axes.axhline(len(chosen) - 0.5, color="black", linewidth=2)
    axes.set_yticks(range(len(lines)), list(lines))
    axes.set_xticks([])
    axes.set_title("Entries in thousandths; bold: kept by the trim of TIES", loc="left")
    _save(figure, "methods")


def _merge(name: str, parameters: dict[str, Any], vectors: TaskVectors) -> torch.Tensor:
    method = make_method(name, parameters)
    merged = method.merge(vectors)
    values = merged if isinstance(merged, torch.Tensor) else merged.dense()
    return values * float(method.default_scale)


def rank() -> None:
    """Draw the energy that a merge of the six LoRAs keeps at each rank."""
    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    lines = {"average": GREY, "dual": BLUE, "ties": RED}
    for name, colour in lines.items():
        merged = ties_peft.merge(adapters(), name, rank="max")
        squares = torch.stack([torch.linalg.svdvals(merged.delta(module)) ** 2 for module in merged.modules]).sum(0)
        kept = torch.cat([torch.zeros(1), squares.cumsum(0) / squares.sum()])
        axes.plot(range(129), 100 * kept[:129], color=colour, label=name)
    total = sum(ties_peft.Adapter.load(path).ranks[0] for path in adapters())
    axes.axvline(total, color="black", linewidth=0.8, linestyle="--")
    axes.text(total + 1, 5, f"Σr = {total}")
    axes.set(xlabel="rank of the result", ylabel="energy kept, percent", xlim=(0, 128), ylim=(0, 102))
    axes.set_title("Six LoRAs of an encoder in one: what a rank keeps", loc="left")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, "rank")


def retention() -> None:
    """Draw what projection and others mean, and the projections of the six LoRAs by method."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained", width_ratios=[1, 1.5])
    one, merged = torch.tensor([1.0, 0.0]), torch.tensor([0.7, 0.6])
    share = float(merged @ one / (one @ one))
    for end, colour, text, place in (
        (one, GREY, "τᵢ", (1.02, 0.02)),
        (merged, BLUE, "τ", (0.71, 0.61)),
        (share * one, RED, "projection · τᵢ", (0.32, -0.09)),
    ):
        left.annotate("", end.tolist(), (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 2})
        left.text(*place, text, color=colour)
    left.plot([share, share], [0, 0.6], color="black", linestyle=":")
    left.text(share + 0.03, 0.25, "others · ‖τᵢ‖")
    left.set(xlim=(-0.05, 1.2), ylim=(-0.15, 0.75), aspect="equal")
    left.axis("off")
    shown = {"average": GREY, "dual": BLUE, "ties": RED}
    for number, (name, colour) in enumerate(shown.items()):
        lines = ties_peft.merge(adapters(), name).report.adapters
        places = [place + 0.27 * (number - 1) for place in range(len(lines))]
        right.bar(places, [line.projection for line in lines], 0.25, color=colour, label=name)
    right.set_xticks(range(len(TASKS)), TASKS, fontsize=9)
    right.set(ylabel="projection")
    right.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.15))
    right.spines[["top", "right"]].set_visible(False)
    _save(figure, "retention")


def auto() -> None:
    """Draw what the default keeps, beside the average and TIES, of the stored results."""
    tables = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("methods", "language_model")
    }
    worlds: dict[str, Callable[[str], float]] = {
        "LoRA, encoder": lambda name: _figure(tables["methods"]["lora"], name, "normalised"),
        "(IA)³, encoder": lambda name: _figure(tables["methods"]["ia3"], name, "normalised"),
        "LoRA, language model": lambda name: _figure(tables["language_model"]["test"]["six"], name, "six"),
    }
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    shown = {"auto": BLUE, "average": GREY, "ties": RED}
    for number, (name, colour) in enumerate(shown.items()):
        places = [place + 0.27 * (number - 1) for place in range(len(worlds))]
        bars = axes.bar(places, [read(name) for read in worlds.values()], 0.25, color=colour, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2)
    for place, read in enumerate(worlds.values()):
        axes.hlines(
            read("base"), place - 0.45, place + 0.45, color="black", linestyle=":", label="" if place else "base"
        )
    axes.set_xticks(range(len(worlds)), list(worlds))
    axes.set(ylabel="own adapters = 100", ylim=(0, 118))
    axes.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.16))
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, "auto")


def _figure(rows: list[dict[str, Any]], name: str, column: str) -> float:
    """Return a method's figure with its defaults: the first row of its name."""
    return float(next(row[column] for row in rows if row["method"] == name))


def _save(figure: Any, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw all of them."""
    plt.rcParams |= {"svg.hashsalt": "ties_peft", "svg.fonttype": "none", "font.family": "sans-serif"}
    for draw in (spaces, methods, rank, retention, auto):
        draw()


if __name__ == "__main__":
    main()
