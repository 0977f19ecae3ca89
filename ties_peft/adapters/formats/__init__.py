"""The file formats of other trainers that are recognised, found by looking into this folder."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import AdapterError
from ..found_classes import all_classes
from ..tensors import open_tensors
from .base import PLAIN, Format, LoraFile, LoraModule

__all__ = ["Format", "LoraFile", "LoraModule", "formats", "read_file"]


@functools.cache
def formats() -> tuple[Format, ...]:
    """Return every format, in the order in which they are tried."""
    found = [cls() for cls in all_classes(__name__, Format) if "name" in vars(cls)]
    return tuple(sorted(found, key=lambda one: one.order))


def read_file(path: Path, config: Mapping[str, Any], label: str) -> LoraFile | None:
    """Recognise a file of weights by the names of its tensors; return None if it is of no known format.

    Args:
        path: of the file.
        config: adapter_config.json beside it; empty if there is none.
        label: the adapter's name in messages.
    Raises: AdapterError if the file cannot be read.
    """
    tensors = open_tensors(path, label)
    form = next((one for one in formats() if one.matches(tensors.names, path)), None)
    if form is None:
        return None
    modules: dict[tuple[str, str], LoraModule] = {}
    rest = []
    for key in tensors.names:
        parsed = form.parse(key)
        if parsed is None:
            rest.append(key)
            continue
        part, name, side = parsed
        module = modules.setdefault((part, name), LoraModule(part, name))
        if side in module.keys:
            raise AdapterError(
                f"adapter '{label}': {key!r} and {module.keys[side]!r} are the same tensor of the same module. Remove one "
                "of them from the file."
            )
        module.keys[side] = key
    found = tuple(modules[place] for place in sorted(modules))
    kinds = sorted({module.kind for module in found})
    variant = form.variant(rest, config) or (", ".join(kinds) if len(kinds) > 1 else "")
    return LoraFile(form, path, tensors, found, tuple(rest), variant, kinds[0] if len(kinds) == 1 else PLAIN)
