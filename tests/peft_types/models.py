"""Tiny models with random weights, one of each architecture that adapters are made for, and how to call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers as hf
from torch import Tensor, nn

TOKENS = torch.tensor([[5, 1, 17, 9, 30], [2, 8, 8, 3, 11]])
WIDTHS = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
PIXELS = torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8).sin()


@dataclass(frozen=True)
class Architecture:
    """A small model of a family, what of it is adapted, and an input.

    Attributes:
        targets: linear layers, or convolutions; of each class of layer square ones and others.
        feedforward: those among them whose input an (IA)³ multiplies.
        embedding: an embedding, if the model has one that can be adapted.
        parameters: of fused experts.
    """

    make: Callable[[], hf.PreTrainedModel]
    targets: list[str]
    feedforward: list[str]
    embedding: str | None = None
    parameters: list[str] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=lambda: {"input_ids": TOKENS})
    conv1d: bool = False


def t5() -> hf.PreTrainedModel:
    config = hf.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    return hf.T5ForConditionalGeneration(config)


def gpt2() -> hf.PreTrainedModel:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=4, **ends))


def llama() -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**WIDTHS, num_hidden_layers=2, num_key_value_heads=2))


def bert_and_gpt2() -> hf.PreTrainedModel:
    """Both classes of layer in one model."""
    parts = {"encoder": bert().config.to_dict(), "decoder": gpt2().config.to_dict()}
    parts["decoder"] |= {"is_decoder": True, "add_cross_attention": True}
    return hf.EncoderDecoderModel(hf.EncoderDecoderConfig(**parts, **ENDS))


def mixtral() -> hf.PreTrainedModel:
    sizes = {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**{**WIDTHS, "intermediate_size": 16}, **sizes))


def bert() -> hf.PreTrainedModel:
    return hf.BertForMaskedLM(hf.BertConfig(**WIDTHS, num_hidden_layers=2, max_position_embeddings=8))


def vit() -> hf.PreTrainedModel:
    sizes = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 2}
    return hf.ViTForImageClassification(hf.ViTConfig(**WIDTHS, **sizes))


def resnet() -> hf.PreTrainedModel:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return hf.ResNetForImageClassification(config)


def clip() -> hf.PreTrainedModel:
    config = hf.CLIPTextConfig(**WIDTHS, num_hidden_layers=2, max_position_embeddings=8, projection_dim=16)
    return hf.CLIPTextModelWithProjection(config)


def whisper() -> hf.PreTrainedModel:
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in SIDE.items()}
    config = hf.WhisperConfig(
        vocab_size=40, d_model=16, num_mel_bins=8, max_source_positions=8, max_target_positions=8, **sides, **ENDS
    )
    return hf.WhisperForConditionalGeneration(config)


SIDE = {"layers": 1, "attention_heads": 4, "ffn_dim": 24}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

ARCHITECTURES = {
    "T5": Architecture(
        t5, ["q", "v", "wo"], ["wo"], "shared", inputs={"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :3]}
    ),
    "GPT-2": Architecture(gpt2, ["c_attn", "attn.c_proj", "mlp.c_proj"], ["mlp.c_proj"], "wte", conv1d=True),
    "BERT and GPT-2": Architecture(
        bert_and_gpt2,
        ["query", "intermediate.dense", "q_attn", "attn.c_proj", "c_fc", "crossattention.c_attn"],
        ["c_fc"],
        inputs={"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :3]},
        conv1d=True,
    ),
    "Llama": Architecture(llama, ["q_proj", "v_proj", "down_proj"], ["down_proj"], "embed_tokens"),
    "Mixtral": Architecture(
        mixtral, ["q_proj", "v_proj"], [], "embed_tokens", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "BERT": Architecture(bert, ["query", "value", "output.dense"], ["output.dense"], "word_embeddings"),
    "ViT": Architecture(
        vit,
        ["query", "q_proj", "value", "v_proj", "mlp.fc2", "output.dense"],  # before and since transformers 5
        ["mlp.fc2", "output.dense"],
        inputs={"pixel_values": PIXELS},
    ),
    "ResNet": Architecture(resnet, ["convolution"], [], inputs={"pixel_values": PIXELS}),
    "CLIP text": Architecture(clip, ["q_proj", "v_proj", "fc2"], ["fc2"], "token_embedding"),
    "Whisper": Architecture(
        whisper,
        ["q_proj", "v_proj", "fc2"],
        ["fc2"],
        inputs={
            "input_features": torch.linspace(-1, 1, 256).reshape(2, 8, 16).sin(),
            "decoder_input_ids": TOKENS[:, :3],
        },
    ),
}


def make(name: str) -> hf.PreTrainedModel:
    """A small model with no weight, bias or norm at its bland initial value."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name].make().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    """What the model computes: logits, or a text's embedding."""
    found = model.eval()(**ARCHITECTURES[name].inputs)
    return found.logits if "logits" in found else found.text_embeds
