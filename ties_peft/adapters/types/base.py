"""PeftType: how the tensors of one type of PEFT adapter become task vectors, and how task vectors become tensors.

To add a type, write a file with a subclass of `PeftType` in this folder; `peft_types()` finds it. `name`, `title`,
`config_name`, `layout` and `read` are enough for a type that is only read: a merge of it is written as LoRA, or as the type
that `output_name` names. A type that a merge can be written as is a `WritablePeftType` (LoRA, (IA)³).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...errors import AdapterError
from ...task_vectors.delta import Delta
from ..base_model import BaseModel
from ..name_patterns import matches_end, matches_whole
from ..tensors import TensorSource

PREFIX = "base_model.model."
Config = Mapping[str, Any]


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
        layer_type: what the task vector belongs to: LINEAR, CONV, EMBEDDING, BIAS or EXPERT.
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
    layer_type: str = LINEAR
    layer: str = ""
    kernel_size: tuple[int, ...] = ()
    expert: tuple[int, int] = (0, 1)
    rank_is_trained: bool = True
    base_tensors: tuple[str, ...] = ()
    conv1d: bool = False
    details: Any = field(default=None, compare=False, repr=False)

    @property
    def path(self) -> str:
        """The path of PEFT's layer."""
        return self.layer or self.name

    @property
    def signature(self) -> tuple[Any, ...]:
        """What must be equal in all adapters that have this module."""
        return self.shape, self.on_input, self.layer_type, self.kernel_size, self.expert


class PeftType(ABC):
    """A type of PEFT adapter.

    Attributes:
        name: in options: `lora`, `ia3`.
        title: in text: LoRA, (IA)³.
        config_name: in adapter_config.json: LORA, IA3.
        output_name: the `name` of the type that a merge of it is written as.
        has_rank: whether its task vectors have a rank.
        has_integer_tensors: whether its files hold integers, the indices of the entries that it changes.
    """

    name: str
    title: str
    config_name: str
    output_name: str = "lora"
    has_rank: bool = True
    has_integer_tensors: bool = False

    @classmethod
    def instances(cls) -> list[PeftType]:
        """Return the PEFT types of this class: one, except for a class that implements several."""
        return [cls()]

    @abstractmethod
    def layout(
        self, config: Config, tensors: TensorSource, label: str, base: BaseModel | None
    ) -> dict[str, ModuleInfo]:
        """Return the modules in a file, by name. Tensors that belong to none are the adapter's extra tensors.

        Args:
            config, tensors: of the adapter.
            label: the adapter's name in messages.
            base: the base model's tensors, if they were given.
        Raises: AdapterError naming the setting or the tensors that cannot be merged.
        """

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


def module_path(key: str, suffix: str, label: str) -> str:
    """Return the module's path in a tensor's name that ends in `suffix`."""
    if not key.startswith(PREFIX):
        raise AdapterError(
            f"adapter '{label}': tensor {key!r} does not start with '{PREFIX}', as PEFT's do. "
            "Save the adapter with PEFT, or rename its tensors."
        )
    return key[len(PREFIX) : -len(suffix)].removesuffix(".")


def group_by_layer(tensors: TensorSource, suffixes: Sequence[str], label: str) -> dict[str, dict[str, str]]:
    """Group the tensors whose names end in one of the suffixes by layer: path → suffix → name; paths sorted."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors.names:
        suffix = next((end for end in suffixes if key.endswith(f".{end}")), None)
        if suffix is not None:
            found.setdefault(module_path(key, suffix, label), {})[suffix] = key
    return dict(sorted(found.items()))


def refuse_settings(config: Config, refused: Mapping[str, str], label: str) -> None:
    """Refuse every setting of the config that is switched on and listed in `refused` (key → what it is)."""
    found = [f"{what} ({key}={config[key]!r})" for key, what in refused.items() if config.get(key) not in _OFF]
    if found:
        raise AdapterError(
            f"adapter '{label}' uses {'; '.join(found)}, which ties_peft cannot merge yet, "
            "and leaving it out would change what the adapter does. Train or convert it without, or leave it out."
        )


def first_match(patterns: Any, name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a path, from the start or a dot on.

    This is PEFT's rule for rank_pattern and alpha_pattern: `re.match(rf"(.*\\.)?({key})$", path)`.
    """
    for pattern, value in (patterns or {}).items():
        if matches_end(pattern, name):
            return value
    return default


def config_number(config: Config, key: str, patterns: str, name: str, default: float, where: str) -> float:
    """Return a finite number of the config, which a pattern may set for one module.

    Raises: AdapterError naming the key and its value.
    """
    try:
        value = float(first_match(config.get(patterns), name, config.get(key, default)))
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise AdapterError(
            f"{where}: its lora scaling cannot be read from {key}={config.get(key)!r}, "
            f"{patterns}={config.get(patterns)!r} ({error}). Correct adapter_config.json."
        ) from None
    if not math.isfinite(value):
        raise AdapterError(f"{where}: {key} is {config.get(key)!r}; expected a finite number.")
    return value


def is_target_module(chosen: Any, path: str) -> bool:
    """Return whether PEFT's target_modules, a list of endings or one regex, include a path."""
    if isinstance(chosen, str):
        try:
            return matches_whole(chosen, path)
        except ValueError:
            return False
    return isinstance(chosen, (list, tuple)) and any(path == end or path.endswith(f".{end}") for end in chosen)


def base_shape(base: BaseModel | None, path: str, parameter: str = "weight") -> tuple[int, ...] | None:
    """Return the shape of a layer's weight or other parameter in the base model; None if it is not known."""
    found = base.find(f"{path}.{parameter}") if base is not None else None
    return base.info(found).shape if base is not None and found is not None else None


def layer_is_conv1d(config: Config, base: BaseModel | None, path: str) -> bool:
    """Return whether the base stores a layer's weight as (in, out).

    The base's architecture decides, as in PEFT, which corrects fan_in_fan_out by the class of each layer. If the architecture
    is not known, the adapter's fan_in_fan_out decides.
    """
    known = base.is_conv1d(path) if base is not None else None
    return bool(config.get("fan_in_fan_out")) if known is None else known


def check_conv1d(config: Config, base: BaseModel | None, path: str, where: str, out: int | None = None) -> bool:
    """Return the result of `layer_is_conv1d`, checked against the known sizes.

    Args:
        where: the layer in messages.
        out: its output size; by default that of its bias in the base.
    Raises: AdapterError if only the adapter's fan_in_fan_out decides, and the sizes contradict it.
    """
    found, shape = layer_is_conv1d(config, base, path), base_shape(base, path)
    if base is None or shape is None or len(shape) != 2 or base.is_conv1d(path) is not None:
        return found
    wide, tall = (shape[0], shape[1]) if found else (shape[1], shape[0])  # (in, out), as they are read
    seen = (out,) if out is not None else base_shape(base, path, "bias")
    if seen == (wide,) != (tall,):
        raise AdapterError(
            f"{where}: the weight in base model '{base.label}' is {list(shape)} and the layer's output size {wide}, which "
            f"contradicts fan_in_fan_out={found} in the adapter's config, and the base's architecture is not known. Name "
            "the base's folder or Hub id with its config.json, or correct fan_in_fan_out."
        )
    return found


def conv_kernel_size(shape: tuple[int, int], name: str, where: str, base: BaseModel | None) -> tuple[int, ...]:
    """Return the kernel size of a convolution whose task vector is stored flattened; () for a linear layer.

    Raises: AdapterError if the name is that of a convolution and the base was not given, or does not fit.
    """
    known = base_shape(base, name)
    if known is not None:
        size = math.prod(known)
        if size != math.prod(shape) or known[0] not in shape:
            raise AdapterError(
                f"{where}: the base's weight is {list(known)}, the adapter's task vector {list(shape)}. Is it the base "
                "that the adapter was trained on?"
            )
        return known[2:]
    if "conv" in name.rpartition(".")[2].lower():
        raise AdapterError(
            f"{where} seems to be a convolution, and the adapter does not store its kernel size. {NEEDS_BASE}"
        )
    return ()


def tucker_kernel_size(
    shape: tuple[int, int], kernel: tuple[int, ...], name: str, where: str, base: BaseModel | None
) -> tuple[int, ...]:
    """Return the kernel size of a convolution with a core tensor, which has two kernel sizes even for a 1-d convolution."""
    if base_shape(base, name) is not None:
        return conv_kernel_size(shape, name, where, base)
    if kernel[-1] == 1:
        raise AdapterError(f"{where}: a core tensor over {list(kernel)} fits two kinds of convolution. {NEEDS_BASE}")
    return kernel


def base_weight(base: BaseModel | None, name: str, what: str) -> Tensor:
    """Return a weight of the base model, float64.

    Args:
        what: needs the weight, for the message.
    Raises: AdapterError if the base has no such weight, or it is quantised.
    """
    if base is None:
        raise AdapterError(f"{what} needs the base model's {name!r}. {NEEDS_BASE}")
    weight = base.require(name, what)
    if not weight.is_floating_point():
        raise AdapterError(
            f"base model '{base.label}': {name!r} is quantised ({weight.dtype}), and {what} needs its "
            "values. Name the unquantised base."
        )
    return weight.double()


NEEDS_BASE = "Name the base model: --base PATH_OR_ID (base=...); only the tensors that are needed are read."
_OFF: tuple[Any, ...] = (None, False, "none", "", [], {}, 0)
