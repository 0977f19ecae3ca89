"""Experiments of `paper.py` on the language model: its own adapters trimmed and flipped, and the stored scores of its merges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from causal import CausalJudge, Rows
from paper_judge import KINDS, Edited, Log, Sizes, flipped, language_model_adapters, mean, trimmed

import smollm2  # isort: skip

import ties_peft

RESULTS = Path(__file__).parent / "results"
SHARES = (0.05, 0.1, 0.2, 0.4)
FLIPS = (0.5, 1.0)
LARGEST, SMALLEST = 0.2, 0.8
METHODS = ("average", "ties", "auto", "peft_ties")
SPLIT = "test"
Loss = float  # per token of the completions


class Writer:
    """The language model and a few rows of the tasks that write text, scored by the loss of the completion."""

    def __init__(self, data: Path, base: str | None, log: Log, sizes: Sizes) -> None:
        self.data, self.base, self.log, self.rows = data, base, log, sizes.language
        self._judge: CausalJudge | None = None

    @property
    def judge(self) -> CausalJudge:
        """The base with the rows, loaded when something has to be scored."""
        if self._judge is None:
            base, tokenizer = smollm2.load_base(self.base, "cpu")
            read = {
                task: smollm2.read_examples(task, SPLIT, self.data, tokenizer, self.rows) for task in smollm2.GENERATION
            }
            self._judge = CausalJudge(base, {(SPLIT, task): Rows(examples, None) for task, examples in read.items()})
        return self._judge

    def loss(self, task: str, what: Sequence[Any], make: Callable[[], Any]) -> Loss:
        """Return the loss per token on a task's rows: from the log, or by scoring an adapter (None for the base)."""

        def score() -> Loss:
            judge, key = self.judge, (SPLIT, task)
            tokens = sum(len(one.completion) for one in judge.rows[key].examples)
            with worn(judge.model, make()):
                return float(judge.score({}, [key])[key].losses.sum()) / tokens

        return float(self.log.find(["language model", self.rows, task, *what], score))


@contextmanager
def worn(model: Any, adapter: Any) -> Iterator[None]:
    """Add an adapter's task vectors to the model's weights; put the weights back afterwards."""
    layers = {name: model.get_submodule(name) for name in (adapter.modules if adapter else ())}
    kept = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight.data = kept[name] + adapter.delta(name)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = kept[name]


def edits(writer: Writer, sizes: Sizes) -> dict[str, Any]:
    """Return how much of the gap in loss each edited adapter closes, in percent, the mean over the tasks that write text."""
    shares, chances = SHARES[:: sizes.shares], FLIPS[:: sizes.shares]
    kept = [_closed(writer, ["kept", share], lambda own, share=share: trimmed(own, share)) for share in shares]
    found: dict[str, Any] = {
        "rows": writer.rows,
        "tasks": list(smollm2.GENERATION),
        "share kept": [*shares, 1.0],
        "closed": [*kept, 100.0],
        "probability": [0.0, *chances],
    }
    for name, share in (("largest", LARGEST), ("smallest", SMALLEST)):
        line = [
            _closed(
                writer,
                [name, share, "flipped", chance],
                lambda own, name=name, share=share, chance=chance: flipped(own, share, name == "largest", chance),
            )
            for chance in chances
        ]
        found[name] = [100.0, *line]
    return found


def _closed(writer: Writer, what: Sequence[Any], edit: Callable[[Any], Edited]) -> float:
    each = []
    for task in smollm2.GENERATION:
        path = language_model_adapters()[task]
        base = writer.loss(task, ["base"], lambda: None)
        own = writer.loss(task, ["own"], lambda path=path: ties_peft.Adapter.load(path))
        loss = writer.loss(task, what, lambda path=path: edit(ties_peft.Adapter.load(path)))
        each.append(100 * (base - loss) / (base - own))
    return mean(each)


def stored() -> dict[str, Any]:
    """Return what other commands stored: the language model's merges, all six and by number, and distil by number."""
    known = json.loads((RESULTS / "language_model.json").read_text(encoding="utf-8"))
    runs = json.loads((RESULTS / "learn.json").read_text(encoding="utf-8"))["runs"]
    test = known["test"]
    return {
        "rows": known["rows"],
        "six": [_line(row) for row in test["six"] if row["space"] in ("", "delta")],
        "by number": _by_number(test["by number of adapters"]),
        "distil": {kind: _distilled(runs, kind) for kind in KINDS},
    }


def _distilled(runs: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float]:
    """Return the accuracy by the number of adapters, own adapter = 100, of 200 texts a task judged on 300 rows."""
    wanted = (kind, "200 rows", 300)
    found = {run["N"]: run["normalised"] for run in runs if (run["kind"], run["rows"], run["judged"]) == wanted}
    return {str(number): found[number] for number in sorted(found)}


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: row.get(key) for key in ("method", "rank", "classification", "generation", "six", "worst", "below base")
    }


def _by_number(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        sizes = {str(size): row[f"N = {size}"] for size in (2, 4, 6) if f"N = {size}" in row}
        if len(sizes) == 3 and row["space"] == "delta":
            found.append({"method": row["method"], **sizes})
    return found
