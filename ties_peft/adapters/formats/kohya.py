"""Kohya's trainers, and LyCORIS, which uses the same names.

    kohya      lora_unet_down_blocks_0_….lora_down.weight, with ….alpha; dots and underscores are not told apart
    LyCORIS    the same with hada_…, lokr_…, lora_mid, dora_scale

A module's path is that of the one module of the base model whose name, with underscores for dots, is the file's. A file
without alpha has scaling 1. Source: kohya's networks/lora.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import Format

LYCORIS = re.compile(
    r"(?:lora|lycoris)_.+\.(hada_|lokr_|lora_mid|dora_scale|oft_|glora_|diff|a1\.|w_norm)"
    r"|(?!base_model\.model\.).+\.(hada_(?=w\d_[ab]|t\d)|lokr_(?=w\d|t2)|lora_mid(?=\.weight)|dora_scale|diff(?=_b$|$))"
)
VARIANTS = {  # of LyCORIS, by a part of the tensors' names
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a middle factor (lora_mid)",
    "dora_scale": "DoRA",
    "oft_": "OFT",
    "glora_": "GLoRA",
    "a1.": "GLoRA",
    "diff": "full differences",
    "w_norm": "norms",
}


class Kohya(Format):
    """The format of kohya's sd-scripts and of the trainers that follow it."""

    pattern = re.compile(
        r"lora_(?P<part>unet|te\d?|transformer|prior_unet|prior_te)_(?P<module>.+)\."
        r"(?:lora_(?P<side>down|up)\.weight|(?P<alpha>alpha))"
    )
    name = "kohya"
    title = "a LoRA of kohya's trainers"
    order = 20
    is_image = True
    has_base_names = False

    def spelled(self, module: str) -> str:
        """Return the name with underscores for dots."""
        return module.replace(".", "_")

    def advice(self, command: str, has_config: bool) -> str:
        """Return how to convert the file, with the base model's names."""
        return (
            f"{super().advice(f'{command} --base FILE', has_config)} Its names have underscores for dots, so FILE, the "
            "base's weights, is needed to tell the modules apart."
        )


class Lycoris(Kohya):
    """LyCORIS: LoHa, LoKr, DoRA and other types under kohya's names; only these three are read."""

    pattern = re.compile(
        r"(?:lora|lycoris)_(?:(?P<part>unet|te\d?|transformer)_)?(?P<module>.+)\.(?:lora_(?P<side>down|up)\.weight"
        r"|(?P<other>alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2))"
    )
    name = "LyCORIS"
    title = "a LyCORIS adapter"
    order = 10

    def matches(self, names: Sequence[str], path: Path) -> bool:
        """Return whether any name belongs to one of LyCORIS's types."""
        return any(LYCORIS.match(name) for name in names)

    def variant(self, rest: Sequence[str], config: Mapping[str, Any]) -> str:
        """Return the types that occur."""
        marks = [found[1] or found[2] for name in rest if (found := LYCORIS.match(name))]
        return ", ".join(dict.fromkeys(VARIANTS[mark] for mark in marks))
