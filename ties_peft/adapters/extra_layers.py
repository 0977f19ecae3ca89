"""Extra layers: the layers that some adapters of a merge hold as a whole, and how their tensors compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Adapter
from .base_model import BaseModel
from .extra_tensors import BASE, LAYER, TOKENS, ExtraTensor, TensorsByAdapter
from .tensors import FLOATING

ROWS = 8  # of a table in a message


@dataclass(frozen=True)
class ExtraLayer:
    """One layer that some adapters hold as a whole, and what the merge does with it.

    Attributes:
        module: its path in the base model.
        role: layer, plain, bias, base or tokens; see `extra_tensors`.
        by_adapter: its tensors in each adapter that holds it.
        used: the indices of the adapters whose values go into the result; empty if the layer is left out.
        outcome: identical, only, kept, average, merged, unchanged or left out; empty if none is possible.
    """

    module: str
    role: str
    by_adapter: TensorsByAdapter
    used: tuple[int, ...] = ()
    outcome: str = ""

    @property
    def tensors(self) -> Mapping[str, ExtraTensor]:
        """Each tensor of the layer, from the first adapter that holds it among those used, or else from the first holder."""
        found: dict[str, ExtraTensor] = {}
        for index in self.used or (min(self.by_adapter),):
            found = {**self.by_adapter[index], **found}
        return found


def layer_role(tensors: TensorsByAdapter, indices: Sequence[int]) -> str:
    """Return the role of a layer; where it differs between adapters, tokens and layer come before base and the others."""
    roles = [extra.role for index in indices for extra in tensors[index].values()]
    return next((role for role in (TOKENS, LAYER, BASE) if role in roles), roles[0])


def is_mergeable(layer: ExtraLayer, adapters: Sequence[Adapter]) -> bool:
    """Return whether policy `merge` merges a layer: its tensors are floats, and not equal in all of several adapters."""
    equal = 1 < len(adapters) == len(layer.by_adapter) and all_equal(layer, adapters)
    return layer.role != TOKENS and _all_floating(layer, adapters) and not equal


def equals_base(layer: ExtraLayer, adapters: Sequence[Adapter], base: BaseModel) -> bool:
    """Return whether all tensors of a layer are copies of the base model's weights with the same values."""
    for index, own in layer.by_adapter.items():
        for name, extra in own.items():
            found = base.find(f"{layer.module}.{name}") if extra.role == BASE else None
            if found is None or tuple(base.info(found).shape) != extra.shape:
                return False
            if not _equal(base.read(found), adapters[index].tensors.read(extra.key)):
                return False
    return True


def all_equal(layer: ExtraLayer, adapters: Sequence[Adapter]) -> bool:
    """Return whether all adapters that hold a layer hold the same values; two tensors are in memory at a time."""
    if not _same_shapes(layer):
        return False
    first, *rest = sorted(layer.by_adapter)
    for name, extra in layer.by_adapter[first].items():
        tensor = adapters[first].tensors.read(extra.key)
        for index in rest:
            other = adapters[index].tensors.read(layer.by_adapter[index][name].key)
            if not _equal(tensor, other):
                return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))


def _same_shapes(layer: ExtraLayer) -> bool:
    shapes = [{name: (extra.shape, extra.rows) for name, extra in own.items()} for own in layer.by_adapter.values()]
    return all(own == shapes[0] for own in shapes)


def can_average(layer: ExtraLayer, adapters: Sequence[Adapter]) -> bool:
    """Return whether all adapters that hold a layer hold the same tensors of it, as floats."""
    return _same_shapes(layer) and _all_floating(layer, adapters)


def _all_floating(layer: ExtraLayer, adapters: Sequence[Adapter]) -> bool:
    keys = [(index, extra.key) for index, own in layer.by_adapter.items() for extra in own.values()]
    return all(adapters[index].tensors.info(key).dtype in FLOATING for index, key in keys)


def difference_table(layers: Sequence[ExtraLayer], names: Sequence[str]) -> str:
    """Return a table with a row for each layer: what each adapter holds of it."""
    rows = []
    for layer in layers[:ROWS]:
        sizes = _sizes(layer)
        if len(set(sizes.values())) == 1:
            holders = ", ".join(names[index] for index in sizes)
            text = f"{next(iter(sizes.values()))}, with different values in {holders}"
        else:
            text = holders_text(layer, names)
        rows.append(f"  {layer.module}: {text}")
    more = f"\n  … and {len(layers) - ROWS} more" if len(layers) > ROWS else ""
    return "\n".join(rows) + more


def holders_text(layer: ExtraLayer, names: Sequence[str]) -> str:
    """Return what each adapter holds of a layer, in words."""
    return ", ".join(f"{names[index]} has {size}" for index, size in _sizes(layer).items())


def _sizes(layer: ExtraLayer) -> dict[int, str]:
    by_index = sorted(layer.by_adapter.items())
    return {index: ", ".join(extra.size for extra in own.values()) for index, own in by_index}
