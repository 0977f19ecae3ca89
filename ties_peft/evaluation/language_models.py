"""Score `choices` and `loss` by a language model, causal or sequence-to-sequence: log-probabilities of continuations.

A prompt and its continuation are tokenized together and divided at the length of the prompt's own tokens, so that the
continuation has the tokens that it has in running text. Only the tokens of the continuation count; padding never does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..merging.plan import Progress
from . import BATCH_SIZE
from .causal_passes import (
    Pair,
    continued_log_probabilities,
    next_log_probabilities,
    shared_length,
    summed_log_probabilities,
)
from .loaded_model import Bench
from .score import Score
from .scorers import Scorer, batches, with_progress
from .task import Task

EMPTY = Pair([], [])


class Continuation(Scorer):
    """Measures `choices` and `loss`: log-probabilities of continuations.

    The prompt of a row runs once for all its choices. Choices of one token each are scored at one position; longer ones
    attend to the stored keys and values of the prompt, or to the states of the encoder.

    Attributes:
        pairs: for `choices` one for each row and choice, rows first; for `loss` one for each row.
    """

    def __init__(self, bench: Bench, task: Task) -> None:
        super().__init__(bench, task)
        rows, texts = self.read()
        self.rows = len(rows)
        self._each = len(task.choices or (None,))  # pairs of a row
        self._has_cache = True  # until the model turns out to keep none
        self.labels = torch.empty(0, dtype=torch.int64)
        if task.choices is not None:
            self.labels = torch.tensor(task.label_numbers(rows))
            self.pairs = self._make_pairs([(text, choice) for text in texts for choice in task.choices])
        else:
            self.pairs = self._make_pairs(
                [_separated(*one) for one in zip(texts, task.target_texts(rows), strict=True)]
            )
        self.refuse_empty([pair.continuation for pair in self.pairs], self._each)

    def scored(self, progress: Progress | None, size: int) -> Score:
        """Return the accuracy and the cross-entropy over the choices; for `loss` the mean over all scored tokens."""
        totals, counts = self.log_probabilities(progress, size)
        if self.task.choices is not None:
            return self.score_of_labels((totals / counts if self.task.mean else totals).reshape(self.rows, -1))
        loss = -float(totals.sum() / counts.sum())
        return self.made((), loss, losses=tuple((-totals).tolist()), tokens=tuple(map(int, counts.tolist())))

    def log_probabilities(self, progress: Progress | None = None, size: int = BATCH_SIZE) -> tuple[Tensor, Tensor]:
        """Return, for each pair, the sum of its tokens' log-probabilities and their number, float64, (pairs,) each."""
        totals = torch.zeros(self.rows, self._each, dtype=torch.float64)
        causal = self.bench.form == "causal"
        counts = torch.tensor(
            [len(p.continuation) - (causal and not p.prompt) for p in self.pairs], dtype=torch.float64
        )
        with torch.no_grad():
            for places in with_progress(self._batches(size), progress, self.task.name, self.rows):
                found = (self._causal if causal else self._seq2seq)([self._pairs_of(place) for place in places])
                totals[torch.tensor(places)] = found.cpu().reshape(-1, self._each)
        return totals.flatten(), counts

    def _pairs_of(self, place: int) -> list[Pair]:
        return self.pairs[place * self._each : (place + 1) * self._each]

    def _batches(self, size: int) -> Iterator[list[int]]:
        """Yield rows in batches, all rows of a batch to be scored in one way (see `_way`)."""
        groups: dict[tuple[str, int], list[int]] = {}
        for place in range(self.rows):
            groups.setdefault(self._way(self._pairs_of(place)), []).append(place)
        for (way, _), places in sorted(groups.items(), reverse=True):
            lengths = [max(len(pair.whole) for pair in self._pairs_of(place)) for place in places]
            most = size if way == "next" else max(1, size // self._each)
            yield from ([places[i] for i in batch] for batch in batches(lengths, most))

    def _way(self, row: Sequence[Pair]) -> tuple[str, int]:
        """Return how the pairs of a row are scored, and the length of prompt that all rows of a batch must share.

        Returns: `next`, 0: by the logits of one position, where every choice is one token; `cached`, length: the prompt
            runs once, and the choices read its keys and values; `whole`, 0: each pair runs by itself.
        """
        shared = shared_length(row)
        if self.bench.form != "causal" or len(row) == 1 or shared < 2:
            return "whole", 0
        single = all(len(pair.prompt) == shared and len(pair.continuation) == 1 for pair in row)
        return ("next", 0) if single else ("cached", shared)

    def _causal(self, rows: Sequence[Sequence[Pair]]) -> Tensor:
        """Return log p of all pairs of some rows that are scored in one way."""
        way, _ = self._way(rows[0])
        if way == "next":
            return next_log_probabilities(
                self.bench, [row[0].prompt for row in rows], [[pair.continuation[0] for pair in row] for row in rows]
            )
        if way == "cached" and self._has_cache:
            found = continued_log_probabilities(self.bench, rows)
            if found is not None:
                return found
            self._has_cache = False
        return summed_log_probabilities(self.bench, [pair for row in rows for pair in row])

    def _seq2seq(self, rows: Sequence[Sequence[Pair]]) -> Tensor:
        """Return log p of all pairs of some rows; the encoder runs once for each row."""
        from transformers.modeling_outputs import BaseModelOutput

        model, each = self.bench.model, self._each
        inputs = self.bench.pad_batch([row[0].prompt for row in rows])
        states = model.get_encoder()(**inputs).last_hidden_state.repeat_interleave(each, 0)
        answers = self.bench.pad_batch([pair.continuation for row in rows for pair in row])
        is_token = answers["attention_mask"].bool()
        labels = answers["input_ids"].masked_fill(~is_token, -100)
        mask = inputs["attention_mask"].repeat_interleave(each, 0)
        output = model(encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=mask, labels=labels)
        logits = output.logits.float().log_softmax(-1)
        chosen = logits.gather(2, answers["input_ids"].unsqueeze(2)).squeeze(2).double()
        totals: Tensor = (chosen * is_token).sum(1)
        return totals

    def _make_pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Tokenize prompts with their continuations, and count the rows that are cut; a pair without tokens is empty."""
        if self.bench.form == "seq2seq":
            prompts, cut = self.bench.token_ids([prompt for prompt, _ in texts], self.task.max_tokens)
            self.cut = cut // self._each
            targets, _ = self.bench.token_ids([target for _, target in texts], self.task.max_tokens)
            return [Pair(*pair) if pair[0] else EMPTY for pair in zip(prompts, targets, strict=True)]
        most = min(self.task.max_tokens, self.bench.max_length)
        whole = self._causal_ids([prompt + target for prompt, target in texts])
        prompts = self._causal_ids([prompt.rstrip() for prompt, _ in texts])
        long = [len(ids) > most for ids in whole]
        self.cut = sum(any(long[row : row + self._each]) for row in range(0, len(long), self._each))
        every = zip(whole, prompts, texts, strict=True)
        return [_causal_pair(ids, prompt, target, most) for ids, prompt, (_, target) in every]

    def _causal_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return token ids of texts, without the end token that some tokenizers add to every text."""
        end = getattr(self.bench.tokenizer, "eos_token_id", None)
        every = self.bench.all_token_ids(texts)
        return [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in every]


def _causal_pair(whole: list[int], prompt: list[int], target: str, most: int) -> Pair:
    """Divide a text into its prompt, which loses its first tokens if the text is too long, and its continuation.

    Args:
        whole: token ids of the prompt and the continuation.
        prompt: token ids of the prompt alone.
        target: the continuation; empty for a text that is scored as a whole.
        most: tokens of the pair, at most.
    Returns: an empty pair where no token would be scored. The first token of all is not predicted.
    """
    if not target:
        return Pair([], whole[:most]) if len(whole[:most]) > 1 else EMPTY
    if not prompt:
        return EMPTY
    pair = Pair(whole[max(0, len(whole) - most) : len(prompt)], whole[len(prompt) :][-most:])
    return pair if pair.prompt or len(pair.continuation) > 1 else EMPTY


def _separated(text: str, target: str) -> tuple[str, str]:
    """Return a text and the label that follows it, with a space between them where there is none."""
    joined = not target or not text or text[-1].isspace() or target[0].isspace()
    return (text, target) if joined else (text, f" {target}")
