"""Layers: what adapters hold whole of one layer, and how their tensors compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base_model import BaseModel
from .extra_tensors import BASE, LAYER, TOKENS, ExtraTensor, Holder, TensorsByAdapter
from .tensors import FLOATING

ROWS = 8  # of a table in a message


@dataclass(frozen=True)
class ExtraLayer:
    """One layer that some adapters hold whole, and what becomes of it.

    Attributes:
        module: its path in the base model.
        role: layer, plain, bias, base or tokens; see `riders`.
        by_adapter: for each adapter that holds it, by its place, its tensors by name.
        used: the adapters whose values go into the result; none where it is left out.
        outcome: identical, only, kept, average, merged, unchanged or left out.
    """

    module: str
    role: str
    by_adapter: TensorsByAdapter
    used: tuple[int, ...] = ()
    outcome: str = ""

    @property
    def tensors(self) -> Mapping[str, ExtraTensor]:
        """The tensors of the adapters whose values are used, of the first that has each; else of the first holder."""
        found: dict[str, ExtraTensor] = {}
        for place in self.used or (min(self.by_adapter),):
            found = {**self.by_adapter[place], **found}
        return found


def layer_role(held: TensorsByAdapter, places: Sequence[int]) -> str:
    """The form of a layer that adapters may hold in several: trained whole in one, it is so."""
    forms = [rider.role for place in places for rider in held[place].values()]
    return next((form for form in (TOKENS, LAYER, BASE) if form in forms), forms[0])


def is_mergeable(layer: ExtraLayer, adapters: Sequence[Holder]) -> bool:
    """Whether policy merge takes a layer: one of float tensors, which not all of several adapters hold alike."""
    alike = 1 < len(adapters) == len(layer.by_adapter) and all_equal(layer, adapters)
    return layer.role != TOKENS and _fractions(layer, adapters) and not alike


def equals_base(layer: ExtraLayer, adapters: Sequence[Holder], base: BaseModel) -> bool:
    """Whether all that is held of a layer are copies of the base's own weight, with the base's values."""
    for place, own in layer.by_adapter.items():
        for name, rider in own.items():
            found = base.find(f"{layer.module}.{name}") if rider.role == BASE else None
            if found is None or tuple(base.info(found).shape) != rider.shape:
                return False
            if not _equal(base.read(found), adapters[place].tensors.read(rider.key)):
                return False
    return True


def all_equal(layer: ExtraLayer, adapters: Sequence[Holder]) -> bool:
    """Whether all that hold a layer hold the same values; two tensors are in memory at a time."""
    if not _same_form(layer):
        return False
    first, *rest = sorted(layer.by_adapter)
    for name, rider in layer.by_adapter[first].items():
        tensor = adapters[first].tensors.read(rider.key)
        for place in rest:
            other = adapters[place].tensors.read(layer.by_adapter[place][name].key)
            if not _equal(tensor, other):
                return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))


def _same_form(layer: ExtraLayer) -> bool:
    forms = [{name: (r.shape, r.rows) for name, r in own.items()} for own in layer.by_adapter.values()]
    return all(form == forms[0] for form in forms)


def can_average(layer: ExtraLayer, adapters: Sequence[Holder]) -> bool:
    """Whether all that hold a layer hold the same tensors of it, of numbers with a fraction."""
    return _same_form(layer) and _fractions(layer, adapters)


def _fractions(layer: ExtraLayer, adapters: Sequence[Holder]) -> bool:
    keys = [(place, rider.key) for place, own in layer.by_adapter.items() for rider in own.values()]
    return all(adapters[place].tensors.info(key).dtype in FLOATING for place, key in keys)


def difference_table(layers: Sequence[ExtraLayer], names: Sequence[str]) -> str:
    """A row for each layer that differs: what each adapter holds of it."""
    rows = []
    for layer in layers[:ROWS]:
        sizes = {place: ", ".join(rider.size for rider in own.values()) for place, own in layer.by_adapter.items()}
        if len(set(sizes.values())) == 1:
            holders = ", ".join(names[place] for place in sorted(sizes))
            text = f"{next(iter(sizes.values()))}, with unlike values in {holders}"
        else:
            text = holders_text(layer, names)
        rows.append(f"  {layer.module}: {text}")
    more = f"\n  … and {len(layers) - ROWS} more" if len(layers) > ROWS else ""
    return "\n".join(rows) + more


def holders_text(layer: ExtraLayer, names: Sequence[str]) -> str:
    """What each adapter holds of a layer."""
    own = {
        place: ", ".join(rider.size for rider in riders.values()) for place, riders in sorted(layer.by_adapter.items())
    }
    return ", ".join(f"{names[place]} has {size}" for place, size in own.items())
