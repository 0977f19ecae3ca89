"""Helpers that every test may use: adapters made by hand, in a folder or in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file

PREFIX = "base_model.model."
OLDER_PEFT = Version(version("peft")) < Version("0.21")  # than the one whose types and merges the tests know
SAMPLES = Path(__file__).parent.parent / "adapters"
Shapes = Mapping[str, tuple[int, int]]
SHAPES: Shapes = {"layers.0.q": (12, 10), "layers.0.up": (20, 12), "layers.1.q": (12, 10)}


def lora_tensors(
    shapes: Shapes, rank: int, seed: int, gain: float = 1.0, rank_pattern: Mapping[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """Random A and B for every module, of the rank that PEFT would give it."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        patterns = (rank_pattern or {}).items()
        r = next((value for pattern, value in patterns if re.match(rf"(.*\.)?({pattern})$", name)), rank)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(r, columns, generator=draw)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = gain * torch.randn(rows, r, generator=draw)
    return tensors


def lora_config(shapes: Shapes, rank: int, alpha: float, **extra: Any) -> dict[str, Any]:
    """What PEFT needs to know of a LoRA."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in shapes}),
        "task_type": "FEATURE_EXTRACTION",
        **extra,
    }


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """An adapter's folder as PEFT writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def make_lora(tmp_path: Path) -> Callable[..., Path]:
    """make_lora(name, rank=4, alpha=8, seed=…, shapes=SHAPES, gain=1, **config) → an adapter's folder."""

    def make(
        name: str,
        rank: int = 4,
        alpha: float = 8,
        seed: int = 0,
        shapes: Shapes = SHAPES,
        gain: float = 1.0,
        dtype: torch.dtype = torch.float32,
        **extra: Any,
    ) -> Path:
        tensors = lora_tensors(shapes, rank, seed, gain, extra.get("rank_pattern"))
        config = lora_config(shapes, rank, alpha, **extra)
        return write_adapter(tmp_path / name, config, {key: t.to(dtype) for key, t in tensors.items()})

    return make


@pytest.fixture
def make_ia3(tmp_path: Path) -> Callable[..., Path]:
    """make_ia3(name, seed=…, vectors={module: (k, on_input)}, **config) → an adapter's folder."""

    def make(
        name: str,
        seed: int = 0,
        vectors: Mapping[str, tuple[int, bool]] | None = None,
        dtype: torch.dtype = torch.float32,
        **extra: Any,
    ) -> Path:
        vectors = vectors or {"layers.0.k": (12, False), "layers.0.down": (20, True), "layers.1.k": (12, False)}
        draw = torch.Generator().manual_seed(seed)
        tensors = {}
        for module, (length, on_input) in vectors.items():
            vector = 1 + torch.randn(length, generator=draw) / 4
            tensors[f"{PREFIX}{module}.ia3_l"] = vector.reshape((1, -1) if on_input else (-1, 1)).to(dtype)
        config = {
            "peft_type": "IA3",
            "base_model_name_or_path": "org/base",
            "target_modules": sorted(vectors),
            "feedforward_modules": sorted(m for m, (_, on_input) in vectors.items() if on_input),
            **extra,
        }
        return write_adapter(tmp_path / name, config, tensors)

    return make
