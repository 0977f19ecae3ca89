"""Small models and PEFT adapters over them that hold whole layers, for the tests of extra tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

TOKENS = torch.tensor([[5, 1, 17, 9, 30], [2, 8, 8, 3, 11]])
WIDTHS: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}
SAVED = ("modules_to_save", "trainable_tokens_delta")
Base = Callable[[], nn.Module]


def bert(labels: int = 2) -> Base:
    """A BERT that classifies; bodies are equal for any number of labels."""
    config = hf.BertConfig(**WIDTHS, max_position_embeddings=8, num_labels=labels)
    return lambda: seeded(lambda: hf.BertForSequenceClassification(config))


def roberta() -> nn.Module:
    """Its head has two layers inside."""
    config = hf.RobertaConfig(**WIDTHS, max_position_embeddings=8, num_labels=3)
    return seeded(lambda: hf.RobertaForSequenceClassification(config))


def distilbert() -> nn.Module:
    """Its `pre_classifier` is saved by the entry `classifier`."""
    sizes = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_heads": 4, "n_layers": 2, "max_position_embeddings": 8}
    return seeded(lambda: hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**sizes)))


def llama(tied: bool = False, added: int = 0) -> nn.Module:
    """A causal language model, its vocabulary made larger by some tokens."""
    config = hf.LlamaConfig(**WIDTHS, num_key_value_heads=2, tie_word_embeddings=tied)

    def make() -> nn.Module:
        model = hf.LlamaForCausalLM(config)
        if added:
            model.resize_token_embeddings(40 + added, mean_resizing=False)
        return model

    return seeded(make)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with no weight, bias or norm at its bland initial value, the same at every call."""
    torch.manual_seed(0)
    model = make().eval()
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "classifier" not in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


def train(base: Base, config: peft.PeftConfig, folder: Path, seed: int = 0, only: str = "") -> Tensor:
    """Change all that an adapter trains, save it, and give the logits.

    Args:
        only: change nothing but the parameters with this in their names, and the adapter's own.
    """
    model = peft.get_peft_model(base(), config).eval()
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (only in name or "lora_" in name or "ia3_" in name):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    with torch.no_grad():
        logits: Tensor = model(input_ids=TOKENS).logits
    model.save_pretrained(folder)
    return logits


def load(base: Base, folder: Path) -> nn.Module:
    """The base with an adapter, as a user loads it."""
    return peft.PeftModel.from_pretrained(base(), folder).eval()


def logits(base: Base, folder: Path) -> Tensor:
    """What it computes."""
    with torch.no_grad():
        found: Tensor = load(base, folder)(input_ids=TOKENS).logits
    return found


def lora(task: str | None = "SEQ_CLS", targets: Any = ("query", "value"), **settings: Any) -> peft.LoraConfig:
    """A LoRA whose B is not zero."""
    return peft.LoraConfig(
        task_type=task, target_modules=list(targets), r=4, lora_alpha=6, init_lora_weights=False, **settings
    )


def ia3() -> peft.IA3Config:
    """An (IA)³ with a head."""
    targets = ["key", "value", "output.dense"]
    return peft.IA3Config(task_type="SEQ_CLS", target_modules=targets, feedforward_modules=["output.dense"])


def causal(**settings: Any) -> peft.LoraConfig:
    """A LoRA on a causal language model."""
    return lora("CAUSAL_LM", ("q_proj", "v_proj"), **settings)
