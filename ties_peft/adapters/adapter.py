"""Adapter: a PEFT adapter's config, modules and task vectors, read lazily from its files."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError, CompatibilityError, RecipeError, TiesPeftError, some, unknown, warn_caller
from ..task_vectors.delta import Delta, norm
from ..task_vectors.processes import SINGLE_PROCESS, ProcessGroup
from ..task_vectors.tiles import thread_pool, threads_fixed
from . import recognise, sources, writer
from .base_model import BaseModel
from .config_values import is_number
from .contents import Contents
from .extra_tensors import INTEGER_DTYPES, ExtraTensor, check_extra_tensors, read_extra_tensors, whole_layer_names
from .formats.base import Origin
from .statistics import Statistics, file_name
from .tensors import FLOATING, Digest, MemoryTensors, SafetensorsFile, TensorSource, open_tensors
from .types import ModuleInfo, PeftType, find_peft_type

INDEX_DTYPES = ("I32", "I64", "int32", "int64")
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Scan:
    """The result of reading all of an adapter's tensors once.

    Attributes:
        digest: as in `Adapter.digest`.
        norm: Frobenius norm of the whole task vector; not finite if `not_finite` has a tensor of a module.
        not_finite: the names of tensors that hold NaN or infinity.
    """

    digest: str
    norm: float
    not_finite: tuple[str, ...]


class Adapter:
    """One adapter: its config, its modules, and a task vector for each of them.

    Opening one reads its config and the names and shapes of its tensors. A tensor is read when a task vector is asked for.

    Attributes:
        config: the contents of adapter_config.json.
        tensors: its tensors, by name.
        contents: config and tensors, as the PEFT type reads them.
        source: the path or Hub id as the user wrote it, with its revision; None if the adapter was made in memory.
        peft_type: LoRA, (IA)³, ….
        base_model: the base model's tensors, if they were given.
        layout: its modules by name.
        extra_keys: the names of the tensors that belong to no module, sorted: heads, biases, embeddings.
        origin: what is known of the file if it is of another format; None for PEFT's.
    """

    def __init__(
        self,
        config: dict[str, Any],
        tensors: TensorSource,
        source: str | None = None,
        base_model: BaseModel | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.source = source
        self.base_model = base_model
        self.origin = origin
        self._statistics: dict[str, Statistics] = {}
        self._original: tuple[Adapter, Mapping[str, str]] | None = None  # what `renamed` was called on, and its names
        self.contents = Contents(config, tensors, self.label, base_model)
        self.peft_type: PeftType = find_peft_type(config.get("peft_type"), self.label)
        self.layout: dict[str, ModuleInfo] = self.peft_type.layout(self.contents)
        if not self.layout:
            raise AdapterError(
                f"adapter '{self.label}' holds no {self.peft_type.title} tensors. Save it again with PEFT's save_pretrained."
            )
        claimed = {key for module in self.layout.values() for key in module.keys}
        self.extra_keys = tuple(key for key in tensors.names if key not in claimed)
        check_extra_tensors(self.extra_keys, self.contents)

    @classmethod
    def load(
        cls,
        source: str | Path,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        base: str | Path | BaseModel | None = None,
    ) -> Adapter:
        """Open an adapter's files; download them if they are on the Hub.

        Args:
            source: a folder that holds adapter_config.json, a file of weights beside one, or a Hub id:
                `org/name`, `org/name@revision`, `org/name@revision:subfolder`; or a LoRA of an image model, in the format
                of diffusers, kohya or ComfyUI, whose modules are then named with their part of the pipeline (`unet.…`).
            revision: a branch, tag or commit on the Hub.
            subfolder: the folder inside `source` that holds the adapter.
            token: for private repositories; by default the one that `hf auth login` stored.
            base: the base model's folder or Hub id. Only types whose task vectors depend on the base's weights, such as
                DoRA, need it, and only the tensors that they need are read.
        Raises: AdapterError if the adapter cannot be read or merged.
        """
        label = sources.join_source(str(source), revision, subfolder)
        if subfolder and not sources.is_inside(subfolder):
            raise AdapterError(
                f"adapter '{label}': the subfolder {subfolder!r} is not a path inside the adapter's folder. Expected a name "
                "such as checkpoints/last."
            )
        files = sources.find_files(label, token)
        config = recognise.read_config(files.folder, label)
        base_model = base if base is None or isinstance(base, BaseModel) else BaseModel.load(base, token)
        file = recognise.recognise(files, config, label)
        if file is not None and file.format.is_image and file.is_plain:
            from .placement import ConversionOptions
            from .to_peft import read_as_peft

            converted = read_as_peft(file, config, ConversionOptions(base=base_model), label, all_parts=True)
            return cls(converted.config, converted.tensors, label, base_model, converted.origin)
        recognise.refuse(files, config, label, file)
        assert config is not None  # `refuse` raised otherwise
        find_peft_type(config.get("peft_type"), label)  # an unsupported type is reported before missing weights
        weights = files.weights or sources.find_weights(files.folder, label)
        return cls(config, open_tensors(weights, label), label, base_model)

    @classmethod
    def from_tensors(cls, config: dict[str, Any], tensors: dict[str, Tensor], source: str | None = None) -> Adapter:
        """Make an adapter from a config and tensors in memory."""
        return cls(config, MemoryTensors(tensors), source)

    @property
    def label(self) -> str:
        """The adapter's name in messages."""
        return self.source or "in memory"

    @property
    def folder(self) -> Path | None:
        """The folder of its files on this machine; None if it is in memory only."""
        path = getattr(self.tensors, "path", None)
        return path.parent if isinstance(path, Path) else None

    @property
    def modules(self) -> tuple[str, ...]:
        """The paths in the base model of the modules that it adapts, without PEFT's prefix, sorted."""
        return tuple(sorted(self.layout))

    def module(self, name: str) -> ModuleInfo:
        """Return what is known of one module without reading its tensors.

        Raises: AdapterError naming the nearest module, if there is none of that name.
        """
        if name not in self.layout:
            raise AdapterError(f"adapter '{self.label}': {unknown('module', name, self.layout)[:600]}")
        return self.layout[name]

    def read(self, name: str) -> Delta:
        """Return the task vector of one module as it is stored: factors for LoRA, values for (IA)³."""
        return self.peft_type.read(self.module(name), self.tensors, self.base_model)

    def prefetch(self, name: str) -> None:
        """Ask the operating system to load a module's bytes from the disk in the background."""
        if isinstance(self.tensors, SafetensorsFile):
            self.tensors.prefetch(self.module(name).keys)

    def delta(self, name: str) -> Tensor:
        """Return the task vector of one module, float32: s·B·A, (out, in), for LoRA; l − 1, (k,), for (IA)³.

        It is (out, in) on GPT-2's Conv1D too, where PEFT's `get_delta_weight` returns (in, out).
        """
        return self.read(name).dense()

    def extra_tensors(self, starts: Sequence[str] | None = None) -> list[ExtraTensor]:
        """Return its tensors that belong to no module, without unused copies.

        Args:
            starts: from `whole_layer_names` of several adapters; by default of this one alone.
        """
        starts = whole_layer_names([self.config]) if starts is None else starts
        return read_extra_tensors(self.extra_keys, self.contents, starts)

    def renamed(self, names: Mapping[str, str], origin: Origin | None = None) -> Adapter:
        """Return this adapter with other names for some of its modules.

        The new names are used for what is written; the base model's tensors are still looked up by the old ones.

        Args:
            names: old name → new name.
            origin: in place of its own, if one is given.
        """
        other = copy.copy(self)
        other.origin = origin or self.origin
        other._original = (self, names)
        other.layout = {}
        for name, module in self.layout.items():
            layer = "" if module.path == name else names.get(module.path, module.path)
            other.layout[names.get(name, name)] = replace(module, name=names.get(name, name), layer=layer)
        return other

    def statistics(self, kind: str) -> Statistics | None:
        """Return the statistics that were gathered for this adapter; None if there are none.

        Args:
            kind: `fisher` or `gram`.
        Raises: AdapterError if the file beside it is damaged; CompatibilityError if it belongs to another adapter.
        """
        if self._original is not None:
            original, names = self._original
            found = original.statistics(kind)
            return None if found is None else found.renamed(names)
        path = None if self.folder is None else self.folder / file_name(kind)
        if kind not in self._statistics and path is not None and path.is_file():
            self.attach_statistics(Statistics.open(path, kind, self.label))
        return self._statistics.get(kind)

    def attach_statistics(self, statistics: Statistics) -> None:
        """Use these statistics instead of the file beside the adapter.

        Raises: CompatibilityError if they belong to another adapter.
        """
        statistics.check(self.digest, {name: module.shape for name, module in self.layout.items()}, self.label)
        self._statistics[statistics.kind] = statistics

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of its modules, each once, sorted."""
        return tuple(sorted({module.rank for module in self.layout.values()}))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its modules' tensors; float32 if they differ."""
        found = {self.tensors.info(key).dtype for module in self.layout.values() for key in module.keys}
        return getattr(torch, found.pop()) if len(found) == 1 else torch.float32

    @property
    def base_name(self) -> str | None:
        """The base model's name in the config."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @cached_property
    def digest(self) -> str:
        """A sha256 over tensor names, shapes, dtypes, bytes and lora scalings, but no paths.

        It also covers the base model's tensors that the task vectors depend on.
        """
        return self.scan.digest

    def norm(self) -> float:
        """Return the Frobenius norm of the whole task vector."""
        return self.scan.norm

    def check(self) -> None:
        """Read every tensor once and refuse values that cannot be merged.

        Raises: AdapterError naming the tensors that hold NaN or infinity, or are not of a floating type.
        """
        extra = frozenset(self.extra_keys)
        for key in self.tensors.names:
            allowed = FLOATING | INTEGER_DTYPES if key in extra else FLOATING
            dtype = self.tensors.info(key).dtype
            if dtype not in allowed and not (self.peft_type.has_integer_tensors and dtype in INDEX_DTYPES):
                raise AdapterError(
                    f"adapter '{self.label}': tensor {key!r} is {dtype}; expected "
                    "float32, float16 or bfloat16. Save the adapter unquantised."
                )
        bad = self.scan.not_finite
        if bad:
            raise AdapterError(
                f"adapter '{self.label}' holds NaN or infinity in {len(bad)} tensor(s): "
                f"{some(bad, 3)}. Its training diverged: leave it out."
            )
        if not self.norm() <= LARGEST:
            raise AdapterError(
                f"adapter '{self.label}': the norm of its task vector exceeds the range of float32. Its training diverged, "
                "or lora_alpha is wrong: correct adapter_config.json, or leave the adapter out."
            )

    @cached_property
    def scan(self) -> Scan:
        """The digest, the norm and the tensors that are not finite, from one reading of the file.

        A tensor stays in memory until the last module that uses it has been read.
        """
        digest = Digest("\n".join(self._digest_header()))
        users = Counter(key for module in self.layout.values() for key in set(module.keys))
        place = {key: number for number, key in enumerate(self.tensors.names)}
        completed: dict[str, list[str]] = {}  # the modules whose last tensor to be read it is
        for name, module in sorted(self.layout.items()):
            completed.setdefault(max(module.keys, key=place.__getitem__), []).append(name)
        held: dict[str, Tensor] = {}
        norms: list[float] = []
        bad: dict[str, None] = {}
        with threads_fixed():
            for key in self.tensors.names:
                held[key] = self.tensors.read(key)
                digest.add(key, held[key])
                if key not in users:
                    bad |= dict.fromkeys(_not_finite({key: held.pop(key)}))
                for name in completed.get(key, ()):
                    own = {other: held[other] for other in self.layout[name].keys}
                    norms.append(norm(self.peft_type.read(self.layout[name], MemoryTensors(own), self.base_model)))
                    if not math.isfinite(norms[-1]):  # the tensors need a check of their own only then
                        bad |= dict.fromkeys(_not_finite(own))
                    users.subtract(own.keys())
                    for other in own:
                        if not users[other]:
                            del held[other]
        return Scan(str(digest), math.hypot(*norms), tuple(bad))

    def reuse_scan(self, scan: Scan) -> None:
        """Take over the scan of the same adapter from another process, instead of reading the tensors again."""
        self.__dict__["scan"] = scan  # where `cached_property` looks first

    def _digest_header(self) -> list[str]:
        """Return what the digest covers besides the tensors: lora scalings and the tensors needed of the base model."""
        lines = [f"{name} {module.scaling!r}" for name, module in sorted(self.layout.items())]
        needed = sorted({key for module in self.layout.values() for key in module.base_tensors})
        if needed and self.base_model is not None:
            digest = Digest()
            for name in needed:
                if (found := self.base_model.find(name)) is not None:
                    digest.add(name, self.base_model.read(found))
            lines.append(str(digest))
        return lines

    def files(self) -> dict[str, writer.Content]:
        """Return the files of a folder that holds this adapter: content by name.

        Raises: CompatibilityError for a LoRA of a pipeline's parts, which no folder of PEFT can hold.
        """
        if self.origin is not None and self.origin.parts:
            raise CompatibilityError(
                f"adapter '{self.label}' is a LoRA of an image model's {', '.join(self.origin.parts)}, and a folder of PEFT is "
                "for one model. Write it with ties_peft.convert(…, target='diffusers') or 'kohya', or one part of it with part=."
            )
        tensors = {name: self.tensors.read(name) for name in self.tensors.names}
        return {sources.ADAPTER_CONFIG: writer.json_text(self.config), sources.WEIGHT_FILES[0]: tensors}

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write the adapter to a folder, completely or not at all.

        Args:
            folder: a path that does not exist, or an empty folder.
            force: replace an existing folder, if it holds nothing but files that ties_peft writes.
        Raises: RecipeError if the folder cannot be replaced or written.
        """
        own = sources.local_path(self.source) if self.source is not None else None
        if own is not None and own.resolve() == Path(folder).resolve():
            raise RecipeError(f"'{folder}' is the adapter's own folder. Save it to another one.")
        return writer.write_folder(Path(folder), self.files(), force, [own] if own else [])

    def __repr__(self) -> str:
        return f"Adapter({self.label!r}, {self.peft_type.name}, {len(self.layout)} modules, ranks {self.ranks})"


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def load_adapters(given: Iterable[str | Path | Adapter], base: BaseModel | None = None) -> list[Adapter]:
    """Open adapters in order; a pattern stands for all adapters that match it (see `sources`)."""
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
    """Refuse a single adapter, a mapping and a set where a list of adapters is expected.

    Raises: RecipeError.
    """
    if isinstance(given, (str, Path, Adapter)):
        raise RecipeError(f"the adapters are one adapter, {given}; expected a list of them: merge([...]).")
    if isinstance(given, Mapping):
        names, numbers = [str(key) for key in given], list(given.values())
        weighted = bool(names) and all(is_number(number) for number in numbers)
        example = f"{names!r}, weights={numbers!r}" if weighted else "[...], weights=[...]"
        raise RecipeError(
            f"the adapters are a {type(given).__name__}; expected a list, with one weight per adapter beside it: "
            f"merge({example})."
        )
    if isinstance(given, Set):
        raise RecipeError(
            f"the adapters are a {type(given).__name__}, which has no order; expected a list, so that weights can be given in "
            "the same order."
        )


def check_adapters(adapters: Sequence[Adapter], processes: ProcessGroup = SINGLE_PROCESS) -> None:
    """Check all tensors of some adapters, in parallel on the threads of all processes.

    Args:
        adapters: the same in every process.
        processes: that share the work; each of them takes over the others' scans.
    Raises: AdapterError, the same in every process: that of the first adapter at fault.
    """
    distinct = list(dict.fromkeys(adapters))
    if not distinct:
        return
    with thread_pool() as threads:
        mine = threads.map(_scan_or_error, distinct[processes.number :: processes.size])
        results = processes.gather(mine)
    for index, adapter in enumerate(distinct):
        result = results[index % processes.size][index // processes.size]
        if isinstance(result, TiesPeftError):
            raise result
        adapter.reuse_scan(result)


def _scan_or_error(adapter: Adapter) -> Scan | TiesPeftError:
    try:
        adapter.check()
        return adapter.scan
    except TiesPeftError as error:
        return error
