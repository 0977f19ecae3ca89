"""Experiments of `paper.py` that score adapters of the sentence encoder. Every function returns plain values for the result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases import Setting
from compare import UNLIKE, sets
from paper_judge import (
    KINDS,
    OTHER,
    TASKS,
    Encoder,
    Rights,
    Sizes,
    accuracy,
    difference,
    flipped,
    load,
    magnitudes,
    mean,
    normalised,
    threshold,
    trimmed,
)

SHARES = (0.01, 0.05, 0.02, 0.1, 0.2, 0.7, 0.4)  # in an order of which every second one is spread as well
FLIPS = (0.25, 0.5, 0.75, 1.0)
LARGEST, SMALLEST = 0.2, 0.8
METHODS = {
    "average": 1.0,
    "task_arithmetic": 0.4,
    "ties": 1.0,
    "dare": 0.4,
    "auto": 1.0,
}  # the λ that each has by itself
SUMS = (0.2, 0.3, 0.4, 0.55, 0.75, 1.0)  # λ of methods that add
MEANS = (0.5, 0.75, 1.0, 1.3, 1.7, 2.2)  # λ of methods that average what agrees
NEAR = (0.75, 1.0, 1.3)  # fewer of them, for signs and densities
DIVIDED = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0)  # λ of means over all adapters, which are small
TIES = Setting("ties")
NO_TRIM, NO_ELECTION = (Setting("ties", extra=extra) for extra in ({"density": 1}, {"elect": "none"}))
ELECTED, ALL = (Setting("ties", extra={"disjoint": rule}) for rule in ("mean_elected", "mean_all"))
DENSITIES = {density: Setting("ties", extra={"density": density}) for density in (0.1, 0.3)}
ABLATIONS = {
    "full": (TIES, MEANS),
    "no trim": (NO_TRIM, MEANS),
    "no election": (NO_ELECTION, MEANS),
    "no disjoint mean: elected values over all adapters": (ELECTED, DIVIDED),
    "no disjoint mean: values of both signs over all adapters": (ALL, DIVIDED),
}
ORACLE = Setting("ties", extra={"sign_from": "multitask"})
RANKS = (8, 16, 32, 56)
RANKED = {
    "ties on the deltas, then cut": Setting("ties"),
    "ties in core space, then cut": Setting("ties", "core"),
    "compressed first, then ties in core space": Setting("ties", "core", extra={"compress_first": True}),
    "task_arithmetic, then cut": Setting("task_arithmetic"),
    "auto": Setting("auto"),
}
CHOICE = Path(__file__).parent / "results" / "choose.json"
FEW_SHOT = "ties, signs of 32 rows a task"  # there

Table = dict[str, Any]


def redundancy(encoder: Encoder) -> Table:
    """Return what is left of each adapter's accuracy, and of its squared norm, when its largest entries alone are kept."""
    rows = encoder.sizes.curve
    shares = [*sorted(SHARES[:: encoder.sizes.shares]), 1.0]
    found: Table = {"rows": rows, "share kept": shares}
    for kind in KINDS:
        own = encoder.own(kind, TASKS, rows)
        line: Table = {"base": normalised(encoder.base(TASKS, rows), own), "accuracy": [], "worst task": []}
        for share in shares:
            rights = {task: _trimmed(encoder, kind, task, share, rows) for task in TASKS} if share < 1 else own
            each = [normalised({task: rights[task]}, own) for task in TASKS]
            line["accuracy"].append(mean(each))
            line["worst task"].append(min(each))
        found[kind] = line
    return found


def _trimmed(encoder: Encoder, kind: str, task: str, share: float, rows: int) -> Any:
    return encoder.rights([kind, task, "kept", share], [task], rows, lambda: trimmed(load(kind, task), share))[task]


def norms(encoder: Encoder) -> Table:
    """Return the share of the squared norm that the largest entries hold, the mean over the adapters of each kind."""
    shares = [*sorted(SHARES[:: encoder.sizes.shares]), 1.0]
    return {kind: [_norm_share([load(kind, task) for task in TASKS], share) for share in shares] for kind in KINDS}


def _norm_share(adapters: Sequence[Any], share: float) -> float:
    each = []
    for values in map(magnitudes, adapters):
        kept = values[values >= threshold(values, share)]
        each.append(100 * float(kept.double().square().sum() / values.double().square().sum()))
    return mean(each)


def flips(encoder: Encoder) -> Table:
    """Return what is left of each adapter's accuracy when the signs of its largest or its smallest entries are flipped."""
    rows = encoder.sizes.curve
    chances = FLIPS[1 :: encoder.sizes.shares] if encoder.sizes.shares > 1 else FLIPS
    found: Table = {"rows": rows, "probability": [0.0, *chances], "largest": LARGEST, "smallest": SMALLEST}
    for kind in KINDS:
        own = encoder.own(kind, TASKS, rows)
        found[kind] = {"base": normalised(encoder.base(TASKS, rows), own)}
        for name, share in (("largest", LARGEST), ("smallest", SMALLEST)):
            line = [100.0]
            for chance in chances:
                rights = {task: _flipped(encoder, kind, task, name, share, chance, rows) for task in TASKS}
                line.append(normalised(rights, own))
            found[kind][name] = line
    return found


def _flipped(encoder: Encoder, kind: str, task: str, name: str, share: float, chance: float, rows: int) -> Any:
    def make() -> Any:
        return flipped(load(kind, task), share, name == "largest", chance)

    return encoder.rights([kind, task, name, share, "flipped", chance], [task], rows, make)[task]


def task_sets() -> list[tuple[str, ...]]:
    """Return two to six tasks: each task in as many sets of a size as any other."""
    plain = [tuple(one) for one in sets() if one not in UNLIKE]
    return sorted([*plain, *left_out()], key=len)


def left_out() -> list[tuple[str, ...]]:
    """Return all sets of five tasks."""
    return [tuple(task for task in TASKS if task != left) for left in TASKS]


def rows_of_set(sizes: Sizes, tasks: int) -> int:
    """Return the test rows of a task: few where each task is in five sets, as many as in the tables where all are merged."""
    return {len(TASKS) - 1: sizes.leave_out, len(TASKS): sizes.table}.get(tasks, sizes.sets)


def tasks(encoder: Encoder) -> Table:
    """Return the accuracy against the number of merged tasks, where each own adapter's is 100."""
    numbers = sorted({len(one) for one in task_sets()})
    found: Table = {"tasks": numbers, "rows": [rows_of_set(encoder.sizes, number) for number in numbers]}
    for kind in KINDS:
        found[kind] = {}
        for method, scale in METHODS.items():
            setting = Setting(method)
            sizes: dict[int, list[float]] = {}
            for chosen in task_sets():
                rows = rows_of_set(encoder.sizes, len(chosen))
                rights = encoder.merged(kind, chosen, setting, scale, chosen, rows)
                sizes.setdefault(len(chosen), []).append(normalised(rights, encoder.own(kind, chosen, rows)))
            found[kind][method] = [mean(sizes[size]) for size in found["tasks"]]
    return found


def curve(encoder: Encoder, kind: str, setting: Setting, scales: Sequence[float]) -> dict[float, float]:
    """Return the mean accuracy on validation rows for each λ."""
    chosen = scales[:: encoder.sizes.scales]
    rows = encoder.sizes.validation
    return {scale: accuracy(encoder.merged(kind, TASKS, setting, scale, TASKS, rows, "validation")) for scale in chosen}


def best(found: Mapping[float, float]) -> float:
    """Return the λ with the highest accuracy, the smaller one of equals."""
    return max(found, key=lambda scale: (found[scale], -scale))


def on_test(encoder: Encoder, kind: str, setting: Setting, scale: float) -> Rights:
    """Return what the merge of all six gets right on test rows."""
    return encoder.merged(kind, TASKS, setting, scale, TASKS, encoder.sizes.table)


def scale(encoder: Encoder) -> Table:
    """Return the accuracy on validation rows against λ."""
    found: Table = {"rows": encoder.sizes.validation}
    for kind in KINDS:
        found[kind] = {}
        for method, default in METHODS.items():
            if method != "average":  # it is task arithmetic with λ = 1/N
                line = curve(encoder, kind, Setting(method), SUMS if default < 1 else MEANS)
                found[kind][method] = {"scale": list(line), "accuracy": list(line.values()), "default": default}
    return found


def ablation(encoder: Encoder) -> Table:
    """Return TIES without each of its steps: λ as chosen for the whole method, and chosen anew for each."""
    found: Table = {"rows": encoder.sizes.table, "chosen on": encoder.sizes.validation}
    for kind in KINDS:
        full = best(curve(encoder, kind, TIES, MEANS))
        against = on_test(encoder, kind, TIES, full)
        lines = [_ablated(encoder, kind, name, setting, scales, full, against) for name, (setting, scales) in ABLATIONS.items()]  # fmt: skip
        plain = on_test(encoder, kind, TIES, 1.0)
        lines.append({"row": "no scale (λ = 1)", "same λ": accuracy(plain), **difference(plain, against), "λ": 1.0})
        found[kind] = lines
    return found


def _ablated(
    encoder: Encoder,
    kind: str,
    name: str,
    setting: Setting,
    scales: Sequence[float],
    full: float,
    against: Rights,
) -> Table:
    same = on_test(encoder, kind, setting, full)
    own = best(curve(encoder, kind, setting, scales))
    tuned = on_test(encoder, kind, setting, own)
    line: Table = {"row": name, "same λ": accuracy(same), **difference(same, against), "λ": own}
    line |= {"own λ": accuracy(tuned)}
    return line | {f"{key}, own λ": value for key, value in difference(tuned, against).items()}


def tuned(encoder: Encoder) -> Table:
    """Return each method as it comes, and with λ (TIES: and the density) chosen on validation rows."""
    found: Table = {"rows": encoder.sizes.table, "chosen on": encoder.sizes.validation}
    for kind in KINDS:
        rows = encoder.sizes.table
        references = {"base": encoder.base(TASKS, rows), "own adapters": encoder.own(kind, TASKS, rows)}
        references["multitask-trained"] = encoder.multitask(kind, TASKS, rows)
        reference = on_test(encoder, kind, TIES, 1.0)
        lines = [
            {"method": name, "accuracy": accuracy(right), **difference(right, reference)}
            for name, right in references.items()
        ]
        for method, default in METHODS.items():
            lines.append(_tuned(encoder, kind, Setting(method), default, reference))
        found[kind] = lines
    return found


def _tuned(encoder: Encoder, kind: str, setting: Setting, default: float, reference: Rights) -> Table:
    plain = on_test(encoder, kind, setting, default)
    line: Table = {"method": setting.label, "accuracy": accuracy(plain), **difference(plain, reference), "λ": default}
    if setting.method == "average":
        return line
    scales = SUMS if default < 1 else MEANS
    options: dict[float | None, Setting] = {None: setting, **(DENSITIES if setting == TIES else {})}
    found = {
        (density, at): value
        for density, one in options.items()
        for at, value in curve(encoder, kind, one, NEAR if density else scales).items()
    }
    density, at = max(found, key=lambda key: (found[key], -key[1]))
    right = on_test(encoder, kind, options[density], at)
    line |= {"tuned": accuracy(right), "tuned λ": at}
    line |= {f"{key}, tuned": value for key, value in difference(right, reference).items()}
    return line | ({} if density is None else {"tuned density": density})


def signs(encoder: Encoder) -> Table:
    """Return TIES with elected signs, with those of the adapter trained on all tasks, and with signs learnt from a few rows.

    The last, which has to train an adapter, is what `choose.py` stored.
    """
    found: Table = {"rows": encoder.sizes.table, "chosen on": encoder.sizes.validation}
    stored = json.loads(CHOICE.read_text(encoding="utf-8"))
    found["few-shot rows"] = stored["rows"]
    for kind in KINDS:
        reference = on_test(encoder, kind, TIES, 1.0)
        lines = []
        for name, setting in (("elected", TIES), ("oracle", ORACLE)):
            default = on_test(encoder, kind, setting, 1.0)
            line = {"signs": name, "accuracy": accuracy(default), **difference(default, reference)}
            at = best(curve(encoder, kind, setting, NEAR))
            right = on_test(encoder, kind, setting, at)
            line |= {"tuned": accuracy(right), "tuned λ": at}
            lines.append(line | {f"{key}, tuned": value for key, value in difference(right, reference).items()})
        (few,) = (way for way in stored[kind] if way["way"] == FEW_SHOT)
        known = {key: few[key] for key in ("difference", "error")}
        lines.append({"signs": "few-shot", "accuracy": few["mean"], **known})
        whole = encoder.multitask(kind, TASKS, encoder.sizes.table)
        lines.append({"signs": "multitask-trained", "accuracy": accuracy(whole), **difference(whole, reference)})
        found[kind] = lines
    return found


def held_out(encoder: Encoder) -> Table:
    """Return the accuracy on tasks whose adapters were not merged: each task left out in turn, and one without any adapter."""
    rows, others = encoder.sizes.curve, encoder.sizes.other
    found: Table = {"rows": rows, "other": OTHER, "rows of the other": others}
    base = {"left out": encoder.base(TASKS, rows), "other": encoder.base([OTHER], others)}
    for kind in KINDS:
        lines: list[Table] = [{"method": "base", **{name: accuracy(right) for name, right in base.items()}}]
        for method, default in METHODS.items():
            setting, left = Setting(method), {}
            for chosen in left_out():
                (task,) = set(TASKS) - set(chosen)
                left |= encoder.merged(kind, chosen, setting, default, [task], rows)
            other = encoder.merged(kind, TASKS, setting, default, [OTHER], others)
            lines.append({"method": method, **_over(left, base, "left out"), **_over(other, base, "other")})
        whole = encoder.multitask(kind, [OTHER], others)
        lines.append({"method": "multitask-trained", **_over(whole, base, "other")})
        found[kind] = lines
    return found


def _over(right: Rights, base: Mapping[str, Rights], name: str) -> Table:
    against = difference(right, base[name])
    return {name: accuracy(right)} | {f"{key}, {name}": value for key, value in against.items()}


def rank(encoder: Encoder) -> Table:
    """Return the accuracy of all six LoRAs in one of a smaller rank: merged and then cut, or compressed first."""
    rows = encoder.sizes.sets
    ranks = RANKS[:: encoder.sizes.shares]
    own = encoder.own("lora", TASKS, rows)
    found: Table = {"rows": rows, "ranks": list(ranks)}
    for name, setting in RANKED.items():
        default = METHODS[setting.method]
        rights = [encoder.merged("lora", TASKS, replace(setting, rank=one), default, TASKS, rows) for one in ranks]
        found[name] = [normalised(right, own) for right in rights]
    return found
