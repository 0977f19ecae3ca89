"""Score `choices` and `loss` by a language model, causal or sequence-to-sequence: log-probabilities of continuations.

A prompt and its continuation are tokenized together and divided at the length of the prompt alone, so that the
continuation has the tokens that it has in running text. Only the tokens of the continuation count; padding never does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .causal_passes import (
    Pair,
    continued_log_probabilities,
    next_log_probabilities,
    shared_length,
    summed_log_probabilities,
)
from .loaded_model import Bench
from .score import Score
from .scorers import BATCH, Progress, Scorer, batches
from .task import Task


class Continuation(Scorer):
    """Measures `choices` and `loss`: log-probabilities of continuations.

    The prompt of a row runs once for all its choices. Choices of one token each are read at one position; longer ones
    read the keys and values of the prompt, or the states of the encoder.

    Attributes:
        pairs: for `choices` one for each row and choice, rows first; for `loss` one for each row.
    """

    def __init__(self, bench: Bench, task: Task) -> None:
        super().__init__(bench, task)
        rows, texts = self.read()
        self._rows = len(rows)
        self._each = len(task.choices or (None,))
        self._cached = True  # until the model turns out to keep no cache
        self.labels = torch.empty(0, dtype=torch.int64)
        if task.choices is not None:
            self.labels = torch.tensor(task.label_numbers(rows))
            follow = [(text, choice) for text in texts for choice in task.choices]
        else:
            follow = [_apart(*one) for one in zip(texts, task.target_texts(rows), strict=True)]
        self.pairs = self._pairs(follow)
        self.refuse_empty([pair.asked for pair in self.pairs], self._each)

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self._rows

    def scored(self, progress: Progress | None, size: int) -> Score:
        """Return the accuracy and cross-entropy among the choices; for `loss` the mean over all tokens of continuations."""
        totals, counts = self.log_probabilities(progress, size)
        if self.task.choices is not None:
            return self.score_of_labels((totals / counts if self.task.mean else totals).reshape(self.rows, -1))
        loss = -float(totals.sum() / counts.sum())
        return self.made((), loss, losses=tuple((-totals).tolist()), tokens=tuple(map(int, counts.tolist())))

    def log_probabilities(self, progress: Progress | None = None, size: int = BATCH) -> tuple[Tensor, Tensor]:
        """Return, for each pair, the sum of its tokens' log-probabilities and their number, float64, (pairs,) each."""
        totals = torch.zeros(self.rows, self._each, dtype=torch.float64)
        causal = self.bench.form == "causal"
        counts = torch.tensor([len(p.asked) - (causal and not p.given) for p in self.pairs], dtype=torch.float64)
        done = 0
        with torch.no_grad():
            for places in self._batches(size):
                found = (self._causal if causal else self._seq2seq)([self._pairs_of(place) for place in places])
                totals[torch.tensor(places)] = found.cpu().reshape(-1, self._each)
                done += len(places)
                if progress is not None:
                    progress(self.task.name, done, self.rows)
        return totals.flatten(), counts

    def _pairs_of(self, place: int) -> list[Pair]:
        return self.pairs[place * self._each : (place + 1) * self._each]

    def _batches(self, size: int) -> Iterator[list[int]]:
        """Yield places of rows in batches that one pass can take: see `_way`."""
        groups: dict[tuple[str, int], list[int]] = {}
        for place in range(self.rows):
            groups.setdefault(self._way(self._pairs_of(place)), []).append(place)
        for (way, _), places in sorted(groups.items(), reverse=True):
            lengths = [max(len(pair.whole) for pair in self._pairs_of(place)) for place in places]
            most = size if way == "next" else max(1, size // self._each)
            yield from ([places[i] for i in batch] for batch in batches(lengths, most))

    def _way(self, row: Sequence[Pair]) -> tuple[str, int]:
        """Return how the choices of a row are read, and the length of the prompts that a batch of such rows has.

        Returns: `next` with 0, one position after the prompt; `cached` with the length of the prompt; `whole` with 0.
        """
        shared = shared_length(row)
        if self.bench.form != "causal" or len(row) == 1 or shared < 2:
            return "whole", 0
        alike = all(len(pair.given) == shared and len(pair.asked) == 1 for pair in row)
        return ("next", 0) if alike else ("cached", shared)

    def _causal(self, rows: Sequence[Sequence[Pair]]) -> Tensor:
        """Return log p of all pairs of some rows, which are read in one way."""
        way, _ = self._way(rows[0])
        if way == "next":
            return next_log_probabilities(
                self.bench, [row[0].given for row in rows], [[pair.asked[0] for pair in row] for row in rows]
            )
        if way == "cached" and self._cached:
            found = continued_log_probabilities(self.bench, rows)
            if found is not None:
                return found
            self._cached = False
        return summed_log_probabilities(self.bench, [pair for row in rows for pair in row])

    def _seq2seq(self, rows: Sequence[Sequence[Pair]]) -> Tensor:
        """Return log p of all pairs of some rows; the encoder runs once for each row."""
        from transformers.modeling_outputs import BaseModelOutput

        model, each = self.bench.model, self._each
        inputs = self.bench.pad_batch([row[0].given for row in rows])
        states = model.get_encoder()(**inputs).last_hidden_state.repeat_interleave(each, 0)
        answers = self.bench.pad_batch([pair.asked for row in rows for pair in row])
        real = answers["attention_mask"].bool()
        labels = answers["input_ids"].masked_fill(~real, -100)
        mask = inputs["attention_mask"].repeat_interleave(each, 0)
        output = model(encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=mask, labels=labels)
        logits = output.logits.float().log_softmax(-1)
        chosen = logits.gather(2, answers["input_ids"].unsqueeze(2)).squeeze(2).double()
        totals: Tensor = (chosen * real).sum(1)
        return totals

    def _pairs(self, follow: Sequence[tuple[str, str]]) -> list[Pair]:
        if self.bench.form == "seq2seq":
            given, cut = self.bench.token_ids([text for text, _ in follow], self.task.max_tokens)
            self.cut = cut // len(self.task.choices or (None,))
            asked, _ = self.bench.token_ids([target for _, target in follow], self.task.max_tokens)
            return [Pair(*pair) if pair[0] else Pair([], []) for pair in zip(given, asked, strict=True)]
        most = min(self.task.max_tokens, self.bench.max_length)
        whole = [self._open(ids) for ids in self.bench.all_token_ids([text + target for text, target in follow])]
        alone = [self._open(ids) for ids in self.bench.all_token_ids([text.rstrip() for text, _ in follow])]
        pairs, long = [], []
        for (_, target), together, before in zip(follow, whole, alone, strict=True):
            start = min(len(before), len(together)) if target else 0
            front, rest = together[:start], together[start:]
            long.append(len(together) > most)
            if target:  # without a prompt the first token of the target would not be scored
                pairs.append(Pair(front[max(0, len(together) - most) :], rest[-most:] if before else []))
            else:
                pairs.append(Pair([], rest[:most]))
        each = len(self.task.choices or (None,))
        self.cut = sum(any(long[row : row + each]) for row in range(0, len(long), each))
        return [pair if pair.given or len(pair.asked) > 1 else Pair([], []) for pair in pairs]

    def _open(self, ids: list[int]) -> list[int]:
        """Return token ids without the end token that some tokenizers add to every text."""
        end = getattr(self.bench.tokenizer, "eos_token_id", None)
        return ids[:-1] if len(ids) > 1 and ids[-1] == end else ids


def _apart(text: str, target: str) -> tuple[str, str]:
    """Return a text and the label that follows it, with a blank between them where there is none."""
    together = not target or not text or text[-1].isspace() or target[0].isspace()
    return (text, target) if together else (text, f" {target}")
