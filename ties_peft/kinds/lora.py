"""LoRA: Δ = s·B·A on linear layers, s = alpha/r or, with rsLoRA, alpha/√r.

The rank is read from the tensors, alpha from the config by PEFT's own matching rule. On GPT-2's
Conv1D (`fan_in_fan_out`) A and B are oriented as on a Linear, and so is Δ here: (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..delta import Delta, LowRank
from ..errors import AdapterError, printable
from ..patterns import matches_end
from ..tensors import TensorSource
from .base import PREFIX, Config, Kind, Module, module_of, refuse_settings

A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"

REFUSED_SETTINGS = {
    "use_dora": "DoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "lora_bias": "a bias on lora_B",
    "target_parameters": "adapted parameters (mixture of experts)",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "an Arrow router",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron layers",
}
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # initialisations that alter the base's weights


class Lora(Kind):
    """Low-rank adapters (Hu et al., LoRA, ICLR 2022; Kalajdzievski, rsLoRA, 2023)."""

    name = "lora"
    writes = "lora"
    title = "LoRA"
    peft_type = "LORA"
    has_rank = True

    def layout(self, config: Config, tensors: TensorSource, label: str) -> dict[str, Module]:
        """Pairs of lora_A and lora_B, their shapes checked."""
        refuse_settings(config, REFUSED_SETTINGS, label)
        _refuse_changed_base(config, label)
        pairs: dict[str, dict[str, str]] = {}
        for key in tensors.names:
            suffix = next((s for s in (A_SUFFIX, B_SUFFIX) if key.endswith(s)), None)
            if suffix is not None:
                pairs.setdefault(module_of(key, suffix[1:], label), {})[suffix] = key
        return {name: _module(name, pair, config, tensors, label) for name, pair in sorted(pairs.items())}

    def read(self, module: Module, tensors: TensorSource) -> LowRank:
        """B (with the lora scaling) and A."""
        A, B = (tensors.read(key).to(torch.float32) for key in module.keys)
        return LowRank(B * module.scaling, A, module.scaling)

    def keys(self, module: str) -> tuple[str, ...]:
        """A's name, then B's."""
        return f"{PREFIX}{module}{A_SUFFIX}", f"{PREFIX}{module}{B_SUFFIX}"

    def pack(self, module: Module, delta: Delta, rank: int) -> dict[str, Tensor]:
        """A and B padded with zeros to `rank`, for a lora scaling of 1."""
        if not isinstance(delta, LowRank):
            raise TypeError(f"a LoRA is written from factors, not from {type(delta).__name__}")
        A = torch.zeros(rank, delta.shape[1])
        B = torch.zeros(delta.shape[0], rank)
        A[: delta.rank], B[:, : delta.rank] = delta.A, delta.B
        return dict(zip(self.keys(module.name), (A, B), strict=True))

    def config(self, modules: Sequence[Module], rank: int) -> dict[str, Any]:
        """One rank, alpha = r, no patterns, the modules by their full paths."""
        return {
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [module.name for module in modules],
        }


def lora_scaling(config: Config, name: str, rank: int) -> float:
    """s of one module: alpha by PEFT's matching rule over alpha_pattern, r from the tensors.

    PEFT takes the first pattern, in the order of the file, that matches the end of the module's
    path at a dot: `re.match(rf"(.*\\.)?({key})$", path)`.
    """
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if matches_end(pattern, name):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module(name: str, pair: dict[str, str], config: Config, tensors: TensorSource, label: str) -> Module:
    where = f"adapter '{label}', module '{printable(name)}'"
    if len(pair) < 2:
        found, missing = ("lora_A", "lora_B") if A_SUFFIX in pair else ("lora_B", "lora_A")
        raise AdapterError(f"{where}: there is a {found} but no {missing}. Save the adapter again, whole.")
    shape_a, shape_b = (tensors.info(pair[s]).shape for s in (A_SUFFIX, B_SUFFIX))
    if len(shape_a) > 2 or len(shape_b) > 2:
        raise AdapterError(f"{where} is a convolution (lora_A {list(shape_a)}), which ties_peft cannot merge yet.")
    if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1] or 0 in shape_a + shape_b:
        raise AdapterError(
            f"{where}: lora_A is {list(shape_a)} and lora_B is {list(shape_b)}; expected [r, in] and [out, r] "
            "with the same r, at least 1. The file is damaged: save the adapter again."
        )
    try:
        scaling = lora_scaling(config, name, shape_a[0])
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise AdapterError(
            f"{where}: its lora scaling cannot be read from lora_alpha={config.get('lora_alpha')!r}, "
            f"alpha_pattern={printable(repr(config.get('alpha_pattern')))} ({error}). Mend adapter_config.json."
        ) from None
    if not math.isfinite(scaling):
        raise AdapterError(f"{where}: lora_alpha is {config.get('lora_alpha')!r}; expected a finite number.")
    return Module(name, (shape_b[0], shape_a[1]), shape_a[0], (pair[A_SUFFIX], pair[B_SUFFIX]), scaling)


def _refuse_changed_base(config: Config, label: str) -> None:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise AdapterError(
            f"adapter '{label}' was initialised with '{printable(start)}', which changes the base's weights, so its "
            "tensors are not a delta to the plain base. Convert it with PEFT first: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
