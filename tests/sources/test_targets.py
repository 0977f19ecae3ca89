"""Targets: what vLLM and llama.cpp load, by their own rules for names, tensors and settings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cli.run_command import run
from conftest import SHAPES, lora_config, write_adapter
from peft_types.models import mixtral
from safetensors.torch import load_file, save_file
from torch import Tensor

import ties_peft
from ties_peft import Adapter, CompatibilityError, Recipe, RecipeError

Make = Callable[..., Path]
WIDE = {"a.q": (700, 600)}
Q = "base_model.model.layers.0.q"


def vllm_reads(folder: Path) -> dict[str, str]:
    """What each tensor is to vLLM 0.33.0; its loader by the facts of peft_helper.py, lora_model.py and utils.py.

    A setting that it refuses, or a tensor that it knows nothing of, fails.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert not [key for key in ("use_dora", "lora_bias", "layer_replication") if config.get(key)]
    saved = config.get("modules_to_save") or []
    assert set(saved) <= {"classifier", "score"} and config.get("bias", "none") == "none"
    found = {}
    for name in load_file(folder / "adapter_model.safetensors"):
        *path, last, parameter = name.removeprefix("base_model.model.").split(".")
        if last in ("lora_A", "lora_B") and parameter == "weight":
            found[name] = ".".join(path)
        elif parameter in ("lora_embedding_A", "lora_embedding_B"):
            found[name] = ".".join((*path, last))
        else:
            assert last in saved and parameter in ("weight", "bias"), f"{name} is unsupported"
            found[name] = last
    assert len(set(found.values()) & set(saved)) <= 1
    return found


def with_tensors(folder: Path, more: Mapping[str, Tensor]) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **more}, path, metadata={"format": "pt"})
    return folder


# Ranks


def test_vllm_is_told_of_its_ranks(make_lora: Make) -> None:
    four = [make_lora(str(seed), rank=5, seed=seed, shapes=WIDE) for seed in range(4)]
    with pytest.warns(ties_peft.TiesPeftWarning, match="target vllm: rank 20 needs .*--max-lora-rank 32"):
        merged = ties_peft.merge(four, "average", target="vllm")
    assert merged.report.rank == 20 and merged.recipe.target == "vllm"
    assert Recipe.from_yaml(merged.recipe.to_yaml()) == merged.recipe
    assert not [w for w in ties_peft.merge(four, rank=16, target="vllm").report.warnings if "target" in w]


def test_vllm_serves_no_more_than_512(make_lora: Make) -> None:
    one = make_lora("a", rank=530, shapes=WIDE)
    with pytest.warns(ties_peft.TiesPeftWarning, match="target vllm: rank 512 .* 530"):
        assert ties_peft.convert(one, target="vllm").ranks == (512,)
    with pytest.raises(CompatibilityError, match="rank 530 is over 512"):
        ties_peft.convert(one, rank=530, target="vllm")


def test_targets_refuse_what_they_do_not_load(make_ia3: Make, make_lora: Make) -> None:
    for target in ("vllm", "llama.cpp"):
        with pytest.raises(CompatibilityError, match=r"loads only LoRA.*\(IA\)³"):
            ties_peft.convert(make_ia3("a"), target=target)
    with pytest.raises(RecipeError, match="unknown target 'tgi'"):
        ties_peft.convert(make_lora("b"), target="tgi")
    with pytest.warns(ties_peft.TiesPeftWarning, match="name no base model"):
        ties_peft.convert(make_lora("c", base_model_name_or_path=None), target="llama.cpp")


def test_the_report_of_one_converted_adapter_does_not_speak_of_a_merge(make_lora: Make) -> None:
    said = str(ties_peft.convert(make_lora("a")).report)
    assert "converted" in said and "merged" not in said and "average" not in said


# Heads


@pytest.mark.parametrize("head", ["score", "classifier"])
@pytest.mark.parametrize("bias", [False, True])
def test_vllm_takes_a_head_of_one_linear_layer(make_lora: Make, tmp_path: Path, head: str, bias: bool) -> None:
    """Its name in modules_to_save, its tensors under that name; from 0.31 on, and the server has to know its size."""
    whole = {f"base_model.model.{head}.weight": torch.arange(30.0).reshape(3, 10)}
    whole |= {f"base_model.model.{head}.bias": torch.ones(3)} if bias else {}
    folders = [with_tensors(make_lora(name, seed=seed, task_type="SEQ_CLS"), whole) for seed, name in enumerate("ab")]
    with pytest.warns(ties_peft.TiesPeftWarning, match=rf"'{head}' needs vLLM 0.31 .*--max-lora-cls-labels 3"):
        merged = ties_peft.merge(folders, target="vllm")
    read = vllm_reads(merged.save(tmp_path / "out"))
    assert {name for name, module in read.items() if module == head} == set(whole)
    assert merged.config["task_type"] == "SEQ_CLS"
    with pytest.raises(CompatibilityError, match=f"target llama.cpp.*whole layers.*{head}"):
        ties_peft.merge(folders, target="llama.cpp")


@pytest.mark.parametrize(
    ("tensors", "config", "why"),
    [
        ({"classifier.dense.weight": (6, 10), "classifier.out_proj.weight": (3, 6)}, {}, "whole layers.*classifier"),
        ({"qa_outputs.weight": (2, 10)}, {}, "whole layers.*qa_outputs"),
        ({"lm_head.weight": (40, 10)}, {"modules_to_save": ["lm_head"]}, "whole layers.*lm_head"),
        ({"model.score.weight": (3, 10)}, {}, "whole layers.*model.score"),
        ({"score.weight": (3, 10), "classifier.weight": (3, 10)}, {}, "two heads.*classifier, score"),
        ({"norm.weight": (10,)}, {}, "whole layers.*norm"),
        (
            {"embed.token_adapter.trainable_tokens_delta": (2, 10)},
            {"trainable_token_indices": {"embed": [1, 2]}},
            "rows of trained tokens.*embed",
        ),
    ],
    ids=["two layers", "another name", "vocabulary", "inside", "two heads", "a norm", "tokens"],
)
def test_whole_layers_that_vllm_has_no_place_for(
    make_lora: Make, tensors: dict[str, tuple[int, ...]], config: dict[str, Any], why: str
) -> None:
    """PEFT's files of these fail in vLLM 0.33.0 as unsupported weights, or by their number."""
    whole = {f"base_model.model.{name}": torch.ones(shape) for name, shape in tensors.items()}
    folder = with_tensors(make_lora("a", **config), whole)
    with pytest.raises(CompatibilityError, match=f"vLLM 0.33.0 cannot load.*{why}"):
        ties_peft.convert(folder, target="vllm")
    with pytest.raises(AssertionError):
        vllm_reads(folder)


# Experts


def experts(parameters: list[str]) -> peft.LoraConfig:
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=parameters)


def test_vllm_takes_fused_experts_whose_parameters_are_both_adapted(tmp_path: Path) -> None:
    """By its splitting, A (experts, r, in) and B (out, r, experts), they are PEFT's own deltas of each expert."""
    torch.manual_seed(0)
    model = peft.get_peft_model(mixtral(), experts(["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "a")
    with pytest.warns(ties_peft.TiesPeftWarning, match="experts are fused.*--enable-mixed-moe-lora-format"):
        folder = ties_peft.convert(tmp_path / "a", target="vllm").save(tmp_path / "out")
    vllm_reads(folder)
    written, config = (
        load_file(folder / "adapter_model.safetensors"),
        json.loads((folder / "adapter_config.json").read_text()),
    )
    layer = model.base_model.model.model.layers[0].mlp.experts
    for path, wrapper in (("experts", layer), ("experts.base_layer", layer.base_layer)):
        A, B = (written[f"base_model.model.model.layers.0.mlp.{path}.lora_{side}.weight"] for side in "AB")
        split_A, split_B = A.reshape(4, -1, A.shape[1]), B.reshape(B.shape[0], -1, 4).permute(2, 0, 1)
        expected = wrapper.get_delta_weight("default")
        found = config["lora_alpha"] / config["r"] * split_B @ split_A
        torch.testing.assert_close(found, expected if expected.shape == found.shape else expected.transpose(1, 2))
    with pytest.raises(CompatibilityError, match=r"target llama.cpp.*of several parameters"):
        ties_peft.convert(tmp_path / "a", target="llama.cpp")


def test_vllm_does_not_take_one_parameter_of_fused_experts(tmp_path: Path) -> None:
    peft.get_peft_model(mixtral(), experts(["mlp.experts.down_proj"])).save_pretrained(tmp_path / "a")
    with pytest.raises(CompatibilityError, match=r"target vllm.*of several parameters"):
        ties_peft.convert(tmp_path / "a", target="vllm")


# What is known before the work


def test_what_no_target_can_load_is_refused_before_the_work(
    make_lora: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole layers, biases of lora_B, convolutions, experts and repeated layers are known from config, names and shapes."""
    saved = load_file(make_lora("plain") / "adapter_model.safetensors")
    headed = {**saved, "base_model.model.lm_head.weight": torch.ones(2, 10)}
    biased = {
        **saved,
        **{key.replace("weight", "bias"): t[:, 0].clone() for key, t in saved.items() if "lora_B" in key},
    }
    conv = {f"{Q}.lora_A.weight": torch.ones(2, 3, 3), f"{Q}.lora_B.weight": torch.ones(4, 2, 1)}
    experts = {
        "base_model.model.mlp.experts.lora_A.weight": torch.ones(4, 3),
        "base_model.model.mlp.experts.lora_B.weight": torch.ones(5, 4),
    }
    parameters = {"r": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    monkeypatch.setattr(
        sys.modules["ties_peft.merging.convert"], "run_plan", lambda *_: pytest.fail("the work was begun")
    )
    for tensors, more, why in (
        (headed, {}, r"whole layers; leave them out \(--heads drop, heads='drop'\): lm_head"),
        (biased, {"lora_bias": True}, "biases of lora_B: layers.0.q.bias"),
        (conv, {}, "no linear layers: layers.0.q"),
        (experts, parameters, r"of several parameters.*mlp.experts.down_proj\[0\]"),
        (saved, {"layer_replication": [[0, 1], [0, 1]]}, "needs layer_replication"),
    ):
        odd = write_adapter(tmp_path / "odd", lora_config(SHAPES, 4, 8, **more), tensors)
        for target in ("vllm", "llama.cpp"):
            with pytest.raises(CompatibilityError, match=f"target {target}.*{why}"):
                ties_peft.convert(odd, target=target)


def test_convert_leaves_whole_layers_out_where_it_is_told(make_lora: Make, tmp_path: Path) -> None:
    folder = with_tensors(make_lora("a"), {"base_model.model.score.weight": torch.ones(2, 10)})
    assert run("convert", folder, "--target", "llama.cpp", "--out", tmp_path / "out").code == 2
    done = run("convert", folder, "--target", "llama.cpp", "--heads", "drop", "--out", tmp_path / "out")
    assert done.code == 0 and "score: left out" in done.err
    assert Adapter.load(tmp_path / "out").extra_keys == ()
    assert Adapter.load(folder).extra_keys == ("base_model.model.score.weight",)
