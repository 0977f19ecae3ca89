"""Format: the names under which one trainer saves LoRA tensors, and how they become PEFT's.

To add a format, write a file with a subclass of `Format` in this folder; `formats()` finds it. Most formats need only
`name`, `title`, `order`, `matches` and `parse`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..tensors import TensorSource

SIDES = {"lora_A": "A", "lora_B": "B", "down": "A", "up": "B", "lora_a": "A", "lora_b": "B"}
SIDES |= {"lora_down": "A", "lora_up": "B"}


class ParsedName(NamedTuple):
    """A tensor's name, taken apart.

    Attributes:
        part: of a pipeline, such as `unet`; empty if the format has no parts.
        module: the module's path as the file spells it.
        side: A, (r, in); B, (out, r); or alpha.
    """

    part: str
    module: str
    side: str


class Format(ABC):
    """The file format of one trainer.

    Attributes:
        name: short, for code and tests.
        title: in messages: "a LoRA of diffusers".
        order: formats with a lower number are tried first.
        has_base_names: whether the module names in the file are those of the base model.
        part_is_prefix: whether a part of a pipeline shows only as the beginning of the module names.
        without_alpha: what is said of a file without alpha, whose scaling alpha/r is taken as 1.
    """

    name: str
    title: str
    order: int
    has_base_names: bool = True
    part_is_prefix: bool = False
    without_alpha: str = "scaling 1, as the file gives no alpha"

    @abstractmethod
    def matches(self, names: Sequence[str], path: Path) -> bool:
        """Return whether a file whose tensors have these names is of this format; formats of lower order are ruled out."""

    @abstractmethod
    def parse(self, key: str) -> ParsedName | None:
        """Take a tensor's name apart; return None if the tensor does not belong to a plain LoRA."""

    def variant(self, rest: Sequence[str], config: Mapping[str, Any]) -> str:
        """Return what the adapter is if it is no plain LoRA, such as DoRA; empty if nothing tells.

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

    def factors(self, A: Tensor, B: Tensor, module: str, where: str) -> tuple[Tensor, Tensor]:
        """Return A, (r, in), and B, (out, r), from the two tensors of a module.

        Args:
            where: the module in messages.
        Raises: AdapterError if they cannot be converted exactly.
        """
        return A, B

    def metadata(self, path: Path, part: str) -> dict[str, Any]:
        """Return the entries of PEFT's config that the file itself holds for one part; empty if there are none."""
        return {}

    def config_scale(self, config: Mapping[str, Any], label: str) -> float | None:
        """Return the lora scaling that the trainer's config gives for all modules; None if the format has no such config.

        Raises: AdapterError if the config should give it and does not.
        """
        return None

    def needs_alpha(self, ranks: Sequence[int]) -> str | None:
        """Return why the scaling of a file without alpha is not known; None if it is 1."""
        return None


@dataclass
class LoraModule:
    """One adapted module of a file.

    Attributes:
        part, module: as in `ParsedName`.
        keys: the names of its tensors by their side: A, B, alpha.
    """

    part: str
    module: str
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LoraFile:
    """A file of a known format.

    Attributes:
        format: its format.
        path: the file.
        tensors: its tensors.
        modules: its modules.
        rest: the names of the tensors that belong to none.
        variant: what the adapter is if it is no plain LoRA: DoRA, LoHa, ….
    """

    format: Format
    path: Path
    tensors: TensorSource
    modules: tuple[LoraModule, ...]
    rest: tuple[str, ...]
    variant: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain LoRA and nothing else, so that it can be converted."""
        return not self.variant and not self.rest

    @property
    def title(self) -> str:
        """What it is, in words."""
        return self.format.title + (f" of type {self.variant}" if self.variant else "")

    @property
    def parts(self) -> Counter[str]:
        """The number of modules of each part of a pipeline."""
        return Counter(module.part for module in self.modules)

    def __str__(self) -> str:
        counts = ", ".join(f"{part}: {count}" if part else str(count) for part, count in sorted(self.parts.items()))
        return f"{self.path.name} is {self.title} ({counts or 'no'} modules that are plain LoRA)"
