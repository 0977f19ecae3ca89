"""Where tensors come from: a safetensors file, an old `.bin`, or memory; always by name, always lazily.

Nothing in a file is executed: safetensors holds no code, and `.bin` goes through PyTorch's
weights-only loader. A file that cannot be read ends in an `AdapterError` that says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

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
    """What a tensor is without reading it."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """Named tensors, read one at a time."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype."""

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in its own dtype."""


class MemoryTensors:
    """Tensors that are already in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(sorted(tensors.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype."""
        tensor = self._tensors[name]
        return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def read(self, name: str) -> Tensor:
        """The tensor."""
        return self._tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start…stop of it."""
        return self._tensors[name][start:stop]


class SafetensorsFile:
    """A safetensors file, read a tensor at a time into memory of its own, so that none of it stays mapped.

    The library checks the header; where the bytes lie is then read from it once, so that a tensor
    costs a copy of its bytes and not another parse.
    """

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label

    @cached_property
    def _index(self) -> dict[str, TensorInfo]:
        _refuse_unreadable(self.path, self.label)
        self._state = _state(self.path)
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
                return {n: _info(s.get_shape(), s.get_dtype()) for n, s in sorted(slices.items())}
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise self._damaged(error) from None

    @cached_property
    def _bytes(self) -> dict[str, tuple[int, int]]:
        """Where each tensor's bytes start in the file, and how many they are."""
        assert self._index is not None  # the header has been checked
        with self.path.open("rb") as file:
            start = 8 + int.from_bytes(header := file.read(8), "little")
            entries = json.loads(file.read(start - len(header)))
        spans = {name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"}
        return {name: (start + begin, end - begin) for name, (begin, end) in spans.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(self._index)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype, from the header."""
        return self._index[name]

    def read(self, name: str) -> Tensor:
        """The tensor, copied out of the file."""
        info = self._index[name]
        try:
            if info.dtype not in FLOATING:  # no merge takes it: as the library reads it
                with safe_open(self.path, framework="pt", device="cpu") as opened:
                    return opened.get_tensor(name).clone()  # type: ignore[no-any-return]
            tensor = torch.empty(info.shape, dtype=getattr(torch, info.dtype))
            start, length = self._bytes[name]
            with self.path.open("rb", buffering=0) as file:
                file.seek(start)
                found = _fill(_raw(tensor), file) if length else 0
            self._refuse_changed()
            if found != length:
                raise OSError(f"{found} of the {length} bytes of '{name}'")
            return tensor
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
            raise self._damaged(error) from None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start…stop of the tensor, copied out of the file without reading the others."""
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                return file.get_slice(name)[start:stop].clone()  # type: ignore[no-any-return]
        except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
            raise self._damaged(error) from None

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the system to fetch the bytes of some tensors from the disk while something else is done."""
        if not hasattr(os, "posix_fadvise"):
            return
        with suppress(OSError), self.path.open("rb", buffering=0) as file:  # what is wrong, `read` will say
            for start, length in (self._bytes[name] for name in names):
                os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)

    def _refuse_changed(self) -> None:
        """A merge reads a file several times; what it reports and writes must be of one content."""
        if _state(self.path) != self._state:
            raise AdapterError(
                f"adapter '{self.label}': {self.path.name} was changed while it was read. Nothing was written: wait until "
                "whatever writes it is done, and merge again."
            )

    def _damaged(self, error: Exception) -> AdapterError:
        return AdapterError(
            f"adapter '{self.label}': {self.path.name} is not a whole safetensors file "
            f"({self.path.stat().st_size if self.path.exists() else 0} bytes: {one_line(error)}). "
            "It is truncated or damaged: download or save the adapter again."
        )


class PickleFile:
    """An `adapter_model.bin` as old releases of PEFT wrote it, through the weights-only loader."""

    def __init__(self, path: Path, label: str) -> None:
        self.path, self.label = path, label

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        _refuse_unreadable(self.path, self.label)
        _refuse_inflated(self.path, self.label)
        try:
            with warnings.catch_warnings():  # torch's remarks on the pickle would stand beside our one message
                warnings.simplefilter("ignore")
                loaded = torch.load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise AdapterError(
                f"adapter '{self.label}': {self.path.name} holds more than tensors, and loading that could run "
                "code. It was not executed. Get the adapter as safetensors, or convert it where you trust it."
            ) from None
        except Exception as error:  # the loader's errors on damaged bytes are of many types
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

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype."""
        return MemoryTensors(self._tensors).info(name)

    def read(self, name: str) -> Tensor:
        """The tensor."""
        return self._tensors[name]


class Digest:
    """A sha256 over names, shapes, dtypes and bytes, a tensor at a time."""

    def __init__(self, extra: str = "") -> None:
        self._running = hashlib.sha256(extra.encode())

    def add(self, name: str, tensor: Tensor) -> None:
        """Take in one tensor; their order matters."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        self._running.update(f"\n{name} {dtype} {list(tensor.shape)}\n".encode())
        self._running.update(_raw(tensor.contiguous()))

    def __str__(self) -> str:
        return self._running.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, where they lie."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _info(shape: list[int], dtype: str) -> TensorInfo:
    known = DTYPES.get(dtype)
    return TensorInfo(tuple(shape), str(known).removeprefix("torch.") if known else dtype)


def _state(path: Path) -> tuple[int, int, int]:
    """What tells one content of a file from the next: which file it is, its size, when it was written."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _fill(memory: memoryview, file: BinaryIO) -> int:
    """How many bytes could be read into all of `memory`; one call to the system gives 2 GB at most."""
    found = 0
    while part := file.readinto(memory[found:]):  # type: ignore[attr-defined]
        found += part
    return found


def _refuse_inflated(path: Path, label: str) -> None:
    """Refuse an archive whose members are larger than itself: PyTorch compresses nothing, a trap does."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # the loader says what is wrong with it
    if size > path.stat().st_size:
        raise AdapterError(
            f"adapter '{label}': {path.name} would unpack from {path.stat().st_size:,} to {size:,} bytes; PyTorch's own "
            "files are not compressed. It was not opened: get the adapter as safetensors."
        )


def _refuse_unreadable(path: Path, label: str) -> None:
    """Faults that deserve a better word than the parser's."""
    if path.stat().st_size == 0:
        raise AdapterError(f"adapter '{label}': {path.name} is empty. Download or save the adapter again.")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise AdapterError(
                f"adapter '{label}': {path.name} is a Git LFS pointer, not the weights. "
                "Run `git lfs pull` in its repository, or download the file itself."
            )
