"""Tensor files: read named tensors lazily from a safetensors file, a `.bin` of old releases, or memory.

No code in a file is executed: safetensors holds none, and `.bin` is read by PyTorch's weights-only loader. A file that
cannot be read raises an `AdapterError` that says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterError, one_line

LFS_POINTER = b"version https://git-lfs"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
FLOATING = frozenset(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TensorFile:
    """The contents of a safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class TensorSource(Protocol):
    """Named tensors, read one at a time."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, in an order that is always the same."""

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype."""

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in its own dtype."""


class MemoryTensors:
    """Tensors that are already in memory, on any device; each is brought to the CPU when it is read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._sorted = dict(sorted(tensors.items()))

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return self._sorted

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors: sorted, those of a `PickleFile` in the order of the file, as its digest covers them."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype."""
        tensor = self._tensors[name]
        return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, without its gradient; one that is there already is not copied."""
        return self._tensors[name].detach().cpu()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start…stop of a tensor."""
        return self._tensors[name][start:stop].detach().cpu()


class Header(NamedTuple):
    """What the header of a safetensors file says.

    Attributes:
        tensors: shape and dtype by name, sorted.
        spans: for each tensor, the position of its first byte in the file and the number of its bytes.
        metadata: the file's own entries.
        fingerprint: of the file when its header was read.
    """

    tensors: dict[str, TensorInfo]
    spans: dict[str, tuple[int, int]]
    metadata: dict[str, str]
    fingerprint: tuple[int, int, int]


class SafetensorsFile:
    """A safetensors file, of which one tensor at a time is copied into memory; no part of the file stays mapped.

    The safetensors library checks the header. It is then read once, so that reading a tensor copies its bytes without
    parsing the header again.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label

    @cached_property
    def _header(self) -> Header:
        _refuse_unreadable(self.path, self.label)
        fingerprint = _fingerprint(self.path)
        with self._reporting_damage(), self._opened(), self.path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(start - 8))
            metadata = entries.pop("__metadata__", None) or {}
            tensors = {name: _info(entry["shape"], entry["dtype"]) for name, entry in sorted(entries.items())}
            offsets = {name: entry["data_offsets"] for name, entry in entries.items()}
            spans = {name: (start + begin, end - begin) for name, (begin, end) in offsets.items()}
        return Header(tensors, spans, metadata, fingerprint)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(self._header.tensors)

    @property
    def metadata(self) -> dict[str, str]:
        """The entries of the file's metadata."""
        return self._header.metadata

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype from the header."""
        return self._header.tensors[name]

    def read(self, name: str) -> Tensor:
        """Return a tensor, copied out of the file."""
        info, (start, length) = self._header.tensors[name], self._header.spans[name]
        with self._reporting_damage():
            if info.dtype not in FLOATING:  # rare, so left to the library
                with self._opened() as opened:
                    return opened.get_tensor(name).clone()  # type: ignore[no-any-return]
            tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                found = _fill(_raw(tensor), file) if length else 0
            self._refuse_changed()
            if found != length:
                raise OSError(f"{found} of the {length} bytes of '{name}'")
            return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows start…stop of a tensor without reading its other rows."""
        with self._reporting_damage(), self._opened() as file:
            return file.get_slice(name)[start:stop].clone()  # type: ignore[no-any-return]

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the operating system to load the bytes of some tensors from the disk in the background."""
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError), self.path.open("rb", buffering=0) as file:  # `read` reports a fault
            for start, length in (self._header.spans[name] for name in names):
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def _opened(self) -> Any:
        return safe_open(self.path, framework="pt", device="cpu")

    def _refuse_changed(self) -> None:
        """Refuse a file that has changed since its header was read: a merge reads it several times and needs one content."""
        if _fingerprint(self.path) != self._header.fingerprint:
            raise AdapterError(
                f"adapter '{self.label}': {self.path.name} was changed while it was read. Nothing was written: wait until "
                "the program that writes it has finished, and merge again."
            )

    @contextmanager
    def _reporting_damage(self) -> Iterator[None]:
        """Raise an AdapterError that calls the file damaged where reading it fails."""
        try:
            yield
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
            size = self.path.stat().st_size if self.path.exists() else 0
            raise AdapterError(
                f"adapter '{self.label}': {self.path.name} is not a whole safetensors file ({size} bytes: {one_line(error)}). "
                "It is truncated or damaged: download or save the adapter again."
            ) from None


class PickleFile(MemoryTensors):
    """An `adapter_model.bin`, the format of old releases of PEFT, read by PyTorch's weights-only loader."""

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        _refuse_unreadable(self.path, self.label)
        _refuse_inflated(self.path, self.label)
        try:
            with warnings.catch_warnings():  # PyTorch warns about the pickle; our error says enough
                warnings.simplefilter("ignore")
                loaded = torch.load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise AdapterError(
                f"adapter '{self.label}': {self.path.name} holds more than tensors, and loading that could run "
                "code. It was not executed. Get the adapter as safetensors, or convert it where you trust it."
            ) from None
        except Exception as error:  # damaged bytes make the loader raise errors of many types
            raise AdapterError(
                f"adapter '{self.label}': {self.path.name} cannot be read "
                f"({type(error).__name__}: {one_line(error)}). Download or save the adapter again."
            ) from None
        if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
            raise AdapterError(
                f"adapter '{self.label}': {self.path.name} is not a table of tensors by name. "
                "Expected the state dict that PEFT saves; save the adapter again."
            )
        for name, tensor in loaded.items():
            if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
                raise AdapterError(
                    f"adapter '{self.label}': tensor {str(name)!r} of {self.path.name} is sparse, quantised "
                    "or without values; expected plain numbers. Save the adapter again."
                )
            if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
                raise AdapterError(
                    f"adapter '{self.label}': tensor {str(name)!r} of {self.path.name} claims the shape "
                    f"{list(tensor.shape)}, more numbers than the file holds. It is damaged: get the adapter again."
                )
        return {str(name): loaded[name].detach() for name in loaded}


def open_tensors(path: Path, label: str) -> SafetensorsFile | PickleFile:
    """Open a file of weights by its suffix.

    Args:
        path: of the file.
        label: the adapter's name in messages.
    """
    return (SafetensorsFile if path.suffix == ".safetensors" else PickleFile)(path, label)


class Digest:
    """A sha256 over names, shapes, dtypes and bytes, updated with one tensor at a time.

    Args:
        header: is covered before the tensors.
    """

    def __init__(self, header: str = "") -> None:
        self._sha256 = hashlib.sha256(header.encode())

    def add(self, name: str, tensor: Tensor) -> None:
        """Update the digest with one tensor; the order of the calls matters."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._sha256.update(f"\n{name} {dtype} {list(tensor.shape)}\n".encode())
        self._sha256.update(_raw(tensor.contiguous()))

    def __str__(self) -> str:
        return self._sha256.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor without copying it."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _info(shape: list[int], dtype: str) -> TensorInfo:
    known = DTYPES.get(dtype)
    return TensorInfo(tuple(shape), str(known).removeprefix("torch.") if known else dtype)


def _fingerprint(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is written anew: its inode, size and time of modification."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _fill(memory: memoryview, file: BinaryIO) -> int:
    """Fill `memory` from a file and return the number of bytes read; one system call reads 2 GB at most."""
    found = 0
    while part := file.readinto(memory[found:]):  # type: ignore[attr-defined]
        found += part
    return found


def _refuse_inflated(path: Path, label: str) -> None:
    """Refuse an archive whose members are larger than itself: PyTorch does not compress, but a decompression bomb does."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # the loader reports the fault
    if size > path.stat().st_size:
        raise AdapterError(
            f"adapter '{label}': {path.name} would unpack from {path.stat().st_size:,} to {size:,} bytes; PyTorch's own "
            "files are not compressed. It was not opened: get the adapter as safetensors."
        )


def _refuse_unreadable(path: Path, label: str) -> None:
    """Refuse an empty file and a Git LFS pointer, for which the parser's message would be unclear."""
    if path.stat().st_size == 0:
        raise AdapterError(f"adapter '{label}': {path.name} is empty. Download or save the adapter again.")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise AdapterError(
                f"adapter '{label}': {path.name} is a Git LFS pointer, not the weights. "
                "Run `git lfs pull` in its repository, or download the file itself."
            )
