"""Statistics that some methods need besides an adapter's weights, kept in a file beside them.

    fisher   (out, in) for LoRA, (k,) for (IA)³: the diagonal of the Fisher information of each task vector,
             E[(∂ log p / ∂τ)²]
    gram     (in, in): the second moments of each module's input, E[x·xᵀ]

Each kind has its own file, `fisher.safetensors` or `gram.safetensors`, which holds the adapter's digest. Statistics of
another adapter, or of the same one before it was trained further, are refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, CompatibilityError
from .tensors import MemoryTensors, SafetensorsFile
from .writer import write_tensors

METADATA_KEY = "ties_peft"  # in the safetensors file: where `Statistics.metadata` is stored as JSON


@dataclass(frozen=True)
class ModuleStatistics:
    """The statistics of one module: a tensor of a file.

    Attributes:
        source: the file.
        name: of the tensor in it.
        norm: returns the Frobenius norm of the statistics over all modules of the adapter.
    """

    source: MemoryTensors | SafetensorsFile
    name: str
    norm: Callable[[], float]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows start…stop, float32, on the CPU."""
        return self.source.rows(self.name, start, stop).float()

    def whole(self) -> Tensor:
        """Return all rows, float32, on the CPU."""
        return self.rows(0, self.source.info(self.name).shape[0])


@dataclass(frozen=True)
class Statistics:
    """The statistics of one kind of all modules of one adapter.

    Attributes:
        kind: `fisher` or `gram`.
        source: the tensors.
        metadata: how they were gathered: the adapter's digest (`adapter`), the number of rows of data (`rows`), and for
            each module whose values equal another's the module under whose name they are stored (`same`).
        norms: results of `norm`, by its modules.
    """

    kind: str
    source: MemoryTensors | SafetensorsFile
    metadata: Mapping[str, Any]
    norms: dict[tuple[str, ...], float] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: Path, kind: str, label: str) -> Statistics:
        """Open the file of one kind; tensors are not read yet.

        Raises: AdapterError if it is not such a file.
        """
        file = SafetensorsFile(path, label)
        try:
            metadata = json.loads(file.metadata.get(METADATA_KEY, ""))
            known = (metadata["kind"], type(metadata["adapter"]), type(metadata["same"])) == (kind, str, dict)
        except (KeyError, TypeError, ValueError, RecursionError):
            known = False
        if not known:
            raise AdapterError(
                f"adapter '{label}': {path.name} does not hold {kind} statistics that ties_peft wrote. Delete it, "
                f"and gather them again: {gather_command(label, kind)}."
            )
        return cls(kind, file, metadata)

    @classmethod
    def make(cls, kind: str, adapter: str, tensors: Mapping[str, Tensor], rows: int, **more: Any) -> Statistics:
        """Make the statistics of an adapter from tensors in memory.

        Args:
            kind: `fisher` or `gram`.
            adapter: the adapter's digest.
            tensors: by module.
            rows: the number of rows of data that they were gathered from.
            more: further entries of `metadata`.
        """
        kept: dict[str, Tensor] = {}
        same: dict[str, str] = {}
        for name, tensor in sorted(tensors.items()):  # query, key and value have the same input
            equal = next((k for k, t in kept.items() if t.shape == tensor.shape and torch.equal(t, tensor)), None)
            if equal is None:
                kept[name] = tensor
            else:
                same[name] = equal
        metadata = {"kind": kind, "adapter": adapter, "rows": rows, **more, "same": same}
        return cls(kind, MemoryTensors(kept), metadata)

    def save(self, folder: Path) -> Path:
        """Write the file into an adapter's folder; an existing one is replaced once the new one is complete.

        Raises: AdapterError if the folder cannot be written to.
        """
        path = folder / file_name(self.kind)
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            tensors = {name: self.source.read(name) for name in self.source.names}
            write_tensors(staged, tensors, {METADATA_KEY: json.dumps(dict(self.metadata))})
            staged.replace(path)
        except OSError as error:
            raise AdapterError(
                f"the statistics cannot be written to '{path}': {error}. Make the adapter's folder writable."
            ) from None
        finally:
            staged.unlink(missing_ok=True)
        return path

    def of_module(self, module: str, modules: Sequence[str] = ()) -> ModuleStatistics | None:
        """Return the statistics of one module; None if there are none.

        Args:
            module: its name.
            modules: those over which the norm is taken.
        """
        name = self.metadata["same"].get(module, module)
        return ModuleStatistics(self.source, name, partial(self.norm, modules)) if name in self.source.names else None

    def norm(self, modules: Sequence[str]) -> float:
        """Return the Frobenius norm over some modules, in float64; it is computed once."""
        key = tuple(modules)
        if key not in self.norms:
            found = (one for module in key if (one := self.of_module(module)) is not None)
            self.norms[key] = math.hypot(*(float(torch.linalg.vector_norm(one.whole().double())) for one in found))
        return self.norms[key]

    def renamed(self, names: Mapping[str, str]) -> Statistics:
        """Return the same statistics with other names for some modules (old → new)."""
        same = {**self.metadata["same"], **{new: self.metadata["same"].get(old, old) for old, new in names.items()}}
        return replace(self, metadata={**self.metadata, "same": same})

    def check(self, digest: str, shapes: Mapping[str, tuple[int, ...]], label: str) -> None:
        """Refuse statistics of another adapter, and statistics that lack some of its modules.

        Args:
            digest: of the adapter.
            shapes: of each module's task vector.
            label: the adapter's name in messages.
        Raises: CompatibilityError.
        """
        if self.metadata["adapter"] != digest:
            raise CompatibilityError(
                f"adapter '{label}': the {self.kind} statistics beside it are of an adapter with digest "
                f"{self.metadata['adapter'][:12]}, and it has {digest[:12]}: they belong to another adapter, or to this one "
                f"before its weights changed. Gather them again: {gather_command(label, self.kind)}."
            )
        for module, shape in shapes.items():
            found = self.of_module(module)
            seen = None if found is None else found.source.info(found.name).shape
            expected = (shape[-1], shape[-1]) if self.kind == "gram" else shape
            if seen != expected:
                raise CompatibilityError(
                    f"adapter '{label}', module {module!r}: its {self.kind} statistics are "
                    f"{'missing' if seen is None else list(seen)}; expected {list(expected)}. Gather them again: "
                    f"{gather_command(label, self.kind)}."
                )


def file_name(kind: str) -> str:
    """Return the name of the file of one kind."""
    return f"{kind}.safetensors"


def gather_command(label: str, kind: str) -> str:
    """Return the command that gathers an adapter's statistics."""
    return f"ties-peft statistics {label} --kind {kind} --task FILE"
