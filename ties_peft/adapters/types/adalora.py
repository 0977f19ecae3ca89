"""AdaLoRA: Δ = s·B·diag(E)·A with s = alpha / (init_r + 0.00001); read only.

PEFT divides by the rank at the start of the training, even if the module was pruned since, plus 1e-5.
"""

from __future__ import annotations

import torch

from ...errors import AdapterError
from ...task_vectors.delta import LowRank
from ..base_model import BaseModel
from ..tensors import TensorSource
from .base import CONV, LINEAR, Config, ModuleInfo, PeftType, config_number, conv_kernel_size, group_by_layer

A, B, E = "lora_A", "lora_B", "lora_E"


class AdaLora(PeftType):
    """LoRA that reallocates its ranks among the layers during training (Zhang et al., AdaLoRA, ICLR 2023)."""

    name = "adalora"
    title = "AdaLoRA"
    config_name = "ADALORA"

    def layout(
        self, config: Config, tensors: TensorSource, label: str, base: BaseModel | None
    ) -> dict[str, ModuleInfo]:
        """Return the layers with lora_A (r, in), lora_E (r, 1) and lora_B (out, r)."""
        layers = group_by_layer(tensors, (A, B, E), label)
        return {name: _module(name, parts, config, tensors, label, base) for name, parts in layers.items()}

    def read(self, module: ModuleInfo, tensors: TensorSource, base: BaseModel | None) -> LowRank:
        """Return the factors B·diag(E)·s and A; zeros if every direction was pruned."""
        first, second, values = (tensors.read(key).to(torch.float32) for key in module.keys)
        if not len(first):
            return LowRank(torch.zeros(module.shape[0], 1), torch.zeros(1, module.shape[1]))
        return LowRank(second * (values.reshape(-1) * module.scaling), first)


def _module(
    name: str, parts: dict[str, str], config: Config, tensors: TensorSource, label: str, base: BaseModel | None
) -> ModuleInfo:
    where = f"adapter '{label}', module {name!r}"
    shapes = {end: tensors.info(key).shape for end, key in parts.items()}
    rank = shapes[A][0] if len(shapes.get(A, ())) == 2 else 0
    if len(parts) < 3 or len(shapes[B]) != 2 or shapes[B][1] != rank or shapes[E] != (rank, 1) or len(shapes[A]) != 2:
        seen = ", ".join(f"{end} {list(shape)}" for end, shape in sorted(shapes.items()))
        raise AdapterError(
            f"{where}: there is {seen}; expected lora_A [r, in], lora_B [out, r] and lora_E [r, 1]. "
            "The file is damaged: save the adapter again."
        )
    start = config_number(config, "init_r", "", name, 12, where)
    alpha = config_number(config, "lora_alpha", "", name, 8, where)
    scaling = (alpha if alpha > 0 else float(rank)) / (start + 1e-5)
    shape = shapes[B][0], shapes[A][1]
    kernel = conv_kernel_size(shape, name, where, base)
    form = CONV if kernel else LINEAR
    return ModuleInfo(
        name, shape, max(1, rank), (parts[A], parts[B], parts[E]), scaling, layer_type=form, kernel_size=kernel
    )
