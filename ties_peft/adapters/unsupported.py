"""Strangers: what is known of files that cannot be merged as they are, from their config and the tensors' names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import TiesPeftError
from .adapter import read_config
from .formats import recognise as foreign
from .sources import AdapterFiles
from .tensors import PickleFile, SafetensorsFile

UNKNOWN = "no adapter that is known here"
CONVERTS = "`ties-peft convert "  # a refusal that names the command is of what it can do


@dataclass(frozen=True)
class UnsupportedAdapter:
    """What one source is that cannot be merged as it is.

    Attributes:
        source: as it was asked for.
        fault: why it is refused, and what to do.
        what: what it is, in words; empty where there is nothing to look at.
        peft_type, base, task_type: as its config says.
        file: of weights; None where there is none.
        tensors, numbers: how many that file holds; None where it cannot be read.
        dtypes: of them, sorted.
        parts: how many modules each of its parts has that are plain LoRA; one part without a name where it has none.
        converts: whether `ties-peft convert` makes a PEFT adapter of it, as the fault then says.
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


def describe_unsupported(source: str, found: AdapterFiles, fault: str) -> UnsupportedAdapter:
    """What can be told of files that were refused; nothing of the tensors is read but names, shapes and dtypes.

    Args:
        source: as it was asked for.
        found: its files.
        fault: the refusal.
    """
    label = source
    config = _or_none(lambda: read_config(found.folder, label)) or {}
    form = _or_none(lambda: foreign.form_of(found, config or None, label))
    facts: dict[str, Any] = {}
    if form is not None:
        facts = {"what": form.title, "parts": dict(sorted(form.parts.items()))}
    elif "peft_type" in config:
        facts = {"what": f"a PEFT adapter of type {config['peft_type']}"}
    else:
        what = "of a config that is not PEFT's" if config else foreign.other_model(found.folder)
        facts = {"what": what or UNKNOWN}
    return UnsupportedAdapter(
        label, fault, **facts, **_said(config), **_weights(found, label), converts=CONVERTS in fault
    )


def _said(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of itself."""
    named = {"peft_type": "peft_type", "base_model_name_or_path": "base", "task_type": "task_type"}
    return {ours: str(config[theirs]) for theirs, ours in named.items() if config.get(theirs)}


def _weights(found: AdapterFiles, label: str) -> dict[str, Any]:
    path = foreign.candidate(found)
    if path is None:
        return {}
    opened = (SafetensorsFile if path.suffix == ".safetensors" else PickleFile)(path, label)
    infos = _or_none(lambda: [opened.info(name) for name in opened.names])
    known = {"file": path.name}
    if infos is None:
        return known
    return {
        **known,
        "tensors": len(infos),
        "numbers": sum(math.prod(info.shape) for info in infos),
        "dtypes": tuple(sorted({info.dtype for info in infos})),
    }


def _or_none(ask: Any) -> Any:
    """What a question gives; None where the files do not let it be answered."""
    try:
        return ask()
    except (TiesPeftError, OSError):
        return None
