"""Cases: a way of merging, the adapters it is tried on, and what came of it, one line of a log each."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from judge import ROOT, Judge, minilm, own_adapters, stretched

import ties_peft

ROOT_N = "1/√N"
FOURTH_ROOT_N = "1/⁴√N"
FORMULAS = {ROOT_N: "1/sqrt(N)", FOURTH_ROOT_N: "N^-1/4"}  # as `ties_peft.merge` takes what tables call so
Set = Mapping[str, float]  # the tasks whose adapters are merged, each with a gain on its task vector


@dataclass(frozen=True)
class Setting:
    """One way of merging.

    Attributes:
        method, space, rank: as `ties_peft.merge` takes them.
        scale: λ, a number or a formula in N; the method's own for None.
        extra: other arguments; `sign_from` may be "multitask", the adapter trained on all tasks.
    """

    method: str
    space: str = "delta"
    rank: int | str = "auto"
    scale: float | str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Method, λ and the rest, in a table's first column."""
        scale = "" if self.scale is None else f" λ {self.scale}"
        return f"{self.method}{scale}{''.join(f', {key} {value}' for key, value in self.extra.items())}"

    def merge(self, kind: str, adapters: Sequence[Any]) -> tuple[ties_peft.Merged, float]:
        """The merged adapter and the seconds of processor time that it took."""
        extra = {key: multitask(kind) if value == "multitask" else value for key, value in self.extra.items()}
        scale = FORMULAS.get(self.scale, self.scale) if isinstance(self.scale, str) else self.scale
        started = time.process_time()
        merged = ties_peft.merge(
            adapters, self.method, self.space, scale=scale, rank=self.rank, dtype="float32", **extra
        )
        return merged, time.process_time() - started


class Bench:
    """One judge, and a log of what it found, so that a run which was stopped goes on where it was.

    Args:
        data, split, rows: what is judged on.
        log: a file with one JSON object a line; None to keep nothing.
    """

    def __init__(self, data: Path, split: str, rows: int, log: Path | None = None) -> None:
        self.data, self.split, self.rows, self.log = data, split, rows, log
        self.tasks = (*minilm.TASKS, *minilm.HELD_OUT)
        self._judge: Judge | None = None
        lines = log.read_text(encoding="utf-8").splitlines() if log and log.exists() else []
        self.known = {record["key"]: record for record in map(json.loads, lines)}

    @property
    def judge(self) -> Judge:
        """Made when first something has to be judged."""
        if self._judge is None:
            self._judge = Judge(self.data, self.split, self.rows, self.tasks)
        return self._judge

    def merged(self, kind: str, chosen: Set, setting: Setting, tasks: Sequence[str]) -> dict[str, Any]:
        """What merging a set of adapters in one way comes to, on some tasks."""

        def make() -> tuple[ties_peft.Adapter, dict[str, Any]]:
            adapters = [stretched(own_adapters(kind)[task], gain) for task, gain in chosen.items()]
            merged, seconds = setting.merge(kind, adapters)
            report = merged.report
            return merged, {"rank": report.rank, "seconds": seconds, "energy": report.energy}

        return self.find([kind, dict(chosen), setting.label, setting.space, setting.rank, list(tasks)], tasks, make)

    def single(self, kind: str, task: str, gain: float = 1.0) -> dict[str, Any]:
        """What one own adapter comes to on its own task."""
        path = own_adapters(kind)[task]
        return self.find([kind, {task: gain}, "own"], [task], lambda: (stretched(path, gain), {}))

    def base(self) -> dict[str, Any]:
        """What the bare base comes to on all tasks."""
        return self.find(["base"], self.tasks, lambda: (None, {}))

    def multitask(self, kind: str) -> dict[str, Any]:
        """What the adapter trained on all tasks comes to on all of them."""
        return self.find([kind, "multitask"], self.tasks, lambda: (ties_peft.Adapter.load(multitask(kind)), {}))

    def find(self, what: list[Any], tasks: Sequence[str], make: Any) -> dict[str, Any]:
        """Return what is known under a key: from the log, or by making and judging an adapter.

        Args:
            what: the key.
            tasks: to judge on.
            make: () → (the adapter, what else to note of it).
        """
        key = json.dumps([self.split, self.rows, *what], ensure_ascii=False)
        if key not in self.known:
            adapter, facts = make()
            scores = self.judge.score(adapter, tasks)
            facts["right"] = {task: pack(own.right) for task, own in scores.items()}
            facts["loss"] = {task: round(own.loss, 5) for task, own in scores.items()}
            facts["accuracy"] = {task: round(own.accuracy, 3) for task, own in scores.items()}
            self.known[key] = {"key": key, **facts}
            if self.log:
                with self.log.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(self.known[key], ensure_ascii=False) + "\n")
        return self.known[key]


def multitask(kind: str) -> Path:
    """The folder of the adapter that was trained on all tasks."""
    return ROOT / "adapters" / "multitask" / kind


def pack(right: torch.Tensor) -> str:
    """Which rows were right, one character a row."""
    return "".join("1" if one else "0" for one in right.tolist())


def unpack(text: str) -> torch.Tensor:
    """The opposite of `pack`."""
    return torch.tensor([one == "1" for one in text])
