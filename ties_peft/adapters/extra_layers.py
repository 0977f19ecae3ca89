"""Extra layers: the layers that some adapters of a merge hold as a whole, and how their tensors compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .adapter import Adapter
from .base_model import BaseModel
from .extra_tensors import BASE, LAYER, TOKENS, ExtraTensor
from .tensors import FLOATING


@dataclass(frozen=True)
class ExtraLayer:
    """One layer that some adapters hold as a whole, and what the merge does with it.

    Attributes:
        module: its path in the base model.
        by_adapter: its tensors by name, for each adapter that holds it, by the adapter's place in the merge.
        adapters, names: of the merge.
        used: the places of the adapters whose values go into the result; empty if the layer is left out.
        outcome: identical, only, kept, average, merged, unchanged or left out; empty if none is possible.
    """

    module: str
    by_adapter: Mapping[int, Mapping[str, ExtraTensor]]
    adapters: Sequence[Adapter] = field(repr=False, compare=False)
    names: Sequence[str]
    used: tuple[int, ...] = ()
    outcome: str = ""

    @cached_property
    def role(self) -> str:
        """Its role (see `extra_tensors`); where adapters differ, tokens and layer come before base and the others."""
        roles = [extra.role for place in self.used or self.holders for extra in self.by_adapter[place].values()]
        return next((role for role in (TOKENS, LAYER, BASE) if role in roles), roles[0])

    @cached_property
    def holders(self) -> tuple[int, ...]:
        """The places in the merge of the adapters that hold it."""
        return tuple(sorted(self.by_adapter))

    @cached_property
    def tensors(self) -> Mapping[str, ExtraTensor]:
        """Each tensor of the layer, from the first adapter that holds it among those used, or else from the first holder."""
        found: dict[str, ExtraTensor] = {}
        for place in self.used or self.holders[:1]:
            found = {**self.by_adapter[place], **found}
        return found

    @property
    def all_floating(self) -> bool:
        """Whether no tensor holds whole numbers."""
        keys = [(place, extra.key) for place, own in self.by_adapter.items() for extra in own.values()]
        return all(self.adapters[place].tensors.info(key).dtype in FLOATING for place, key in keys)

    @property
    def can_average(self) -> bool:
        """Whether all adapters that hold it hold the same tensors, as floats."""
        return self._same_shapes and self.all_floating

    @property
    def is_mergeable(self) -> bool:
        """Whether policy `merge` merges it: its tensors are floats, and not equal in all of several adapters."""
        equal = 1 < len(self.adapters) == len(self.by_adapter) and self.all_equal
        return self.role != TOKENS and self.all_floating and not equal

    @property
    def all_equal(self) -> bool:
        """Whether all adapters that hold it hold the same values; two tensors are in memory at a time."""
        first, *rest = self.holders
        for name in self.by_adapter[first] if self._same_shapes else ():
            tensor = self.read(first, name)
            if not all(_equal(tensor, self.read(place, name)) for place in rest):
                return False
        return self._same_shapes

    def equals_base(self, base: BaseModel) -> bool:
        """Return whether all tensors are copies of the base model's weights with the same values."""
        for place, own in self.by_adapter.items():
            for name, extra in own.items():
                found = base.find(f"{self.module}.{name}") if extra.role == BASE else None
                if found is None or tuple(base.info(found).shape) != extra.shape:
                    return False
                if not _equal(base.read(found), self.read(place, name)):
                    return False
        return True

    def read(self, place: int, name: str) -> Tensor:
        """Return one tensor of an adapter that holds it."""
        return self.adapters[place].tensors.read(self.by_adapter[place][name].key)

    def contents(self) -> str:
        """Describe what each adapter holds of it."""
        return ", ".join(f"{self.names[place]} has {size}" for place, size in self._sizes.items())

    def difference(self) -> str:
        """Describe how the adapters differ in it."""
        if len(sizes := set(self._sizes.values())) > 1:
            return self.contents()
        return f"{sizes.pop()}, with different values in {', '.join(self.names[place] for place in self.holders)}"

    @property
    def _sizes(self) -> dict[int, str]:
        return {place: ", ".join(extra.size for extra in self.by_adapter[place].values()) for place in self.holders}

    @property
    def _same_shapes(self) -> bool:
        shapes = [{name: (extra.shape, extra.rows) for name, extra in own.items()} for own in self.by_adapter.values()]
        return all(own == shapes[0] for own in shapes)


def _equal(one: Tensor, other: Tensor) -> bool:
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))
