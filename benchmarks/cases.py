"""Cases of the encoder's benchmarks: a setting of a merge, the adapters to merge, and their scores, in a log."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from judge import ROOT, Judge, minilm, own_adapters, stretched
from records import Record, Records

import ties_peft

ROOT_N = "1/√N"
FOURTH_ROOT_N = "1/⁴√N"
FORMULAS = {ROOT_N: "1/sqrt(N)", FOURTH_ROOT_N: "N^-1/4"}  # what `ties_peft.merge` takes, by the name in tables
Set = Mapping[str, float]  # the tasks whose adapters are merged, each with the factor of its task vector


@dataclass(frozen=True)
class Setting:
    """One setting of a merge.

    Attributes:
        method, space, rank: as in `ties_peft.merge`.
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
        """Method, λ and other arguments, for tables and logs."""
        scale = "" if self.scale is None else f" λ {self.scale}"
        return f"{self.method}{scale}{''.join(f', {key} {value}' for key, value in self.extra.items())}"

    def merge(self, kind: str, adapters: Sequence[Any]) -> tuple[ties_peft.Merged, float]:
        """Merge adapters of a kind, and return the result and the seconds of processor time."""
        extra = {key: multitask(kind) if value == "multitask" else value for key, value in self.extra.items()}
        scale = FORMULAS.get(self.scale, self.scale) if isinstance(self.scale, str) else self.scale
        started = time.process_time()
        merged = ties_peft.merge(
            adapters, self.method, self.space, scale=scale, rank=self.rank, dtype="float32", **extra
        )
        return merged, time.process_time() - started


class Measurements:
    """What adapters and merges reach on the rows of tasks, with a log so that a stopped run continues.

    Args:
        data, split, rows: the rows.
        log: a file with one JSON object a line; None to keep nothing.
    """

    def __init__(self, data: Path, split: str, rows: int, log: Path | None = None) -> None:
        self.data, self.split, self.rows = data, split, rows
        self.records = Records(log)
        self.tasks = (*minilm.TASKS, *minilm.HELD_OUT)

    @functools.cached_property
    def judge(self) -> Judge:
        """The base model with the rows, loaded when something has to be scored."""
        return Judge(self.data, self.split, self.rows, self.tasks)

    def merged(self, kind: str, chosen: Set, setting: Setting, tasks: Sequence[str]) -> Record:
        """Return the scores of a merge on some tasks."""

        def make() -> tuple[ties_peft.Adapter, Record]:
            adapters = [stretched(own_adapters(kind)[task], gain) for task, gain in chosen.items()]
            merged, seconds = setting.merge(kind, adapters)
            report = merged.report
            return merged, {"rank": report.rank, "seconds": seconds, "energy": report.energy}

        return self.find([kind, dict(chosen), setting.label, setting.space, setting.rank, list(tasks)], tasks, make)

    def single(self, kind: str, task: str, gain: float = 1.0) -> Record:
        """Return the scores of one task's own adapter on its task."""
        path = own_adapters(kind)[task]
        return self.find([kind, {task: gain}, "own"], [task], lambda: (stretched(path, gain), {}))

    def base(self) -> Record:
        """Return the scores of the base without an adapter on all tasks."""
        return self.find(["base"], self.tasks, lambda: (None, {}))

    def multitask(self, kind: str) -> Record:
        """Return the scores of the adapter trained on all tasks."""
        return self.find([kind, "multitask"], self.tasks, lambda: (ties_peft.Adapter.load(multitask(kind)), {}))

    def find(
        self, key: list[Any], tasks: Sequence[str], make: Callable[[], tuple[ties_peft.Adapter | None, Record]]
    ) -> Record:
        """Return the record of a key, from the log or by scoring an adapter.

        Args:
            key: without the split and the number of rows.
            tasks: to score on.
            make: returns the adapter, and what else the record holds.
        """

        def scored() -> Record:
            adapter, facts = make()
            scores = self.judge.score(adapter, tasks)
            return {
                **facts,
                "right": {task: pack(own.right) for task, own in scores.items()},
                "loss": {task: round(own.loss, 5) for task, own in scores.items()},
                "accuracy": {task: round(own.accuracy, 3) for task, own in scores.items()},
            }

        return self.records.find(scored, self.split, self.rows, *key)


def multitask(kind: str) -> Path:
    """Return the folder of the adapter that was trained on all tasks."""
    return ROOT / "adapters" / "multitask" / kind


def pack(right: torch.Tensor) -> str:
    """Write down which rows were right, one character a row."""
    return "".join("1" if one else "0" for one in right.tolist())


def unpack(text: str) -> torch.Tensor:
    """Read which rows were right from what `pack` returned."""
    return torch.tensor([one == "1" for one in text])
