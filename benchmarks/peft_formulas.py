"""Merge A's and B's separately by PEFT's own functions, also for adapters of different ranks.

`add_weighted_adapter` refuses different ranks for `linear` and `ties`; here smaller factors are padded with zeros first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import ties_peft
from ties_peft.task_vectors.delta import LowRank

COMBINATIONS = ("peft_linear", "peft_ties")
DENSITY = 0.2


def merge_as_peft(paths: Sequence[Path], combination: str) -> ties_peft.Adapter:
    """Merge as PEFT merges adapters of one rank: `linear` with weights 1/N, `ties` with weights 1 and density 0.2."""
    adapters = [ties_peft.Adapter.load(path) for path in paths]
    rank = max(rank for adapter in adapters for rank in adapter.ranks)
    tensors: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.modules):
        deltas = [adapter.read(name) for adapter in adapters if name in adapter.modules]
        weight = 1 / len(adapters) if combination == "peft_linear" else 1.0
        A, B = combine([delta for delta in deltas if isinstance(delta, LowRank)], rank, weight, combination)
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    modules = sorted({key.split(".")[-3] for key in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    return ties_peft.Adapter.from_tensors(config, tensors)


def combine(deltas: Sequence[LowRank], rank: int, weight: float, combination: str) -> tuple[Tensor, Tensor]:
    """Return the merged A and B of one module."""
    from peft.utils.merge_utils import task_arithmetic, ties

    weights = torch.tensor([math.sqrt(weight * delta.scaling) for delta in deltas])
    padded_A = [padded(delta.A, rank) for delta in deltas]
    padded_B = [padded((delta.B / delta.scaling).T, rank).T.contiguous() for delta in deltas]
    if combination == "peft_linear":
        return task_arithmetic(padded_A, weights), task_arithmetic(padded_B, weights)
    return ties(padded_A, weights, DENSITY), ties(padded_B, weights, DENSITY)


def padded(factor: Tensor, rank: int) -> Tensor:
    """Return a factor (r, n) padded with rows of zeros to (rank, n)."""
    return torch.cat([factor, factor.new_zeros(rank - len(factor), factor.shape[1])])
