"""Score adapters on a task: its rows are read, tokenized and checked once, for any number of adapters.

    bench = Bench.load("org/base", "encoder")
    scorer = make_scorer(bench, read_task("sst2.yaml"))
    with bench.applied(adapter):
        score = scorer.score()

Batches hold rows of similar length, so that little is padded; the results are in the order of the rows.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ..errors import RecipeError
from ..merging.plan import Progress
from . import BATCH_SIZE
from .loaded_model import FORM_OF_MEASURE, LANGUAGE, Bench
from .rows import Row, texts_of
from .score import Score
from .task import Task


class Scorer(ABC):
    """A task, and the loaded model with which adapters are scored on it.

    Attributes:
        rows: the number of rows; each kind of scorer sets it.
        labels: the right label of each row, (rows,), int64; empty where the measure has none.
        cut: the number of rows that were too long.
        blank: the number of rows whose text is empty or white space.
    """

    rows: int
    labels: Tensor

    def __init__(self, bench: Bench, task: Task) -> None:
        self.bench, self.task = bench, task
        self.cut = self.blank = 0

    def score(self, progress: Progress | None = None, size: int = BATCH_SIZE) -> Score:
        """Score the adapter that is applied to the model.

        Args:
            progress: called as progress(stage, done, of).
            size: rows in a batch.
        """
        started = time.perf_counter()
        found = self.scored(progress, size)
        active = self.bench.active_adapter
        return replace(
            found,
            adapter=None if active is None else active.label,
            cut=self.cut,
            blank=self.blank,
            dtype=self.bench.dtype,
            seconds=time.perf_counter() - started,
        )

    @abstractmethod
    def scored(self, progress: Progress | None, size: int) -> Score:
        """Run the model and return the fields of the score that depend on the measure; `score` adds the others."""

    def read(self) -> tuple[list[Row], list[str]]:
        """Return the task's rows and the prompt of each, and set `blank`."""
        rows = self.task.read()
        texts = texts_of(rows, self.task.text, self.task.where)
        self.blank = sum(not text.strip() for text in texts)
        return rows, self.task.fill_template(texts)

    def refuse_empty(self, tokens: Sequence[Sequence[int]], each: int = 1) -> None:
        """Refuse rows without tokens.

        Args:
            tokens: `each` sequences of tokens for every row.
            each: the number of sequences of a row.
        Raises: RecipeError that names the first such row.
        """
        place = next((place for place, ids in enumerate(tokens) if not ids), None)
        if place is not None:
            raise RecipeError(
                f"{self.task.where}, row {place // each + 1}: its text or its label has no tokens, so there is "
                "nothing to score. Leave the row out."
            )

    def score_of_labels(self, logits: Tensor) -> Score:
        """Return the accuracy and the cross-entropy of the right labels.

        Args:
            logits: of the labels, (rows, labels), on the CPU.
        """
        right = tuple((logits.argmax(-1) == self.labels).tolist())
        losses = cross_entropy(logits.double(), self.labels, reduction="none")
        return self.made(right, float(losses.mean()), losses=tuple(losses.tolist()))

    def made(self, right: tuple[bool, ...], loss: float | None, **more: Any) -> Score:
        """Return a score of this task, with the accuracy that follows from `right` and with further fields of `Score`."""
        accuracy = sum(right) / len(right) if right else None
        return Score(self.task.name, self.task.measure, None, self.rows, accuracy, loss, right, **more)


class Classification(Scorer):
    """Measures `descriptions` and `head`: one forward pass gives a logit for each label.

    Args:
        labelled: whether the rows' labels are read; without them rows can be predicted but not scored.
        sequences: token ids of each row, in place of the task's rows.

    Attributes:
        sequences: token ids of each row.
        label_embeddings: of the descriptions, (labels, width); None for measure `head`.
    """

    def __init__(
        self, bench: Bench, task: Task, labelled: bool = True, sequences: Sequence[Sequence[int]] | None = None
    ) -> None:
        super().__init__(bench, task)
        self.labels = torch.empty(0, dtype=torch.int64)
        if sequences is None:
            rows, texts = self.read()
            if labelled:
                self.labels = torch.tensor(task.label_numbers(rows, self._names_in_head()))
            sequences, self.cut = bench.token_ids(texts, task.max_tokens)
            self.refuse_empty(sequences)
        self.sequences, self.rows = sequences, len(sequences)
        self.label_embeddings: Tensor | None = None
        if task.descriptions is not None:
            with bench.without_adapter(), torch.no_grad():
                described, _ = bench.token_ids(task.descriptions, task.max_tokens)
                self.label_embeddings = self._embed(bench.pad_batch(described))

    def logits(self, places: Sequence[int]) -> Tensor:
        """Return the logits of some rows, (len(places), labels), float32; differentiable."""
        inputs = self.bench.pad_batch([self.sequences[place] for place in places])
        if self.label_embeddings is None:
            found: Tensor = self.bench.model(**inputs).logits
            return found.float()
        return self.task.temperature * (self._embed(inputs) @ self.label_embeddings.T)

    def all_logits(self, progress: Progress | None = None, size: int = BATCH_SIZE) -> Tensor:
        """Return the logits of all rows in order, (rows, labels), on the CPU."""
        parts: list[Tensor] = []
        order: list[int] = []
        with torch.no_grad():
            divided = batches([len(ids) for ids in self.sequences], size)
            for places in with_progress(divided, progress, self.task.name, self.rows):
                parts.append(self.logits(places).cpu())
                order += places
        found = torch.cat(parts)
        result = torch.empty_like(found)
        result[torch.tensor(order)] = found
        return result

    def scored(self, progress: Progress | None, size: int) -> Score:
        """Return the accuracy, and the mean cross-entropy of the right labels."""
        return self.score_of_labels(self.all_logits(progress, size))

    def _embed(self, inputs: dict[str, Tensor]) -> Tensor:
        """Return the mean of the last hidden states over tokens that are not padding, of norm 1: (rows, width)."""
        hidden = self.bench.model(**inputs).last_hidden_state
        real = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return normalize(((hidden * real).sum(1) / real.sum(1)).float(), dim=-1)

    def _names_in_head(self) -> tuple[str, ...] | None:
        """Return the names of the labels in the head's config, in order; None for measure `descriptions`.

        Raises: RecipeError where the task names another number of labels.
        """
        if self.task.measure != "head":
            return None
        table = self.bench.model.config.id2label
        names = tuple(str(table[number]) for number in range(len(table)))
        if self.task.labels is not None and len(self.task.labels) != len(names):
            raise RecipeError(
                f"task {self.task.name!r} has {len(self.task.labels)} labels and the head of "
                f"'{self.bench.base}' {len(names)}. Name a base, or an adapter, with a head for this task."
            )
        return names


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield indices of rows in batches of similar length, the longest first: if any batch exceeds the memory, the first does."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    yield from (order[start : start + size] for start in range(0, len(order), size))


def with_progress(parts: Iterable[list[int]], progress: Progress | None, stage: str, total: int) -> Iterator[list[int]]:
    """Yield parts of the rows, and after each report the number of rows that are done."""
    done = 0
    for part in parts:
        yield part
        done += len(part)
        if progress is not None:
            progress(stage, done, total)


def form_for(task: Task) -> str:
    """Return the form in which a task needs the model loaded; see `Bench.load`."""
    return FORM_OF_MEASURE.get(task.measure, LANGUAGE)


def check_form(bench: Bench, task: Task) -> None:
    """Refuse a task whose measure needs another form of the model.

    Raises: RecipeError.
    """
    wanted = form_for(task)
    fits = bench.form in ("causal", "seq2seq") if wanted == LANGUAGE else bench.form == wanted
    if not fits:
        raise RecipeError(
            f"task {task.name!r}: measure '{task.measure}' needs a {wanted} model; '{bench.base}' is loaded as "
            f"{bench.form} ({type(bench.model).__name__}). Load it in that form, or choose another measure."
        )
