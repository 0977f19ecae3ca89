"""Write the tables of `docs/paper.md` from the result of `paper.py`: each stands between two comments that name it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]
WORLDS = {"lora": "LoRA", "ia3": "(IA)³", "language model": "language model"}
LANGUAGE_MODEL = ("average", "task_arithmetic λ 1/√N", "ties")  # of its merges by number
PLACE = re.compile(r"(<!-- table: (?P<name>[a-z ]+) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def filled(page: str, found: Found) -> str:
    """Return a page with every table made anew."""
    return PLACE.sub(lambda match: match[1] + "\n" + TABLES[match["name"]](found) + "\n\n", page)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown; None is an empty cell."""
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.1f}".replace("-", "−") if isinstance(value, float) else str(value)


def _against(row: Mapping[str, Any], ending: str = "") -> str | None:
    """Return a difference with its standard error."""
    points, error = row.get(f"difference{ending}"), row.get(f"error{ending}")
    if points is None or not error:
        return None
    return f"{round(points, 1) + 0.0:+.1f} ± {error:.1f}".replace("-", "−")  # + 0.0: no −0.0


def _percent(shares: Iterable[float]) -> list[str]:
    return [f"{100 * share:g} %" for share in shares]


def redundancy(found: Found) -> str:
    """Accuracy and squared norm against the share of entries kept."""
    own = found["redundancy"]
    rows = [[f"{WORLDS[kind]}: accuracy", own[kind]["base"], *own[kind]["accuracy"]] for kind in ("lora", "ia3")]
    rows += [[f"{WORLDS[kind]}: worst task", None, *own[kind]["worst task"]] for kind in ("lora", "ia3")]
    if "edits" in found:
        closed = dict(zip(found["edits"]["share kept"], found["edits"]["closed"], strict=True))
        rows.append(["language model: loss gap closed", 0.0, *(closed.get(share) for share in own["share kept"])])
    for world, read in found["weights"].items():
        shares = {float(share): value for share, value in read["norm share"].items()}
        rows.append([f"{WORLDS[world]}: squared norm", None, *(shares.get(share) for share in own["share kept"])])
    return table(["entries kept", "none", *_percent(own["share kept"])], rows)


def conflict(found: Found) -> str:
    """Sign conflicts against the number of adapters."""
    weights = found["weights"]
    names = {"of all": "all entries", "of those kept by one": "entries that one keeps", "of those kept by two": "entries that two keep"}  # fmt: skip
    rows = [
        [f"{WORLDS[world]}, of {text}", *read["conflict"][name]]
        for world, read in weights.items()
        for name, text in names.items()
    ]
    return table(["% with both signs", *(str(one) for one in weights["lora"]["conflict"]["adapters"])], rows)


def influence(found: Found) -> str:
    """Mean magnitude by the number of adapters that keep an entry."""
    shown = {"no trim, mean of all": "mean over all", "trim, mean of the kept": "trim, mean of the kept", "trim, elected": "TIES"}  # fmt: skip
    rows = []
    for world, read in found["weights"].items():
        own = read["by influence"]
        rows.append([f"{WORLDS[world]}: entries, %", *(round(share, 1) for share in own["share"])])
        rows += [[f"{WORLDS[world]}: {text}", *map(_two, own["magnitude"][name])] for name, text in shown.items()]
    return table(["adapters that keep the entry", *map(str, range(7))], rows)


def agreement(found: Found) -> str:
    """Mean magnitude by sign agreement."""
    shown = {"no trim, mean of all": "mean over all", "no trim, elected": "elect, disjoint mean"}
    rows = []
    for world, read in found["weights"].items():
        own = read["by agreement"]
        rows.append([f"{WORLDS[world]}: entries, %", *(round(share, 1) for share in own["share"])])
        rows += [[f"{WORLDS[world]}: {text}", *map(_two, own["magnitude"][name])] for name, text in shown.items()]
    return table(["sign agreement", "0.5 to 0.6", "to 0.7", "to 0.8", "to 0.9", "to 1"], rows)


def _two(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def flips(found: Found) -> str:
    """Accuracy when signs are flipped."""
    own = found["flips"]
    rows = [
        [f"{WORLDS[kind]}, {name}", *own[kind][name]] for kind in ("lora", "ia3") for name in ("largest", "smallest")
    ]
    if "edits" in found:
        edits = found["edits"]
        for name in ("largest", "smallest"):
            line = dict(zip(edits["probability"], edits[name], strict=True))
            rows.append([f"language model, {name}", *(line.get(one) for one in own["probability"])])
    return table(["probability of a flip", *(f"{one:g}" for one in own["probability"])], rows)


def tasks(found: Found) -> str:
    """Accuracy against the number of merged tasks."""
    own, stored = found["tasks"], found["stored"]
    rows: list[list[Any]] = []
    for kind in ("lora", "ia3"):
        rows += [[f"{WORLDS[kind]}: `{name}`", *values] for name, values in own[kind].items()]
        rows.append([f"{WORLDS[kind]}: `distil`", *(stored["distil"][kind][str(size)] for size in own["tasks"])])
    for row in stored["by number"]:
        if row["method"] in LANGUAGE_MODEL:
            rows.append([f"language model: {row['method']}", *(row.get(str(size)) for size in own["tasks"])])
    return table(["merged tasks", *map(str, own["tasks"])], rows)


def ablation(found: Found) -> str:
    """TIES without each of its steps."""
    rows = [
        [
            f"{WORLDS[kind]}: {row['row']}",
            row["same λ"],
            _against(row),
            row.get("own λ"),
            _against(row, ", own λ"),
            f"{row['λ']:g}",
        ]
        for kind in ("lora", "ia3")
        for row in found["ablation"][kind]
    ]
    return table(
        ["", "λ of the whole method", "against it", "λ of its own", "against the whole method", "that λ"], rows
    )


def tuned(found: Found) -> str:
    """Methods as they come and tuned."""
    rows = []
    for kind in ("lora", "ia3"):
        for row in found["tuned"][kind]:
            chosen = None
            if "tuned λ" in row:
                density = f", density {row['tuned density']:g}" if "tuned density" in row else ""
                chosen = f"λ {row['tuned λ']:g}{density}"
            rows.append([f"{WORLDS[kind]}: {row['method']}", row["accuracy"], _against(row), row.get("tuned"), _against(row, ", tuned"), chosen])  # fmt: skip
    return table(["", "as it comes", "against TIES as it comes", "tuned", "against the same", "chosen"], rows)


def signs(found: Found) -> str:
    """TIES with other signs."""
    rows = []
    for kind in ("lora", "ia3"):
        for row in found["signs"][kind]:
            chosen = f"{row['tuned λ']:g}" if "tuned λ" in row else None
            rows.append([f"{WORLDS[kind]}: {row['signs']}", row["accuracy"], _against(row), row.get("tuned"), _against(row, ", tuned"), chosen])  # fmt: skip
    return table(["signs", "λ = 1", "against elected", "tuned λ", "against elected at λ = 1", "that λ"], rows)


def held_out(found: Found) -> str:
    """Accuracy on tasks whose adapters were not merged."""
    rows = [
        [
            f"{WORLDS[kind]}: {row['method']}",
            row.get("left out"),
            _against(row, ", left out"),
            row["other"],
            _against(row, ", other"),
        ]
        for kind in ("lora", "ia3")
        for row in found["held out"][kind]
    ]
    return table(["", "each task left out", "against the base", found["held out"]["other"], "against the base"], rows)


def rank(found: Found) -> str:
    """Accuracy against the output's rank."""
    own = found["rank"]
    rows = [[name, *values] for name, values in own.items() if name not in ("rows", "ranks")]
    return table(["rank that is written", *map(str, own["ranks"])], rows)


def stored(found: Found) -> str:
    """Merges of the language model."""
    own = found["stored"]["six"]
    shown = ("base", "own adapters", "multitask-trained", "auto", "average", "ties λ 0.5", "peft_ties", "task_arithmetic λ 0.3", "task_arithmetic λ 0.4", "ties", "dare_ties")  # fmt: skip
    picked = [next(row for row in own if row["method"] == name) for name in shown]
    rows = [[row["method"], row["classification"], row["generation"], row["six"], row["worst"]] for row in picked]
    return table(["", "labels", "text", "all six", "worst task"], rows)


def digits(found: Found) -> str:
    """Convolutional experts."""
    own = found["digits"]
    rows = [
        [row["way"], row["among its two"], f"{row['lowest']:.1f} … {row['highest']:.1f}", row["among all ten"]]
        for row in own["rows"]
    ]
    return table(["", "among its two digits", "lowest and highest seed", "among all ten"], rows)


TABLES: dict[str, Callable[[Found], str]] = {
    "redundancy": redundancy,
    "conflict": conflict,
    "influence": influence,
    "agreement": agreement,
    "flips": flips,
    "tasks": tasks,
    "ablation": ablation,
    "tuned": tuned,
    "signs": signs,
    "held out": held_out,
    "rank": rank,
    "language model": stored,
    "digits": digits,
}
