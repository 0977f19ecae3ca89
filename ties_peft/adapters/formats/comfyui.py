"""ComfyUI: names that begin with the part of the model, as ComfyUI loads them.

    diffusion_model.….lora_A.weight or .lora_down.weight, with ….alpha

Module names stay as they are. A file without alpha has alpha = rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .base import Format


class ComfyUI(Format):
    """The names that ComfyUI's loader expects."""

    pattern = re.compile(
        r"(?P<part>diffusion_model|text_encoders)\.(?P<module>.+)\."
        r"(?:(?P<side>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(?P<alpha>alpha))"
    )
    name = "ComfyUI"
    title = "a LoRA with ComfyUI's names"
    order = 40
    is_image = True
    without_alpha = "alpha = rank (scaling 1), as ComfyUI takes a file that gives no alpha"

    def matches(self, names: Sequence[str], path: Path) -> bool:
        """Return whether any name is that of a factor."""
        return any(found is not None and found["side"] for found in map(self.pattern.fullmatch, names))
