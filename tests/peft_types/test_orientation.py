"""Layers whose weight the base holds as (in, out): found by the base's architecture, as PEFT finds them by their class."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft_types.matrix import KINDS, TOLERANCE, save, weight_errors
from peft_types.models import ARCHITECTURES, make
from sampling import covering
from torch import nn

import ties_peft
from ties_peft import AdapterError
from ties_peft.adapters.base_model import BaseModel, is_conv1d

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("DEFT", "DoRA", "FourierFT", "GraLoRA", "HiRA", "PVeRA", "RandLoRA", "VB-LoRA", "VeRA", "WaveFT")
READERS = [name for name in NAMES if KINDS[name](ARCHITECTURES["GPT-2"]) is not None]  # those that this PEFT has
LINEAR_ONLY = ("BOFT", "OFT", "SHiRA")  # they have fan_in_fan_out, and PEFT takes no Conv1D
SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 2}
CLVP = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**SMALL, vocab_size=40)),
    "gpt2 with a head": lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**SMALL, vocab_size=40)),
    "openai-gpt": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**SMALL, vocab_size=40)),
    "imagegpt": lambda: hf.ImageGPTForCausalImageModeling(hf.ImageGPTConfig(**SMALL, vocab_size=40)),
    "decision_transformer": lambda: hf.DecisionTransformerModel(
        hf.DecisionTransformerConfig(hidden_size=16, n_layer=2, n_head=2)
    ),
    "clvp": lambda: hf.ClvpModelForConditionalGeneration(
        hf.ClvpConfig(
            text_config={**CLVP, "intermediate_size": 24, "vocab_size": 40},
            speech_config={**CLVP, "intermediate_size": 24, "vocab_size": 40},
            decoder_config={**CLVP, "n_inner": 24, "vocab_size": 40, "max_text_tokens": 8},
            projection_dim=16,
        )
    ),
    "gpt_bigcode": lambda: hf.GPTBigCodeForCausalLM(
        hf.GPTBigCodeConfig(**SMALL, vocab_size=40)
    ),  # the names, as Linear
    "gpt_neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]], vocab_size=40)
    ),
    **{name: (lambda name=name: make(name)) for name in ARCHITECTURES},
}


def saved(kind: str, name: str, folder: Path, **changes: Any) -> nn.Module:
    """Save an adapter of PEFT's and its base, with other entries in its config; return the base."""
    config = KINDS[kind](ARCHITECTURES[name])
    assert config is not None and save(name, config, folder / "adapter") is None
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    base = make(name)
    base.save_pretrained(folder / "base")
    return base


def merged_alone(folder: Path, base: Path, rank: Any = "max") -> ties_peft.Merged:
    merged = ties_peft.merge([folder / "adapter"], density=1, rank=rank, base=base)
    merged.save(folder / "merged", force=True)
    return merged


@pytest.mark.parametrize("name", MODELS)
def test_the_architecture_tells_the_class_of_every_layer(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.save_pretrained(tmp_path)
    base = BaseModel.load(tmp_path)
    classes = {
        path: type(layer).__name__ == "Conv1D"
        for path, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, hf.pytorch_utils.Conv1D))
    }
    assert {path: base.is_conv1d(path) for path in classes} == classes


def test_every_model_of_transformers_that_has_a_conv1d_is_known() -> None:
    """By the source of the installed release: whatever takes Conv1D from it says what its model type is."""
    found = set()
    for path in sorted((Path(hf.__file__).parent / "models").glob("*/modeling_*.py")):
        if re.search(r"import .*\bConv1D\b", path.read_text(encoding="utf-8")):
            configs = importlib.import_module(f"transformers.models.{path.parent.name}")
            classes = [getattr(configs, name) for name in dir(configs) if name.endswith("Config")]
            found |= {
                (path.parent.name, cls.model_type)
                for cls in classes
                if cls.__module__.startswith("transformers.") and hasattr(cls, "model_type")
            }
    known = {name for name, model_type in found if is_conv1d("h.0.mlp.c_proj", {"model_type": model_type})}
    names = {name for name, _ in found} - {"ctrl"}  # transformers 4 imports it there for pruning alone
    assert known == names >= {"gpt2", "openai", "imagegpt", "decision_transformer", "clvp"}


WRONG = [(kind, name, False) for kind in READERS for name in ("GPT-2", "BERT and GPT-2")]
WRONG += [(kind, name, True) for kind in (*READERS, *LINEAR_ONLY) for name in ("Llama", "BERT")]
WRONG += [("DoRA", "BERT and GPT-2", True)]


@pytest.mark.parametrize(("kind", "name", "stated"), covering(WRONG, lambda case: (case[0], case[1:])))
def test_a_wrong_fan_in_fan_out_is_corrected_as_peft_does(kind: str, name: str, stated: bool, tmp_path: Path) -> None:
    base = saved(kind, name, tmp_path, fan_in_fan_out=stated)
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to"):  # PEFT's own
        peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "adapter")
    merged = merged_alone(tmp_path, tmp_path / "base")
    errors = weight_errors(base, tmp_path / "adapter", tmp_path / "merged")
    assert errors and max(errors.values()) < TOLERANCE
    told = [text for text in merged.report.warnings if "fan_in_fan_out" in text]
    if kind == "VeRA":  # its own diagonals say which side is which
        assert not told
    else:
        assert len(told) == 1
        assert f"fan_in_fan_out={stated}" in told[0] and ("are Conv1D in" in told[0]) == (not stated)
    assert bool(merged.config.get("fan_in_fan_out")) == ARCHITECTURES[name].conv1d


def test_a_config_that_is_right_is_not_warned_of(tmp_path: Path) -> None:
    for name in ("GPT-2", "Llama"):
        saved("DoRA", name, tmp_path / name)
        merged = merged_alone(tmp_path / name, tmp_path / name / "base")
        assert not [text for text in merged.report.warnings if "fan_in_fan_out" in text]


SQUARE = ["attn.c_proj"]


@pytest.fixture
def square(tmp_path: Path) -> nn.Module:
    """A DoRA on GPT-2's square layers alone, whose shapes tell nothing, and its base."""
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=SQUARE, fan_in_fan_out=True)
    assert save("GPT-2", config, tmp_path / "adapter") is None
    base = make("GPT-2")
    base.save_pretrained(tmp_path / "base")
    return base


def state(folder: Path, value: bool) -> None:
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": value}))


@pytest.mark.parametrize("stated", [True, False])
def test_a_config_beside_the_file_of_weights_tells_the_architecture(
    square: nn.Module, stated: bool, tmp_path: Path
) -> None:
    state(tmp_path, stated)
    for source in (tmp_path / "base", tmp_path / "base" / "model.safetensors"):
        merged_alone(tmp_path, source)
        assert max(weight_errors(square, tmp_path / "adapter", tmp_path / "merged").values()) < TOLERANCE


def test_weights_without_a_config_are_read_as_the_adapter_says(square: nn.Module, tmp_path: Path) -> None:
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "alone.safetensors")
    for stated in (True, False):
        state(tmp_path, stated)
        merged = merged_alone(tmp_path, tmp_path / "alone.safetensors")
        error = max(weight_errors(square, tmp_path / "adapter", tmp_path / "merged").values())
        assert error < TOLERANCE if stated else error > 0.1, "nothing else is known"
        [told] = [text for text in merged.report.warnings if "fan_in_fan_out" in text]
        assert f"fan_in_fan_out={stated}" in told and "no config.json" in told


def test_code_of_its_own_leaves_it_to_the_adapter(square: nn.Module, tmp_path: Path) -> None:
    """A model whose code lies in its repository may hold its weights either way, whatever it is called."""
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "modeling.Own"}}))
    assert BaseModel.load(tmp_path / "base").is_conv1d("transformer.h.0.attn.c_proj") is None
    merged_alone(tmp_path, tmp_path / "base")
    assert max(weight_errors(square, tmp_path / "adapter", tmp_path / "merged").values()) < TOLERANCE


@pytest.mark.parametrize("kind", READERS)
def test_a_shape_that_contradicts_the_adapter_is_refused_and_not_turned(kind: str, tmp_path: Path) -> None:
    """Without the architecture, a wrong fan_in_fan_out would be right on some layers and wrong on the square ones."""
    base = saved(kind, "GPT-2", tmp_path, fan_in_fan_out=False)
    shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "alone.safetensors")
    if kind == "VeRA":
        merged_alone(tmp_path, tmp_path / "alone.safetensors")
        assert max(weight_errors(base, tmp_path / "adapter", tmp_path / "merged").values()) < TOLERANCE
        return
    with pytest.raises(AdapterError, match=r"alone.safetensors.*fan_in_fan_out.*config.json"):
        merged_alone(tmp_path, tmp_path / "alone.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_config_of_the_base_that_cannot_be_read_is_said(square: nn.Module, text: str, tmp_path: Path) -> None:
    (tmp_path / "base" / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=r"base model '.*': config.json cannot be read"):
        merged_alone(tmp_path, tmp_path / "base")


def test_a_file_without_a_config_is_checked_against_the_base_as_its_layers_hold_it(tmp_path: Path) -> None:
    """`convert` with --base: the sizes of GPT-2's layers are (in, out) there, and the result says so."""
    base = saved("LoRA", "GPT-2", tmp_path)
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path / "bare" / "bare.safetensors")
    made = ties_peft.convert(tmp_path / "bare" / "bare.safetensors", base=tmp_path / "base", alpha=5)
    made.save(tmp_path / "merged")
    assert made.config["fan_in_fan_out"] is True
    assert max(weight_errors(base, tmp_path / "adapter", tmp_path / "merged").values()) < TOLERANCE


@pytest.mark.parametrize("name", ["GPT-2", "BERT and GPT-2"])
def test_loaded_layers_are_known_by_their_class(name: str, tmp_path: Path) -> None:
    """DoRA in a live model: what is added computes what the adapter does, with fan_in_fan_out wrong in its config."""
    base = saved("DoRA", name, tmp_path)
    model = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "adapter", adapter_name="a")
    model.peft_config["a"].fan_in_fan_out = False
    ties_peft.add_merged_adapter(model, ["a"], "again", density=1, rank="max")
    model.set_adapter("again")
    model.save_pretrained(tmp_path, selected_adapters=["again"])
    errors = weight_errors(base, tmp_path / "adapter", tmp_path / "again")
    assert errors and max(errors.values()) < TOLERANCE
    assert torch.isfinite(torch.tensor(list(errors.values()))).all()
