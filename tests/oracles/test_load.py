"""A merged adapter loads in PEFT, and the model then computes what base + merged delta computes."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers as hf
from oracles import definition
from oracles.definition import Vectors
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ties_peft

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")

TOKENS = torch.tensor([[5, 1, 17, 9, 30], [2, 8, 8, 3, 11]])
WIDTHS = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}


@dataclass(frozen=True)
class Family:
    """A family of models: a small one of it, and what is adapted there."""

    make: Callable[[], hf.PreTrainedModel]
    lora: list[str]
    ia3: list[str]
    feedforward: list[str]
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


def bert() -> hf.PreTrainedModel:
    return hf.BertForMaskedLM(hf.BertConfig(**WIDTHS, num_hidden_layers=2, max_position_embeddings=8))


def vit() -> hf.PreTrainedModel:
    sizes = {"image_size": 8, "patch_size": 4, "num_hidden_layers": 2}
    return hf.ViTForImageClassification(hf.ViTConfig(**WIDTHS, **sizes))


FAMILIES = {
    "t5": Family(
        t5, ["q", "v", "wo"], ["k", "v", "wo"], ["wo"], {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :3]}
    ),
    "gpt2": Family(gpt2, ["c_attn", "c_fc", "c_proj"], ["c_attn", "mlp.c_proj"], ["mlp.c_proj"], conv1d=True),
    "llama": Family(llama, ["q_proj", "k_proj", "down_proj"], ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "bert": Family(bert, ["query", "value", "output.dense"], ["key", "value", "output.dense"], ["output.dense"]),
    "vit": Family(
        vit,
        ["query", "q_proj", "value", "v_proj"],  # before and since transformers 5
        ["value", "v_proj", "output.dense", "mlp.fc2"],
        ["output.dense", "mlp.fc2"],
        {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8).sin()},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def base(family: Family) -> hf.PreTrainedModel:
    """A small model with no weight, bias or norm at its bland initial value."""
    torch.manual_seed(0)
    model = family.make().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def lora_configs(family: Family) -> dict[str, LoraConfig]:
    """Two adapters of unlike rank, lora scaling and modules, the second on one layer alone."""
    last = family.lora[-1]
    return {
        "x": LoraConfig(target_modules=family.lora, r=4, lora_alpha=6, fan_in_fan_out=family.conv1d),
        "y": LoraConfig(
            target_modules=family.lora[-2:],
            layers_to_transform=[1],
            r=6,
            lora_alpha=3,
            use_rslora=True,
            alpha_pattern={last: 2},
            rank_pattern={last: 3},
            fan_in_fan_out=family.conv1d,
        ),
    }


def ia3_configs(family: Family) -> dict[str, IA3Config]:
    """Two adapters, of which the second leaves the feed-forward layers alone."""
    attention = [name for name in family.ia3 if name not in family.feedforward]
    return {
        "x": IA3Config(target_modules=family.ia3, feedforward_modules=family.feedforward, fan_in_fan_out=family.conv1d),
        "y": IA3Config(target_modules=attention, feedforward_modules=[], fan_in_fan_out=family.conv1d),
    }


@pytest.fixture(params=[lora_configs, ia3_configs], ids=["lora", "ia3"])
def folders(request: pytest.FixtureRequest, family: Family, base: hf.PreTrainedModel, tmp_path: Path) -> list[Path]:
    """Adapters that PEFT made, filled with random numbers and saved."""
    configs = request.param(family)
    for name, config in configs.items():
        save_random(deepcopy(base), config, tmp_path / name)
    return [tmp_path / name for name in configs]


def save_random(model: hf.PreTrainedModel, config: PeftConfig, folder: Path) -> None:
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.4)
        elif "ia3_l" in name:
            nn.init.normal_(parameter, mean=1, std=0.4)
    peft_model.save_pretrained(folder)


@torch.no_grad()
def logits(model: nn.Module, family: Family) -> Tensor:
    return model.eval()(**family.inputs).logits


@torch.no_grad()
def applied(model: hf.PreTrainedModel, deltas: Vectors, feedforward: list[str]) -> hf.PreTrainedModel:
    """The base with task vectors worked into its weights by hand."""
    for name, delta in deltas.items():
        layer, vector = model.get_submodule(name), torch.from_numpy(delta).float()
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        if vector.dim() == 2:
            weight += vector
        elif name.endswith(tuple(feedforward)):
            weight *= 1 + vector
        else:
            weight *= 1 + vector[:, None]
            if layer.bias is not None:
                layer.bias *= 1 + vector
    return model


def assert_computes(model: nn.Module, family: Family, base: hf.PreTrainedModel, expected: Tensor) -> None:
    """The expected logits, which are not those of the base."""
    torch.testing.assert_close(logits(model, family), expected, atol=1e-4, rtol=1e-4)
    assert torch.dist(expected, logits(base, family)) > 0.05 * expected.norm()


def test_every_key_of_the_file_is_loaded_and_no_other(
    family: Family, base: hf.PreTrainedModel, folders: list[Path], tmp_path: Path
) -> None:
    out = ties_peft.merge(folders).save(tmp_path / "out")
    model = PeftModel.from_pretrained(base, out)
    assert get_peft_model_state_dict(model).keys() == load_file(out / "adapter_model.safetensors").keys()
    again = model.load_adapter(out, "again")
    missing = [key for key in again.missing_keys if "again" in key]  # PEFT 0.13 names the base's weights too
    assert (missing, again.unexpected_keys) == ([], [])
    assert model.peft_config["again"].fan_in_fan_out == family.conv1d


def test_a_merged_adapter_computes_base_plus_merged_delta(
    family: Family, base: hf.PreTrainedModel, folders: list[Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    asked = {"rank": "max"} if ties_peft.Adapter.load(folders[0]).peft_type.has_rank else {}
    out = ties_peft.merge(folders, weights=[1, 2], density=0.5, scale=0.8, **asked).save(tmp_path / "out")
    deltas = definition.ties([definition.read(folder) for folder in folders], [1, 2], density=0.5, scale=0.8)
    expected = logits(applied(deepcopy(base), deltas, family.feedforward), family)
    assert_computes(PeftModel.from_pretrained(deepcopy(base), out), family, base, expected)
    assert not [warning for warning in recwarn if "missing" in str(warning.message)]


def test_an_adapter_merged_alone_computes_the_same(
    family: Family, base: hf.PreTrainedModel, folders: list[Path], tmp_path: Path
) -> None:
    for folder in folders:
        out = ties_peft.merge([folder], density=1).save(tmp_path / f"out-{folder.name}")
        expected = logits(PeftModel.from_pretrained(deepcopy(base), folder), family)
        assert_computes(PeftModel.from_pretrained(deepcopy(base), out), family, base, expected)
