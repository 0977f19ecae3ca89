"""What the experiments of `paper.py` share: edited adapters, and scores that are kept row by row in a log."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import Setting, multitask, pack, unpack
from judge import ROOT, Judge, minilm, own_adapters, paired
from torch import Tensor

import ties_peft

KINDS = ("lora", "ia3")
TASKS = minilm.TASKS
OTHER = minilm.HELD_OUT[0]  # a task that no adapter was trained on


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        table: test rows of a task, for tables.
        curve: test rows of a task, for curves.
        sets, leave_out: test rows of a task for each set of two to four adapters, and of five, of which each task is in five.
        other: test rows of the task that no adapter was trained on.
        validation: rows of a task by which a λ or a density is chosen; the paper takes 32.
        language: rows of a task of the language model.
        scales: every how many values of λ one is tried.
        shares: every how many shares of kept entries one is tried.
        modules: modules that the weights are read of, spread evenly; None for all.
        epochs, seeds: of the convolutional experts.
    """

    table: int = 100
    curve: int = 60
    sets: int = 40
    leave_out: int = 20
    other: int = 200
    validation: int = 32
    language: int = 8
    scales: int = 1
    shares: int = 1
    modules: int | None = None
    epochs: int = 15
    seeds: int = 3


FULL = Sizes()
FAST = Sizes(40, 24, 20, 10, 40, 16, 4, 2, 2, 12, 10, 1)


class Edited:
    """An adapter whose task vectors are changed as they are read, without being cut to a rank, as `Bench.applied` needs it.

    Args:
        adapter: anything with `modules`, `module` and `delta`.
        change: (module, task vector) → another task vector.
    """

    label = base_name = "changed task vectors"
    origin = None  # the file of an image model, where it comes from one

    def __init__(self, adapter: Any, change: Callable[[str, Tensor], Tensor]) -> None:
        self.adapter, self.change = adapter, change
        self.modules: tuple[str, ...] = tuple(adapter.modules)

    def module(self, name: str) -> Any:
        """Return what is known of a module."""
        return self.adapter.module(name)

    def extra_tensors(self) -> tuple[()]:
        """Return none."""
        return ()

    def delta(self, name: str) -> Tensor:
        """Return the changed task vector of one module."""
        return self.change(name, self.adapter.delta(name))


def scaled(adapter: Any, scale: float) -> Edited:
    """Return an adapter with its task vector times λ."""
    return Edited(adapter, lambda _, delta: scale * delta)


def magnitudes(adapter: Any, modules: Iterable[str] | None = None) -> Tensor:
    """Return the magnitudes of all entries of an adapter, flat. That of one adapter alone is in memory."""
    return torch.cat([adapter.delta(name).abs().flatten() for name in modules or adapter.modules])


def threshold(values: Tensor, share: float) -> float:
    """Return the magnitude of the ⌊share·n⌋-th largest entry: entries from it on are kept; infinity where none is."""
    count = int(share * values.numel() + 1e-9)
    return float(values.kthvalue(values.numel() - count + 1).values) if count else float("inf")


def trimmed(adapter: Any, share: float) -> Edited:
    """Return an adapter of which the largest entries are kept, ranked over the whole adapter."""
    least = threshold(magnitudes(adapter), share)
    return Edited(adapter, lambda _, delta: torch.where(delta.abs() >= least, delta, 0.0))


def flipped(adapter: Any, share: float, largest: bool, probability: float, seed: int = 0) -> Edited:
    """Return an adapter of which some entries have the opposite sign.

    Args:
        adapter: whose.
        share: of its entries that may be flipped.
        largest: whether these are the largest or the smallest.
        probability: of a flip.
        seed: of the draws.
    """
    least = threshold(magnitudes(adapter), share if largest else 1 - share)

    def change(name: str, delta: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(seed + 1000 * adapter.modules.index(name))
        flips = torch.rand(delta.shape, generator=draw) < probability
        return torch.where(flips & ((delta.abs() >= least) == largest), -delta, delta)

    return Edited(adapter, change)


class Log:
    """What was found, one JSON object a line, so that a run that was stopped goes on where it was."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self.known: dict[str, Any] = {record["key"]: record["value"] for record in map(json.loads, lines)}

    def find(self, what: Sequence[Any], make: Callable[[], Any]) -> Any:
        """Return what is known under a key, or make it and keep it."""
        key = json.dumps(what, ensure_ascii=False)
        if key not in self.known:
            self.add(what, make())
        return self.known[key]

    def get(self, what: Sequence[Any]) -> Any:
        """Return what is known under a key, or None."""
        return self.known.get(json.dumps(what, ensure_ascii=False))

    def add(self, what: Sequence[Any], value: Any) -> None:
        """Keep something."""
        key = json.dumps(what, ensure_ascii=False)
        self.known[key] = value
        if self.path:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")


Rights = dict[str, Tensor]  # which rows of each task were right, (rows,) each


class Encoder:
    """The sentence encoder, and which rows each adapter got right on it."""

    def __init__(self, data: Path, log: Log, sizes: Sizes) -> None:
        self.data, self.log, self.sizes = data, log, sizes
        self._judges: dict[str, Judge] = {}
        self._merged: tuple[str, Any] = ("", None)

    def rights(
        self, what: Sequence[Any], tasks: Sequence[str], rows: int, make: Callable[[], Any], split: str = "test"
    ) -> Rights:
        """Return which of the first rows of some tasks are right: from the log, or by scoring an adapter.

        Args:
            what: names the adapter.
            tasks, rows, split: what is scored; rows of it that are in the log are not scored again.
            make: () → the adapter; None for the base alone.
        """
        known = {task: self.log.get(["rows", split, *what, task]) or "" for task in tasks}
        adapter = None
        for scored in sorted({len(own) for own in known.values() if len(own) < rows}):
            missing = [task for task in tasks if len(known[task]) == scored]
            adapter = adapter or make()
            for task, scores in self._judge(split, scored, rows).score(adapter, missing).items():
                known[task] += pack(scores.right)
                self.log.add(["rows", split, *what, task], known[task])
        return {task: unpack(own[:rows]) for task, own in known.items()}

    def _judge(self, split: str, first: int, last: int) -> Judge:
        """Return a judge of some rows; the base is loaded once for each split, and so are its texts."""
        if split not in self._judges:
            most = max(self.sizes.table, self.sizes.other) if split == "test" else self.sizes.validation
            self._judges[split] = Judge(self.data, split, most, (*TASKS, OTHER))
        judge = copy.copy(self._judges[split])
        judge.tokens = {task: own[first:last] for task, own in judge.tokens.items()}
        judge.labels = {task: own[first:last] for task, own in judge.labels.items()}
        return judge

    def base(self, tasks: Sequence[str], rows: int) -> Rights:
        """Return what the base gets right."""
        return self.rights(["base"], tasks, rows, lambda: None)

    def own(self, kind: str, tasks: Sequence[str], rows: int) -> Rights:
        """Return what each task's own adapter gets right on it."""
        return {
            task: self.rights([kind, task], [task], rows, lambda task=task: load(kind, task))[task] for task in tasks
        }

    def multitask(self, kind: str, tasks: Sequence[str], rows: int) -> Rights:
        """Return what the adapter that was trained on all tasks gets right."""
        return self.rights([kind, "multitask"], tasks, rows, lambda: ties_peft.Adapter.load(multitask(kind)))

    def merged(
        self,
        kind: str,
        chosen: Sequence[str],
        setting: Setting,
        scale: float,
        tasks: Sequence[str],
        rows: int,
        split: str = "test",
    ) -> Rights:
        """Return what the merge of some tasks' adapters gets right, merged at λ = 1 and then multiplied by λ."""
        name = [kind, "+".join(chosen), setting.label, setting.space, str(setting.rank)]

        def make() -> Any:
            if self._merged[0] != str(name):
                adapters = [load(kind, task) for task in chosen]
                with_unit_scale = Setting(setting.method, setting.space, setting.rank, 1.0, setting.extra)
                self._merged = str(name), with_unit_scale.merge(kind, adapters)[0]
            return scaled(self._merged[1], scale)

        return self.rights([*name, round(scale, 6)], tasks, rows, make, split)


def load(kind: str, task: str) -> ties_peft.Adapter:
    """Return a sample adapter of the encoder."""
    return ties_peft.Adapter.load(own_adapters(kind)[task])


def accuracy(rights: Mapping[str, Tensor]) -> float:
    """Return the mean accuracy over tasks, in percent."""
    return mean(100 * float(right.double().mean()) for right in rights.values())


def normalised(rights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> float:
    """Return the mean over tasks of the accuracy where the own adapter's is 100."""
    return mean(100 * float(right.double().mean() / own[task].double().mean()) for task, right in rights.items())


def difference(a: Rights, b: Rights) -> dict[str, float]:
    """Return a − b in points of the mean accuracy, and its paired standard error."""
    points, error = paired([(a, b)])
    return {"difference": round(points, 2), "error": round(error, 2)}


def mean(values: Iterable[float]) -> float:
    """Return the mean, to two digits."""
    numbers = list(values)
    return round(sum(numbers) / len(numbers), 2)


def language_model_adapters() -> dict[str, Path]:
    """Return the folder of each task's adapter of the language model."""
    import smollm2

    return {task: ROOT / "adapters" / "smollm2" / task for task in smollm2.TASKS}
