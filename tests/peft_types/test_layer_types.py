"""LoRA and DoRA on every form of layer at once, and experts in two forms, against PEFT."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import lora_config, lora_tensors, write_adapter
from peft_types.matrix import randomised
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ties_peft
from ties_peft import CompatibilityError

pytestmark = pytest.mark.filterwarnings("ignore")
FORMS = ["line", "plane", "room", "words", "linear", "few", "square"]


class Forms(nn.Module):
    """Convolutions over one, two and three dimensions, an embedding, attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.plane, self.room = nn.Conv1d(3, 6, 3), nn.Conv2d(2, 4, (1, 3)), nn.Conv3d(2, 4, (2, 3, 1))
        self.words, self.linear = nn.Embedding(10, 5), nn.Linear(5, 4)
        self.few, self.square = nn.Embedding(5, 5), nn.Linear(5, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self) -> Tensor:
        draw = torch.Generator().manual_seed(3)
        line, plane, room, values = (
            torch.randn(2, *sizes, generator=draw) for sizes in ((3, 7), (2, 4, 5), (2, 4, 5, 3), (3, 8))
        )
        tokens = torch.tensor([[1, 2], [3, 4]])
        words = self.linear(self.square(self.words(tokens)) + self.few(tokens))
        attended = self.attention(values, values, values)[0]
        found = (self.line(line), self.plane(plane), self.room(room), words, attended)
        return torch.cat([part.flatten() for part in found])


@pytest.fixture
def base(tmp_path: Path) -> Forms:
    torch.manual_seed(0)
    model = Forms().eval()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "base.safetensors")
    return model


def adapted(base: Forms, folder: Path, **settings: Any) -> tuple[Path, Tensor]:
    """(an adapter that PEFT makes, what it computes)."""
    model = randomised(peft.get_peft_model(deepcopy(base), peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **settings})))
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, model().detach()


@pytest.mark.parametrize(
    ("targets", "dora"), [([*FORMS, "attention"], False), (FORMS, True)], ids=["LoRA", "DoRA"]
)  # PEFT has no DoRA on attention
def test_one_adapter_on_every_form_of_layer_comes_back(
    base: Forms, tmp_path: Path, targets: list[str], dora: bool
) -> None:
    folder, wanted = adapted(base, tmp_path / "a", target_modules=targets, use_dora=dora)
    needed = {"base": tmp_path / "base.safetensors"} if dora else {}
    ties_peft.merge([folder], density=1, rank="max", **needed).save(tmp_path / "out")
    found = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "out").eval()()
    assert (wanted - base()).abs().max() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_sums_on_every_form_of_layer_are_those_of_what_peft_merges(base: Forms, tmp_path: Path) -> None:
    """w₁Δ₁ + w₂Δ₂ of a LoRA and a DoRA of other ranks, against W′ − W by PEFT's merge_and_unload in float64."""
    weights = [0.7, -1.2]
    folders = [
        adapted(base, tmp_path / "a", target_modules=FORMS, r=3)[0],
        adapted(base, tmp_path / "b", target_modules=FORMS, use_dora=True)[0],
    ]
    plain = {name: weight.double() for name, weight in base.state_dict().items()}
    wanted = deepcopy(plain)
    for folder, weight in zip(folders, weights, strict=True):
        model = peft.PeftModel.from_pretrained(deepcopy(base).double(), folder, autocast_adapter_dtype=False).double()
        for name, moved in model.merge_and_unload().state_dict().items():
            wanted[name] += weight * (moved - plain[name])
    asked = {"weights": weights, "scale": 1, "rank": "max", "base": tmp_path / "base.safetensors"}
    ties_peft.merge(folders, "task_arithmetic", **asked).save(tmp_path / "out")
    found = peft.PeftModel.from_pretrained(deepcopy(base).double(), tmp_path / "out").double().merge_and_unload()
    for name, weight in found.state_dict().items():
        torch.testing.assert_close(weight, wanted[name], atol=1e-5, rtol=1e-5)


def test_experts_apart_and_fused_are_not_merged_side_by_side(tmp_path: Path) -> None:
    """The names of transformers 4 and 5 for one Mixtral: side by side, neither would be added to the other."""
    shared = "model.layers.0.self_attn.q_proj"
    shapes = {shared: (8, 8), "model.layers.0.block_sparse_moe.experts.1.w1": (12, 8)}
    old = write_adapter(tmp_path / "old", lora_config(shapes, 2, 4), lora_tensors(shapes, 2, 0))
    fused = lora_tensors({shared: (8, 8)}, 2, 1)
    fused["base_model.model.model.layers.0.mlp.experts.lora_A.weight"] = torch.ones(4, 8)
    fused["base_model.model.model.layers.0.mlp.experts.lora_B.weight"] = torch.ones(24, 4)
    parameters = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
    new = write_adapter(tmp_path / "new", lora_config({}, 2, 4) | parameters, fused)
    with pytest.raises(
        CompatibilityError, match=r"one fused parameter.*\n  old: '.*experts.1.w1'\n  new: '.*gate_up_proj\[0\]'"
    ):
        ties_peft.merge([old, new])
    for alone in (old, new):
        assert ties_peft.merge([alone, alone]).modules


def test_an_adapter_of_old_names_alone_keeps_them(tmp_path: Path) -> None:
    shapes = {f"model.layers.0.block_sparse_moe.experts.{i}.w{j}": (12, 8) for i in range(2) for j in (1, 3)}
    old = [write_adapter(tmp_path / str(i), lora_config(shapes, 2, 4), lora_tensors(shapes, 2, i)) for i in range(2)]
    ties_peft.merge(old).save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(shapes)
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 2 * len(shapes)
