"""(IA)³: a vector l multiplies a layer's output, or the input of a feed-forward layer.

Its task vector is l − 1, the difference from the identity; an adapter without the module has l = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...task_vectors.delta import Delta, Dense
from ..base_model import BaseModel
from ..config_values import matches_whole
from ..contents import PREFIX, Contents
from ..tensors import TensorSource
from .base import LINEAR, ModuleInfo, WritablePeftType

SUFFIX = "ia3_l"


class IA3(WritablePeftType):
    """Infused adapters (Liu et al., Few-Shot Parameter-Efficient Fine-Tuning, NeurIPS 2022)."""

    name = "ia3"
    output_name = "ia3"
    title = "(IA)³"
    config_name = "IA3"
    suffixes = (SUFFIX,)
    has_rank = False

    def module(self, name: str, parts: Mapping[str, str], contents: Contents) -> ModuleInfo:
        """Return a layer with its vector.

        The shape tells whether a vector multiplies the output, (k, 1), or the input, (1, k). On a convolution it is (1, k, 1…)
        for both, and feedforward_modules of the config decides.
        """
        keys = (parts[SUFFIX],)
        shape = contents.tensors.info(parts[SUFFIX]).shape
        feedforward = _feedforward(contents.config, name)
        wide = len(shape) > 2 and shape[0] == 1 and set(shape[2:]) == {1}
        if not (wide or len(shape) == 2) or 1 not in shape or 0 in shape:
            raise contents.damaged(name, {SUFFIX: shape}, "[k, 1] or [1, k], or [1, k, 1, 1] on a convolution")
        if wide:
            return ModuleInfo(name, (shape[1],), 1, keys, 1.0, feedforward, LINEAR, kernel_size=shape[2:])
        return ModuleInfo(name, (max(shape),), 1, keys, 1.0, feedforward if shape == (1, 1) else shape[0] == 1)

    def read(self, module: ModuleInfo, tensors: TensorSource, base: BaseModel | None) -> Dense:
        """Return l − 1, (k,)."""
        return Dense(tensors.read(module.keys[0]).to(torch.float32).reshape(-1) - 1)

    def written(self, module: ModuleInfo, rank: int) -> ModuleInfo:
        """Return the module with its new key."""
        return replace(module, keys=(f"{PREFIX}{module.name}.{SUFFIX}",))

    def pack(self, module: ModuleInfo, delta: Delta, rank: int) -> dict[str, Tensor]:
        """Return l = 1 + the task vector: a column for the output, a row for the input or a convolution's channels."""
        vector = 1 + delta.dense()
        row = module.on_input or module.kernel_size
        shape = (1, -1, *module.kernel_size) if row else (-1, 1)
        return {f"{PREFIX}{module.name}.{SUFFIX}": vector.reshape(shape)}

    def config(self, modules: Sequence[ModuleInfo], rank: int) -> dict[str, Any]:
        """Return the full paths of the modules, and those that are feed-forward."""
        return {
            "target_modules": [module.name for module in modules],
            "feedforward_modules": [module.name for module in modules if module.on_input],
        }


def _feedforward(config: Mapping[str, Any], name: str) -> bool:
    """Return whether a layer is feed-forward by PEFT's rule: a regex for the whole path, or a list of endings of any length."""
    chosen = config.get("feedforward_modules")
    try:
        if isinstance(chosen, str):
            return matches_whole(chosen, name)
        return isinstance(chosen, (list, tuple)) and any(name.endswith(str(end)) for end in chosen)
    except ValueError:
        return False
