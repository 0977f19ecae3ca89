"""Format: the names under which one trainer saves LoRA tensors, and how they become PEFT's.

To add a format, write a file with a subclass of `Format` in this folder; `formats()` finds it. Most formats need only
`name`, `title`, `order` and `pattern`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..tensors import TensorSource

PLAIN, DORA, LOHA, LOKR = "LoRA", "DoRA", "LoHa", "LoKr"  # kinds of modules
SIDES = {  # of formats' own names; alpha and the factors of LyCORIS keep theirs
    **dict.fromkeys(("lora_A", "lora_a", "lora_down", "down"), "A"),
    **dict.fromkeys(("lora_B", "lora_b", "lora_up", "up"), "B"),
    "dora_scale": "magnitude",
}


class ParsedName(NamedTuple):
    """A tensor's name, taken apart.

    Attributes:
        part: of a pipeline, such as `unet`; empty if the format has no parts.
        module: the module's path as the file spells it.
        side: what the tensor is: A, (r, in); B, (out, r); alpha; or another factor, as in `LoraModule`.
    """

    part: str
    module: str
    side: str


class Format:
    """The file format of one trainer.

    Attributes:
        pattern: of a tensor's name, with the group `module`, the group `part` if the format has parts, and groups of which one
            matches, the side as the format names it.
        name: short, for code and tests.
        title: in messages: "a LoRA of diffusers".
        order: formats with a lower number are tried first.
        has_base_names: whether the module names in the file are those of the base model.
        part_is_prefix: whether a part of a pipeline shows only as the beginning of the module names.
        is_image: whether it is for image models, whose names `image_models` knows; such files are merged as they are.
        transposed: whether the factors are stored transposed.
        without_alpha: what is said of a file without alpha, whose scaling alpha/r is taken as 1.
    """

    pattern: re.Pattern[str]
    name: str
    title: str
    order: int
    has_base_names: bool = True
    part_is_prefix: bool = False
    is_image: bool = False
    transposed: bool = False
    without_alpha: str = "scaling 1, as the file gives no alpha"

    def matches(self, names: Sequence[str], path: Path) -> bool:
        """Return whether a file whose tensors have these names is of this format, given that it is of none with a lower order."""
        return any(self.pattern.fullmatch(name) for name in names)

    def parse(self, key: str) -> ParsedName | None:
        """Return a tensor's name in its parts; None if the tensor does not belong to a plain LoRA."""
        found = self.pattern.fullmatch(key)
        if found is None:
            return None
        groups = {name: text for name, text in found.groupdict().items() if text}
        part, module = groups.pop("part", ""), groups.pop("module")
        (side,) = groups.values()
        return ParsedName(part, module, SIDES.get(side, side))

    def variant(self, rest: Sequence[str], config: Mapping[str, Any]) -> str:
        """Return what the adapter is if it is no plain LoRA, such as DoRA; empty if it is one.

        Args:
            rest: the names of the tensors that `parse` does not know.
            config: adapter_config.json; empty if there is none.
        """
        return ""

    def advice(self, command: str, has_config: bool) -> str:
        """Return the end of the message that refuses to merge such a file, on how to convert it.

        Args:
            command: that converts it.
            has_config: whether an adapter_config.json lies beside it.
        """
        return f"not a PEFT adapter. Turn it into one with `{command}` and merge that."

    def config_fault(self, config: Mapping[str, Any], command: str) -> str | None:
        """Return why a folder with this config of the format's trainer, but without its file, holds no adapter.

        Args:
            config: adapter_config.json without a peft_type.
            command: that would convert the file.
        """
        return None

    def spelled(self, module: str) -> str:
        """Return how the file spells a module of the base model."""
        return module

    def factors_fault(self, A: Sequence[int], B: Sequence[int], module: str) -> str | None:
        """Return why the factors of a module cannot be converted exactly, and what to do; None if they can.

        Args:
            A, B: their shapes in the file.
            module: as the file spells it.
        """
        return None

    def metadata(self, entries: Mapping[str, str], part: str) -> dict[str, Any]:
        """Return the entries of PEFT's config that the file itself holds for one part; empty if there are none.

        Args:
            entries: of the file's metadata.
            part: of a pipeline.
        """
        return {}

    def config_scale(self, config: Mapping[str, Any], label: str) -> float | None:
        """Return the lora scaling that the trainer's config gives for all modules; None if the format has no such config.

        Raises: AdapterError if the config should give it and does not.
        """
        return None

    def needs_alpha(self, ranks: Sequence[int]) -> str | None:
        """Return why the scaling of a file without alpha is not known; None if it is 1."""
        return None


@dataclass(eq=False)
class LoraModule:
    """One adapted module of a file; two are equal only if they are the same object.

    Attributes:
        part, module: as in `ParsedName`.
        keys: the names of its tensors by their side: A, B, alpha, magnitude; for LoHa and LoKr as LyCORIS names them.
    """

    part: str
    module: str
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """LoRA, DoRA, LoHa or LoKr."""
        starts = {side.partition("_")[0] for side in self.keys}
        found = {"hada": LOHA, "lokr": LOKR, "magnitude": DORA}
        return ", ".join(name for start, name in found.items() if start in starts) or PLAIN


@dataclass(frozen=True)
class LoraFile:
    """A file of a known format.

    Attributes:
        format: its format.
        path: the file.
        tensors: its tensors.
        modules: its modules.
        rest: the names of the tensors that belong to none.
        variant: what the adapter is if it cannot be converted: GLoRA, several kinds of modules, ….
        kind: of its modules.
    """

    format: Format
    path: Path
    tensors: TensorSource
    modules: tuple[LoraModule, ...]
    rest: tuple[str, ...]
    variant: str = ""
    kind: str = PLAIN

    @property
    def is_plain(self) -> bool:
        """Whether all of its tensors are of one kind that PEFT has too, so that it can be converted."""
        return not self.variant and not self.rest

    @property
    def title(self) -> str:
        """What it is, in words."""
        what = self.variant or (self.kind if self.kind != PLAIN else "")
        return self.format.title + (f" of type {what}" if what else "")

    @property
    def parts(self) -> Counter[str]:
        """The number of modules of each part of a pipeline."""
        return Counter(module.part for module in self.modules)

    def __str__(self) -> str:
        counts = ", ".join(f"{part}: {count}" if part else str(count) for part, count in sorted(self.parts.items()))
        return f"{self.path.name} is {self.title} ({counts or 'no'} modules that are plain LoRA)"


@dataclass(frozen=True)
class Origin:
    """What is known of an adapter that was read from a file of another format.

    Attributes:
        title: what the file is, in words.
        architecture: of the image model; empty if it is unknown.
        parts: of a pipeline that it adapts, sorted; each module's name begins with one of them. Empty if it has none.
        description: how it was read.
        assumptions: what the file does not say and was assumed.
        metadata: of the file: the training's settings and trigger words.
    """

    title: str
    architecture: str = ""
    parts: tuple[str, ...] = ()
    description: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
