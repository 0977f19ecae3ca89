"""Tiny base models with a tokenizer of words, and adapters for them by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PREFIX, write_adapter
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
VOCABULARY = len(WORDS) + len(SPECIAL)
WIDTH = 16


def make_tokenizer(frame: bool) -> PreTrainedTokenizerFast:
    """One token a word; framed by [CLS] and [SEP] as an encoder wants it, or bare."""
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **names, **({"cls_token": "[CLS]", "sep_token": "[SEP]"} if frame else {})
    )


def make_model(form: str, seed: int = 0) -> Any:
    """A random model of two layers, in evaluation mode: encoder, classifier, gpt2, llama or t5."""
    torch.manual_seed(seed)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 24}
    if form in ("encoder", "classifier"):
        config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=3, **small)
        config.initializer_range = 0.3
        return (BertModel if form == "encoder" else BertForSequenceClassification)(config).eval()
    if form == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)).eval()
    if form == "llama":
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.3, **small)
        ).eval()
    sizes = {"d_model": WIDTH, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2, **sizes)
    ).eval()


def save_base(folder: Path, form: str) -> Path:
    """A base model's folder, with its tokenizer."""
    make_model(form).save_pretrained(folder)
    make_tokenizer(form in ("encoder", "classifier")).save_pretrained(folder)
    return folder


def linear_shapes(model: Any, *endings: str) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers whose paths end so."""
    found = {}
    for name, layer in model.named_modules():
        if name.endswith(endings) and hasattr(layer, "weight"):
            rows, columns = layer.weight.shape
            found[name] = (columns, rows) if type(layer).__name__ == "Conv1D" else (rows, columns)
    return found


def write_lora(
    folder: Path, shapes: Mapping[str, tuple[int, int]], seed: int, rank: int = 2, gain: float = 0.5, **config: Any
) -> Path:
    """A random LoRA."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=draw) / columns**0.5
        tensors[f"{PREFIX}{name}.lora_B.weight"] = gain * torch.randn(rows, rank, generator=draw)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(shapes), **config}
    return write_adapter(folder, settings, tensors)


def write_ia3(folder: Path, vectors: Mapping[str, tuple[int, bool]], seed: int, **config: Any) -> Path:
    """A random (IA)³: (k, on_input) of each module."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (length, on_input) in vectors.items():
        vector = 1 + torch.randn(length, generator=draw) / 2
        tensors[f"{PREFIX}{name}.ia3_l"] = vector.reshape((1, -1) if on_input else (-1, 1))
    feedforward = [name for name, (_, on_input) in vectors.items() if on_input]
    settings = {"peft_type": "IA3", "target_modules": list(vectors), "feedforward_modules": feedforward, **config}
    return write_adapter(folder, settings, tensors)


def sentences(count: int, seed: int, length: int = 6) -> list[str]:
    """Random words."""
    draw = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[n] for n in torch.randint(len(WORDS), (length + place % 3,), generator=draw))
        for place in range(count)
    ]


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of a tiny encoder, classifier, gpt2, llama and t5, made once."""
    root = tmp_path_factory.mktemp("bases")
    return {form: save_base(root / form, form) for form in ("encoder", "classifier", "gpt2", "llama", "t5")}
