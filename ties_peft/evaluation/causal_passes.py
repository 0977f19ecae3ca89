"""Run a causal model for the log-probabilities of given tokens.

Logits over a vocabulary take most of a small model's memory and much of its time, so they are computed only at the
positions that are asked for. Several continuations of one prompt share the keys and values of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .loaded_model import Bench

CACHE = "DynamicCache"  # the class of transformers whose rows can be repeated, if all layers are of these classes
CACHE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")


class Pair(NamedTuple):
    """The token ids of a prompt, which may be empty, and of the continuation that is scored."""

    prompt: list[int]
    continuation: list[int]

    @property
    def whole(self) -> list[int]:
        """The prompt and the continuation."""
        return [*self.prompt, *self.continuation]

    @property
    def first(self) -> int:
        """The place in `whole` of the first token that is scored; the very first token is not predicted."""
        return max(1, len(self.prompt))


def selected_logits(
    model: Any, inputs: dict[str, Tensor], rows: Tensor, places: Tensor, **options: Any
) -> tuple[Tensor, Any]:
    """Run a causal model, and return its logits at some positions, (positions, vocabulary), and its output.

    A hook on the output layer selects the hidden states before it. So what the model does with logits afterwards (a
    scale, a soft cap) is done as well.

    Args:
        inputs: input_ids and the like.
        rows, places: the row and the place in it of each position, (positions,).
        options: further arguments of the model.
    """
    shapes: list[torch.Size] = []

    def select(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(args[0].shape)
        return (args[0][rows, places].unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(select)
    try:
        output = model(**inputs, **options)
    finally:
        if handle is not None:
            handle.remove()
    return (output.logits[0] if shapes else output.logits[rows, places]), output


def summed_log_probabilities(bench: Bench, pairs: Sequence[Pair]) -> Tensor:
    """Return the sum of log p over the continuation's tokens for each pair, (pairs,), float64, by one pass."""
    inputs = bench.pad_batch([pair.whole for pair in pairs])
    return _sums(bench, inputs, [range(pair.first, len(pair.whole)) for pair in pairs], inputs["input_ids"])


def next_log_probabilities(bench: Bench, prompts: Sequence[list[int]], choices: Sequence[Sequence[int]]) -> Tensor:
    """Return log p of several next tokens of each prompt, (prompts, choices), float64, by one pass over the prompts."""
    rows = torch.arange(len(prompts), device=bench.device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=bench.device)
    logits, _ = selected_logits(bench.model, bench.pad_batch(prompts), rows, last, use_cache=False)
    return logits.float().log_softmax(-1).double().gather(1, torch.tensor(choices, device=bench.device))


def shared_length(pairs: Sequence[Pair]) -> int:
    """Return the number of tokens at the start that the prompts of all pairs share."""
    shared = 0
    for tokens in zip(*(pair.prompt for pair in pairs), strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared


def continued_log_probabilities(bench: Bench, rows: Sequence[Sequence[Pair]]) -> Tensor | None:
    """Return log p of several continuations of each prompt, summed over their tokens, (rows · continuations,), float64.

    The prompt runs once, without its last token, and each continuation attends to its keys and values. The prompts have
    one length, so no padding stands between prompt and continuation, and positions and windows are those of running text.

    Args:
        bench: a causal model.
        rows: the pairs of each row, as many in each; `shared_length`, at least 2, is the same for all rows.
    Returns: None where the model keeps no cache whose rows can be repeated.
    """
    kept = shared_length(rows[0]) - 1
    prompts = bench.pad_batch([row[0].prompt[:kept] for row in rows])
    every = torch.arange(len(rows), device=bench.device)
    _, output = selected_logits(bench.model, prompts, every, torch.full_like(every, kept - 1), use_cache=True)
    cache = getattr(output, "past_key_values", None)
    if cache is None or not _can_be_repeated(cache):
        return None
    cache.batch_repeat_interleave(len(rows[0]))
    pairs = [pair for row in rows for pair in row]
    ids = bench.pad_batch([pair.whole[kept:] for pair in pairs])["input_ids"]
    scored = [range(pair.first - kept, len(pair.whole) - kept) for pair in pairs]
    return _sums(bench, {"input_ids": ids[:, :-1]}, scored, ids, past_key_values=cache, use_cache=True)


def _sums(bench: Bench, inputs: dict[str, Tensor], scored: Sequence[range], ids: Tensor, **options: Any) -> Tensor:
    """Return the sum of log p over the scored places of each row of `ids`, (rows,), float64."""
    lengths = torch.tensor([len(places) for places in scored], device=bench.device)
    rows = torch.arange(len(scored), device=bench.device).repeat_interleave(lengths)
    places = torch.tensor([place for one in scored for place in one], device=bench.device)
    logits, _ = selected_logits(bench.model, inputs, rows, places - 1, **options)
    each = -cross_entropy(logits.float(), ids[rows, places], reduction="none").double()
    totals = torch.zeros(len(scored), dtype=torch.float64, device=bench.device)
    return totals.index_add_(0, rows, each)


def _can_be_repeated(cache: Any) -> bool:
    """Return whether a cache holds nothing but keys and values, so that its rows can be repeated."""
    layers = {type(layer).__name__ for layer in getattr(cache, "layers", ())}
    return type(cache).__name__ == CACHE and layers <= set(CACHE_LAYERS)
