"""Files as old releases of PEFT wrote them, made by hand from the keys that each release knew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PREFIX

import ties_peft

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
COMMON = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "inference_mode": True}
V0_3 = {
    **COMMON,
    "r": 4,
    "lora_alpha": 6,
    "lora_dropout": 0.05,
    "bias": "none",
    "fan_in_fan_out": False,
    "target_modules": ["q_proj", "v_proj"],
    "merge_weights": False,
    "enable_lora": None,
    "modules_to_save": None,
}
V0_6 = {k: v for k, v in V0_3.items() if k not in ("merge_weights", "enable_lora")} | {
    "auto_mapping": None,
    "revision": None,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {"v_proj": 2},
}
V0_9 = V0_6 | {"use_rslora": True, "loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"}
V0_12 = V0_9 | {"use_dora": False, "layer_replication": None}
V0_15 = V0_12 | {"exclude_modules": None, "lora_bias": False, "eva_config": None, "corda_config": None}
V0_15 |= {"trainable_token_indices": None}
BARE = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
RELEASES = {"0.3": V0_3, "0.6": V0_6, "0.9": V0_9, "0.12": V0_12, "0.15": V0_15, "four keys": BARE}


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"lora_A": (4, 10), "lora_B": (12, 4)}
    return {
        f"{PREFIX}{layer}.{part}.weight": torch.randn(*shape, generator=draw)
        for layer in LAYERS
        for part, shape in shapes.items()
    }


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
def test_it_is_read_right(release: str, tmp_path: Path) -> None:
    config: dict[str, Any] = RELEASES[release]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors(), tmp_path / "adapter_model.bin")
    merged = ties_peft.merge([tmp_path], density=1)
    for layer in LAYERS:
        A, B = (tensors()[f"{PREFIX}{layer}.{part}.weight"].double() for part in ("lora_A", "lora_B"))
        alpha = 2 if config.get("alpha_pattern") and layer.endswith("v_proj") else 6
        wanted = alpha / (2.0 if config.get("use_rslora") else 4.0) * B @ A
        torch.testing.assert_close(ties_peft.Adapter.load(tmp_path).delta(layer).double(), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged.delta(layer).double(), wanted, atol=1e-5, rtol=1e-5)
    assert not {"merge_weights", "enable_lora", "peft_version", "auto_mapping"} & set(merged.config)


def test_the_fused_layers_before_0_3_are_refused_by_name(tmp_path: Path) -> None:
    config = V0_3 | {"enable_lora": [True, False, True], "fan_in_fan_out": True, "target_modules": ["c_attn"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name = f"{PREFIX}h.0.attn.c_attn"
    fused = {f"{name}.lora_A.weight": torch.zeros(8, 10), f"{name}.lora_B.weight": torch.zeros(20, 4, 1)}
    torch.save(fused, tmp_path / "adapter_model.bin")
    with pytest.raises(ties_peft.AdapterError, match="enable_lora"):
        ties_peft.Adapter.load(tmp_path)


@pytest.mark.parametrize(
    "peft_type", ["PROMPT_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "XLORA", "LN_TUNING", "POLY"]
)
def test_a_type_without_a_task_vector_is_refused_by_name(peft_type: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": peft_type}))
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ties_peft.AdapterError, match=f"type '{peft_type}', (which|whose) .*Leave it out"):
        ties_peft.Adapter.load(tmp_path)


@pytest.mark.parametrize("replicated", [[[0, 2], [1, 2]], None])
def test_replicated_layers_are_kept_where_they_agree(replicated: Any, tmp_path: Path) -> None:
    for name, own in (("a", [[0, 2], [1, 2]]), ("b", replicated)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(BARE | {"layer_replication": own}))
        torch.save(tensors(), tmp_path / name / "adapter_model.bin")
    both = [tmp_path / "a", tmp_path / "b"]
    if replicated is None:
        with pytest.raises(ties_peft.CompatibilityError, match="layer_replication"):
            ties_peft.merge(both)
    else:
        assert ties_peft.merge(both, "average").config["layer_replication"] == replicated
