"""PeftType: how the tensors of one type of PEFT adapter become task vectors, and how task vectors become tensors.

To add a type, write a file with a subclass of `PeftType` in this folder; `peft_types()` finds it. `name`, `title`,
`config_name`, `suffixes`, `module` and `read` are enough for a type that is only read: a merge of it is written as LoRA, or
as the type that `output_name` names. A type that a merge can be written as is a `WritablePeftType` (LoRA, (IA)³).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...task_vectors.delta import Delta
from ..base_model import BaseModel
from ..contents import Contents
from ..tensors import TensorSource

LINEAR, CONV, EMBEDDING, BIAS, EXPERT = "linear", "conv", "embedding", "bias", "expert"


@dataclass(frozen=True)
class ModuleInfo:
    """What is known of one task vector of an adapter without reading it: of a layer's weight or bias, or of an expert's weight.

    Attributes:
        name: the path in the base model, without PEFT's prefix. The name for a bias is `layer.bias`, that for one expert of a
            parameter `experts.down_proj[3]`.
        shape: of its task vector: (out, in) for LoRA, (out, in·kernel) for a convolution, (dim, vocabulary)
            for an embedding, (out, 1) for a bias; (k,) for (IA)³.
        rank: the largest possible rank of the task vector, by the shapes of the tensors; 1 for (IA)³.
        keys: the names of its tensors in the file.
        scaling: the lora scaling, alpha/r or alpha/√r; 1 for PEFT types without one.
        on_input: whether an (IA)³ vector multiplies the layer's input (feed-forward) or its output.
        layer_type: what the task vector belongs to: LINEAR, CONV, EMBEDDING, BIAS or EXPERT; by default CONV if there is a
            kernel size, else LINEAR.
        layer: the path of PEFT's layer; empty if it is the name.
        kernel_size: of a convolution; for (IA)³ on a convolution a 1 for each dimension.
        expert: for EXPERT, its index and the number of experts.
        rank_is_trained: whether `rank` is the r of the training, and not only what the shape allows.
        base_tensors: the base model's tensors that the task vector depends on.
        conv1d: whether the base stores the layer's weight as (in, out); only set if the task vector depends on it.
        details: what else the PEFT type needs to read it.
    """

    name: str
    shape: tuple[int, ...]
    rank: int
    keys: tuple[str, ...]
    scaling: float = 1.0
    on_input: bool = False
    layer_type: str = ""
    layer: str = ""
    kernel_size: tuple[int, ...] = ()
    expert: tuple[int, int] = (0, 1)
    rank_is_trained: bool = True
    base_tensors: tuple[str, ...] = ()
    conv1d: bool = False
    details: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.layer_type:
            object.__setattr__(self, "layer_type", CONV if self.kernel_size else LINEAR)

    @property
    def path(self) -> str:
        """The path of PEFT's layer."""
        return self.layer or self.name

    @property
    def signature(self) -> tuple[Any, ...]:
        """The facts that must be equal in all adapters that have this module."""
        return self.shape, self.on_input, self.layer_type, self.kernel_size, self.expert


class PeftType(ABC):
    """A type of PEFT adapter.

    Attributes:
        name: in options: `lora`, `ia3`.
        title: in text: LoRA, (IA)³.
        config_name: in adapter_config.json: LORA, IA3.
        output_name: the `name` of the type that a merge of it is written as.
        suffixes: the ends of the names of a layer's tensors, without the dot.
        has_rank: whether its task vectors have a rank.
        has_integer_tensors: whether its files hold integers, the indices of the entries that it changes.
    """

    name: str
    title: str
    config_name: str
    output_name: str = "lora"
    suffixes: tuple[str, ...] = ()
    has_rank: bool = True
    has_integer_tensors: bool = False

    @classmethod
    def instances(cls) -> list[PeftType]:
        """Return the PEFT types of this class: one, except for a class that implements several."""
        return [cls()]

    def layout(self, contents: Contents) -> dict[str, ModuleInfo]:
        """Return the modules in a file, by name. Tensors that belong to none are the adapter's extra tensors.

        Raises: AdapterError naming the setting or the tensors that cannot be merged.
        """
        layers = contents.layers(self.suffixes)
        return {name: self.module(name, parts, contents) for name, parts in layers.items()}

    def module(self, name: str, parts: Mapping[str, str], contents: Contents) -> ModuleInfo:
        """Return the module of one layer, for a type that does not find its modules in `layout`.

        Args:
            name: the layer's path.
            parts: the names of its tensors by suffix.
        Raises: as `layout`.
        """
        raise NotImplementedError

    @abstractmethod
    def read(self, module: ModuleInfo, tensors: TensorSource, base: BaseModel | None) -> Delta:
        """Return the task vector of one module, float32."""


class WritablePeftType(PeftType):
    """A PEFT type that a merge can be written as."""

    @abstractmethod
    def written(self, module: ModuleInfo, rank: int) -> ModuleInfo:
        """Return the module as `pack` writes it: its new keys, and a lora scaling of 1."""

    @abstractmethod
    def pack(self, module: ModuleInfo, delta: Delta, rank: int) -> dict[str, Tensor]:
        """Return the tensors, float32 and by name, whose task vector is `delta`."""

    def join(self, modules: Sequence[ModuleInfo], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the file's tensors, with those that several modules share joined.

        Args:
            modules: all that are written.
            tensors: their packed tensors.
        """
        return tensors

    def fault(self, modules: Sequence[ModuleInfo]) -> str | None:
        """Return why one PEFT adapter cannot hold all of these modules; None if it can."""
        return None

    @abstractmethod
    def config(self, modules: Sequence[ModuleInfo], rank: int) -> dict[str, Any]:
        """Return the entries of adapter_config.json that belong to this type, as few as possible."""
