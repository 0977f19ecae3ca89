"""CausalJudge: scores many adapters of one causal language model on the same rows.

It is fast: an adapter's task vectors are added to the weights in place, the rows are divided into batches once, and only
the positions that predict a completion go through the output matrix. So an adapter takes little more than one pass over
the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from judge import ROOT  # noqa: F401  (puts the folder of `smollm2` on the path)
from torch import Tensor

import ties_peft

import smollm2  # isort: skip

BATCH_TOKENS = {"cuda": 32768, "cpu": 2048}  # padded tokens of a batch, which fill a GPU, or fit into a core's cache
LOGIT_ROWS = 2048  # positions whose logits over the whole vocabulary are in memory at once
SPLITS = ("validation", "test")
TEXT = "cr"  # a set whose text no adapter was trained on; its labels are not used

Factors = Mapping[str, tuple[Tensor, Tensor]]  # (B, A) of each module
Key = tuple[str, str]  # split, task


class Rows(NamedTuple):
    """Rows to score.

    Attributes:
        examples: their tokens.
        choices: the token of each label; None where the loss of the completion is scored.
    """

    examples: Sequence[smollm2.Example]
    choices: Sequence[int] | None


class Scored(NamedTuple):
    """The scores on some rows, one number per row.

    Attributes:
        right: whether the most probable choice is the label's; None without choices.
        losses: the sum of −log p over the completion's tokens; with choices −log p of the label among them.
    """

    right: Tensor | None
    losses: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, as tensors.

    Attributes:
        ids: (rows, width), padded on the right.
        places: positions of the flattened ids whose next token is predicted.
        owners: the row of each place.
        targets: the next token of each place, or the number of the label.
    """

    ids: Tensor
    places: Tensor
    owners: Tensor
    targets: Tensor


class CausalJudge:
    """A causal model, and rows that are divided into batches once.

    Law: scores are those of the model with the adapter loaded by PEFT, one row at a time, up to rounding.

    Args:
        model: in evaluation mode, on the device where it runs.
        rows: by split and task.
    """

    def __init__(self, model: Any, rows: Mapping[Key, Rows]) -> None:
        self.model = model
        self.rows = rows
        self.device = next(model.parameters()).device
        self._batches = {key: list(self._pack(one)) for key, one in rows.items()}
        self._originals: dict[str, Tensor] = {}

    def _pack(self, rows: Rows) -> Iterator[Batch]:
        lengths = [len(one.prompt) + (0 if rows.choices else len(one.completion)) for one in rows.examples]
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if batch and (len(batch) + 1) * lengths[i] > BATCH_TOKENS[self.device.type]:
                yield self._batch(rows, batch)
                batch = []
            batch.append(i)
        if batch:
            yield self._batch(rows, batch)

    def _batch(self, rows: Rows, chosen: Sequence[int]) -> Batch:
        ids, places, owners, targets = [], [], [], []
        kept = [rows.examples[i] for i in chosen]
        inputs = [one.prompt if rows.choices else [*one.prompt, *one.completion] for one in kept]
        width = max(map(len, inputs))
        for place, (i, one, tokens) in enumerate(zip(chosen, kept, inputs, strict=True)):
            ids.append(tokens + [0] * (width - len(tokens)))  # in a causal model padding at the end has no effect
            predicted = [one.label] if rows.choices else one.completion
            places += [place * width + len(one.prompt) - 1 + step for step in range(len(predicted))]
            owners += [i] * len(predicted)
            targets += predicted
        return Batch(*(torch.tensor(values, device=self.device) for values in (ids, places, owners, targets)))

    def apply(self, factors: Factors) -> None:
        """Add B·A to the original weight of each module; modules without factors get their original weight."""
        for name in factors:
            if name not in self._originals:
                self._originals[name] = self.model.get_submodule(name).weight.detach().clone()
        for name, original in self._originals.items():
            weight = self.model.get_submodule(name).weight.data
            if name in factors:
                B, A = (factor.to(self.device) for factor in factors[name])
                torch.addmm(original, B, A, out=weight)
            else:
                weight.copy_(original)

    @torch.no_grad()
    def score(self, factors: Factors, keys: Sequence[Key]) -> dict[Key, Scored]:
        """Return the scores on some sets of rows of the model with an adapter, or without one (no factors)."""
        self.apply(factors)
        return {key: self._score(key) for key in keys}

    def _score(self, key: Key) -> Scored:
        choices, count = self.rows[key].choices, len(self.rows[key].examples)
        losses = torch.zeros(count, dtype=torch.float64, device=self.device)
        right = torch.zeros(count, dtype=torch.bool, device=self.device)
        for batch in self._batches[key]:
            states = self.model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
            states = states.flatten(0, 1)[batch.places]
            if choices:
                logits = (states @ self.model.lm_head.weight[list(choices)].T).float()
                losses[batch.owners] = torch.nn.functional.cross_entropy(
                    logits, batch.targets, reduction="none"
                ).double()
                right[batch.owners] = logits.argmax(-1) == batch.targets
            else:
                for part in torch.arange(len(states), device=self.device).split(LOGIT_ROWS):
                    logits = self.model.lm_head(states[part]).float()
                    each = torch.nn.functional.cross_entropy(logits, batch.targets[part], reduction="none")
                    losses.index_add_(0, batch.owners[part], each.double())
        return Scored(right.cpu() if choices else None, losses.cpu())


def factors_of(adapter: ties_peft.Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (B, A) of each module of a LoRA; the scaling is in B."""
    read = {name: adapter.read(name) for name in adapter.modules}
    return {name: (delta.B, delta.A) for name, delta in read.items()}


def read_rows(data: Path, tokenizer: Any, limit: int) -> dict[Key, Rows]:
    """Return the first rows of each split of each task, and those of `TEXT` if it is there."""
    found: dict[Key, Rows] = {}
    for split in SPLITS:
        for task in smollm2.TASKS:
            examples = smollm2.read_examples(task, split, data, tokenizer, limit)
            found[split, task] = Rows(examples, smollm2.choice_tokens(task, tokenizer))
        if (data / TEXT / f"{split}.jsonl").exists():
            found[split, TEXT] = Rows(smollm2.read_text(TEXT, split, data, tokenizer, limit), None)
    return found
