"""Tiny untrained models with a tokenizer of words, and tasks for them."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ties_peft import Adapter, Bench

VOCABULARY = 40
TEXTS = ("the cat sat", "a dog", "seven birds sang in one tree", "rain falls on the roof", "no", "the old dog sang")
LABELS = (0, 1, 1, 0, 2, 2)
DESCRIPTIONS = ["about cats", "about many birds", "about the weather"]
ENCODER = {"measure": "descriptions", "descriptions": DESCRIPTIONS}


class Words:
    """A tokenizer: a number for each word, by its letters."""

    pad_token_id = 0
    eos_token_id = 1

    def __call__(
        self, texts: Sequence[str], truncation: bool = False, max_length: int | None = None, **_: Any
    ) -> dict[str, list[list[int]]]:
        rows = [[2 + zlib.crc32(word.encode()) % (VOCABULARY - 2) for word in text.split()] for text in texts]
        return {"input_ids": [row[:max_length] if truncation else row for row in rows]}


def encoder() -> Bench:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return Bench(BertModel(config), Words(), "tiny/bert")


def saved_encoder(folder: Path) -> Path:
    """The encoder and a tokenizer of words, as save_pretrained writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in (*TEXTS, *DESCRIPTIONS) for word in text.split()})
    table = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1} | {w: i + 2 for i, w in enumerate(words)}, "[UNK]"))
    table.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=table, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    encoder().model.save_pretrained(folder)
    return folder


def causal() -> Bench:
    """GPT-2, whose weights are (in, out)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3)
    return Bench(GPT2LMHeadModel(config), Words(), "tiny/gpt2")


BERT = {
    "encoder.layer.0.attention.self.query": (16, 16),
    "encoder.layer.0.attention.self.key": (16, 16),
    "encoder.layer.1.intermediate.dense": (24, 16),
}
GPT2 = {"transformer.h.0.attn.c_attn": (48, 16), "transformer.h.1.mlp.c_proj": (16, 64)}
BERT_VECTORS = {
    "encoder.layer.0.attention.self.key": (16, False),
    "encoder.layer.1.output.dense": (24, True),
}


def rows(labelled: bool = True) -> list[dict[str, Any]]:
    pairs = zip(TEXTS, LABELS, strict=True)
    return [{"text": text, "label": label} if labelled else {"text": text} for text, label in pairs]


def double(bench: Bench, adapter: Adapter) -> Any:
    """A float64 copy of a bench's model with the task vectors of a LoRA in its weights, put there by hand."""
    model = copy.deepcopy(bench.model).double()
    for name in adapter.modules:
        weight = model.get_submodule(name).weight
        delta = adapter.delta(name).double()
        weight.data += delta if weight.shape == delta.shape and "h." not in name else delta.T
    return model
