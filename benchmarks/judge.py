"""Judge: scores adapters on one base model, the sentence encoder, on rows that are tokenized once."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from records import ROOT
from torch import Tensor

import ties_peft

sys.path.insert(0, str(ROOT / "adapters"))
import minilm

BATCH_TOKENS = 1024  # which fit into a core's cache


@dataclass(frozen=True)
class Scores:
    """The scores of a model on the rows of one task.

    Attributes:
        right: for each row whether the nearest description is the right one, (rows,).
        loss: the mean cross-entropy, in nats.
    """

    right: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """The share of right rows, in percent."""
        return 100.0 * self.right.double().mean().item()


class Judge:
    """The base, the embeddings of the labels' descriptions, and the rows.

    Law: an adapter's accuracies are those of `minilm.accuracy` with the adapter on the base; `score` leaves the base as it
        was.
    """

    def __init__(self, data: Path, split: str, rows: int, tasks: Sequence[str]) -> None:
        self.base, tokenizer = minilm.load_base()
        self.bench = ties_peft.Bench(self.base, tokenizer)
        self.heads = minilm.make_heads(self.base, tokenizer, tasks, data)
        self.tokens: dict[str, list[list[int]]] = {}
        self.labels: dict[str, Tensor] = {}
        for task in tasks:
            found = minilm.read_rows(task, split, data, rows)
            encoded = tokenizer(found.texts, truncation=True, max_length=minilm.MAX_TOKENS)
            self.tokens[task], self.labels[task] = encoded["input_ids"], torch.tensor(found.labels)

    @torch.no_grad()
    def score(self, adapter: ties_peft.Adapter | None, tasks: Sequence[str]) -> dict[str, Scores]:
        """Return the scores on each task with an adapter on the base, or of the base alone."""
        with self.bench.applied(adapter):
            embeddings = self._embed([ids for task in tasks for ids in self.tokens[task]])
        parts = embeddings.split([len(self.tokens[task]) for task in tasks])
        return {task: self._compare(task, part) for task, part in zip(tasks, parts, strict=True)}

    def _compare(self, task: str, embeddings: Tensor) -> Scores:
        logits = minilm.TEMPERATURE * embeddings @ self.heads[task].T
        loss = torch.nn.functional.cross_entropy(logits, self.labels[task])
        return Scores(logits.argmax(-1) == self.labels[task], loss.item())

    def _embed(self, tokens: Sequence[list[int]]) -> Tensor:
        """Return the embeddings of some rows, (rows, width), of norm 1."""
        result = torch.empty(len(tokens), self.base.config.hidden_size)
        for chosen in batches(tokens):
            longest = len(tokens[chosen[-1]])
            ids = torch.tensor([tokens[i] + [0] * (longest - len(tokens[i])) for i in chosen])
            mask = torch.tensor([[1] * len(tokens[i]) + [0] * (longest - len(tokens[i])) for i in chosen])
            hidden = self.base(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
            result[chosen] = torch.nn.functional.normalize(pooled, dim=-1)
        return result


def batches(tokens: Sequence[list[int]]) -> Iterator[list[int]]:
    """Yield indices of rows of similar length, up to `BATCH_TOKENS` tokens together."""
    batch: list[int] = []
    for i in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
        if batch and (len(batch) + 1) * len(tokens[i]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def own_adapters(kind: str) -> dict[str, Path]:
    """Return the folder of each task's own adapter."""
    return {task: ROOT / "adapters" / kind / task for task in minilm.TASKS}


def stretched(path: Path, gain: float) -> ties_peft.Adapter:
    """Return an adapter with its task vector times a factor, as if trained longer, shorter or with another alpha."""
    if gain == 1:
        return ties_peft.Adapter.load(path)
    return ties_peft.merge(
        [path], "task_arithmetic", scale=gain, rank="max" if path.parent.name == "lora" else "auto", dtype="float32"
    )


Rights = Mapping[str, Tensor]  # which rows of each task were right, (rows,) each


def paired(sets: Sequence[tuple[Rights, Rights]]) -> tuple[float, float]:
    """Return the difference of two mean accuracies over the same rows, a − b in points, and its standard error.

    Args:
        sets: (a, b) for each set of tasks; the mean is over tasks, then over sets. A row that is scored in several sets is
            one draw, so its differences are added before their variance is taken.
    """
    totals: dict[str, Tensor] = {}
    for a, b in sets:
        for task in a:
            difference = 100.0 * (a[task].double() - b[task].double()) / (len(a) * len(sets))
            totals[task] = totals[task] + difference if task in totals else difference
    variance = sum(float(total.var(correction=1)) / len(total) for total in totals.values())
    return sum(float(total.mean()) for total in totals.values()), variance**0.5
