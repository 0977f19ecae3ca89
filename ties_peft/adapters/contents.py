"""Contents: what an adapter's files hold, as the PEFT types look their modules up in it.

config       its settings, by PEFT's matching rules
tensors      their names and shapes
base model   the shapes of its weights, where an adapter does not store them
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import AdapterError
from .base_model import BaseModel
from .config_values import matches_end, matches_whole
from .tensors import TensorSource

PREFIX = "base_model.model."
NEEDS_BASE = "Name the base model: --base PATH_OR_ID (base=...); only the tensors that are needed are read."
_OFF: tuple[Any, ...] = (None, False, "none", "", [], {}, 0)


@dataclass(frozen=True)
class Contents:
    """An adapter's config and tensors.

    Attributes:
        config: the contents of adapter_config.json.
        tensors: its tensors, by name.
        label: its name in messages.
        base: the base model's tensors; None if they were not given.
    """

    config: Mapping[str, Any]
    tensors: TensorSource
    label: str
    base: BaseModel | None = None

    def where(self, module: str) -> str:
        """Return how messages name a module."""
        return f"adapter '{self.label}', module {module!r}"

    def require_base(self, what: str) -> None:
        """Refuse an adapter whose base model was not given.

        Args:
            what: why it needs the base, as the end of a sentence on the adapter.
        Raises: AdapterError.
        """
        if self.base is None:
            raise AdapterError(f"adapter '{self.label}' {what}. {NEEDS_BASE}")

    def layers(self, suffixes: Sequence[str]) -> dict[str, dict[str, str]]:
        """Group the tensors whose names end in one of the suffixes by layer: path → suffix → name; paths sorted.

        Raises: AdapterError for a name without PEFT's prefix.
        """
        found: dict[str, dict[str, str]] = {}
        for key in self.tensors.names:
            suffix = next((end for end in suffixes if key.endswith(f".{end}")), None)
            if suffix is None:
                continue
            if not key.startswith(PREFIX):
                raise AdapterError(
                    f"adapter '{self.label}': tensor {key!r} does not start with '{PREFIX}', as PEFT's do. "
                    "Save the adapter with PEFT, or rename its tensors."
                )
            found.setdefault(key[len(PREFIX) : -len(suffix)].removesuffix("."), {})[suffix] = key
        return dict(sorted(found.items()))

    def shapes(self, parts: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of a layer, by suffix."""
        return {end: self.tensors.info(key).shape for end, key in parts.items()}

    def damaged(self, module: str, shapes: Mapping[str, tuple[int, ...]], expected: str) -> AdapterError:
        """Make the error for a module whose tensors do not fit each other.

        Args:
            shapes: of its tensors, by suffix.
            expected: the names and shapes, in words.
        """
        seen = ", ".join(f"{end} {list(shape)}" for end, shape in sorted(shapes.items()))
        return AdapterError(
            f"{self.where(module)}: there is {seen}; expected {expected}. The file is damaged: save the adapter again."
        )

    def number(self, key: str, patterns: str, module: str, default: float) -> float:
        """Return a finite number of the config, which a pattern may set for one module.

        Args:
            key, patterns: of the config: `lora_alpha`, `alpha_pattern`. Of several patterns that match, the first counts.
        Raises: AdapterError naming the key and its value.
        """
        config = self.config
        try:
            given = (value for pattern, value in (config.get(patterns) or {}).items() if matches_end(pattern, module))
            value = float(next(given, config.get(key, default)))
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise AdapterError(
                f"{self.where(module)}: its lora scaling cannot be read from {key}={config.get(key)!r}, "
                f"{patterns}={config.get(patterns)!r} ({error}). Correct adapter_config.json."
            ) from None
        if not math.isfinite(value):
            raise AdapterError(f"{self.where(module)}: {key} is {config.get(key)!r}; expected a finite number.")
        return value

    def is_target(self, path: str) -> bool:
        """Return whether PEFT's target_modules, a list of endings or one regex, include a path."""
        chosen = self.config.get("target_modules")
        if isinstance(chosen, str):
            try:
                return matches_whole(chosen, path)
            except ValueError:
                return False
        return isinstance(chosen, (list, tuple)) and any(path == end or path.endswith(f".{end}") for end in chosen)

    def base_shape(self, path: str, parameter: str = "weight") -> tuple[int, ...] | None:
        """Return the shape of a layer's weight or other parameter in the base model; None if it is not known."""
        found = self.base.find(f"{path}.{parameter}") if self.base is not None else None
        return self.base.info(found).shape if self.base is not None and found is not None else None

    def is_conv1d(self, path: str) -> bool:
        """Return whether the base stores a layer's weight as (in, out).

        The base's architecture decides, as in PEFT, which corrects fan_in_fan_out by the class of each layer. If the
        architecture is not known, the adapter's fan_in_fan_out decides.
        """
        known = self.base.is_conv1d(path) if self.base is not None else None
        return bool(self.config.get("fan_in_fan_out")) if known is None else known

    def check_conv1d(self, path: str, out: int | None = None) -> bool:
        """Return the result of `is_conv1d`, checked against the known sizes.

        Args:
            out: the layer's output size; by default that of its bias in the base.
        Raises: AdapterError if only the adapter's fan_in_fan_out decides, and the sizes contradict it.
        """
        found, shape = self.is_conv1d(path), self.base_shape(path)
        if self.base is None or shape is None or len(shape) != 2 or self.base.is_conv1d(path) is not None:
            return found
        read_in, read_out = shape if found else shape[::-1]
        known_out = (out,) if out is not None else self.base_shape(path, "bias")
        if known_out == (read_in,) and read_in != read_out:
            raise AdapterError(
                f"{self.where(path)}: the weight in base model '{self.base.label}' is {list(shape)} and the layer's output "
                f"size {read_in}, which contradicts fan_in_fan_out={found} in the adapter's config, and the base's architecture "
                "is not known. Name the base's folder or Hub id with its config.json, or correct fan_in_fan_out."
            )
        return found

    def kernel_size(self, shape: tuple[int, int], path: str) -> tuple[int, ...]:
        """Return the kernel size of a convolution whose task vector is stored flattened; () for a linear layer.

        Raises: AdapterError if the name is that of a convolution and the base was not given, or does not fit.
        """
        known = self.base_shape(path)
        if known is not None:
            if math.prod(known) != math.prod(shape) or known[0] not in shape:
                raise AdapterError(
                    f"{self.where(path)}: the base's weight is {list(known)}, the adapter's task vector {list(shape)}. Is it "
                    "the base that the adapter was trained on?"
                )
            return known[2:]
        if "conv" in path.rpartition(".")[2].lower():
            raise AdapterError(
                f"{self.where(path)} seems to be a convolution, and the adapter does not store its kernel size. {NEEDS_BASE}"
            )
        return ()

    def tucker_kernel_size(self, shape: tuple[int, int], kernel: tuple[int, ...], path: str) -> tuple[int, ...]:
        """Return the kernel size of a convolution with a core tensor, which has two sizes even for a 1-d convolution."""
        if self.base_shape(path) is not None:
            return self.kernel_size(shape, path)
        if kernel[-1] == 1:
            raise AdapterError(
                f"{self.where(path)}: a core tensor over {list(kernel)} fits two kinds of convolution. {NEEDS_BASE}"
            )
        return kernel

    def refuse_settings(self, refused: Mapping[str, str]) -> None:
        """Refuse every setting of the config that is switched on and listed in `refused` (key → what it is)."""
        on = [key for key in refused if self.config.get(key) not in _OFF]
        if on:
            found = "; ".join(f"{refused[key]} ({key}={self.config[key]!r})" for key in on)
            raise AdapterError(
                f"adapter '{self.label}' uses {found}, which ties_peft cannot merge yet, and leaving it out would change "
                "what the adapter does. Train or convert it without, or leave it out."
            )


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
