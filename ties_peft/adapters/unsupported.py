"""Unsupported adapters: what is known, from their config and the names of their tensors, of files that cannot be merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import TiesPeftError
from .adapter import read_config
from .recognise import full_model, recognise, weights_of
from .sources import AdapterFiles
from .tensors import open_tensors

Value = TypeVar("Value")
UNKNOWN = "not an adapter of a known format"
CONVERT = "`ties-peft convert "  # in the reason of files that this command converts


@dataclass(frozen=True)
class UnsupportedAdapter:
    """A source that cannot be merged as it is.

    Attributes:
        source: as it was asked for.
        fault: why it is refused, and what to do.
        what: what it is, in words; empty if there is nothing to look at.
        peft_type, base, task_type: as its config says.
        file: of weights; None if there is none.
        tensors, numbers: how many that file holds; None if it cannot be read.
        dtypes: of its tensors, sorted.
        parts: the number of modules of each of its parts that are plain LoRA; a file without parts has one without a name.
        converts: whether `ties-peft convert` makes a PEFT adapter of it, as `fault` then says.
    """

    source: str
    fault: str
    what: str = ""
    peft_type: str | None = None
    base: str | None = None
    task_type: str | None = None
    file: str | None = None
    tensors: int | None = None
    numbers: int | None = None
    dtypes: tuple[str, ...] = ()
    parts: Mapping[str, int] = field(default_factory=dict)
    converts: bool = False


def describe_unsupported(source: str, files: AdapterFiles, fault: str) -> UnsupportedAdapter:
    """Describe files that were refused, by their config and the names, shapes and dtypes of their tensors.

    Args:
        source: as it was asked for.
        files: of the adapter.
        fault: the message that refused them.
    """
    config = _or_none(lambda: read_config(files.folder, source)) or {}
    file = _or_none(lambda: recognise(files, config or None, source))
    parts: Mapping[str, int] = {}
    if file is not None:
        what, parts = file.title, dict(sorted(file.parts.items()))
    elif "peft_type" in config:
        what = f"a PEFT adapter of type {config['peft_type']}"
    elif config:
        what = "of a config that is not PEFT's"
    else:
        what = full_model(files.folder) or UNKNOWN
    named = {"peft_type": "peft_type", "base_model_name_or_path": "base", "task_type": "task_type"}
    facts: dict[str, Any] = {ours: str(config[theirs]) for theirs, ours in named.items() if config.get(theirs)}
    facts |= _weights(files, source)
    return UnsupportedAdapter(source, fault, what, **facts, parts=parts, converts=CONVERT in fault)


def _weights(files: AdapterFiles, label: str) -> dict[str, Any]:
    path = weights_of(files)
    if path is None:
        return {}
    tensors = open_tensors(path, label)
    infos = _or_none(lambda: [tensors.info(name) for name in tensors.names])
    if infos is None:
        return {"file": path.name}
    return {
        "file": path.name,
        "tensors": len(infos),
        "numbers": sum(math.prod(info.shape) for info in infos),
        "dtypes": tuple(sorted({info.dtype for info in infos})),
    }


def _or_none(read: Callable[[], Value]) -> Value | None:
    """Return what a function returns; None if the files cannot be read."""
    try:
        return read()
    except (TiesPeftError, OSError):
        return None
