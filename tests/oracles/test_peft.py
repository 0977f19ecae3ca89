"""Reading and merging against PEFT itself, on the same adapters in a small model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import OLDER_PEFT
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import ties_peft

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
NAMES = ("first", "second", "third")  # PEFT 0.13 saves an adapter "y" with all tensors whose names hold that letter
FULL: dict[str, Any] = {"svd_rank": 20, "svd_full_matrices": False}  # the largest side: nothing is lost


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.up = nn.Linear(10, 12), nn.Linear(12, 20)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.q = nn.Linear(10, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(30, 10), Conv1D(10, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.c_attn(x))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "lora_alpha": 12, "use_rslora": True},
    "rank pattern": {"r": 4, "lora_alpha": 12, "rank_pattern": {"layers.1.q": 8, "up": 2}},
    "alpha pattern": {"r": 4, "lora_alpha": 12, "alpha_pattern": {"yers.0.q": 99, r"\d.q": 3, "q": 5}},
    "anchored pattern": {"r": 4, "lora_alpha": 12, "alpha_pattern": {"^q": 7, r"layers\.[01]\.up": 3}},
    "both, rslora": {"r": 4, "rank_pattern": {"up": 9}, "alpha_pattern": {"up": 3}, "use_rslora": True},
    "one layer": {"r": 4, "lora_alpha": 12, "layers_to_transform": [1], "layers_pattern": "layers"},
}


def adapted(model: nn.Module, configs: dict[str, LoraConfig]) -> PeftModel:
    """The model with random, non-zero adapters of these names."""
    torch.manual_seed(0)
    first, *others = configs
    peft_model = get_peft_model(model, configs[first], adapter_name=first)
    for name in others:
        peft_model.add_adapter(name, configs[name])
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return peft_model


def peft_deltas(model: PeftModel, name: str) -> dict[str, Tensor]:
    """What PEFT itself says that an adapter adds to each module, (out, in)."""
    layers = {path: m for path, m in model.base_model.model.named_modules() if name in getattr(m, "lora_A", {})}
    deltas = {path: layer.get_delta_weight(name).detach() for path, layer in layers.items()}
    return {path: delta.T if layers[path].fan_in_fan_out else delta for path, delta in deltas.items()}


def assert_equal(ours: ties_peft.Adapter, theirs: dict[str, Tensor], within: float = 1e-4) -> None:
    assert list(ours.modules) == sorted(theirs)
    for module, delta in theirs.items():
        assert torch.dist(ours.delta(module), delta) <= within * delta.norm(), module


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_adapter_reads_as_peft_reads_it(setting: str, tmp_path: Path) -> None:
    model = adapted(Tiny(), {NAMES[0]: LoraConfig(target_modules=["q", "up"], **SETTINGS[setting])})
    model.save_pretrained(tmp_path)
    assert_equal(ties_peft.Adapter.load(tmp_path / NAMES[0]), peft_deltas(model, NAMES[0]), within=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_conv1d_reads_as_peft_reads_it(rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["c_attn", "c_proj"], r=4, use_rslora=rslora, fan_in_fan_out=True)
    model = adapted(Transposed(), {NAMES[0]: config})
    model.save_pretrained(tmp_path)
    assert_equal(ties_peft.Adapter.load(tmp_path / NAMES[0]), peft_deltas(model, NAMES[0]), within=1e-6)


@pytest.fixture
def mixed(tmp_path: Path) -> PeftModel:
    """Three adapters of unlike ranks and lora scalings, saved under `tmp_path` by name."""
    configs = {
        NAMES[0]: LoraConfig(target_modules=["q", "up"], r=4, lora_alpha=8),
        NAMES[1]: LoraConfig(target_modules=["q"], r=8, lora_alpha=4),
        NAMES[2]: LoraConfig(target_modules=["q", "up"], r=2, lora_alpha=2, use_rslora=True),
    }
    model = adapted(Tiny(), configs)
    model.save_pretrained(tmp_path)
    return model


def ours(folder: Path, method: str, **asked: Any) -> ties_peft.Merged:
    return ties_peft.merge([folder / name for name in NAMES], method, rank="max", **asked)


def skip_if_the_scaling_counts_twice() -> None:
    """Earlier releases of PEFT multiply the weights of their svd combinations by the lora scaling once more."""
    if OLDER_PEFT:
        pytest.skip("this release of PEFT counts the lora scaling twice")


def theirs(model: PeftModel, combination: str, weights: Sequence[float], **asked: Any) -> dict[str, Tensor]:
    model.add_weighted_adapter(list(NAMES), weights, "merged", combination_type=combination, **asked)
    return peft_deltas(model, "merged")


@pytest.mark.parametrize("elect, majority", [("mass", "total"), ("count", "frequency")])
@pytest.mark.parametrize("density", [0.2, 0.5, 0.9])
def test_ties_svd(mixed: PeftModel, tmp_path: Path, density: float, elect: str, majority: str) -> None:
    skip_if_the_scaling_counts_twice()
    expected = theirs(mixed, "ties_svd", [1, 1, 1], density=density, majority_sign_method=majority, **FULL)
    assert_equal(ours(tmp_path, "ties", scope="module", density=density, elect=elect), expected)


@pytest.mark.parametrize("combination, asked", [("cat", {}), ("svd", FULL)])
def test_exact_sums(mixed: PeftModel, tmp_path: Path, combination: str, asked: dict[str, Any]) -> None:
    if combination == "svd":
        skip_if_the_scaling_counts_twice()
    weights = [1.0, 0.5, -2.0]
    expected = theirs(mixed, combination, weights, **asked)
    assert_equal(ours(tmp_path, "task_arithmetic", scale=1.0, weights=weights), expected)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_plain_ties_is_space_factors(tmp_path: Path, density: float) -> None:
    model = adapted(Tiny(), {name: LoraConfig(target_modules=["q", "up"], r=5, lora_alpha=15) for name in NAMES})
    model.save_pretrained(tmp_path)
    expected = theirs(model, "ties", [1, 1, 1], density=density)
    assert_equal(ours(tmp_path, "ties", space="factors", density=density), expected)


@pytest.mark.parametrize(
    ("alphas", "weights"),
    [((15, 15, 15), (1.0, 2.0, 0.5)), ((15, 5, 30), (1.0, 1.0, 1.0))],
    ids=["weights", "scalings"],
)
def test_plain_ties_is_no_space_factors_for_unequal_scalings_or_weights(
    tmp_path: Path, alphas: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    configs = {
        name: LoraConfig(target_modules=["q", "up"], r=5, lora_alpha=alpha)
        for name, alpha in zip(NAMES, alphas, strict=True)
    }
    model = adapted(Tiny(), configs)
    model.save_pretrained(tmp_path)
    expected = theirs(model, "ties", weights, density=0.5)
    merged = ours(tmp_path, "ties", space="factors", density=0.5, weights=weights)
    assert max(float(torch.dist(merged.delta(n), d) / d.norm()) for n, d in expected.items()) > 0.05
