"""PEFT's names in a file without adapter_config.json: ….lora_A.weight, with nothing that gives lora_alpha."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..sources import ADAPTER_CONFIG
from .base import Format


class PeftNames(Format):
    """A state dict of PEFT that was saved without its config."""

    pattern = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<side>lora_A|lora_B)(?:\.[^.]+)?\.weight")
    name = "PEFT"
    title = "a LoRA with PEFT's names"
    order = 60
    part_is_prefix = True

    def advice(self, command: str, has_config: bool) -> str:
        """Return how to give the alpha that is missing."""
        return (
            f"but there is no {ADAPTER_CONFIG} beside it, which would give lora_alpha. Put the {ADAPTER_CONFIG} that "
            f"belongs to it there, or give the alpha: `{command} --alpha NUMBER`."
        )

    def needs_alpha(self, ranks: Sequence[int]) -> str | None:
        """Return why the scaling is not known."""
        return "nothing else gives its scaling"
