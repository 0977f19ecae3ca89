"""Run each adapter once on its rows, keep its predictions, and measure the student against them.

The measure is the Kullback-Leibler divergence KL(teacher ‖ student) of predictions, in nats: over the labels of a
row, or the mean over the positions of a row of that over the next token.

Of the predictions of next tokens only the teacher's `TOP_K` likeliest and the sum of the other probabilities, the rest,
are kept. By the data-processing inequality the divergence of what is kept is at most that of the whole. Log-probabilities
are kept in float16, so they are wrong by at most |log p|/2048, and are normalised when they are used. Token numbers take
two bytes up to a vocabulary of 65,536, else four.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..evaluation.loaded_model import Bench
from ..evaluation.scorers import BATCH, Classification, Progress, batches
from ..task_vectors.random_numbers import stream_key

TOP_K = 128
SHORT_VOCABULARY = 1 << 16  # of which a token number fits into two bytes
MAX_LOGITS = 1 << 26  # logits in memory at once
MIN_TOKENS, MAX_TOKENS = 6, 32  # in a row of random tokens


class Comparison(NamedTuple):
    """The student measured against the teacher on some rows.

    Attributes:
        divergence: for each row, in nats; differentiable.
        agreement: for each row, the share of predictions whose likeliest answer is the teacher's.
    """

    divergence: Tensor
    agreement: Tensor


class Teacher(ABC):
    """One adapter, its rows, and its predictions on them.

    Args:
        bench: the base model.
        adapter: the one to imitate.
        sequences: token ids of each row.
        name: for tables.
        origin: where the rows come from, for the report.
    """

    def __init__(
        self, bench: Bench, adapter: Adapter, sequences: Sequence[Sequence[int]], name: str, origin: str
    ) -> None:
        self.bench, self.adapter, self.name, self.origin = bench, adapter, name, origin
        self.sequences = [list(ids) for ids in sequences]

    @property
    def digest(self) -> str:
        """A sha256 of the adapter, the token ids, and how predictions are read."""
        running = hashlib.sha256(f"{type(self).__name__} {self.adapter.digest} {self.settings}".encode())
        running.update(str(self.sequences).encode())
        return running.hexdigest()

    @property
    @abstractmethod
    def settings(self) -> str:
        """How predictions are read, as a text for the digest."""

    @abstractmethod
    def predict(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """Run the adapter and return its predictions, for `set_predictions`."""

    @abstractmethod
    def set_predictions(self, predictions: dict[str, Tensor]) -> None:
        """Set the predictions to those that `predict` returned, now or in an earlier run."""

    @abstractmethod
    def compare(self, places: Sequence[int]) -> Comparison:
        """Measure what is applied to the base model against the predictions on some rows."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """The size of the predictions."""

    @property
    def kept_probability(self) -> float:
        """The mean share of the teacher's probability that is in the answers kept one by one."""
        return 1.0

    def own_head(self) -> AbstractContextManager[Any]:
        """Apply the head that the teacher is compared with, within a `with` block that includes the backward pass."""
        return nullcontext()

    def micro_batch(self, size: int) -> int:
        """Return how many rows of a batch of `size` are run at once; it changes memory alone."""
        return size

    def measure(self, places: Sequence[int], size: int = BATCH) -> tuple[float, float]:
        """Return the mean divergence and agreement over some rows."""
        divergence, agreement = 0.0, 0.0
        with torch.no_grad(), self.own_head():
            for chosen in batches([len(self.sequences[place]) for place in places], self.micro_batch(size)):
                found = self.compare([places[number] for number in chosen])
                divergence += float(found.divergence.double().sum())
                agreement += float(found.agreement.double().sum())
        return divergence / len(places), agreement / len(places)


class LabelTeacher(Teacher):
    """A teacher that predicts a distribution over labels; see `Classification`."""

    def __init__(self, scorer: Classification, adapter: Adapter, name: str, origin: str) -> None:
        super().__init__(scorer.bench, adapter, scorer.sequences, name, origin)
        self.scorer = scorer
        self._log_p = torch.empty(0)

    @property
    def settings(self) -> str:
        """The task's measure, descriptions and temperature."""
        task = self.scorer.task
        return f"{task.measure} {task.descriptions} {task.temperature}"

    @property
    def cache_bytes(self) -> int:
        """Four bytes for each row and label."""
        task, head = self.scorer.task, self.bench.model.config.num_labels
        return 4 * len(self.sequences) * (head if task.descriptions is None else len(task.descriptions))

    def predict(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """Return log-probabilities, (rows, labels)."""
        with self.bench.applied(self.adapter):
            return {"log_p": self.scorer.all_logits(progress).log_softmax(-1)}

    def set_predictions(self, predictions: dict[str, Tensor]) -> None:
        """Set the log-probabilities, (rows, labels)."""
        self._log_p = predictions["log_p"].to(self.bench.device)

    def own_head(self) -> AbstractContextManager[Any]:
        """Apply the teacher's own head, where it has one."""
        return self.bench.applied_extra_tensors(self.adapter) if self.bench.form == "classifier" else nullcontext()

    def compare(self, places: Sequence[int]) -> Comparison:
        """Return KL over the labels."""
        log_p = self._log_p[torch.tensor(places, device=self._log_p.device)]
        log_q = self.scorer.logits(places).log_softmax(-1)
        return Comparison((log_p.exp() * (log_p - log_q)).sum(-1), (log_p.argmax(-1) == log_q.argmax(-1)).float())


class TokenTeacher(Teacher):
    """A teacher that predicts a distribution over the next token at each position of a row."""

    def __init__(self, bench: Bench, adapter: Adapter, sequences: list[list[int]], name: str, origin: str) -> None:
        super().__init__(bench, adapter, sequences, name, origin)
        self._tokens: list[Tensor] = []
        self._log_p: list[Tensor] = []

    @property
    def settings(self) -> str:
        """How many tokens are kept at each position, and how."""
        return f"{TOP_K} float16"

    @property
    def cache_bytes(self) -> int:
        """Of each position the token numbers, and two bytes for each log-probability."""
        kept, rest = self._kept, self._kept < self._vocabulary
        each = kept * (2 if self._vocabulary <= SHORT_VOCABULARY else 4) + 2 * (kept + rest)
        return each * sum(len(ids) for ids in self.sequences)

    @property
    def kept_probability(self) -> float:
        """The mean over positions of the probability of the tokens kept one by one."""
        log_p = torch.cat(self._log_p).float().log_softmax(-1)
        return float(log_p[:, : self._kept].exp().sum(-1).mean())

    def micro_batch(self, size: int) -> int:
        """Return so many rows that their logits are at most `MAX_LOGITS` numbers."""
        longest = max(len(ids) for ids in self.sequences)
        return max(1, min(size, MAX_LOGITS // (longest * self._vocabulary)))

    def predict(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """Return the likeliest tokens at all positions, row after row, (positions, kept), and log-probabilities.

        After those of the tokens stands the rest's, (positions, kept + 1), unless the whole vocabulary is kept.
        """
        tokens: dict[int, Tensor] = {}
        log_p: dict[int, Tensor] = {}
        short = torch.int16 if self._vocabulary <= SHORT_VOCABULARY else torch.int32
        with self.bench.applied(self.adapter), torch.no_grad():
            for chosen in batches([len(ids) for ids in self.sequences], self.micro_batch(BATCH)):
                logits = self._logits(chosen)
                for row, place in enumerate(chosen):
                    top = logits[row, : len(self.sequences[place])].log_softmax(-1).topk(self._kept)
                    tokens[place], log_p[place] = top.indices.to(short).cpu(), self._with_rest(top.values).half().cpu()
                if progress is not None:
                    progress(self.name, len(tokens), len(self.sequences))
        order = range(len(self.sequences))
        return {"tokens": torch.cat([tokens[p] for p in order]), "log_p": torch.cat([log_p[p] for p in order])}

    def set_predictions(self, predictions: dict[str, Tensor]) -> None:
        """Set the tokens and log-probabilities."""
        lengths = [len(ids) for ids in self.sequences]
        self._tokens = list(torch.split(predictions["tokens"], lengths))
        self._log_p = list(torch.split(predictions["log_p"], lengths))

    def compare(self, places: Sequence[int]) -> Comparison:
        """Return for each row the mean over positions of KL over the kept tokens and the rest."""
        logits = self._logits(places)
        divergences, agreements = [], []
        for row, place in enumerate(places):
            tokens = self._tokens[place].to(self.bench.device).long()
            if self._vocabulary <= SHORT_VOCABULARY:
                tokens = tokens & (SHORT_VOCABULARY - 1)  # int16 holds numbers from 32,768 up as negative ones
            log_p = self._log_p[place].to(self.bench.device).float().log_softmax(-1)
            whole = logits[row, : len(tokens)].log_softmax(-1)
            log_q = self._with_rest(whole.gather(1, tokens))
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            agreements.append((whole.argmax(-1) == tokens[:, 0]).float().mean())
        return Comparison(torch.stack(divergences), torch.stack(agreements))

    @cached_property
    def _vocabulary(self) -> int:
        size: int = self.bench.model.get_output_embeddings().weight.shape[0]
        return size

    @property
    def _kept(self) -> int:
        """How many tokens are kept one by one."""
        return min(TOP_K, self._vocabulary)

    def _with_rest(self, log_p: Tensor) -> Tensor:
        """Append the log-probability of all tokens that are not kept, at least log 1e-6, unless all are kept."""
        if self._kept == self._vocabulary:
            return log_p
        rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp_min(1e-6)
        return torch.cat([log_p, rest.log()], -1)

    def _logits(self, places: Sequence[int]) -> Tensor:
        inputs = self.bench.pad_batch([self.sequences[place] for place in places])
        logits: Tensor = self.bench.model(**inputs).logits
        return logits.float()


def random_rows(
    bench: Bench, count: int, seed: int, digest: str, described: Sequence[str] | None = None
) -> list[list[int]]:
    """Return rows of random tokens, all equally likely, between the special tokens that begin and end a text.

    Where there are descriptions of the labels, half of the tokens, at random positions, are drawn from them. This
    makes the rows more similar to the task's.

    Args:
        bench: its tokenizer's vocabulary is used, without special tokens.
        count: how many rows, each of MIN_TOKENS to MAX_TOKENS tokens apart from special ones.
        seed, digest: what the draw depends on; the digest is the adapter's.
        described: a text for each label.
    """
    tokenizer = bench.tokenizer
    special = set(tokenizer.all_special_ids)
    rows_held = bench.model.get_input_embeddings().weight.shape[0]
    usable = torch.tensor([token for token in range(min(len(tokenizer), rows_held)) if token not in special])
    generator = torch.Generator().manual_seed(stream_key(seed, "random tokens", 0, digest) % (1 << 63))
    front, back = _special_tokens_around(bench)
    most = max(1, min(MAX_TOKENS, bench.max_length - len(front) - len(back)))
    lengths = torch.randint(min(MIN_TOKENS, most), most + 1, (count,), generator=generator).tolist()
    drawn = [usable[torch.randint(len(usable), (length,), generator=generator)].tolist() for length in lengths]
    words = torch.tensor([token for ids in bench.all_token_ids(described or (), special=False) for token in ids])
    if len(words):
        drawn = [_mix_in(ids, words, generator) for ids in drawn]
    return [[*front, *ids, *back] for ids in drawn]


def _mix_in(ids: list[int], words: Tensor, generator: torch.Generator) -> list[int]:
    """Return a row with half of its tokens replaced by draws from others, by their frequency there."""
    chosen = torch.rand(len(ids), generator=generator) < 0.5
    others = words[torch.randint(len(words), (len(ids),), generator=generator)]
    return torch.where(chosen, others, torch.tensor(ids)).tolist()


def _special_tokens_around(bench: Bench) -> tuple[list[int], list[int]]:
    """Return the special tokens before and after a text."""
    (whole,), (plain,) = bench.all_token_ids(["a"]), bench.all_token_ids(["a"], special=False)
    fits = (at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain)
    start = next(fits, 0)
    return whole[:start], whole[start + len(plain) :]
