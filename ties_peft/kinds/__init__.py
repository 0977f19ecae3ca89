"""The types of adapter that can be merged, found by looking into this folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from ..errors import AdapterError, printable
from .base import Kind, Module, Written

__all__ = ["Kind", "Module", "Written", "kind_of", "kinds", "written_as"]


@functools.cache
def kinds() -> dict[str, Kind]:
    """Every kind by its PEFT type."""
    found: dict[str, Kind] = {}
    for entry in pkgutil.iter_modules(__path__):
        if entry.name == "base":
            continue
        module = importlib.import_module(f"{__name__}.{entry.name}")
        own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
        found.update({kind.peft_type: kind for c in own if issubclass(c, Kind) for kind in c.all()})
    return dict(sorted(found.items()))


def written_as(kind: Kind) -> Written:
    """The kind that a merge of adapters of this kind is written as."""
    found = next(other for other in kinds().values() if other.name == kind.writes)
    assert isinstance(found, Written)
    return found


def kind_of(peft_type: object, label: str) -> Kind:
    """The kind of an adapter by the peft_type of its config.

    Raises: AdapterError naming the type, where it is missing, unknown or not supported yet.
    """
    if not isinstance(peft_type, str) or not peft_type:
        raise AdapterError(
            f"adapter '{label}': peft_type is {printable(repr(peft_type))} in adapter_config.json; "
            f"expected one of {', '.join(kinds())}. Is this a PEFT adapter?"
        )
    if peft_type.upper() not in kinds():
        raise AdapterError(
            f"adapter '{label}' is of PEFT type '{printable(peft_type)}', which ties_peft cannot merge yet; "
            f"it merges {', '.join(kinds())}. Leave it out."
        )
    return kinds()[peft_type.upper()]
