"""Lessons: rows, and what one adapter predicts on them, run once and kept; the student is measured against it.

Measured is the Kullback-Leibler divergence KL(teacher ‖ student) of predictions, in nats: over the
labels of a row, or over the next token at every place of a row and then the mean of those. Of next
tokens the teacher's `TOP_K` likeliest are kept and the rest of its probability in one sum, so that memory
stays small; by the data-processing inequality the divergence of what is kept is at most that of the whole.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..evaluation.loaded_model import Bench
from ..evaluation.scorers import BATCH, Classification, Progress, batches
from ..task_vectors.random_numbers import stream_key

TOP_K = 128
MAX_LOGITS = 1 << 26  # logits held at once, for the rows of one batch
MIN_TOKENS, MAX_TOKENS = 6, 32  # tokens in a row of random ones


class Comparison(NamedTuple):
    """A student against the teacher, on some rows.

    Attributes:
        divergence: of each row, in nats; differentiable.
        agreement: of each row the share of predictions whose likeliest is the teacher's.
    """

    divergence: Tensor
    agreement: Tensor


class Teacher(ABC):
    """One adapter's rows and its predictions on them.

    Args:
        bench: where it is given.
        adapter: the teacher.
        sequences: token ids of the rows.
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
        """A sha256 over the teacher, the token ids, and how predictions are read."""
        running = hashlib.sha256(f"{type(self).__name__} {self.adapter.digest} {self.settings}".encode())
        running.update(str(self.sequences).encode())
        return running.hexdigest()

    @property
    @abstractmethod
    def settings(self) -> str:
        """How predictions are read, for the digest."""

    @abstractmethod
    def predict(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """Run the teacher; its predictions, to be kept and given to `set_predictions`."""

    @abstractmethod
    def set_predictions(self, predictions: dict[str, Tensor]) -> None:
        """Take what `predict` gave, now or in an earlier run."""

    @abstractmethod
    def compare(self, places: Sequence[int]) -> Comparison:
        """What is on the bench against the teacher, on some rows."""

    def own_head(self) -> AbstractContextManager[Any]:
        """The bench with what the teacher is judged by; what is differentiated stays in it until that is done."""
        return nullcontext()

    def micro_batch(self, size: int) -> int:
        """How many rows of a batch are run at once: a matter of memory alone."""
        return size

    def measure(self, places: Sequence[int], size: int = BATCH) -> tuple[float, float]:
        """Mean divergence and agreement over some rows."""
        divergence, agreement = 0.0, 0.0
        with torch.no_grad(), self.own_head():
            for chosen in batches([len(self.sequences[place]) for place in places], self.micro_batch(size)):
                found = self.compare([places[number] for number in chosen])
                divergence += float(found.divergence.double().sum())
                agreement += float(found.agreement.double().sum())
        return divergence / len(places), agreement / len(places)


class LabelTeacher(Teacher):
    """Predictions are a distribution over labels; see `Classification`."""

    def __init__(self, scorer: Classification, adapter: Adapter, name: str, origin: str) -> None:
        super().__init__(scorer.bench, adapter, scorer.sequences, name, origin)
        self.scorer = scorer
        self._log_p = torch.empty(0)

    @property
    def settings(self) -> str:
        """The task's measure, descriptions and temperature."""
        task = self.scorer.task
        return f"{task.measure} {task.descriptions} {task.temperature}"

    def predict(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """Log-probabilities, (rows, labels)."""
        with self.bench.applied(self.adapter):
            return {"log_p": self.scorer.all_logits(progress).log_softmax(-1)}

    def set_predictions(self, predictions: dict[str, Tensor]) -> None:
        """Log-probabilities, (rows, labels)."""
        self._log_p = predictions["log_p"].to(self.bench.device)

    def own_head(self) -> AbstractContextManager[Any]:
        """With the teacher's own head, where it has one."""
        return self.bench.applied_extra_tensors(self.adapter) if self.bench.form == "classifier" else nullcontext()

    def compare(self, places: Sequence[int]) -> Comparison:
        """KL over the labels."""
        log_p = self._log_p[torch.tensor(places, device=self._log_p.device)]
        log_q = self.scorer.logits(places).log_softmax(-1)
        return Comparison((log_p.exp() * (log_p - log_q)).sum(-1), (log_p.argmax(-1) == log_q.argmax(-1)).float())


class TokenTeacher(Teacher):
    """Predictions are distributions over the next token, one for each place of a row."""

    def __init__(self, bench: Bench, adapter: Adapter, sequences: list[list[int]], name: str, origin: str) -> None:
        super().__init__(bench, adapter, sequences, name, origin)
        self._tokens: list[Tensor] = []
        self._log_p: list[Tensor] = []

    @property
    def settings(self) -> str:
        """How many tokens are kept."""
        return str(TOP_K)

    def micro_batch(self, size: int) -> int:
        """So many rows that their logits are no more than `MAX_LOGITS` numbers."""
        longest = max(len(ids) for ids in self.sequences)
        vocabulary: int = self.bench.model.get_output_embeddings().weight.shape[0]
        return max(1, min(size, MAX_LOGITS // (longest * vocabulary)))

    def predict(self, progress: Progress | None = None) -> dict[str, Tensor]:
        """Of all places, rows one after the other: the likeliest tokens, (places, top), and their log-probabilities."""
        tokens: dict[int, Tensor] = {}
        log_p: dict[int, Tensor] = {}
        with self.bench.applied(self.adapter), torch.no_grad():
            for chosen in batches([len(ids) for ids in self.sequences], self.micro_batch(BATCH)):
                logits = self._logits(chosen)
                for row, place in enumerate(chosen):
                    own = logits[row, : len(self.sequences[place])].log_softmax(-1)
                    top = own.topk(min(TOP_K, own.shape[-1]))
                    tokens[place], log_p[place] = top.indices.int().cpu(), top.values.cpu()
                if progress is not None:
                    progress(self.name, len(tokens), len(self.sequences))
        order = range(len(self.sequences))
        return {"tokens": torch.cat([tokens[p] for p in order]), "log_p": torch.cat([log_p[p] for p in order])}

    def set_predictions(self, predictions: dict[str, Tensor]) -> None:
        """What `predict` gave."""
        lengths = [len(ids) for ids in self.sequences]
        self._tokens = list(torch.split(predictions["tokens"], lengths))
        self._log_p = list(torch.split(predictions["log_p"], lengths))

    def compare(self, places: Sequence[int]) -> Comparison:
        """The mean over places of KL over the kept tokens and the rest."""
        logits = self._logits(places)
        divergences, agreements = [], []
        for row, place in enumerate(places):
            tokens = self._tokens[place].to(self.bench.device).long()
            log_p = self._log_p[place].to(self.bench.device)
            whole = logits[row, : len(tokens)].log_softmax(-1)
            log_q = whole.gather(1, tokens)
            divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
            if tokens.shape[1] < whole.shape[1]:
                rest_p, rest_q = _rest(log_p), _rest(log_q)
                divergence = divergence + rest_p * (rest_p.log() - rest_q.log())
            divergences.append(divergence.mean())
            agreements.append((whole.argmax(-1) == tokens[:, 0]).float().mean())
        return Comparison(torch.stack(divergences), torch.stack(agreements))

    def _logits(self, places: Sequence[int]) -> Tensor:
        inputs = self.bench.pad_batch([self.sequences[place] for place in places])
        logits: Tensor = self.bench.model(**inputs).logits
        return logits.float()


def _rest(log_p: Tensor) -> Tensor:
    """1 − Σ p, kept off 0."""
    return (1 - log_p.exp().sum(-1)).clamp_min(1e-6)


def random_rows(
    bench: Bench, count: int, seed: int, digest: str, described: Sequence[str] | None = None
) -> list[list[int]]:
    """Rows of random tokens of the vocabulary, each as likely, framed as a text is.

    What the labels' descriptions are made of brings such rows nearer to the task: half of the tokens, at places
    drawn too, come from there where there are descriptions.

    Args:
        bench: whose tokenizer's vocabulary, special tokens left out.
        count: how many rows; each of MIN_TOKENS to MAX_TOKENS tokens between the frame's.
        seed, digest: what the draw depends on, the digest being the adapter's.
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
    """Half of the tokens replaced by draws from others, a token that comes twice there being twice as likely."""
    chosen = torch.rand(len(ids), generator=generator) < 0.5
    others = words[torch.randint(len(words), (len(ids),), generator=generator)]
    return torch.where(chosen, others, torch.tensor(ids)).tolist()


def _special_tokens_around(bench: Bench) -> tuple[list[int], list[int]]:
    """The special tokens that stand before and after a text."""
    (whole,), (plain,) = bench.all_token_ids(["a"]), bench.all_token_ids(["a"], special=False)
    fits = (at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain)
    start = next(fits, 0)
    return whole[:start], whole[start + len(plain) :]
