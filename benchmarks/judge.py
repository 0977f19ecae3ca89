"""Judge: one base model that wears adapter after adapter, and rows that are tokenised once."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ties_peft

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "adapters"))
import minilm  # noqa: E402  (the samples' setting lies beside the adapters)

BATCH_TOKENS = 1024  # few enough to stay in a core's cache


@dataclass(frozen=True)
class Scores:
    """What a model does on the rows of one task.

    Attributes:
        right: (rows,), whether the nearest description is the right one.
        loss: mean cross-entropy, in nats.
    """

    right: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100.0 * self.right.double().mean().item()


class Judge:
    """The base, its frozen heads and the rows to judge by.

    Law: an adapter's accuracies are those of `minilm.accuracy` with the adapter on the base; `score`
        leaves the base as it was.
    """

    def __init__(self, data: Path, split: str, rows: int, tasks: Sequence[str]) -> None:
        self.base, tokenizer = minilm.load_base()
        self.heads = minilm.make_heads(self.base, tokenizer, tasks, data)
        self.tokens: dict[str, list[list[int]]] = {}
        self.labels: dict[str, Tensor] = {}
        for task in tasks:
            found = minilm.read_rows(task, split, data, rows)
            encoded = tokenizer(found.texts, truncation=True, max_length=minilm.MAX_TOKENS)
            self.tokens[task], self.labels[task] = encoded["input_ids"], torch.tensor(found.labels)

    @torch.no_grad()
    def score(self, adapter: ties_peft.Adapter | None, tasks: Sequence[str]) -> dict[str, Scores]:
        """The scores on each task with an adapter on the base, or of the bare base."""
        with wearing(self.base, adapter):
            embeddings = self._embed([ids for task in tasks for ids in self.tokens[task]])
        parts = embeddings.split([len(self.tokens[task]) for task in tasks])
        return {task: self._compare(task, part) for task, part in zip(tasks, parts, strict=True)}

    def _compare(self, task: str, embeddings: Tensor) -> Scores:
        logits = minilm.TEMPERATURE * embeddings @ self.heads[task].T
        loss = torch.nn.functional.cross_entropy(logits, self.labels[task])
        return Scores(logits.argmax(-1) == self.labels[task], loss.item())

    def _embed(self, tokens: Sequence[list[int]]) -> Tensor:
        """(len(tokens), width), of length one, in order."""
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
    """Indices of rows of like length, up to `BATCH_TOKENS` tokens together."""
    batch: list[int] = []
    for i in sorted(range(len(tokens)), key=lambda i: len(tokens[i])):
        if batch and (len(batch) + 1) * len(tokens[i]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@contextmanager
def wearing(base: Any, adapter: ties_peft.Adapter | None) -> Iterator[None]:
    """The base with an adapter's effect in its weights (and, for (IA)³, biases), put back afterwards."""
    layers = {name: base.get_submodule(name) for name in (adapter.modules if adapter else ())}
    kept = {name: (layer.weight.data, layer.bias.data) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight.data, layer.bias.data = changed(*kept[name], adapter, name)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data, layer.bias.data = kept[name]


def changed(weight: Tensor, bias: Tensor, adapter: Any, name: str) -> tuple[Tensor, Tensor]:
    """A linear layer's weight and bias with one module's task vector in them."""
    delta = adapter.delta(name)
    if delta.dim() == 2:
        return weight + delta, bias
    if adapter.module(name).on_input:
        return weight * (1 + delta), bias
    return weight * (1 + delta).unsqueeze(1), bias * (1 + delta)


def own_adapters(kind: str) -> dict[str, Path]:
    """The folder of each task's own adapter."""
    return {task: ROOT / "adapters" / kind / task for task in minilm.TASKS}


def stretched(path: Path, gain: float) -> ties_peft.Adapter:
    """An adapter with its task vector times a gain, as if trained longer, shorter or with another alpha."""
    if gain == 1:
        return ties_peft.Adapter.load(path)
    return ties_peft.merge(
        [path], "task_arithmetic", scale=gain, rank="max" if path.parent.name == "lora" else "auto", dtype="float32"
    )


Rights = Mapping[str, Tensor]  # which rows of each task were right, (rows,) each


def paired(sets: Sequence[tuple[Rights, Rights]]) -> tuple[float, float]:
    """Difference of two mean accuracies over the same rows, a − b in points, and its standard error.

    Args:
        sets: (a, b) for each set of tasks; the mean is over tasks, then over sets. A row that is judged
            in several sets is one draw, so its differences are added up before their variance is taken.
    """
    totals: dict[str, Tensor] = {}
    for a, b in sets:
        for task in a:
            difference = 100.0 * (a[task].double() - b[task].double()) / (len(a) * len(sets))
            totals[task] = totals[task] + difference if task in totals else difference
    variance = sum(float(total.var(correction=1)) / len(total) for total in totals.values())
    return sum(float(total.mean()) for total in totals.values()), variance**0.5
