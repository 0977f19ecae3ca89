"""AdaLoRA: Δ = s·B·diag(E)·A with s = alpha / (init_r + 0.00001); read only.

PEFT divides by the rank at the start of the training, even if the module was pruned since, plus 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...task_vectors.delta import LowRank
from ..base_model import BaseModel
from ..contents import Contents
from ..tensors import TensorSource
from .base import ModuleInfo, PeftType

A, B, E = "lora_A", "lora_B", "lora_E"


class AdaLora(PeftType):
    """LoRA that reallocates its ranks among the layers during training (Zhang et al., AdaLoRA, ICLR 2023)."""

    name = "adalora"
    title = "AdaLoRA"
    config_name = "ADALORA"
    suffixes = (A, B, E)

    def module(self, name: str, parts: Mapping[str, str], contents: Contents) -> ModuleInfo:
        """Return a layer with lora_A (r, in), lora_E (r, 1) and lora_B (out, r)."""
        shapes = contents.shapes(parts)
        rank, width = shapes[A] if len(shapes.get(A, ())) == 2 else (0, 0)
        out = (shapes.get(B) or (0,))[0]
        if shapes != {A: (rank, width), B: (out, rank), E: (rank, 1)}:
            raise contents.damaged(name, shapes, "lora_A [r, in], lora_B [out, r] and lora_E [r, 1]")
        start = contents.number("init_r", "", name, 12)
        alpha = contents.number("lora_alpha", "", name, 8)
        scaling = (alpha if alpha > 0 else float(rank)) / (start + 1e-5)
        kernel = contents.kernel_size((out, width), name)
        keys = (parts[A], parts[B], parts[E])
        return ModuleInfo(name, (out, width), max(1, rank), keys, scaling, kernel_size=kernel)

    def read(self, module: ModuleInfo, tensors: TensorSource, base: BaseModel | None) -> LowRank:
        """Return the factors B·diag(E)·s and A; zeros if every direction was pruned."""
        first, second, values = (tensors.read(key).to(torch.float32) for key in module.keys)
        if not len(first):
            return LowRank(torch.zeros(module.shape[0], 1), torch.zeros(1, module.shape[1]))
        return LowRank(second * (values.reshape(-1) * module.scaling), first)
