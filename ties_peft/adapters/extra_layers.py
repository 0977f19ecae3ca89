"""Layers: what adapters hold whole of one layer, and how their tensors compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base_model import BaseModel
from .extra_tensors import BASE, LAYER, TOKENS, Held, Holder, Rider
from .tensors import FLOATING

ROWS = 8  # of a table in a message


@dataclass(frozen=True)
class Layer:
    """One layer that some adapters hold whole, and what becomes of it.

    Attributes:
        module: its path in the base model.
        form: layer, plain, bias, base or tokens; see `riders`.
        held: for each adapter that holds it, by its place, its tensors by name.
        places: the adapters whose values go into the result; none where it is left out.
        fate: identical, only, kept, average, merged, unchanged or left out.
    """

    module: str
    form: str
    held: Held
    places: tuple[int, ...] = ()
    fate: str = ""

    @property
    def any(self) -> Mapping[str, Rider]:
        """The tensors of the adapters whose values are used, of the first that has each; else of the first holder."""
        found: dict[str, Rider] = {}
        for place in self.places or (min(self.held),):
            found = {**self.held[place], **found}
        return found


def form_of(held: Held, places: Sequence[int]) -> str:
    """The form of a layer that adapters may hold in several: trained whole in one, it is so."""
    forms = [rider.form for place in places for rider in held[place].values()]
    return next((form for form in (TOKENS, LAYER, BASE) if form in forms), forms[0])


def goes_in(layer: Layer, adapters: Sequence[Holder]) -> bool:
    """Whether policy merge takes a layer: one of float tensors, which not all of several adapters hold alike."""
    alike = 1 < len(adapters) == len(layer.held) and agree(layer, adapters)
    return layer.form != TOKENS and _fractions(layer, adapters) and not alike


def unchanged(layer: Layer, adapters: Sequence[Holder], base: BaseModel) -> bool:
    """Whether all that is held of a layer are copies of the base's own weight, with the base's values."""
    for place, own in layer.held.items():
        for name, rider in own.items():
            found = base.find(f"{layer.module}.{name}") if rider.form == BASE else None
            if found is None or tuple(base.info(found).shape) != rider.shape:
                return False
            if not _equal(base.read(found), adapters[place].tensors.read(rider.key)):
                return False
    return True


def agree(layer: Layer, adapters: Sequence[Holder]) -> bool:
    """Whether all that hold a layer hold the same values; two tensors are in memory at a time."""
    if not _same_form(layer):
        return False
    first, *rest = sorted(layer.held)
    for name, rider in layer.held[first].items():
        tensor = adapters[first].tensors.read(rider.key)
        for place in rest:
            other = adapters[place].tensors.read(layer.held[place][name].key)
            if not _equal(tensor, other):
                return False
    return True


def _equal(one: Tensor, other: Tensor) -> bool:
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))


def _same_form(layer: Layer) -> bool:
    forms = [{name: (r.shape, r.rows) for name, r in own.items()} for own in layer.held.values()]
    return all(form == forms[0] for form in forms)


def has_mean(layer: Layer, adapters: Sequence[Holder]) -> bool:
    """Whether all that hold a layer hold the same tensors of it, of numbers with a fraction."""
    return _same_form(layer) and _fractions(layer, adapters)


def _fractions(layer: Layer, adapters: Sequence[Holder]) -> bool:
    keys = [(place, rider.key) for place, own in layer.held.items() for rider in own.values()]
    return all(adapters[place].tensors.info(key).dtype in FLOATING for place, key in keys)


def table(layers: Sequence[Layer], names: Sequence[str]) -> str:
    """A row for each layer that differs: what each adapter holds of it."""
    rows = []
    for layer in layers[:ROWS]:
        sizes = {place: ", ".join(rider.size for rider in own.values()) for place, own in layer.held.items()}
        if len(set(sizes.values())) == 1:
            holders = ", ".join(names[place] for place in sorted(sizes))
            text = f"{next(iter(sizes.values()))}, with unlike values in {holders}"
        else:
            text = held_text(layer, names)
        rows.append(f"  {layer.module}: {text}")
    more = f"\n  … and {len(layers) - ROWS} more" if len(layers) > ROWS else ""
    return "\n".join(rows) + more


def held_text(layer: Layer, names: Sequence[str]) -> str:
    """What each adapter holds of a layer."""
    own = {place: ", ".join(rider.size for rider in riders.values()) for place, riders in sorted(layer.held.items())}
    return ", ".join(f"{names[place]} has {size}" for place, size in own.items())
