"""Score tasks of language models, causal and sequence-to-sequence: rank classification, exact match, loss.

A prompt and its continuation are tokenized together and divided at the length of the prompt alone, so that the
continuation has the tokens that it has in running text. Only the tokens of the continuation count; padding never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RecipeError
from .loaded_model import Bench
from .scorers import BATCH, Progress, Score, Scorer, batches
from .task import Task


class Pair(NamedTuple):
    """The token ids of a prompt (`given`; may be empty) and of the continuation that is scored (`asked`)."""

    given: list[int]
    asked: list[int]


class Continuation(Scorer):
    """Measures `choices` and `loss`: log-probabilities of continuations.

    Attributes:
        pairs: for `choices` one for each row and choice, rows first; for `loss` one for each row.
    """

    def __init__(self, bench: Bench, task: Task) -> None:
        super().__init__(bench, task)
        rows, texts = self.read()
        self._rows = len(rows)
        self.labels = torch.empty(0, dtype=torch.int64)
        if task.choices is not None:
            self.labels = torch.tensor(task.label_numbers(rows))
            follow = [(text, choice) for text in texts for choice in task.choices]
        else:
            follow = [_apart(*one) for one in zip(texts, task.target_texts(rows), strict=True)]
        self.pairs = self._pairs(follow)
        self.refuse_empty([pair.asked for pair in self.pairs], len(task.choices or (None,)))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self._rows

    def score(self, progress: Progress | None = None, size: int = BATCH) -> Score:
        """Return the accuracy and cross-entropy among the choices; for `loss` the mean over all tokens of continuations."""
        totals, counts = self.log_probabilities(progress, size)
        if self.task.choices is None:
            return self.graded([], -float(totals.sum() / counts.sum()), classified=False)
        wide = (totals / counts if self.task.mean else totals).reshape(self.rows, -1)
        right = wide.argmax(-1) == self.labels
        losses = -wide.log_softmax(-1).gather(1, self.labels.unsqueeze(1))
        return self.graded(right.tolist(), float(losses.mean()))

    def log_probabilities(self, progress: Progress | None = None, size: int = BATCH) -> tuple[Tensor, Tensor]:
        """Return, for each pair, the sum of its tokens' log-probabilities and their number, float64, (pairs,) each."""
        totals = torch.zeros(len(self.pairs), dtype=torch.float64)
        causal = self.bench.form == "causal"
        counts = torch.tensor([len(p.asked) - (causal and not p.given) for p in self.pairs], dtype=torch.float64)
        done = 0
        score = self._seq2seq if self.bench.form == "seq2seq" else self._causal
        with torch.no_grad():
            for places in batches([len(pair.given) + len(pair.asked) for pair in self.pairs], size):
                totals[torch.tensor(places)] = score([self.pairs[place] for place in places]).double().cpu()
                done += len(places)
                if progress is not None:
                    progress(self.task.name, done, len(self.pairs))
        return totals, counts

    def _causal(self, pairs: Sequence[Pair]) -> Tensor:
        inputs = self.bench.pad_batch([[*pair.given, *pair.asked] for pair in pairs])
        logits = self.bench.model(**inputs).logits
        found = []
        for row, pair in enumerate(pairs):
            start = max(1, len(pair.given))  # the first token of all is not predicted
            stop = len(pair.given) + len(pair.asked)
            steps = logits[row, start - 1 : stop - 1].float().log_softmax(-1)
            found.append(steps.gather(1, inputs["input_ids"][row, start:stop].unsqueeze(1)).sum())
        return torch.stack(found)

    def _seq2seq(self, pairs: Sequence[Pair]) -> Tensor:
        inputs = self.bench.pad_batch([pair.given for pair in pairs])
        answers = self.bench.pad_batch([pair.asked for pair in pairs])
        real = answers["attention_mask"].bool()
        labels = answers["input_ids"].masked_fill(~real, -100)
        logits = self.bench.model(**inputs, labels=labels).logits.float().log_softmax(-1)
        chosen = logits.gather(2, answers["input_ids"].unsqueeze(2)).squeeze(2)
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


class Generation(Scorer):
    """Measure `exact_match`: greedy text against the row's label."""

    def __init__(self, bench: Bench, task: Task) -> None:
        super().__init__(bench, task)
        rows, texts = self.read()
        if task.label is None:
            raise RecipeError(f"{task.where}: measure 'exact_match' needs a label. Name its key (label: KEY).")
        self.labels = torch.empty(0, dtype=torch.int64)
        self.answers = [answer.strip() for answer in task.target_texts(rows)]
        most = min(task.max_tokens, bench.max_length - task.new_tokens)
        if most < 1:
            raise RecipeError(
                f"task {task.name!r}: new_tokens is {task.new_tokens}, and '{bench.base}' has room for "
                f"{bench.max_length} tokens in all. Ask for fewer."
            )
        found = bench.all_token_ids(texts)
        self.refuse_empty(found)
        self.cut = sum(len(ids) > most for ids in found)
        self.sequences = [ids[:most] if bench.form == "seq2seq" else ids[-most:] for ids in found]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.sequences)

    def score(self, progress: Progress | None = None, size: int = BATCH) -> Score:
        """Return the share of rows whose generated text is the label."""
        written = self.written(progress, size)
        return self.graded([text == answer for text, answer in zip(written, self.answers, strict=True)], None)

    def written(self, progress: Progress | None = None, size: int = BATCH) -> list[str]:
        """Return what the model generates for each row, cut at `stop` and stripped."""
        texts = [""] * self.rows
        done, causal = 0, self.bench.form == "causal"
        with torch.no_grad():
            for places in batches([len(ids) for ids in self.sequences], size):
                inputs = self.bench.pad_batch([self.sequences[place] for place in places], left=causal)
                made = _greedy(self.bench, inputs, self.task.new_tokens)
                fresh = made[:, inputs["input_ids"].shape[1] :] if causal else made
                for place, ids in zip(places, fresh, strict=True):
                    texts[place] = self._clean(self.bench.tokenizer.decode(ids, skip_special_tokens=True))
                done += len(places)
                if progress is not None:
                    progress(self.task.name, done, self.rows)
        return texts

    def _clean(self, text: str) -> str:
        text = text.strip()
        return text.partition(self.task.stop)[0].strip() if self.task.stop else text


def _greedy(bench: Bench, inputs: dict[str, Tensor], most: int) -> Tensor:
    """Generate greedily, up to the end token or `most` new tokens: token ids, (rows, tokens).

    Of the base's own generation_config only the special tokens are kept: it may ask for beams, sampling, penalties or a
    minimum length, and `generate` takes from it what its own arguments do not set.
    """
    from transformers import GenerationConfig

    model = bench.model.get_base_model() if hasattr(bench.model, "get_base_model") else bench.model
    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "decoder_start_token_id")}
    settings = {
        "max_new_tokens": most,
        "do_sample": False,
        "num_beams": 1,
        "pad_token_id": bench.pad_token_id,
        **tokens,
    }
    plain = GenerationConfig(**settings)  # type: ignore[no-untyped-call]
    try:
        model.generation_config = plain
        made: Tensor = bench.model.generate(**inputs, generation_config=plain)
    finally:
        model.generation_config = own
    return made
