"""Write the catalogue of methods: from their docstrings, their parameters and the stored results of the benchmarks."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import docstrings
import yaml

import ties_peft
from ties_peft.methods import MethodInfo, Parameter, find_method
from ties_peft.methods.auto import Auto

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
ADVICE: dict[str, dict[str, str]] = yaml.safe_load((DOCS / "methods.yaml").read_text(encoding="utf-8"))
WORLDS = {"lora": "LoRA, encoder", "ia3": "(IA)³, encoder", "lm": "LoRA, language model", "worst": "its worst task"}
REFERENCES = ("own adapters", "multitask-trained", "base", "peft_ties", "peft_linear")
TITLES = {
    "own adapters": "each task's own adapter",
    "multitask-trained": "one adapter trained on all tasks",
    "base": "the base without adapters",
    "peft_ties": "PEFT's `ties`",
    "peft_linear": "PEFT's `linear`",
}
LIMITS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
HEAD = """# Methods

`ties-peft methods NAME` prints the text of one method, `--method NAME` chooses it, and `--set NAME=VALUE` sets a parameter. Two
methods can be combined: `dare+ties`, `pico+ties`, `task_arithmetic+boosting`.

In the formulas, τᵢ is the task vector of adapter i in one module, wᵢ its weight, N the number of adapters and λ the scale.
A *law* is a statement that the tests check.

**The figures** are percentages of what each task's own adapter reaches, the mean of six tasks, for the six sample adapters of each
kind merged into one: accuracy for an encoder (all-MiniLM-L6-v2), for a language model (SmolLM2-135M-Instruct) accuracy for three
tasks and for three others the share of the gap in loss between base and own adapter; the last column is its worst task. Below the
row of the base, a merge is worse than no adapter. They come from 300 test rows a task, by `benchmarks/compare.py` and
`benchmarks/choose.py`. – means not measured. Differences under about 1 are within the error; [measurements](../measurements.md) has
the errors.
"""


class Setting(NamedTuple):
    """What a row of a stored table was measured with: its label, space and rank."""

    label: str
    space: str
    rank: str


BY_AUTO = "as `auto` chooses it"
Figures = dict[Setting, dict[str, float]]


def page() -> str:
    """Return the page of all methods."""
    figures = _figures()
    known = ties_peft.methods()
    references = [
        ["", TITLES[name], *_cells(found)] for name in REFERENCES for key, found in figures.items() if key.label == name
    ]
    head = ["method", "what it does", *WORLDS.values()]
    overview = _table(head, [*(_overview(info, figures) for info in known), *references])
    return "\n".join([HEAD, overview, *(_method(info, figures) for info in known)])


def _overview(info: MethodInfo, figures: Figures) -> list[str]:
    """Return a row for a method with its defaults."""
    link = f"[`{info.name}`](#{info.name})"
    labels = (info.name, f"{info.name}, {BY_AUTO}")
    found = [figures[key] for label in labels if (key := Setting(label, "delta", "auto")) in figures]
    return [link, _cell(info.summary), *_cells(found[0] if found else {})]


def _method(info: MethodInfo, figures: Figures) -> str:
    advice = ADVICE[info.name]
    spaces = ", ".join(f"`{space}`" for space in info.spaces)
    kinds = " and ".join({"lora": "LoRA and what becomes LoRA", "ia3": "(IA)³"}[kind] for kind in info.kinds)
    rows = [
        [f"`{parameter.name}`", _default(parameter), _range(info.name, parameter), _cell(parameter.meaning)]
        for parameter in info.parameters
    ]
    rows.append(["`scale`", f"`{info.default_scale}`", "", "λ, the factor on the result"])
    return "\n".join(
        [
            f"## {info.name}\n",
            docstrings.markdown(docstrings.read(info.text)),
            f"**Use it** {advice['use']}\n",
            f"**Do not use it** {advice['avoid']}\n",
            _table(["parameter", "default", "range", "meaning"], rows),
            f"Spaces: {spaces}. Adapters: {kinds}.\n",
            _measured(info.name, figures),
        ]
    )


def _measured(name: str, figures: Figures) -> str:
    """Return the figures of one method, by setting; its name in the labels gives place to what differs from the defaults."""
    rows = [
        [_setting(name, key.label), f"`{key.space}`", key.rank, *_cells(found)]
        for key, found in figures.items()
        if name in _methods_in(key.label)
    ]
    if not rows:
        return "Not measured.\n"
    return _table(["measured with", "space", "rank", *WORLDS.values()], rows)


def _methods_in(label: str) -> list[str]:
    """Return the names of the methods in a label such as `pico+ties λ 0.5, density 1`: those that stand first, or alone."""
    first = re.split(r"[ ,]", label, maxsplit=1)[0]
    return [first.split("+")[0]] if first not in TITLES else []


def _setting(name: str, label: str) -> str:
    rest = re.sub(rf"^{name}\b[ ,]*", "", label)
    return _cell(label if label.startswith(f"{name}+") else rest or "the defaults")


def _figures() -> Figures:
    """Return the stored figures by setting; the rows of `auto` count for the methods that it stands for, too."""
    found: Figures = defaultdict(dict)
    rows = list(_rows())
    totals = {world: row["rank"] for world, row in rows if row.get("method") == "average"}  # Σrᵢ, its rank
    for world, row in rows:
        rank = "auto" if row.get("rank") in (None, totals[world]) else str(row["rank"])
        key = Setting(_label(row), row.get("space") or "delta", rank)
        known = {world: row["six"], "worst": row["worst"]} if world == "lm" else {world: row["normalised"]}
        for own in (key, *_chosen_by_auto(world, key)):
            found[own] = {**known, **found[own]}  # the first table that has it
    return dict(found)


def _rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of the stored tables, each with the key of its column."""
    compared, chosen, subsets, language = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("methods", "choose", "subsets", "language_model")
    )
    for kind in ("lora", "ia3"):
        yield from ((kind, row) for row in compared[kind])
        yield from ((kind, row | {"normalised": row["6 adapters"]}) for row in subsets[kind])
        yield from ((kind, row) for row in chosen[kind] if re.match(r"(fisher|regmean)\b", row["way"]))
    yield from (("lm", row) for row in language["test"]["six"])


def _label(row: dict[str, Any]) -> str:
    """Return the label of a row without a scale that is the method's default."""
    label = str(row.get("method") or row["way"])
    name = re.split(r"[ ,+]", label, maxsplit=1)[0]
    if name not in ADVICE:
        return label
    default = str(find_method(name).default_scale).replace("1/sqrt(N)", "1/√N")
    label = re.sub(rf" λ {re.escape(default)}(?=,|$)", "", label)
    return label.replace("sign_from multitask", "sign_from the adapter trained on all tasks")


def _chosen_by_auto(world: str, key: Setting) -> Iterator[Setting]:
    if key.label == Auto.name:
        chosen = Auto().choose("ia3" if world == "ia3" else "lora", key.space).method.name
        yield key._replace(label=f"{chosen}, {BY_AUTO}")


def _default(parameter: Parameter) -> str:
    return "none" if parameter.default is None else f"`{parameter.default}`"


def _range(method: str, parameter: Parameter) -> str:
    """Return the values that a parameter may have, from the JSON schema of the method."""
    schema: dict[str, Any] = find_method(method).model_json_schema()["properties"][parameter.name]
    found = []
    for one in schema.get("anyOf", [schema]):
        if one.get("type") == "null":
            found.append("none")
        elif "enum" in one:
            found.append(", ".join(one["enum"]))
        elif one.get("type") == "boolean":
            found.append("true, false")
        else:
            found.append(" and ".join(text.format(f"{one[key]:g}") for key, text in LIMITS.items() if key in one))
    return " or ".join(part for part in found if part).replace("<", "\\<").replace(">", "\\>")


def _cells(found: dict[str, float]) -> list[str]:
    return [f"{found[world]:.1f}".replace("-", "−") if world in found else "–" for world in WORLDS]


def _cell(text: str) -> str:
    return docstrings.markdown_text(text)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
