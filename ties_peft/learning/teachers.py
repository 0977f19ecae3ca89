"""Teachers: each runs its adapter once on its rows, keeps the predictions, and compares the student with them.

Predictions are compared by the Kullback-Leibler divergence KL(teacher ‖ student), in nats: of the distribution over the
labels of a row, or of that over the next token, in the mean over positions of a row (see `token_teachers`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..evaluation import BATCH_SIZE
from ..evaluation.loaded_model import Bench
from ..evaluation.scorers import Classification, batches
from ..merging.plan import Progress
from .written_rows import WrittenCount

MATCHED = {  # what of the predictions is compared, and how reports say it
    "labels": "the probabilities of the labels",
    "answers": "the tokens of the answers",
    "answers and choices": "the tokens of the answers, and the choices among each other",
    "rows": "the whole text of the rows",
    "rows and answers": "the whole text: the rows, and the answers that the adapters wrote to them",
}
BASE = "base"  # stands for a digest where the teacher is the base model


class Comparison(NamedTuple):
    """The student compared with the teacher on some rows.

    Attributes:
        divergence: of each row, in nats; differentiable.
        agreement: for each row, the share of predictions whose likeliest answer is the teacher's.
    """

    divergence: Tensor
    agreement: Tensor


class Teacher(ABC):
    """One adapter, its rows, and its predictions on them.

    Args:
        bench: the base model.
        adapter: the one to imitate; None for the base model itself.
        sequences: the given token ids of each row.
        name: for tables.
        origin: where the rows come from, for the report.

    Attributes:
        given: the given token ids of each row.
        sequences: the token ids of each row with those that the adapter has written.
        settings: how predictions are read, as a text for the digest; each kind of teacher sets it.
    """

    settings: str

    def __init__(
        self, bench: Bench, adapter: Adapter | None, sequences: Sequence[Sequence[int]], name: str, origin: str
    ) -> None:
        self.bench, self.adapter, self.name, self.origin = bench, adapter, name, origin
        self.given = [list(ids) for ids in sequences]
        self.sequences = self.given

    @property
    def adapter_digest(self) -> str:
        """The digest of the adapter."""
        return BASE if self.adapter is None else self.adapter.digest

    @property
    def digest(self) -> str:
        """A sha256 of the adapter, the given token ids, and how predictions are read."""
        running = hashlib.sha256(f"{type(self).__name__} {self.adapter_digest} {self.settings}".encode())
        running.update(str(self.given).encode())
        return running.hexdigest()

    def write(self, progress: Progress | None = None) -> dict[str, Any]:
        """Let the adapter write its rows or answers, and return them for `set_written`; empty where it writes nothing."""
        return {}

    def set_written(self, written: Mapping[str, Any]) -> None:
        """Take the rows that `write` returned, now or in an earlier run."""
        assert not written

    @property
    def matched(self) -> str:
        """What of the predictions is compared: a key of `MATCHED`."""
        return "labels"

    def count_written(self) -> WrittenCount | None:
        """Count the distinct and the empty rows that the adapter wrote; None where it wrote no whole rows."""
        return None

    @abstractmethod
    def predict(self) -> dict[str, Tensor]:
        """Run the adapter and return its predictions, for `set_predictions`."""

    @abstractmethod
    def set_predictions(self, predictions: dict[str, Tensor]) -> None:
        """Set the predictions to those that `predict` returned, now or in an earlier run."""

    @abstractmethod
    def compare(self, places: Sequence[int]) -> Comparison:
        """Compare the adapter that is applied to the base model with the predictions on some rows."""

    @abstractmethod
    def outputs(self, places: Sequence[int]) -> Tensor:
        """Return the logits of some rows, (predictions, answers), float32; differentiable."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """The bytes of the predictions."""

    @property
    def kept_probability(self) -> float:
        """The mean share of the teacher's probability that belongs to the answers compared one by one."""
        return 1.0

    def own_head(self) -> AbstractContextManager[Any]:
        """Apply the teacher's own head, if any, within a `with` block, in which the backward pass must run too."""
        return nullcontext()

    def parts(self, places: Sequence[int], size: int = BATCH_SIZE) -> list[list[int]]:
        """Divide rows into parts of at most `size` that run at once; only memory and time depend on it."""
        chosen = batches([len(self.sequences[place]) for place in places], size)
        return [[places[number] for number in part] for part in chosen]

    def measure(self, places: Sequence[int]) -> tuple[float, float]:
        """Return the mean divergence and agreement over some rows."""
        divergence, agreement = 0.0, 0.0
        with torch.no_grad(), self.own_head():
            for part in self.parts(places):
                found = self.compare(part)
                divergence += float(found.divergence.double().sum())
                agreement += float(found.agreement.double().sum())
        return divergence / len(places), agreement / len(places)


class LabelTeacher(Teacher):
    """A teacher that predicts a distribution over labels; see `Classification`."""

    def __init__(self, scorer: Classification, adapter: Adapter, name: str, origin: str) -> None:
        super().__init__(scorer.bench, adapter, scorer.sequences, name, origin)
        self.scorer, task = scorer, scorer.task
        self.settings = f"{task.measure} {task.descriptions} {task.temperature}"
        self._log_p = torch.empty(0)

    @property
    def cache_bytes(self) -> int:
        """Four bytes for each row and label."""
        task, head = self.scorer.task, self.bench.model.config.num_labels
        return 4 * len(self.sequences) * (head if task.descriptions is None else len(task.descriptions))

    def predict(self) -> dict[str, Tensor]:
        """Return log-probabilities, (rows, labels)."""
        with self.bench.applied(self.adapter):
            return {"log_p": self.scorer.all_logits().log_softmax(-1)}

    def set_predictions(self, predictions: dict[str, Tensor]) -> None:
        """Set the log-probabilities, (rows, labels)."""
        self._log_p = predictions["log_p"].to(self.bench.device)

    def own_head(self) -> AbstractContextManager[Any]:
        """Apply the teacher's own head, where it has one."""
        if self.adapter is None or self.bench.form != "classifier":
            return nullcontext()
        return self.bench.applied_extra_tensors(self.adapter)

    def outputs(self, places: Sequence[int]) -> Tensor:
        """Return the logits of some rows, (rows, labels)."""
        return self.scorer.logits(places)

    def compare(self, places: Sequence[int]) -> Comparison:
        """Return KL over the labels."""
        log_p = self._log_p[torch.tensor(places, device=self._log_p.device)]
        log_q = self.scorer.logits(places).log_softmax(-1)
        return Comparison(kl_divergence(log_p, log_q), (log_p.argmax(-1) == log_q.argmax(-1)).float())


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) over the last dimension, in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
