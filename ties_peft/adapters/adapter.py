"""Adapter: a PEFT adapter seen through its files, read lazily and checked when it is opened."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, RecipeError, TiesPeftError, one_line, unknown, warn_caller
from ..task_vectors.delta import Delta
from ..task_vectors.processes import SINGLE_PROCESS, ProcessGroup
from ..task_vectors.singular_values import norm
from ..task_vectors.tiles import thread_pool, threads_fixed
from . import sources, writer
from .base_model import BaseModel
from .extra_tensors import WHOLE_NUMBERS, check_extra_tensors
from .formats import recognise as foreign
from .statistics import Statistics, file_name
from .tensors import FLOATING, Digest, MemoryTensors, PickleFile, SafetensorsFile, TensorSource
from .types import ModuleInfo, PeftType, find_peft_type
from .values import is_number

INTEGERS = ("I32", "I64", "int32", "int64")
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class _Look:
    """What one reading of all of an adapter's tensors tells.

    Attributes:
        digest: as in `Adapter.digest`.
        norm: of the whole task vector; not finite where `bad` is not empty.
        bad: the names of tensors that hold NaN or infinity.
    """

    digest: str
    norm: float
    bad: tuple[str, ...]


class Adapter:
    """One adapter: its config, its modules, and a task vector for each of them.

    Nothing but the config and the names and shapes of the tensors is read until a task vector is
    asked for.

    Attributes:
        config: adapter_config.json as it was read.
        tensors: where its tensors come from.
        source: the path or Hub id it came from, as the user wrote it, with its revision; None if it
            never had one.
        peft_type: its type: LoRA, (IA)³.
        base_model: the tensors of its base model, where they were given.
        layout: its modules by name.
        riders: the names of the tensors that belong to no module, sorted: heads, biases, embeddings.
    """

    def __init__(
        self,
        config: dict[str, Any],
        tensors: TensorSource,
        source: str | None = None,
        base_model: BaseModel | None = None,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.source = source
        self._statistics: dict[str, Statistics] = {}
        self._renamed: tuple[Adapter, Mapping[str, str]] | None = None  # what it was, and the new names
        self.base_model = base_model
        self.peft_type: PeftType = find_peft_type(config.get("peft_type"), self.label)
        self.layout: dict[str, ModuleInfo] = self.peft_type.layout(config, tensors, self.label, base_model)
        if not self.layout:
            raise AdapterError(
                f"adapter '{self.label}' holds no {self.peft_type.title} tensors. Save it again with PEFT's save_pretrained."
            )
        claimed = {key for module in self.layout.values() for key in module.keys}
        self.extra_keys = tuple(key for key in tensors.names if key not in claimed)
        check_extra_tensors(self.extra_keys, config, tensors, self.label)

    @classmethod
    def load(
        cls,
        source: str | Path,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        base: str | Path | BaseModel | None = None,
    ) -> Adapter:
        """Open an adapter's files, or fetch them from the Hub.

        Args:
            source: a folder that holds adapter_config.json, a file of weights beside one, or a Hub id:
                `org/name`, `org/name@revision`, `org/name@revision:subfolder`.
            revision: a branch, tag or commit on the Hub.
            subfolder: the folder inside it that holds the adapter; it must lead into it.
            token: for private repositories; by default the one that `hf auth login` stored.
            base: the base model's folder or Hub id, for the few kinds whose task vectors depend on its
                weights (DoRA, say); just the tensors they need are read.
        Raises: AdapterError with one clear sentence where it cannot be read or merged.
        """
        named = sources.join_source(str(source), revision, subfolder)
        label = named
        if subfolder and not sources.is_inside(subfolder):
            raise AdapterError(f"adapter '{label}': the subfolder {subfolder!r} does not lead into it.")
        found = sources.find_files(named, token)
        config = read_config(found.folder, label)
        foreign.refuse(found, config, label)
        assert config is not None  # else it was refused
        find_peft_type(config.get("peft_type"), label)  # before the weights: their absence matters less than the type
        weights = found.weights or sources.find_weights(found.folder, label)
        opened = SafetensorsFile if weights.suffix == ".safetensors" else PickleFile
        known = base if base is None or isinstance(base, BaseModel) else BaseModel.load(base, token)
        return cls(config, opened(weights, label), named, known)

    @classmethod
    def from_tensors(cls, config: dict[str, Any], tensors: dict[str, Tensor], source: str | None = None) -> Adapter:
        """Make an adapter of a config and tensors that are not in a file."""
        return cls(config, MemoryTensors(tensors), source)

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.source or "in memory"

    @property
    def folder(self) -> Path | None:
        """Where its files lie on this machine; None if it is in memory alone."""
        path = getattr(self.tensors, "path", None)
        return path.parent if isinstance(path, Path) else None

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths in the base model of the modules it adapts, without PEFT's prefix, sorted."""
        return tuple(sorted(self.layout))

    def module(self, name: str) -> ModuleInfo:
        """What is known of one module without reading it.

        Raises: AdapterError naming the nearest module, where there is none of that name.
        """
        if name not in self.layout:
            raise AdapterError(f"adapter '{self.label}': {unknown('module', name, self.layout)[:600]}")
        return self.layout[name]

    def read(self, name: str) -> Delta:
        """The task vector of one module as it is held: factors for LoRA, values for (IA)³."""
        return self.peft_type.read(self.module(name), self.tensors, self.base_model)

    def prefetch(self, name: str) -> None:
        """Have the system fetch a module's bytes from the disk meanwhile; nothing waits for it."""
        if isinstance(self.tensors, SafetensorsFile):
            self.tensors.prefetch(self.module(name).keys)

    def delta(self, name: str) -> Tensor:
        """The task vector of one module, float32: s·B·A, (out, in), for LoRA; l − 1, (k,), for (IA)³.

        On GPT-2's Conv1D it is (out, in) too, where PEFT's `get_delta_weight` gives (in, out).
        """
        return self.read(name).dense()

    def renamed(self, names: Mapping[str, str]) -> Adapter:
        """The same adapter with other names for some of its modules (old → new); its tensors are as they were.

        A module that is written goes by its new name; the base is still asked by the old.
        """
        other = copy.copy(self)
        other._renamed = (self, names)
        other.layout = {}
        for name, module in self.layout.items():
            layer = "" if module.path == name else names.get(module.path, module.path)
            other.layout[names.get(name, name)] = replace(module, name=names.get(name, name), layer=layer)
        return other

    def statistics(self, kind: str) -> Statistics | None:
        """What was gathered of it, `fisher` or `gram`; None if nothing was.

        Raises: AdapterError or CompatibilityError where the file beside it is damaged or of another adapter.
        """
        if self._renamed is not None:
            own = self._renamed[0].statistics(kind)
            return None if own is None else own.renamed(self._renamed[1])
        path = None if self.folder is None else self.folder / file_name(kind)
        if kind not in self._statistics and path is not None and path.is_file():
            self.attach_statistics(Statistics.open(path, kind, self.label))
        return self._statistics.get(kind)

    def attach_statistics(self, statistics: Statistics) -> None:
        """Give it statistics that do not lie beside it; they take the place of those that do.

        Raises: CompatibilityError where they are of another adapter.
        """
        statistics.check(self.digest, {name: module.shape for name, module in self.layout.items()}, self.label)
        self._statistics[statistics.kind] = statistics

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, sorted."""
        return tuple(sorted({module.rank for module in self.layout.values()}))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its tensors; float32 where they differ."""
        found = {self.tensors.info(key).dtype for module in self.layout.values() for key in module.keys}
        return getattr(torch, found.pop()) if len(found) == 1 else torch.float32

    @property
    def base_name(self) -> str | None:
        """The base model's name as the config gives it."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @cached_property
    def digest(self) -> str:
        """A sha256 over tensor names, shapes, dtypes, bytes and lora scalings; never over paths.

        Where task vectors depend on the base model's weights, also over those.
        """
        return self._look.digest

    def norm(self) -> float:
        """The Frobenius norm of the whole task vector."""
        return self._look.norm

    def check(self) -> None:
        """Read every tensor once and refuse what no merge survives.

        Raises: AdapterError naming the tensors that hold NaN or infinity, or are not of a floating type.
        """
        riders = frozenset(self.extra_keys)
        for key in self.tensors.names:
            allowed = FLOATING | WHOLE_NUMBERS if key in riders else FLOATING
            dtype = self.tensors.info(key).dtype
            if dtype not in allowed and not (self.peft_type.has_integer_tensors and dtype in INTEGERS):
                raise AdapterError(
                    f"adapter '{self.label}': tensor {key!r} is {dtype}; expected "
                    "float32, float16 or bfloat16. Save the adapter unquantised."
                )
        bad = self._look.bad
        if bad:
            raise AdapterError(
                f"adapter '{self.label}' holds NaN or infinity in {len(bad)} tensor(s): "
                f"{', '.join(bad[:3])}{', …' if len(bad) > 3 else ''}. Its training diverged: leave it out."
            )
        if not self.norm() <= LARGEST:
            raise AdapterError(
                f"adapter '{self.label}': its task vector is beyond what float32 can hold. Its training diverged, or "
                "lora_alpha is wrong: mend adapter_config.json, or leave it out."
            )

    @cached_property
    def _look(self) -> _Look:
        """All that takes a reading of every tensor, from one reading; each is let go when its last module is done."""
        running = Digest("\n".join(self._beside()))
        left = {name: set(module.keys) for name, module in self.layout.items()}
        users: dict[str, set[str]] = {}
        for name, module in self.layout.items():
            for key in module.keys:
                users.setdefault(key, set()).add(name)
        held: dict[str, Tensor] = {}
        norms: list[float] = []
        bad: dict[str, None] = {}
        with threads_fixed():
            for key in self.tensors.names:
                held[key] = self.tensors.read(key)
                running.add(key, held[key])
                if key not in users:
                    bad |= dict.fromkeys(_not_finite({key: held.pop(key)}))
                    continue
                for name in sorted(users[key]):
                    left[name].discard(key)
                    if left[name]:
                        continue
                    own = {other: held[other] for other in self.layout[name].keys}
                    norms.append(norm(self.peft_type.read(self.layout[name], MemoryTensors(own), self.base_model)))
                    # a finite norm says that all its tensors are finite, at a fraction of the cost of asking
                    bad |= {} if math.isfinite(norms[-1]) else dict.fromkeys(_not_finite(own))
                    for other in own:
                        users[other].discard(name)
                        _ = users[other] or held.pop(other)
        return _Look(str(running), math.hypot(*norms), tuple(bad))

    def _beside(self) -> list[str]:
        """What the digest covers beside the tensors: lora scalings, and the base's tensors that are needed."""
        lines = [f"{name} {module.scaling!r}" for name, module in sorted(self.layout.items())]
        needed = sorted({need for module in self.layout.values() for need in module.base_tensors})
        if needed and self.base_model is not None:
            base = Digest()
            chosen = self.base_model.select(needed)
            for name in chosen.names:
                base.add(name, chosen.read(name))
            lines.append(str(base))
        return lines

    def files(self) -> dict[str, writer.Content]:
        """The files that make it again, by name."""
        tensors = {name: self.tensors.read(name) for name in self.tensors.names}
        return {sources.ADAPTER_CONFIG: writer.json_text(self.config), sources.WEIGHT_FILES[0]: tensors}

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write it to a folder, whole or not at all.

        Args:
            folder: must not exist, or be empty.
            force: replace an existing folder, if it holds nothing but files that we write.
        Raises: RecipeError where the folder is in the way or cannot be written.
        """
        own = sources.local_path(self.source) if self.source is not None else None
        if own is not None and own.resolve() == Path(folder).resolve():
            raise RecipeError(f"'{folder}' is the adapter itself; save it elsewhere.")
        return writer.write_folder(Path(folder), self.files(), force, [own] if own else [])

    def __repr__(self) -> str:
        return f"Adapter({self.label!r}, {self.peft_type.name}, {len(self.layout)} modules, ranks {self.ranks})"


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def load_adapters(given: Iterable[str | Path | Adapter], base: BaseModel | None = None) -> list[Adapter]:
    """Adapters opened, in order; a pattern is all that fits it (see `sources`)."""
    check_is_list(given)
    opened = []
    for one in given:
        if isinstance(one, Adapter):
            opened.append(one)
            continue
        names, remarks = sources.expand_patterns([str(one)])
        warn_caller(remark for remark in remarks if "left out" in remark)
        opened += [Adapter.load(name, base=base) for name in names]
    return opened


def check_is_list(given: Any) -> None:
    """Refuse adapters that are no list: a single one, and what would lose the order or the values.

    Raises: RecipeError.
    """
    if isinstance(given, (str, Path, Adapter)):
        raise RecipeError(f"the adapters are one adapter, {given}; expected a list of them: merge([...]).")
    if isinstance(given, Mapping):
        names, numbers = [str(key) for key in given], list(given.values())
        weighed = bool(names) and all(is_number(number) for number in numbers)
        shown = f"{names!r}, weights={numbers!r}" if weighed else "[...], weights=[...]"
        raise RecipeError(
            f"the adapters are a {type(given).__name__}; expected a list, with one weight per adapter beside it: "
            f"merge({shown})."
        )
    if isinstance(given, Set):
        raise RecipeError(f"the adapters are a {type(given).__name__}; expected a list, whose order weights refer to.")


def check_adapters(adapters: Sequence[Adapter], processes: ProcessGroup = SINGLE_PROCESS) -> None:
    """Look through the tensors, several adapters at a time; the first in order that is at fault speaks.

    Args:
        adapters: the same in every process.
        processes: the processes that share the work; each of them learns what the others found.
    """
    everyone = list(dict.fromkeys(adapters))
    if not everyone:
        return
    with thread_pool() as pool:
        found = processes.gather(pool.map(_look_or_fault, everyone[processes.number :: processes.size]))
    for place, adapter in enumerate(everyone):
        look = found[place % processes.size][place // processes.size]
        if isinstance(look, TiesPeftError):
            raise look
        adapter.__dict__["_look"] = look


def _look_or_fault(adapter: Adapter) -> _Look | TiesPeftError:
    try:
        adapter.check()
        return adapter._look
    except TiesPeftError as fault:
        return fault


def read_config(folder: Path, label: str) -> dict[str, Any] | None:
    """adapter_config.json of a folder; None where there is none.

    Raises: AdapterError where it is not JSON, or no object.
    """
    path = folder / sources.ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise AdapterError(
            f"adapter '{label}': {sources.ADAPTER_CONFIG} is not JSON ({one_line(error)}). Mend it, or save it again."
        ) from None
    if not isinstance(config, dict):
        raise AdapterError(
            f"adapter '{label}': {sources.ADAPTER_CONFIG} is a {type(config).__name__}; expected an object."
        )
    return config
