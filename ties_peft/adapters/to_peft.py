"""Convert a LoRA of diffusers, kohya, ComfyUI or MLX to the PEFT adapter that computes exactly the same.

How names, factors and scalings of each format are read is in `formats`. What cannot be converted exactly is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterError, RecipeError
from . import recognise, sources
from .adapter import Adapter, read_config
from .base_model import PIPELINE, BaseModel
from .contents import PREFIX
from .formats import LoraFile, LoraModule
from .module_names import accepted_names

CONFIG_KEYS = ("lora_alpha", "alpha_pattern", "use_rslora")  # taken over from a file's own metadata


@dataclass(frozen=True)
class ConversionOptions:
    """What a file of another format does not say itself.

    Attributes:
        part: of a pipeline, such as `unet`.
        base: the base model's weights, for its modules' names: a folder, a file or a Hub id.
        modules: a text file with those names, one per line, instead of the base. It may be given for an adapter of PEFT's
            too: modules that a release of transformers renamed are then written under these names.
        alpha: lora_alpha of all modules.
        base_model: the base's name to write.
    """

    part: str | None = None
    base: str | None = None
    modules: Path | None = None
    alpha: float | None = None
    base_model: str | None = None


def open_as_peft(source: str, options: ConversionOptions) -> tuple[Adapter, list[str]]:
    """Open an adapter of any known format; return it as PEFT's, and remarks on what was converted.

    Raises: AdapterError if it is no adapter, or cannot be converted exactly; RecipeError for options that do not apply to it.
    """
    files = sources.find_files(source)
    config = read_config(files.folder, source)
    file = recognise.recognise(files, config, source)
    if file is None or (file.format.name == "PEFT" and config is not None):
        given = [f"--{name}" for name in ("part", "alpha") if getattr(options, name) is not None]
        if given:
            raise RecipeError(f"{', '.join(given)} is for files that are not PEFT's, and '{source}' is. Leave it out.")
        return _rename_modules(Adapter.load(source, base=options.base), options, source)
    if not file.is_plain:
        recognise.refuse_file(file, config, source)
    return _Conversion(file, config or {}, options, source).run()


class _Conversion:
    """The conversion of one file.

    Args:
        file: a plain LoRA.
        config: adapter_config.json beside it; empty if there is none.
        options: of the user.
        label: the adapter's name in messages.
    """

    def __init__(self, file: LoraFile, config: Mapping[str, Any], options: ConversionOptions, label: str) -> None:
        self.file, self.config, self.options, self.label = file, config, options, label
        self.format = file.format
        self.base = None if options.base is None else BaseModel.load(options.base)

    def run(self) -> tuple[Adapter, list[str]]:
        """Return the adapter, and remarks on what was done."""
        modules, remarks = self.choose_part()
        names, renamed = self.find_names([module.module for module in modules])
        part = modules[0].part
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        alphas: dict[str, float | None] = {}
        for module, name in zip(modules, names, strict=True):
            A, B, alphas[name] = self.read(module)
            A, B = self.fit_to_base(A, B, name)
            tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A, B
            ranks[name] = A.shape[0]
        scaling, remark = self.scaling(part, ranks, alphas)
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": self.base_name(),
            "target_modules": names,
            **({"fan_in_fan_out": True} if self.base is not None and any(map(self.base.is_conv1d, names)) else {}),
            **scaling,
        }
        what = f"{self.file.path.name} was {self.file.title}, {len(names)} modules{f' of {part}' if part else ''}"
        return Adapter.from_tensors(config, tensors, self.label), [f"{what}; {remark}.", *renamed, *remarks]

    def base_name(self) -> str | None:
        """Return the base model's name to write."""
        own = self.config.get("model")  # MLX-LM stores it there
        return self.options.base_model or (own if isinstance(own, str) else None)

    def choose_part(self) -> tuple[list[LoraModule], list[str]]:
        """Return the modules of the part that was asked for, and a remark on the others."""
        modules, asked = list(self.file.modules), self.options.part
        if self.format.part_is_prefix and asked:
            modules = [_without_prefix(module, asked) for module in modules]
        parts = Counter(module.part for module in modules)
        if asked is not None and asked not in parts:
            raise AdapterError(self._no_part(asked, parts))
        if asked is None and len(parts) > 1:
            raise AdapterError(
                f"adapter '{self.label}': {self.file.path.name} holds adapters for {len(parts)} part(s): "
                f"{_list_parts(parts)}; each becomes an adapter of its own. Say which: --part {max(parts)}."
            )
        part = asked or next(iter(parts))
        others = [f"{name or 'no part'} ({count} modules)" for name, count in sorted(parts.items()) if name != part]
        remarks = [f"not converted, being adapters of their own: {', '.join(others)} (--part)."] if others else []
        return [module for module in modules if module.part == part], remarks

    def _no_part(self, part: str, parts: Counter[str]) -> str:
        known = Counter({name: count for name, count in parts.items() if name})
        if self.format.part_is_prefix:  # then the beginnings of the module names can be named as parts
            known = Counter(module.module.partition(".")[0] for module in self.file.modules)
        has = (
            f"It has {_list_parts(known)}. Name one of them with --part"
            if known
            else "It has no parts. Leave --part out"
        )
        return f"adapter '{self.label}': {self.file.path.name} has no part {part!r}. {has}."

    def find_names(self, own: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the paths in the base model of modules, and a remark on those that the file names differently."""
        known = _base_names(self.options, self.base)
        if known is None and self.format.has_base_names:
            return list(own), []
        if known is None:
            raise AdapterError(
                f"adapter '{self.label}': the names of {self.format.name} have underscores for dots ({own[0]!r}), so the "
                "names of the base's modules are needed to tell them apart. Name the base's weights with --base (for a "
                f"pipeline, those of its part, such as unet/{PIPELINE}), or a text file of the names with --modules."
            )
        table = self._spellings(known)
        missing = [name for name in own if name not in table]
        if missing:
            raise AdapterError(_not_in_base(self.label, missing, len(own), known))
        ambiguous = {name: sorted(table[name]) for name in own if len(table[name]) > 1}
        if ambiguous:
            module, names = next(iter(ambiguous.items()))
            raise AdapterError(
                f"adapter '{self.label}': {module!r} may be any of {', '.join(names)} ({len(ambiguous)} such "
                "name(s)). List only the right ones with --modules."
            )
        found = [min(table[name]) for name in own]
        renamed = {name: new for name, new in zip(own, found, strict=True) if self.format.spelled(new) != name}
        return found, _renaming_remark(renamed)

    def _spellings(self, known: Sequence[str]) -> dict[str, set[str]]:
        """Return the names to write by their spelling in the file; the base's own names come before other spellings."""
        exact: dict[str, set[str]] = {}
        for name in known:
            exact.setdefault(self.format.spelled(name), set()).add(name)
        others: dict[str, set[str]] = {}
        for spelling, name in accepted_names(known, exactly=self.base is None).items():
            others.setdefault(self.format.spelled(spelling), set()).add(name)
        return others | exact

    def read(self, module: LoraModule) -> tuple[Tensor, Tensor, float | None]:
        """Return A, B, and alpha if the file has it, of one module."""
        where = f"adapter '{self.label}', module {module.module!r}"
        for side, word in (("A", "down (lora_A)"), ("B", "up (lora_B)")):
            if side not in module.keys:
                raise AdapterError(f"{where}: there is no {word} tensor. The file is incomplete: get it again.")
        A, B = (self.file.tensors.read(module.keys[side]) for side in ("A", "B"))
        A, B = self.format.factors(A, B, module.module, where)
        if A.ndim < 2 or B.ndim < 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
            raise AdapterError(
                f"{where}: the tensors are {list(A.shape)} and {list(B.shape)}; expected [r, in] and [out, r] with the same "
                "r. The file is damaged: get it again."
            )
        return A, B, self._alpha(module, where)

    def _alpha(self, module: LoraModule, where: str) -> float | None:
        if "alpha" not in module.keys:
            return None
        tensor = self.file.tensors.read(module.keys["alpha"])
        value = float(tensor.item()) if tensor.numel() == 1 else math.nan
        if not math.isfinite(value):
            raise AdapterError(
                f"{where}: alpha is {tensor.tolist()}; expected one finite number. The file is damaged: get it again."
            )
        return value

    def fit_to_base(self, A: Tensor, B: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Return A and B with as many dimensions as the base's weight, their sizes checked against it."""
        found = None if self.base is None else self.base.find(f"{name}.weight")
        if self.base is None or found is None:  # a newer name may stand for several modules of an older checkpoint
            return A, B
        shape = self.base.info(found).shape
        shape = shape[::-1] if self.base.is_conv1d(name) else shape
        pointwise = all(size == 1 for size in (*A.shape[2:], *B.shape[2:], *shape[2:]))
        if pointwise and A.ndim != len(shape):
            ones = (1,) * (len(shape) - 2)
            A, B = A.reshape(*A.shape[:2], *ones), B.reshape(*B.shape[:2], *ones)
        if (B.shape[0], *A.shape[1:]) != shape:
            raise AdapterError(
                f"adapter '{self.label}', module {name!r}: it changes a weight of {[B.shape[0], *A.shape[1:]]}, the "
                f"base's is {list(shape)}. Is it the base that the adapter was trained on?"
            )
        return A, B

    def scaling(
        self, part: str, ranks: Mapping[str, int], alphas: Mapping[str, float | None]
    ) -> tuple[dict[str, Any], str]:
        """Return the config's keys that give every module its lora scaling, and where they are from."""
        asked, label = self.options.alpha, self.label
        own = {name: alpha for name, alpha in alphas.items() if alpha is not None}
        metadata = self.format.metadata(self.file.path, part)
        if (own or metadata) and asked is not None:
            raise RecipeError(f"--alpha is {asked:g}, but '{label}' states its alpha itself. Leave it out.")
        if metadata.get("use_dora"):
            raise AdapterError(f"adapter '{label}' is a DoRA by its metadata, which is no plain LoRA. Leave it out.")
        if own:
            each = {name: own.get(name, float(rank)) for name, rank in ranks.items()}
            lacking = len(ranks) - len(own)
            return _by_module(each), "alpha from the file" + (f", scaling 1 for {lacking} without" if lacking else "")
        if "lora_alpha" in metadata:
            return {key: metadata[key] for key in CONFIG_KEYS if key in metadata}, "alpha from the file's metadata"
        if asked is not None:
            return {"lora_alpha": asked}, f"alpha {asked:g} as given"
        scale = self.format.config_scale(self.config, label)
        if scale is not None:
            return _by_module({name: scale * r for name, r in ranks.items()}), f"scaling {scale:g} from its config"
        reason = self.format.needs_alpha(list(ranks.values()))
        if reason is not None:
            raise AdapterError(
                f"adapter '{label}': the file gives no alpha (ranks {', '.join(map(str, sorted(set(ranks.values()))))}), "
                f"and {reason}. Give the lora_alpha of its training: --alpha NUMBER."
            )
        return _by_module({name: float(rank) for name, rank in ranks.items()}), self.format.without_alpha


def _without_prefix(module: LoraModule, part: str) -> LoraModule:
    """Return a module as one of a part, if its name begins with the part's."""
    if not module.module.startswith(f"{part}."):
        return module
    return LoraModule(part, module.module[len(part) + 1 :], module.keys)


def _list_parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'no name'} ({count} modules)" for name, count in sorted(parts.items()))


def _by_module(alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return lora_alpha, and a pattern for every module that has another alpha."""
    (common, _), *_ = Counter(alphas.values()).most_common(1)
    patterns = {f"^{_escaped(name)}": alpha for name, alpha in sorted(alphas.items()) if alpha != common}
    return {"lora_alpha": common, **({"alpha_pattern": patterns} if patterns else {})}


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace(".", "\\.")


def _rename_modules(adapter: Adapter, options: ConversionOptions, label: str) -> tuple[Adapter, list[str]]:
    """Return an adapter of PEFT's under the names that --modules lists, if it was given, and a remark on new names."""
    if options.modules is None:
        return adapter, []
    known = _base_names(options, None) or []
    names = accepted_names(known, exactly=True)
    paths = {name: m.path if name.startswith(m.path) else name for name, m in adapter.layout.items()}
    missing = [path for path in paths.values() if path not in names]
    if missing:
        raise AdapterError(_not_in_base(label, missing, len(adapter.layout), known))
    renamed = {path: names[path] for path in paths.values() if names[path] != path}
    inside = {name: renamed[path] + name[len(path) :] for name, path in paths.items() if path in renamed}
    return (adapter.renamed(renamed | inside) if renamed else adapter), _renaming_remark(renamed)


def _renaming_remark(names: Mapping[str, str]) -> list[str]:
    """Return a remark on modules that are written under other names, given old name → new; none for none."""
    if not names:
        return []
    old = min(names)
    return [f"{len(names)} modules are written under the base's names: {old!r} as {names[old]!r}."]


def _base_names(options: ConversionOptions, base: BaseModel | None) -> list[str] | None:
    """Return the names of the base model's modules; None if neither the base nor a list of names was given."""
    if base is not None:
        return base.modules
    if options.modules is None:
        return None
    try:
        lines = options.modules.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"--modules {str(options.modules)!r} cannot be read: {error}. Expected a text file with one module name per line."
        ) from None
    return sorted({line.strip() for line in lines if line.strip()})


def _not_in_base(label: str, missing: Sequence[str], count: int, known: Sequence[str]) -> str:
    return (
        f"adapter '{label}': {len(missing)} of its {count} modules are not in the base, such as {missing[0]!r}; the base has "
        f"{len(known)}, such as '{known[0] if known else 'none'}'. Is it the base, and the part of it, that the adapter was "
        "trained on, with the same module names?"
    )
