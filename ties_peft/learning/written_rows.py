"""Make rows that are not given: random tokens, answers to prompts, and whole rows that an adapter writes itself.

A causal model writes by sampling at temperature 1. Every draw depends on the seed, the adapter, the row and the step, so
the same call writes the same rows, however they are divided into batches. The next token is the largest of log p + g, g
independently drawn from the standard Gumbel distribution, which has the distribution p (Gumbel, Statistical Theory of
Extreme Values, 1954).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..evaluation.generation import generate
from ..evaluation.loaded_model import Bench
from ..evaluation.scorers import batches, with_progress
from ..merging.plan import Progress
from ..task_vectors.random_numbers import stream_key, uniform

MIN_TOKENS, MAX_TOKENS = 6, 32  # in a row of random tokens
WRITTEN_AT_ONCE = 32  # rows
EXAMPLES, EXAMPLE_LENGTH = 3, 120  # rows that a report shows, and the characters of each
PLACEHOLDER = "§"  # in place of the user's text, to find out where a chat template puts it


@dataclass(frozen=True)
class Written:
    """Rows that an adapter has written or answered.

    Attributes:
        sequences: token ids of each row.
        starts: the position in each row of the first token that is compared.
    """

    sequences: list[list[int]]
    starts: list[int]


@dataclass(frozen=True)
class WrittenCount:
    """How much the rows that an adapter has written differ.

    White space and special tokens do not count, nor do the answers.

    Attributes:
        rows: their number.
        distinct: the number of different ones that are not empty.
        empty: the number of those in which nothing was written.
        examples: the first few, with their answers, cut at `EXAMPLE_LENGTH` characters.
    """

    rows: int
    distinct: int
    empty: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class AnswerWriter:
    """Lets an adapter answer prompts; the answers depend on the fields and the adapter alone.

    Attributes:
        tokens: the largest number in an answer.
        seed: of the sampling.
        whole: whether the tokens of the prompts are compared as well, because they may be plain text.
    """

    tokens: int
    seed: int
    whole: bool = False

    @property
    def prompted(self) -> bool:
        """Whether only the answers are compared."""
        return not self.whole

    def write(self, bench: Bench, given: Sequence[Sequence[int]], digest: str, progress: Progress | None) -> Written:
        """Return prompts with the answers of the adapter that is applied to the model.

        An answer takes at most half of the model's positions. Prompts that are too long for the rest lose their first tokens.

        Args:
            bench: the model.
            given: token ids of each prompt.
            digest: of the adapter.
            progress: called as progress(stage, done, of).
        """
        most = min(self.tokens, max(1, bench.max_length // 2))
        prompts = [list(ids[-max(1, bench.max_length - most) :]) for ids in given]
        answers = sample(bench, prompts, most, stream_key(self.seed, "answers", 0, digest), progress)
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        return Written(rows, [1 if self.whole else len(prompt) for prompt in prompts])


@dataclass(frozen=True)
class RowWriter:
    """Lets an adapter write whole rows: the text of each slot of a template, one after the other, then an answer.

    The rows depend on the fields and the adapter alone.

    Attributes:
        text_tokens: the largest number in a slot.
        answer_tokens: the largest number in an answer.
        pieces: token ids of the template after each slot. If there are none, the adapter writes texts without answers.
        stop: token ids any of which ends the text of a slot.
        seed: of the sampling.
    """

    text_tokens: int
    answer_tokens: int
    pieces: tuple[tuple[int, ...], ...]
    stop: tuple[int, ...]
    seed: int

    @property
    def prompted(self) -> bool:
        """Whether there is a template, so that only the answers are compared."""
        return bool(self.pieces)

    def write(self, bench: Bench, given: Sequence[Sequence[int]], digest: str, progress: Progress | None) -> Written:
        """Return rows that the adapter continues; the arguments are those of `AnswerWriter.write`.

        Only answers are compared, or, without a template, all that is written.
        """
        rows, most = [list(start) for start in given], self._slot_tokens(bench, given)
        if not self.pieces:
            key = stream_key(self.seed, "rows", 0, digest)
            texts = sample(bench, rows, most, key, progress, self.stop)
            written = [[*start, *text] for start, text in zip(rows, texts, strict=True)]
            return Written(written, [len(start) for start in rows])
        ended = set(self.stop) | end_tokens(bench)
        for slot, piece in enumerate(self.pieces):
            key = stream_key(self.seed, "rows", slot, digest)
            texts = sample(bench, rows, most, key, progress, self.stop)
            texts = [text[:-1] if text[-1] in ended else text for text in texts]
            rows = [[*row, *text, *piece] for row, text in zip(rows, texts, strict=True)]
        return AnswerWriter(self.answer_tokens, self.seed).write(bench, rows, digest, progress)

    def count(self, bench: Bench, beginning: Sequence[int], written: Written) -> WrittenCount:
        """Count the distinct and the empty rows among those that were written after a beginning."""
        rows = written.sequences
        prompts = [ids[:start] for ids, start in zip(rows, written.starts, strict=True)] if self.pieces else rows
        frame = [token for part in (beginning, *self.pieces) for token in part]
        unfilled, *texts = ["".join(text.split()) for text in _decode(bench, [frame, *prompts])]
        shown = _decode(bench, rows[:EXAMPLES])
        return WrittenCount(
            rows=len(rows),
            distinct=len(set(texts) - {unfilled}),
            empty=texts.count(unfilled),
            examples=tuple(text if len(text) <= EXAMPLE_LENGTH else f"{text[: EXAMPLE_LENGTH - 1]}…" for text in shown),
        )

    def _slot_tokens(self, bench: Bench, given: Sequence[Sequence[int]]) -> int:
        """Return the largest number of tokens in a slot with which the whole row fits the model."""
        fixed = max(map(len, given), default=0) + sum(map(len, self.pieces))
        answer = min(self.answer_tokens, bench.max_length // 2) if self.pieces else 0
        room = (bench.max_length - fixed - answer) // max(1, len(self.pieces))
        return max(1, min(self.text_tokens, room))


Writer = AnswerWriter | RowWriter


def sample(
    bench: Bench,
    prompts: Sequence[Sequence[int]],
    most: int,
    key: int,
    progress: Progress | None = None,
    stop: Sequence[int] = (),
) -> list[list[int]]:
    """Return what the model writes after each prompt at temperature 1, with the token that ends it.

    Args:
        prompts: token ids.
        most: the largest number of tokens after each.
        key: of the random numbers.
        stop: tokens that end a row, besides the model's own end tokens.
    """
    from transformers import LogitsProcessorList

    found: list[list[int]] = [[] for _ in prompts]
    ends = sorted({*stop, *end_tokens(bench)})
    divided = batches([len(ids) for ids in prompts], WRITTEN_AT_ONCE)
    for places in with_progress(divided, progress, "writing", len(prompts)):
        inputs = bench.pad_batch([prompts[place] for place in places], left=True)
        width = inputs["input_ids"].shape[1]
        noise = _GumbelNoise([stream_key(0, f"row {place}", 0, str(key)) for place in places], width)
        made = generate(bench, inputs, most, ends, LogitsProcessorList([noise]))[:, width:].tolist()
        for place, ids in zip(places, made, strict=True):
            stops = [at for at, token in enumerate(ids) if token in ends]
            found[place] = ids[: stops[0] + 1] if stops else ids
    return found


class _GumbelNoise:
    """Add independent Gumbel noise to log-probabilities, so that the largest sum is a sample."""

    def __init__(self, keys: Sequence[int], width: int) -> None:
        self._keys, self._width = keys, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        size, step = scores.shape[-1], input_ids.shape[1] - self._width
        drawn = torch.stack([uniform(key, step * size, (size,)) for key in self._keys]).to(scores.device)
        middle = drawn.double() + 2.0**-25  # of the interval of length 2^-24 that a value stands for: never 0 or 1
        return scores.double() - (-middle.log()).log()


def _decode(bench: Bench, rows: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of some rows without special tokens."""
    texts: list[str] = bench.tokenizer.batch_decode([list(ids) for ids in rows], skip_special_tokens=True)
    return texts


def end_tokens(bench: Bench) -> set[int]:
    """Return the end tokens of a model, as its tokenizer, generation_config and config name them."""
    sources = (bench.tokenizer, getattr(bench.model, "generation_config", None), bench.model.config)
    found: set[int] = set()
    for source in sources:
        ends = getattr(source, "eos_token_id", None)
        found |= {ends} if isinstance(ends, int) else set(ends or ())
    return found


def line_ends(bench: Bench) -> tuple[int, ...]:
    """Return the tokens whose text has an end of line in it."""
    tokenizer = bench.tokenizer
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return tuple(token for token, text in enumerate(texts) if "\n" in text)


def row_beginning(bench: Bench, template_head: str) -> list[int]:
    """Return the token ids with which an adapter begins to write a row.

    They are the template's text before its slot, else the start of a user's turn in the chat template, else the special
    token that begins a text.
    """
    if template_head.strip():
        return bench.all_token_ids([template_head.rstrip()])[0]
    tokenizer = bench.tokenizer
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": PLACEHOLDER}]
        text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=False)
        return bench.all_token_ids([text.partition(PLACEHOLDER)[0]], special=False)[0]
    first = getattr(tokenizer, "bos_token_id", None)
    return [first if isinstance(first, int) else bench.pad_token_id]


def random_rows(
    bench: Bench, count: int, seed: int, digest: str, described: Sequence[str] | None = None
) -> list[list[int]]:
    """Return rows of random tokens, all equally likely, between the special tokens that begin and end a text.

    With descriptions of the labels, about half of the tokens, at random positions, are drawn from the descriptions, which
    makes the rows more similar to those of the task.

    Args:
        bench: whose vocabulary is used, without special tokens.
        count: the number of rows, each of MIN_TOKENS to MAX_TOKENS tokens without the special ones.
        seed, digest: what the draws depend on; the digest is the adapter's.
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
    """Return a row in which about half of the tokens are replaced by tokens drawn from some words."""
    is_replaced = torch.rand(len(ids), generator=generator) < 0.5
    drawn = words[torch.randint(len(words), (len(ids),), generator=generator)]
    return torch.where(is_replaced, drawn, torch.tensor(ids)).tolist()


def _special_tokens_around(bench: Bench) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts before and after a text."""
    (whole,), (plain,) = bench.all_token_ids(["a"]), bench.all_token_ids(["a"], special=False)
    fits = (at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain)
    start = next(fits, 0)
    return whole[:start], whole[start + len(plain) :]
