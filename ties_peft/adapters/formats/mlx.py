"""MLX-LM: transposed factors, and a config of its own.

    model.layers.0.….lora_a, (in, r), and lora_b, (r, out); m beside them in a DoRA

A = lora_aᵀ and B = lora_bᵀ. The config gives the lora scaling: scale, or scale·alpha/rank in old files.
Source: mlx_lm/tuner/lora.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import AdapterError
from ..sources import ADAPTER_CONFIG
from .base import Format

CONFIG_KEYS = frozenset({"lora_parameters", "fine_tune_type", "lora_layers"})
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embedding")


class Mlx(Format):
    """The format of mlx_lm.lora: adapters.safetensors and its adapter_config.json."""

    pattern = re.compile(r"(?P<module>.+)\.(?P<side>lora_a|lora_b)")
    name = "MLX"
    title = "an adapter of MLX-LM"
    order = 30
    transposed = True

    def variant(self, rest: Sequence[str], config: Mapping[str, Any]) -> str:
        """Return DoRA if the config says so or there are magnitudes."""
        dora = config.get("fine_tune_type") == "dora" or any(name.endswith(".m") for name in rest)
        return "DoRA" if dora else ""

    def advice(self, command: str, has_config: bool) -> str:
        """Return how to convert the file; without its config the scale is not known."""
        if has_config:
            return super().advice(command, has_config)
        return (
            f"not a PEFT adapter, and there is no {ADAPTER_CONFIG} beside it that gives its scale. "
            f"Put MLX-LM's there, or give the alpha (scale × rank): `{command} --alpha NUMBER`."
        )

    def config_fault(self, config: Mapping[str, Any], command: str) -> str | None:
        """Return why a folder with MLX-LM's config holds no adapter."""
        if config.get("fine_tune_type") == "full":
            return (
                "was trained in full by MLX-LM (fine_tune_type is 'full'): its files hold whole weights and no adapter. "
                "Leave it out."
            )
        if not CONFIG_KEYS & config.keys():
            return None
        return (
            f"has the {ADAPTER_CONFIG} of MLX-LM, not of PEFT, and there are no adapters.safetensors beside it. "
            f"With them, `{command}` turns it into a PEFT adapter."
        )

    def factors_fault(self, A: Sequence[int], B: Sequence[int], module: str) -> str | None:
        """Return why experts and embeddings cannot be converted."""
        if len(A) != 2 or len(B) != 2:
            return f"belongs to experts ({list(A)}), which cannot be converted exactly. Leave it out."
        if module.rsplit(".", 1)[-1] in EMBEDDINGS:
            return "is an embedding, which cannot be converted. Train the adapter without it."
        return None

    def config_scale(self, config: Mapping[str, Any], label: str) -> float | None:
        """Return the lora scaling of MLX-LM's config."""
        given, fine_tune_type = config.get("lora_parameters"), config.get("fine_tune_type", "lora")
        if fine_tune_type != "lora":
            raise AdapterError(
                f"adapter '{label}': fine_tune_type is {fine_tune_type!r}; only lora can be converted. Leave it out."
            )
        try:
            scale = float(given["scale"])  # type: ignore[index]
            if "alpha" in given:  # type: ignore[operator]
                scale *= float(given["alpha"]) / float(given["rank"])  # type: ignore[index]
        except (TypeError, KeyError, ValueError, ZeroDivisionError):
            raise AdapterError(
                f"adapter '{label}': {ADAPTER_CONFIG} gives no scale (lora_parameters is {given!r}). Give lora_alpha = scale "
                "× rank: --alpha NUMBER (alpha=NUMBER)."
            ) from None
        if not math.isfinite(scale):
            raise AdapterError(
                f"adapter '{label}': the scale in {ADAPTER_CONFIG} is {scale}; expected a finite number. Correct it."
            )
        return scale
