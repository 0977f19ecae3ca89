"""Recognise what an adapter's files are if they are not PEFT's, and refuse them with the way to convert them.

A file of weights is recognised by the names of its tensors (see `formats`). `ties-peft convert` turns what can be converted
exactly into a PEFT adapter, and the message that refuses the file shows the command. `describe_unsupported` says what is
known of files that were refused.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import AdapterError, TiesPeftError, some
from .config_values import read_object
from .formats import LoraFile, formats, read_file
from .sources import (
    ADAPTER_CONFIG,
    FULL_MODEL_CONFIGS,
    GGUF,
    OTHER_WEIGHT_FILES,
    WEIGHT_FILES,
    WEIGHT_SUFFIXES,
    AdapterFiles,
    adapter_subfolders,
    list_folder,
    refuse_gguf,
)
from .tensors import open_tensors

Value = TypeVar("Value")
UNKNOWN = "not an adapter of a known format"
CONVERT = "ties-peft convert "  # in a refusal: the command converts the file


def read_config(folder: Path, label: str) -> dict[str, Any] | None:
    """Return a folder's adapter_config.json; None if there is none.

    Raises: AdapterError if it is not a JSON object.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        return read_object(path)
    except ValueError as error:
        raise AdapterError(
            f"adapter '{label}': {ADAPTER_CONFIG} is {error}. Correct it, or save the adapter again."
        ) from None


def weights_of(files: AdapterFiles) -> Path | None:
    """Return the file of weights of an adapter that may not be PEFT's; None if there is none."""
    if files.weights is not None:
        return files.weights
    known = [files.folder / name for name in (*WEIGHT_FILES, *OTHER_WEIGHT_FILES)]
    others = sorted(files.folder.glob("*.safetensors")) if files.folder.is_dir() else []
    return next((path for path in (*known, *others) if path.is_file()), None)


def recognise(files: AdapterFiles, config: Mapping[str, Any] | None, label: str) -> LoraFile | None:
    """Return what an adapter's files are if they are not PEFT's; None if they are, or are of no known format.

    Args:
        files: of the adapter.
        config: adapter_config.json; None if there is none.
        label: the adapter's name in messages.
    Raises: AdapterError if the file cannot be read, or a folder holds several LoRAs of image models.
    """
    is_peft = config is not None and "peft_type" in config
    if is_peft and (files.weights is None or files.weights.name in WEIGHT_FILES):
        return None
    path = weights_of(files)
    file = read_file(path, config or {}, label) if path is not None else None
    if file is not None and file.format.is_image and files.weights is None:
        _refuse_several(files.folder, file.path, label)
    return None if file is None or (is_peft and file.format.name == "PEFT") else file


def _refuse_several(folder: Path, chosen: Path, label: str) -> None:
    """Refuse a folder of several files of weights of which none has a known name."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if chosen.name not in (*WEIGHT_FILES, *OTHER_WEIGHT_FILES) and len(names) > 1:
        raise AdapterError(
            f"adapter '{label}': the folder holds {len(names)} files of weights: {some(names, 6)}. Name one of them, or all: "
            f"'{label.rstrip('/')}/*.safetensors'."
        )


def refuse(files: AdapterFiles, config: Mapping[str, Any] | None, label: str, file: LoraFile | None) -> None:
    """Refuse an adapter's files if they are not PEFT's.

    Args:
        files, config, label: as in `recognise`.
        file: what `recognise` returned.
    Raises: AdapterError saying what they are and what to do.
    """
    if file is None and config is not None and "peft_type" in config:
        return
    if file is not None and (file.format.name != "PEFT" or config is None):
        refuse_file(file, config, label)
    if config is None:
        _refuse_without_config(files, label)
    _refuse_config(config, label)


def refuse_file(file: LoraFile, config: Mapping[str, Any] | None, label: str) -> NoReturn:
    """Refuse a file of another format, and say how it becomes a PEFT adapter, if it can.

    Raises: AdapterError.
    """
    if not file.is_plain:
        rest = f"; {len(file.rest)} other tensors, such as {file.rest[0]!r}" if file.rest else ""
        raise AdapterError(
            f"adapter '{label}': {file}{rest}, not a PEFT adapter. ties_peft cannot merge or convert it: its updates are no "
            "plain LoRA. Leave it out, or convert it where it was made."
        )
    part = f" --part {' or '.join(sorted(file.parts))}" if len(file.parts) > 1 else ""
    raise AdapterError(
        f"adapter '{label}': {file}, {file.format.advice(_convert(label) + part, has_config=config is not None)}"
    )


def _convert(label: str) -> str:
    return f"{CONVERT}{shlex.quote(label)} --out DIR"


def full_model(folder: Path) -> str | None:
    """Return which full model a folder holds; None if it holds none."""
    for name in FULL_MODEL_CONFIGS:
        try:
            config = read_object(folder / name)
        except ValueError:
            continue
        named = [config[key] for key in ("architectures", "_class_name", "model_type") if config.get(key)]
        what = named[0][0] if named and isinstance(named[0], list) else next(iter(named), name)
        return f"a full model ({what})"
    return None


def _refuse_without_config(files: AdapterFiles, label: str) -> NoReturn:
    inside = adapter_subfolders(files.folder)
    if inside and files.weights is None:
        example = f"{label}{'/' if files.folder.name == label.rpartition('/')[2] else ':'}{inside[0]}"
        raise AdapterError(
            f"adapter '{label}': there is no {ADAPTER_CONFIG} in it, but in {len(inside)} of its sub-folders: {some(inside, 20)}. "
            f"Name one of them, such as {example}."
        )
    model = full_model(files.folder)
    if model is not None:
        raise AdapterError(
            f"adapter '{label}' is {model}, not an adapter: there is no {ADAPTER_CONFIG} beside its config. ties_peft "
            "merges adapters; mergekit merges full models. Name the folder of an adapter that was trained on it."
        )
    if files.weights is not None:
        raise AdapterError(
            f"adapter '{label}': there is no {ADAPTER_CONFIG} beside {files.weights.name}, and its tensors are no "
            "LoRA's. Name the folder that PEFT's save_pretrained wrote."
        )
    suffixes = {path.suffix for path in files.folder.glob("*")} if files.folder.is_dir() else set()
    if GGUF in suffixes and not suffixes & set(WEIGHT_SUFFIXES):
        refuse_gguf(label)
    seen = f" It holds {list_folder(files.folder)}." if files.folder.is_dir() else ""
    hint = " None of them is a LoRA of a known format." if suffixes & set(WEIGHT_SUFFIXES) else ""
    raise AdapterError(
        f"adapter '{label}': there is no {ADAPTER_CONFIG} in it.{seen}{hint} Name the folder that PEFT's "
        "save_pretrained wrote."
    )


def _refuse_config(config: Mapping[str, Any], label: str) -> NoReturn:
    for form in formats():
        fault = form.config_fault(config, _convert(label))
        if fault is not None:
            raise AdapterError(f"adapter '{label}' {fault}")
    if isinstance(config.get("config"), dict) and {"model_class", "model_name", "model_type"} & config.keys():
        raise AdapterError(
            f"adapter '{label}': {ADAPTER_CONFIG} is of the library `adapters` (AdapterHub), not of PEFT; ties_peft cannot "
            "merge or convert that. Train it with PEFT, or leave it out."
        )
    keys = ", ".join(str(key)[:30] for key in sorted(config)[:8]) or "none"
    raise AdapterError(
        f"adapter '{label}': {ADAPTER_CONFIG} has no peft_type, so it is not PEFT's (its keys: {keys}). If it is a PEFT "
        'adapter, write its type into that file, such as "peft_type": "LORA"; otherwise leave it out.'
    )


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
    return UnsupportedAdapter(source, fault, what, **facts, parts=parts, converts=f"`{CONVERT}" in fault)


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
