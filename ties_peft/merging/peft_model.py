"""Read the adapters of a PEFT model as if they came from files, and add one.

All code that depends on PEFT's layers is here. Only the adapters' own tensors are read, and only those of the new adapter
are written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, check_is_list
from ..adapters.base_model import BaseModel
from ..adapters.contents import PREFIX, Contents
from ..adapters.tensors import MemoryTensors
from ..adapters.types import find_peft_type
from ..errors import AdapterError, CompatibilityError, RecipeError, one_line, unknown

WHOLE = {  # they lie outside the adapter's layers, and PEFT holds those of one adapter at a time
    "modules_to_save": "whole modules saved beside the adapter",
    "bias": "trained biases",
    "trainable_token_indices": "trained token embeddings",
}


def find_tuner(model: Any) -> Any:
    """Return PEFT's LoraModel, IA3Model or similar, which has the layers and their configs."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    model = getattr(model, "_modules", {}).get("_orig_mod", model)  # torch.compile
    if isinstance(model, PeftModel):
        for name, config in model.peft_config.items():
            if config.is_prompt_learning:
                find_peft_type(_plain(config.peft_type), name)  # raises: such a type has no task vector
        model = model.base_model
    if not isinstance(model, BaseTuner):
        raise RecipeError(
            f"peft_model is a {type(model).__name__}; expected a PeftModel with LoRA or (IA)³ adapters, without "
            "wrappers such as DistributedDataParallel around it."
        )
    return model


def check_names(tuner: Any, adapters: Sequence[str], name: str) -> None:
    """Check that the adapters exist, and that PEFT can add one under the new name."""
    if isinstance(adapters, (Mapping, Set)):
        check_is_list(adapters)
    if isinstance(adapters, str) or not all(isinstance(adapter, str) for adapter in adapters):
        raise RecipeError(f"adapters is {adapters!r}; expected a list of names of loaded adapters.")
    if not adapters:
        raise RecipeError(f"no adapters were given. Loaded are: {', '.join(tuner.peft_config)}.")
    for adapter in adapters:
        if adapter not in tuner.peft_config:
            raise RecipeError(unknown("adapter", adapter, tuner.peft_config))
    if not isinstance(name, str):
        raise RecipeError(f"adapter_name is {name!r}; expected the new adapter's name.")
    if name in tuner.peft_config:
        raise RecipeError(
            f"an adapter {name!r} is loaded already, and PEFT cannot hold two of one name. "
            "Take another name, or delete_adapter it first."
        )
    try:
        nn.ModuleDict({name: nn.Identity()})
        nn.ParameterDict({name: torch.zeros(0)})
    except (KeyError, AssertionError, AttributeError) as error:
        raise RecipeError(f"PyTorch cannot hold an adapter named {name!r}: {error}. Take another.") from None
    if any(name in path.split(".") for path, _ in tuner.named_parameters()):
        raise RecipeError(
            f"{name!r} is also a part of the names of the model's parameters, by which PEFT tells adapters "
            "apart: it would mix them up when it saves them. Take another name."
        )


def check_state(tuner: Any) -> None:
    """Check that no adapter is merged into the base weights, and that none routes to the others."""
    merged = sorted({name for _, layer in _layers(tuner) for name in layer.merged_adapters})
    if merged:
        raise RecipeError(
            f"{', '.join(merged)} is merged into the base weights, which PEFT would undo, with rounding "
            "errors, as soon as an adapter is added. Call unmerge_adapter() first."
        )
    routers = [name for name, config in tuner.peft_config.items() if getattr(config, "arrow_config", None)]
    if routers:
        raise RecipeError(
            f"the model has an Arrow router ({routers[0]!r}), which would take the merged adapter for one "
            "more expert. Merge in a model without it."
        )


def _layers(tuner: Any) -> list[tuple[str, Any]]:
    """Return PEFT's layers with their paths in the base model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(path, layer) for path, layer in tuner.model.named_modules() if isinstance(layer, BaseTunerLayer)]


class Slot(NamedTuple):
    """Where a tensor of an adapter lives: `getattr(owner, field)`."""

    owner: Any
    field: str
    tensor: Tensor


def _slots(tuner: Any, adapter: str) -> dict[str, Slot]:
    """Return every tensor of one adapter by its key in a file.

    They are read from the layers. The model's state dict tells adapters apart only by parts of names.
    """
    slots = {}
    for path, layer in _layers(tuner):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            held: Any = getattr(layer, attribute, ())
            entry = held[adapter] if hasattr(held, "keys") and adapter in held else None
            key = f"{PREFIX}{path}.{attribute}"
            if isinstance(entry, Tensor):
                slots[key] = Slot(held, adapter, entry)
            elif isinstance(entry, nn.Module):
                for part, owner in entry.named_modules(prefix=key):
                    own = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
                    slots |= {f"{part}.{name}": Slot(owner, name, tensor) for name, tensor in own}
    return slots


def open_loaded(tuner: Any, name: str) -> Adapter:
    """Return a loaded adapter as if it came from its files, with the lora scaling that its layers use.

    Raises: AdapterError if its files could not be merged either, or if its values are not in memory.
    """
    config = _plain(tuner.peft_config[name].to_dict())
    found = {key: slot.tensor for key, slot in _slots(tuner, name).items()}
    tensors = MemoryTensors(found)
    Contents(config, tensors, name).refuse_settings(WHOLE)
    for key, tensor in found.items():
        if tensor.device.type == "meta" or hasattr(tensor, "device_mesh"):
            where = "offloaded" if tensor.device.type == "meta" else "sharded"
            raise AdapterError(
                f"adapter {name!r}: tensor {key!r} is {where}, so its values are not in memory. "
                "Save the adapters and merge the folders with ties_peft.merge."
            )
    peft_type = find_peft_type(config.get("peft_type"), name)
    if peft_type.output_name != peft_type.name:
        raise AdapterError(
            f"adapter {name!r} is of type {peft_type.title}: a merge of it is a LoRA, for which a model of "
            f"{peft_type.title} layers has no place. Save the adapters and merge the folders with ties_peft.merge."
        )
    adapter = Adapter(config, tensors, name, _loaded_base(tuner, name))
    for path, layer in _layers(tuner):
        if name in getattr(layer, "scaling", ()):
            for module in [m for m in adapter.layout.values() if m.keys[0].startswith(f"{PREFIX}{path}.lora_")]:
                adapter.layout[module.name] = replace(module, scaling=float(layer.scaling[name]))
    return adapter


def _loaded_base(tuner: Any, name: str) -> BaseModel:
    """Return the model under an adapter: the classes of its layers, and the weights of layers with DoRA.

    Raises: AdapterError for other variants of LoRA, which do not compute s·B·A.
    """
    weights, conv1d = {}, {}
    for path, layer in _layers(tuner):
        conv1d[path] = type(layer.get_base_layer()).__name__ == "Conv1D"
        variant = getattr(layer, "lora_variant", {})
        if name not in variant:
            continue
        if not type(variant[name]).__name__.startswith("Dora"):
            raise AdapterError(
                f"adapter {name!r}, module {path!r} works by {type(variant[name]).__name__}, "
                "not by s·B·A, so ties_peft cannot merge it. Leave it out."
            )
        weights[f"{path}.weight"] = layer.get_base_layer().weight
    return _LoadedBase(MemoryTensors(weights), type(tuner.model).__name__, conv1d)


class _LoadedBase(BaseModel):
    """A loaded model, with the weights of some layers.

    Args:
        tensors: the weights.
        architecture: the model's class.
        conv1d: for each adapted layer, whether it is a Conv1D.
    """

    def __init__(self, tensors: MemoryTensors, architecture: str, conv1d: Mapping[str, bool]) -> None:
        super().__init__({name: (tensors, name) for name in tensors.names}, "the model's own")
        self.config = {"architectures": [architecture]}
        self._conv1d = conv1d

    def is_conv1d(self, module: str) -> bool | None:
        """Return whether a layer is a Conv1D, by its class."""
        return self._conv1d.get(module)


def _plain(value: Any) -> Any:
    """Return a config's value as in JSON: enums as their values, sets as sorted lists."""
    return json.loads(json.dumps(value, default=lambda one: sorted(one) if isinstance(one, Set) else str(one)))


class _ModelState:
    """The state of a model that adding an adapter must not change; by names, because PEFT recreates some parameters."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner
        self.active = tuner.active_adapter
        self.layers = [(layer, layer._active_adapter) for _, layer in _layers(tuner)]
        self.flags = {name: parameter.requires_grad for name, parameter in tuner.named_parameters()}
        self.addresses = self._addresses()

    def restore(self) -> None:
        """Restore which adapters are active, and the gradient flags."""
        self.tuner.active_adapter = self.active
        for layer, active in self.layers:
            layer._active_adapter = active
        for name, parameter in self.tuner.named_parameters():
            if self.flags.get(name, parameter.requires_grad) != parameter.requires_grad:
                parameter.requires_grad_(self.flags[name])

    def changed(self) -> list[str]:
        """Return the tensors whose values moved in memory, as when PEFT initialises from the base."""
        now = self._addresses()
        return [name for name, address in self.addresses.items() if now.get(name) != address]

    def _addresses(self) -> dict[str, int]:
        return {name: _address(t) for name, t in (*self.tuner.named_parameters(), *self.tuner.named_buffers())}


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a quantised form without storage of its own
        return id(tensor)


def add(tuner: Any, name: str, merged: Adapter, adapters: Sequence[str]) -> None:
    """Create the adapter in the layers, fill in its tensors, and check that nothing else changed.

    Raises: CompatibilityError; the adapter is removed again.
    """
    before = _ModelState(tuner)
    devices = {key: slot.tensor.device for adapter in adapters for key, slot in _slots(tuner, adapter).items()}
    try:
        _inject(tuner, name, _config(tuner, merged, adapters))
        _fill(tuner, name, merged, devices)
        changed = before.changed()
        if changed:
            raise CompatibilityError(
                f"PEFT changed {len(changed)} tensor(s) that are not of the new adapter, first "
                f"{changed[0]!r}. Load the model anew, and report this."
            )
    except BaseException:
        tuner.peft_config.pop(name, None)
        for _, layer in _layers(tuner):
            layer.delete_adapter(name)
        raise
    finally:
        before.restore()


def _inject(tuner: Any, name: str, config: Any) -> None:
    """Let PEFT create an adapter without changing the state of PyTorch's random numbers."""
    tuner.peft_config[name] = config
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            tuner.inject_adapter(tuner.model, name)
    except Exception as error:
        raise CompatibilityError(f"PEFT cannot add adapter {name!r}: {one_line(error)}") from error


def _config(tuner: Any, merged: Adapter, adapters: Sequence[str]) -> Any:
    """Return PEFT's config of the merged adapter, made from its own keys alone."""
    targets = set(merged.config["target_modules"])
    ends = tuple(f".{target}" for target in targets)
    config = dict(merged.config)
    if any(path.endswith(ends) and path not in targets for path, _ in tuner.model.named_modules()):
        config["target_modules"] = "|".join(map(re.escape, sorted(targets)))  # PEFT takes a list's entries as endings
    said = [getattr(tuner.peft_config[adapter], "target_parameters", None) for adapter in adapters]
    if config.get("target_parameters") and all(said) and len({frozenset(own or ()) for own in said}) == 1:
        config["target_parameters"] = sorted(said[0] or ())  # PEFT wants all adapters of a model to say the same
    return type(tuner.peft_config[adapters[0]])(**config)


def _fill(tuner: Any, name: str, merged: Adapter, devices: Mapping[str, torch.device]) -> None:
    """Copy every merged tensor to its place, frozen, on the device of the adapters' tensors."""
    slots = _slots(tuner, name)
    shapes = {key: tuple(slot.tensor.shape) for key, slot in slots.items()}
    wanted = {key: merged.tensors.info(key).shape for key in merged.tensors.names}
    if shapes != wanted:
        differing = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
        raise CompatibilityError(
            f"PEFT made other tensors for adapter {name!r} than were merged: {differing[0]!r} is "
            f"{shapes.get(differing[0])}, expected {wanted.get(differing[0])} ({len(differing)} such tensors)."
        )
    for key, slot in slots.items():
        tensor = merged.tensors.read(key).to(devices[key], copy=True)
        setattr(slot.owner, slot.field, nn.Parameter(tensor, requires_grad=False))
    for _, layer in _layers(tuner):
        for held in layer.children():
            if isinstance(held, nn.ModuleDict) and name in held:
                held[name].train(layer.training)
