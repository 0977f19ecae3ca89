"""Kind: one type of PEFT adapter, by how its tensors make task vectors and are made from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..delta import Delta
from ..errors import AdapterError, printable
from ..tensors import TensorSource

PREFIX = "base_model.model."
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Module:
    """One adapted layer as an adapter's file holds it.

    Attributes:
        name: its path in the base model, without PEFT's prefix.
        shape: of its task vector: (out, in) for LoRA, (k,) for (IA)³.
        rank: of its task vector, read from the tensors; 1 for (IA)³.
        keys: its tensors' names in the file.
        scaling: the lora scaling, alpha/r or alpha/√r; 1 for (IA)³.
        on_input: whether an (IA)³ vector multiplies the layer's input (feed-forward) or its output.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    keys: tuple[str, ...]
    scaling: float = 1.0
    on_input: bool = False


class Kind(ABC):
    """A type of adapter. One file in `kinds/` each; the folder is the list.

    Attributes:
        name: as users see it: `lora`, `ia3`.
        title: as it is written in text: LoRA, (IA)³.
        peft_type: as it stands in adapter_config.json.
        writes: the name of the kind that a merge of it is written as; its own, if it has a form of its own.
        has_rank: whether `rank` means anything for it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    peft_type: ClassVar[str]
    writes: ClassVar[str]
    has_rank: ClassVar[bool]

    @abstractmethod
    def layout(self, config: Config, tensors: TensorSource, label: str) -> dict[str, Module]:
        """The modules in a file, by name. Tensors that belong to none are the adapter's riders.

        Raises: AdapterError, naming what of the config or of the tensors cannot be merged.
        """

    @abstractmethod
    def read(self, module: Module, tensors: TensorSource) -> Delta:
        """The task vector of one module, float32."""

    @abstractmethod
    def keys(self, module: str) -> tuple[str, ...]:
        """The names of a module's tensors in a file, in the order in which `read` takes them."""

    @abstractmethod
    def pack(self, module: Module, delta: Delta, rank: int) -> dict[str, Tensor]:
        """The tensors, float32 and by name in the file, that make `delta` again."""

    @abstractmethod
    def config(self, modules: Sequence[Module], rank: int) -> dict[str, Any]:
        """The keys of adapter_config.json that are this kind's own, as portable as can be."""


def module_of(key: str, suffix: str, label: str) -> str:
    """The module's path in a tensor's name that ends in `suffix`."""
    if not key.startswith(PREFIX):
        raise AdapterError(
            f"adapter '{label}': tensor '{printable(key)}' does not start with '{PREFIX}', as PEFT's do. "
            "Save the adapter with PEFT, or rename its tensors."
        )
    return key[len(PREFIX) : -len(suffix) - 1]


def refuse_settings(config: Config, refused: Mapping[str, str], label: str) -> None:
    """Refuse every config key that is switched on and listed in `refused` (key → what it is)."""
    found = [f"{what} ({key}={config[key]!r})" for key, what in refused.items() if config.get(key) not in _OFF]
    if found:
        raise AdapterError(
            f"adapter '{label}' uses {printable('; '.join(found))}, which ties_peft cannot merge yet, "
            "and leaving it out would change what the adapter does. Train or convert it without, or leave it out."
        )


_OFF: tuple[Any, ...] = (None, False, "none", "", [], {}, 0)
