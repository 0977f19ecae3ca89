"""(IA)³: a vector l multiplies a layer's output, or its input where the layer is feed-forward.

Its task vector is l − 1, the distance from doing nothing; a module that an adapter lacks is l = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..delta import Delta, Dense
from ..errors import AdapterError, printable
from ..tensors import TensorSource
from .base import PREFIX, Config, Kind, Module, module_of

SUFFIX = ".ia3_l"


class IA3(Kind):
    """Infused adapters (Liu et al., Few-Shot Parameter-Efficient Fine-Tuning, NeurIPS 2022)."""

    name = "ia3"
    writes = "ia3"
    title = "(IA)³"
    peft_type = "IA3"
    has_rank = False

    def layout(self, config: Config, tensors: TensorSource, label: str) -> dict[str, Module]:
        """The vectors; which side they multiply is told by their shape, (k, 1) or (1, k)."""
        vectors = [key for key in tensors.names if key.endswith(SUFFIX)]
        modules = (_module(module_of(key, SUFFIX[1:], label), key, tensors, label) for key in vectors)
        return {module.name: module for module in modules}

    def read(self, module: Module, tensors: TensorSource) -> Dense:
        """l − 1, (k,)."""
        return Dense(tensors.read(module.keys[0]).to(torch.float32).reshape(-1) - 1)

    def keys(self, module: str) -> tuple[str, ...]:
        """The vector's name."""
        return (f"{PREFIX}{module}{SUFFIX}",)

    def pack(self, module: Module, delta: Delta, rank: int) -> dict[str, Tensor]:
        """l = 1 + the task vector, as a column (output) or a row (input)."""
        vector = 1 + delta.dense()
        shape = (1, -1) if module.on_input else (-1, 1)
        return {self.keys(module.name)[0]: vector.reshape(shape)}

    def config(self, modules: Sequence[Module], rank: int) -> dict[str, Any]:
        """The modules by their full paths, and those that are feed-forward."""
        return {
            "target_modules": [module.name for module in modules],
            "feedforward_modules": [module.name for module in modules if module.on_input],
        }


def _module(name: str, key: str, tensors: TensorSource, label: str) -> Module:
    shape = tensors.info(key).shape
    where = f"adapter '{label}', module '{printable(name)}'"
    if len(shape) > 2:
        raise AdapterError(f"{where} is a convolution (ia3_l {list(shape)}), which ties_peft cannot merge yet.")
    if len(shape) != 2 or 1 not in shape or 0 in shape:
        raise AdapterError(
            f"{where}: ia3_l is {list(shape)}; expected [k, 1] or [1, k]. The file is damaged: save the adapter again."
        )
    return Module(name, (max(shape),), 1, (key,), on_input=shape[0] == 1 and shape[1] != 1)
