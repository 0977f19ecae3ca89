"""Statistics: what some methods must know of an adapter beyond its weights, kept in a file beside them.

    fisher   (out, in) for LoRA, (k,) for (IA)³: how sharply the adapter's predictions depend on each
             entry of its task vector, E[(∂ log p / ∂τ)²]
    gram     (in, in): the second moments of the inputs of each module, E[x·xᵀ]

Each kind has a file of its own, `fisher.safetensors` or `gram.safetensors`, with the digest of the
adapter inside: statistics of another adapter, or of this one before it was trained on, are refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AdapterError, CompatibilityError
from .tensors import MemoryTensors, SafetensorsFile, TensorInfo
from .writer import write_tensors

METADATA_KEY = "ties_peft"  # the key of the file's metadata that holds them, as JSON


class RowReader(Protocol):
    """Named tensors of which some rows can be read alone."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, sorted."""

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start…stop of a tensor."""


@dataclass(frozen=True)
class ModuleStatistics:
    """That of one module.

    Attributes:
        source: where it lies.
        name: of the tensor there.
        divisor: what it is divided by.
    """

    source: RowReader
    name: str
    divisor: float = 1.0

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start…stop, float32, on the CPU."""
        values = self.source.rows(self.name, start, stop).float()
        return values if self.divisor == 1 else values / self.divisor

    def whole(self) -> Tensor:
        """All of it, float32, on the CPU."""
        return self.rows(0, self.source.info(self.name).shape[0])


@dataclass(frozen=True)
class Statistics:
    """Those of all modules of one adapter, of one kind.

    Attributes:
        kind: `fisher` or `gram`.
        source: the tensors.
        metadata: how they were made: the adapter's digest (`adapter`), the number of rows (`rows`), and
            for modules with the same values the one that holds them (`same`).
        norms: those found so far, by modules.
    """

    kind: str
    source: RowReader
    metadata: Mapping[str, Any]
    norms: dict[tuple[str, ...], float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, kind: str, label: str) -> Statistics:
        """Open the file of one kind; only names, shapes and metadata are read.

        Raises: AdapterError where it is not such a file.
        """
        file = SafetensorsFile(path, label)
        file.names  # noqa: B018  (refuses what is damaged)
        try:
            with safe_open(path, framework="pt", device="cpu") as opened:
                metadata = json.loads((opened.metadata() or {})[METADATA_KEY])
            known = (
                metadata["kind"] == kind and isinstance(metadata["adapter"], str) and isinstance(metadata["same"], dict)
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
            known = False
        if not known:
            raise AdapterError(
                f"adapter '{label}': {path.name} holds no {kind} statistics of ties_peft's. Delete it, and make them "
                f"anew: {gather_command(label, kind)}."
            )
        return cls(kind, file, metadata)

    @classmethod
    def make(cls, kind: str, adapter: str, tensors: Mapping[str, Tensor], rows: int, **more: Any) -> Statistics:
        """Of tensors in memory.

        Args:
            kind: `fisher` or `gram`.
            adapter: its digest.
            tensors: by module.
            rows: how many were looked at.
            more: metadata that are worth keeping.
        """
        kept: dict[str, Tensor] = {}
        same: dict[str, str] = {}
        for name, tensor in sorted(tensors.items()):  # query, key and value read one input
            twin = next((k for k, t in kept.items() if t.shape == tensor.shape and torch.equal(t, tensor)), None)
            if twin is None:
                kept[name] = tensor
            else:
                same[name] = twin
        metadata = {"kind": kind, "adapter": adapter, "rows": rows, **more, "same": same}
        return cls(kind, MemoryTensors(kept), metadata)

    def save(self, folder: Path) -> Path:
        """Write their file into an adapter's folder; one that is there gives way only to a whole new one.

        Raises: AdapterError where the folder cannot be written to.
        """
        path = folder / file_name(self.kind)
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            tensors = {name: self.source.rows(name, 0, self.source.info(name).shape[0]) for name in self.source.names}
            write_tensors(staged, tensors, {METADATA_KEY: json.dumps(dict(self.metadata))})
            staged.replace(path)
        except OSError as error:
            raise AdapterError(f"the statistics cannot be written to '{path}': {error}.") from None
        finally:
            staged.unlink(missing_ok=True)
        return path

    def of(self, module: str) -> ModuleStatistics | None:
        """That of one module; None if there is none."""
        name = self.metadata["same"].get(module, module)
        return ModuleStatistics(self.source, name) if name in self.source.names else None

    def norm(self, modules: Sequence[str]) -> float:
        """Return the Frobenius norm over some modules, in float64; they are read once."""
        key = tuple(modules)
        if key not in self.norms:
            found = (one for module in key if (one := self.of(module)) is not None)
            self.norms[key] = math.hypot(*(float(torch.linalg.vector_norm(one.whole().double())) for one in found))
        return self.norms[key]

    def renamed(self, names: Mapping[str, str]) -> Statistics:
        """The same under other names for some modules (old → new)."""
        same = {**self.metadata["same"], **{new: self.metadata["same"].get(old, old) for old, new in names.items()}}
        return replace(self, metadata={**self.metadata, "same": same})

    def check(self, digest: str, shapes: Mapping[str, tuple[int, ...]], label: str) -> None:
        """Refuse statistics that are not of this adapter, or not of all its modules.

        Args:
            digest: of the adapter.
            shapes: of each module's task vector.
            label: how messages name the adapter.
        Raises: CompatibilityError.
        """
        if self.metadata["adapter"] != digest:
            raise CompatibilityError(
                f"adapter '{label}': the {self.kind} statistics beside it are of an adapter with digest "
                f"{self.metadata['adapter'][:12]}, and it has {digest[:12]}: they belong to another, or to what "
                f"it was before. Make them anew: {gather_command(label, self.kind)}."
            )
        for module, shape in shapes.items():
            found = self.of(module)
            seen = None if found is None else found.source.info(found.name).shape
            expected = (shape[-1], shape[-1]) if self.kind == "gram" else shape
            if seen != expected:
                raise CompatibilityError(
                    f"adapter '{label}', module {module!r}: its {self.kind} statistics are "
                    f"{'missing' if seen is None else list(seen)}; expected {list(expected)}. Make them anew: "
                    f"{gather_command(label, self.kind)}."
                )


def file_name(kind: str) -> str:
    """The name of the file beside an adapter."""
    return f"{kind}.safetensors"


def gather_command(label: str, kind: str) -> str:
    """What makes the statistics of an adapter."""
    return f"ties-peft statistics {label} --kind {kind} --task FILE"
