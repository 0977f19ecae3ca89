"""Diffusers: LoRAs of its pipelines, in the names of all its releases.

    unet.….attn1.to_k.lora.down.weight, ….attn1.processor.to_k_lora.down.weight, unet.….lora_A.weight
    transformer_blocks.….lora_down.weight, as some trainers of diffusers' transformers write

Newer releases store PEFT's config in the file's metadata. Without it alpha is read from the file; a file without alpha has
scaling 1. Source: diffusers/utils/state_dict_utils.py, peft_utils.py and loaders/lora_base.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..image_files import METADATA
from ..sources import OTHER_WEIGHT_FILES
from .base import SIDES, Format, ParsedName

PARTS = r"unet|text_encoder(?:_\d)?|transformer(?:_\d)?|prior|controlnet"
NAME = re.compile(
    rf"(?:(?P<part>{PARTS})\.)?(?P<module>.+?)\.(?:(?:lora|lora_linear_layer)\.(?P<side>down|up)\.weight"
    r"|(?P<peft>lora_A|lora_B)(?:\.default)?\.weight|(?P<kohya>lora_down|lora_up)\.weight|(?P<alpha>alpha))"
)
PROCESSOR = re.compile(  # of the first releases
    rf"(?:(?P<part>{PARTS})\.)?(?P<module>.+?)\.(?P<to>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight"
)
TEXT_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
PEFT_NAME = re.compile(r".+\.(?:lora_A|lora_B)(?:\.[^.]+)?\.weight")
UNAMBIGUOUS = (  # beginnings of names that PEFT does not write
    "unet.",
    "text_encoder",
    "transformer.transformer_blocks.",
    "transformer.single_transformer_blocks.",
    "transformer_blocks.",
    "single_transformer_blocks.",
    "prior.",
)


class Diffusers(Format):
    """The format of diffusers' `save_lora_weights`."""

    pattern = NAME
    name = "diffusers"
    title = "a LoRA of diffusers"
    order = 50
    is_image = True

    def matches(self, names: Sequence[str], path: Path) -> bool:
        """Return whether some names are diffusers' own, or PEFT's with a part of a pipeline or in a file that diffusers names."""
        own = [name for name in names if NAME.fullmatch(name) or PROCESSOR.fullmatch(name)]
        if any(not PEFT_NAME.fullmatch(name) and not name.endswith(".alpha") for name in own):
            return True
        return bool(own) and (path.name in OTHER_WEIGHT_FILES or any(name.startswith(UNAMBIGUOUS) for name in own))

    def parse(self, key: str) -> ParsedName | None:
        """Return a tensor's name in its parts, those of the first releases included."""
        found = PROCESSOR.fullmatch(key)
        if found:
            part, outer = found["part"] or "", found["module"].removesuffix(".processor")
            layer = TEXT_ENCODER[found["to"]] if part.startswith("text_encoder") else found["to"]
            return ParsedName(part, f"{outer}.{'to_out.0' if layer == 'to_out' else layer}", SIDES[found["side"]])
        parsed = super().parse(key)
        return parsed and parsed._replace(module=parsed.module.replace(".processor.", "."))

    def metadata(self, entries: Mapping[str, str], part: str) -> dict[str, Any]:
        """Return PEFT's config of one part from the file's metadata."""
        try:
            config = json.loads(entries.get(METADATA, "{}"))
        except (ValueError, RecursionError):
            return {}
        items = config.items() if isinstance(config, dict) else ()
        return {key.removeprefix(f"{part}."): value for key, value in items if key.startswith(f"{part}.") or not part}

    def needs_alpha(self, ranks: Sequence[int]) -> str | None:
        """Return why the scaling is not known if the modules have several ranks."""
        return "releases of diffusers differ on its scaling" if len(set(ranks)) > 1 else None
