"""Draw the pictures of `paper.py` from its result; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from paper_page import LANGUAGE_MODEL

Found = Mapping[str, Any]
WORLDS = {"lora": "LoRA, encoder", "ia3": "(IA)³, encoder", "language model": "LoRA, language model"}
# Okabe and Ito, for all kinds of sight; every line has a marker of its own as well
STYLES = {
    "lora": {"color": "#0072b2", "marker": "o"},
    "ia3": {"color": "#d55e00", "marker": "s"},
    "language model": {"color": "#009e73", "marker": "^"},
    "average": {"color": "#999999", "marker": "o"},
    "task_arithmetic": {"color": "#e69f00", "marker": "s"},
    "ties": {"color": "#0072b2", "marker": "^"},
    "dare": {"color": "#cc79a7", "marker": "D"},
    "auto": {"color": "#009e73", "marker": "v"},
    "distil": {"color": "#000000", "marker": "x"},
}
ACCURACY = "accuracy, own adapter = 100"


def draw(found: Found, folder: Path) -> None:
    """Write every picture whose stages are in the result."""
    plt.rcParams.update(
        {"svg.hashsalt": "ties_peft", "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    )
    for name, (needs, picture) in PICTURES.items():
        if all(stage in found for stage in needs):
            figure = picture(found)
            figure.savefig(folder / f"paper-{name}.svg", metadata={"Date": None})
            plt.close(figure)


def panels(rows: int, columns: int, width: float, height: float, **shared: Any) -> tuple[Any, Sequence[Axes]]:
    """Return a figure and its panels in one list."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **shared)
    return figure, list(axes.flat)


def redundancy(found: Found) -> Any:
    """What is left of one adapter that keeps its largest entries, and of its squared norm."""
    figure, (left, right) = panels(1, 2, 8, 3.3)
    own = found["redundancy"]
    lines = {kind: (own["share kept"], own[kind]["accuracy"]) for kind in ("lora", "ia3")}
    if "edits" in found:
        lines["language model"] = (found["edits"]["share kept"], found["edits"]["closed"])
    for world, (shares, values) in lines.items():
        left.plot([100 * share for share in shares], values, label=WORLDS[world], **STYLES[world])
    for kind in ("lora", "ia3"):
        left.axhline(own[kind]["base"], color=STYLES[kind]["color"], linestyle=":", linewidth=1)
    left.set(xlabel="entries kept, % (dotted: base)", ylabel=f"{ACCURACY}\n(or loss gap closed, %)", xscale="log")
    for world, read in found["weights"].items():
        shares = [100 * float(share) for share in read["norm share"]]
        right.plot(shares, list(read["norm share"].values()), label=WORLDS[world], **STYLES[world])
    right.set(xlabel="largest entries, %", ylabel="share of the squared norm, %", xscale="log")
    for panel in (left, right):
        panel.set_xticks([1, 2, 5, 10, 20, 40, 100], ["1", "2", "5", "10", "20", "40", "100"])
    right.legend(frameon=False)
    return figure


def conflict(found: Found) -> Any:
    """Sign conflicts against the number of adapters."""
    figure, both = panels(1, 2, 8, 3)
    titles = {"of those kept by one": "of the entries that one or more keep", "of those kept by two": "of the entries that two or more keep"}  # fmt: skip
    for panel, (key, title) in zip(both, titles.items(), strict=True):
        for world, read in found["weights"].items():
            panel.plot(read["conflict"]["adapters"], read["conflict"][key], label=WORLDS[world], **STYLES[world])
        panel.set(xlabel="number of adapters", ylabel="entries with both signs, %", ylim=(0, None), xticks=range(2, 7))
        panel.set_title(title, loc="left")
    both[0].legend(frameon=False)
    return figure


def magnitude(found: Found) -> Any:
    """Mean magnitude of merged entries by influence and by sign agreement."""
    figure, axes = panels(2, 3, 9, 5.4, sharey="row")
    by_influence = {
        "mean over all": ("no trim, mean of all", "#999999", "o"),
        "trim, mean of the kept": ("trim, mean of the kept", "#e69f00", "s"),
        "trim, elect, disjoint mean": ("trim, elected", "#0072b2", "^"),
    }
    by_agreement = {
        "mean over all": ("no trim, mean of all", "#999999", "o"),
        "elect, disjoint mean": ("no trim, elected", "#cc79a7", "D"),
    }
    for column, (world, read) in enumerate(found["weights"].items()):
        top, bottom = axes[column], axes[column + 3]
        lines(top, range(len(read["by influence"]["share"])), read["by influence"]["magnitude"], by_influence)
        top.set(xlabel="adapters that keep the entry", title=WORLDS[world])
        middles = (0.55, 0.65, 0.75, 0.85, 0.95)
        lines(bottom, middles, read["by agreement"]["magnitude"], by_agreement)
        bottom.set(xlabel="sign agreement (0.5: none, 1: all)")
    for panel, place in ((axes[0], "upper left"), (axes[3], "center left")):
        panel.legend(frameon=False, loc=place)
    for panel in (axes[0], axes[3]):
        panel.set(ylabel="mean magnitude,\nunit: r.m.s. entry of an adapter")
        panel.set_ylim(bottom=0)  # of the whole row
    return figure


def lines(
    panel: Axes, x: Sequence[float], values: Mapping[str, Sequence[Any]], shown: Mapping[str, tuple[str, str, str]]
) -> None:
    """Draw some of the lines of a table; bins without entries are left out."""
    for label, (key, colour, marker) in shown.items():
        points = [(at, value) for at, value in zip(x, values[key], strict=True) if value is not None]
        panel.plot(*zip(*points, strict=True), label=label, color=colour, marker=marker)


def flips(found: Found) -> Any:
    """What is left of an adapter when signs are flipped."""
    worlds = ["lora", "ia3", *(["language model"] if "edits" in found else [])]
    figure, axes = panels(1, len(worlds), 3 * len(worlds), 2.9)
    for panel, world in zip(axes, worlds, strict=True):
        text = world == "language model"
        own = found["edits"] if text else found["flips"][world]
        chances = found["edits" if text else "flips"]["probability"]
        panel.plot(chances, own["largest"], label="largest 20 %", color="#d55e00", marker="o")
        panel.plot(chances, own["smallest"], label="smallest 80 %", color="#0072b2", marker="s")
        panel.axhline(0 if text else own["base"], color="black", linestyle=":", linewidth=1, label="base")
        panel.set(
            xlabel="probability of a flip", ylabel="loss gap closed, %" if text else ACCURACY, title=WORLDS[world]
        )
    axes[0].legend(frameon=False)
    return figure


def tasks(found: Found) -> Any:
    """Accuracy against the number of merged tasks."""
    figure, axes = panels(1, 3, 9.5, 3.2)
    for panel, kind in zip(axes, ("lora", "ia3"), strict=False):
        for method, values in found["tasks"][kind].items():
            panel.plot(found["tasks"]["tasks"], values, label=method, **STYLES[method])
        learnt = {int(number): value for number, value in found["stored"]["distil"][kind].items()}
        panel.plot(*zip(*learnt.items(), strict=True), label="distil", linestyle="--", **STYLES["distil"])
        panel.set(title=WORLDS[kind], ylabel=ACCURACY)
    for row in found["stored"]["by number"]:
        style = STYLES.get(row["method"].split(" ")[0])
        if style and row["method"] in LANGUAGE_MODEL:
            axes[2].plot([2, 4, 6], [row[size] for size in ("2", "4", "6")], label=row["method"], **style)
    six = next(row for row in found["stored"]["six"] if row["method"] == "auto")
    axes[2].plot([6], [six["six"]], label="auto", linestyle="none", **STYLES["auto"])
    axes[2].set(title=WORLDS["language model"], ylabel="share of the own adapters', %")
    for panel in axes:
        panel.set(xlabel="number of merged tasks", xticks=range(2, 7))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=6, frameon=False, fontsize=8)
    axes[2].legend(frameon=False, fontsize=8)
    return figure


def scale(found: Found) -> Any:
    """Accuracy on validation rows against λ."""
    figure, axes = panels(1, 2, 8, 3.1)
    for panel, kind in zip(axes, ("lora", "ia3"), strict=True):
        for method, own in found["scale"][kind].items():
            panel.plot(own["scale"], own["accuracy"], label=method, **STYLES[method])
            at = dict(zip(own["scale"], own["accuracy"], strict=True)).get(own["default"])
            panel.plot(
                [own["default"]] * (at is not None),
                [at] * (at is not None),
                "o",
                ms=11,
                mfc="none",
                mec=STYLES[method]["color"],
            )
        panel.set(xlabel="λ (circle: the method's own)", ylabel="accuracy, validation rows, %", title=WORLDS[kind])
    axes[1].legend(frameon=False, loc="upper right")
    return figure


def rank(found: Found) -> Any:
    """Accuracy against the rank that is written."""
    figure, (panel,) = panels(1, 1, 6, 3.8)
    colours = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73")
    named = {name: values for name, values in found["rank"].items() if name not in ("rows", "ranks")}
    for (name, values), colour, marker in zip(named.items(), colours, "^voDs", strict=True):
        panel.plot(found["rank"]["ranks"], values, label=name, color=colour, marker=marker)
    panel.set(xlabel="rank that is written (Σrᵢ = 56)", ylabel=ACCURACY, xscale="log")
    panel.set_xticks(found["rank"]["ranks"], [str(one) for one in found["rank"]["ranks"]], minor=False)
    panel.minorticks_off()
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    return figure


PICTURES = {
    "redundancy": (("redundancy", "weights"), redundancy),
    "conflict": (("weights",), conflict),
    "magnitude": (("weights",), magnitude),
    "flips": (("flips",), flips),
    "tasks": (("tasks", "stored"), tasks),
    "scale": (("scale",), scale),
    "rank": (("rank",), rank),
}
