"""PeftType: one type of PEFT adapter, by how its tensors make task vectors and are made from them.

A kind that has a form of its own to be written in is a `WritablePeftType` (LoRA, (IA)³); the others are only
read, and a merge of them is written as the kind that their `writes` names.
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
    """One task vector that an adapter's file holds: of a layer's weight, of its bias, or of one expert's weight.

    Attributes:
        name: its path in the base model, without PEFT's prefix. The bias of a layer is `layer.bias`, a
            parameter of several experts `experts.down_proj[3]`.
        shape: of its task vector: (out, in) for LoRA, (out, in·kernel) for a convolution, (dim, vocabulary)
            for an embedding, (out, 1) for a bias; (k,) for (IA)³.
        rank: the most that the rank of its task vector can be, read from the tensors; 1 for (IA)³.
        keys: its tensors' names in the file.
        scaling: the lora scaling, alpha/r or alpha/√r; 1 where the kind has none.
        on_input: whether an (IA)³ vector multiplies the layer's input (feed-forward) or its output.
        layer_type: what it is the task vector of: LINEAR, CONV, EMBEDDING, BIAS or EXPERT.
        layer: the path of PEFT's layer, where the name is not it.
        kernel_size: the sizes of a convolution's kernel; of (IA)³ on a convolution a 1 for each.
        expert: (which, of how many), for EXPERT.
        rank_is_trained: whether `rank` is the r it was trained at, and not merely what its shape allows.
        base_tensors: the tensors of the base model without which it has no task vector.
        conv1d: whether the base holds the layer's weight as (in, out), where that matters.
        details: what else its kind reads it by.
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
        """What must be the same in all adapters that have it."""
        return self.shape, self.on_input, self.layer_type, self.kernel_size, self.expert


class PeftType(ABC):
    """A type of adapter. One file in `kinds/` each; the folder is the list.

    Attributes:
        name: as users see it: `lora`, `ia3`.
        title: as it is written in text: LoRA, (IA)³.
        config_name: as it stands in adapter_config.json.
        output_name: the name of the kind that a merge of it is written as; its own, if it has a form of its own.
        has_rank: whether `rank` means anything for it.
        indices: whether tensors of whole numbers belong to it: which entries it changes.
    """

    name: str
    title: str
    config_name: str
    output_name: str = "lora"
    has_rank: bool = True
    has_integer_tensors: bool = False

    @classmethod
    def instances(cls) -> list[PeftType]:
        """The kinds that this class makes: one, but for a class that serves several PEFT types."""
        return [cls()]

    @abstractmethod
    def layout(
        self, config: Config, tensors: TensorSource, label: str, base: BaseModel | None
    ) -> dict[str, ModuleInfo]:
        """The modules in a file, by name. Tensors that belong to none are the adapter's riders.

        Args:
            config, tensors: of the adapter.
            label: how messages name it.
            base: its base model's tensors, where they were given.
        Raises: AdapterError, naming what of the config or of the tensors cannot be merged.
        """

    @abstractmethod
    def read(self, module: ModuleInfo, tensors: TensorSource, base: BaseModel | None) -> Delta:
        """The task vector of one module, float32."""


class WritablePeftType(PeftType):
    """A kind that a merge can be written as."""

    @abstractmethod
    def written(self, module: ModuleInfo, rank: int) -> ModuleInfo:
        """The module as `pack` will have made it: its keys, a lora scaling of 1."""

    @abstractmethod
    def pack(self, module: ModuleInfo, delta: Delta, rank: int) -> dict[str, Tensor]:
        """The tensors, float32 and by name, that make `delta` again."""

    def join(self, modules: Sequence[ModuleInfo], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The file's tensors, made of all that were packed: where several modules share one."""
        return tensors

    def fault(self, modules: Sequence[ModuleInfo]) -> str | None:
        """Why PEFT has no adapter that holds all of these; None where it has."""
        return None

    @abstractmethod
    def config(self, modules: Sequence[ModuleInfo], rank: int) -> dict[str, Any]:
        """The keys of adapter_config.json that are this kind's own, as portable as can be."""


def module_path(key: str, suffix: str, label: str) -> str:
    """The module's path in a tensor's name that ends in `suffix`."""
    if not key.startswith(PREFIX):
        raise AdapterError(
            f"adapter '{label}': tensor {key!r} does not start with '{PREFIX}', as PEFT's do. "
            "Save the adapter with PEFT, or rename its tensors."
        )
    return key[len(PREFIX) : -len(suffix)].removesuffix(".")


def group_by_layer(tensors: TensorSource, suffixes: Sequence[str], label: str) -> dict[str, dict[str, str]]:
    """Each layer's tensors: path → what a tensor's name ends in → its whole name; paths sorted."""
    found: dict[str, dict[str, str]] = {}
    for key in tensors.names:
        suffix = next((end for end in suffixes if key.endswith(f".{end}")), None)
        if suffix is not None:
            found.setdefault(module_path(key, suffix, label), {})[suffix] = key
    return dict(sorted(found.items()))


def refuse_settings(config: Config, refused: Mapping[str, str], label: str) -> None:
    """Refuse every config key that is switched on and listed in `refused` (key → what it is)."""
    found = [f"{what} ({key}={config[key]!r})" for key, what in refused.items() if config.get(key) not in _OFF]
    if found:
        raise AdapterError(
            f"adapter '{label}' uses {'; '.join(found)}, which ties_peft cannot merge yet, "
            "and leaving it out would change what the adapter does. Train or convert it without, or leave it out."
        )


def first_match(patterns: Any, name: str, default: Any) -> Any:
    """The value of the first pattern, in the order of the file, that matches the end of a path at a dot.

    It is PEFT's rule for rank_pattern and alpha_pattern: `re.match(rf"(.*\\.)?({key})$", path)`.
    """
    for pattern, value in (patterns or {}).items():
        if matches_end(pattern, name):
            return value
    return default


def config_number(config: Config, key: str, patterns: str, name: str, default: float, where: str) -> float:
    """A finite number of the config, which a pattern may set for one module.

    Raises: AdapterError naming the key and what stands there.
    """
    try:
        value = float(first_match(config.get(patterns), name, config.get(key, default)))
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise AdapterError(
            f"{where}: its lora scaling cannot be read from {key}={config.get(key)!r}, "
            f"{patterns}={config.get(patterns)!r} ({error}). Mend adapter_config.json."
        ) from None
    if not math.isfinite(value):
        raise AdapterError(f"{where}: {key} is {config.get(key)!r}; expected a finite number.")
    return value


def is_target_module(chosen: Any, path: str) -> bool:
    """Whether PEFT's target_modules, a list of endings or one regex, name a path."""
    if isinstance(chosen, str):
        try:
            return matches_whole(chosen, path)
        except ValueError:
            return False
    return isinstance(chosen, (list, tuple)) and any(path == end or path.endswith(f".{end}") for end in chosen)


def base_shape(base: BaseModel | None, path: str, parameter: str = "weight") -> tuple[int, ...] | None:
    """The shape of a layer's weight, or other parameter, in the base model; None where that is not known."""
    found = base.find(f"{path}.{parameter}") if base is not None else None
    return base.info(found).shape if base is not None and found is not None else None


def layer_is_conv1d(config: Config, base: BaseModel | None, path: str) -> bool:
    """Return whether the base holds a layer's weight as (in, out).

    The base's architecture decides, as in PEFT, which corrects fan_in_fan_out by the class of each layer; where the
    architecture is not known, the adapter's fan_in_fan_out does.
    """
    known = base.is_conv1d(path) if base is not None else None
    return bool(config.get("fan_in_fan_out")) if known is None else known


def check_conv1d(config: Config, base: BaseModel | None, path: str, where: str, out: int | None = None) -> bool:
    """Return what `layer_is_conv1d` does, checked against the sizes that are known.

    Args:
        where: how messages name the layer.
        out: its output size; by default that of its bias in the base.
    Raises: AdapterError where the adapter's fan_in_fan_out alone tells, and the sizes contradict it.
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
    """The kernel of a convolution whose task vector a kind holds flattened; () for a linear layer.

    Raises: AdapterError where the name speaks of a convolution and the base was not given, or does not fit.
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
        raise AdapterError(f"{where} seems to be a convolution, whose kernel this adapter does not tell. {NEEDS_BASE}")
    return ()


def tucker_kernel_size(
    shape: tuple[int, int], kernel: tuple[int, ...], name: str, where: str, base: BaseModel | None
) -> tuple[int, ...]:
    """The kernel of a convolution whose core tensor has two sizes of it, also where it has but one."""
    if base_shape(base, name) is not None:
        return conv_kernel_size(shape, name, where, base)
    if kernel[-1] == 1:
        raise AdapterError(f"{where}: a core tensor over {list(kernel)} fits two kinds of convolution. {NEEDS_BASE}")
    return kernel


def base_weight(base: BaseModel | None, name: str, what: str) -> Tensor:
    """A weight of the base model, float64.

    Raises: AdapterError where there is none, or it is quantised.
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


NEEDS_BASE = "Name its base: --base PATH_OR_ID (base=...); just the tensors it needs are read."
_OFF: tuple[Any, ...] = (None, False, "none", "", [], {}, 0)
