"""Translate: a LoRA of diffusers, kohya or MLX as the PEFT adapter that does exactly the same.

    diffusers  the part's module paths as they stand; alpha from the file, else scaling 1, as diffusers takes it
    kohya      the path is the one module of the base whose name with underscores for dots is the file's; alpha likewise
               (of a module that versions of transformers name differently, any of the names; see `spellings`)
    ComfyUI    names as they stand; alpha from the file, else the rank, as ComfyUI takes it
    MLX        A = lora_aᵀ, B = lora_bᵀ; scaling as the config gives it: scale, or in old files scale·alpha/rank
    PEFT       names as they stand; lora_alpha as it is said

What is not exact is refused. Sources: diffusers/utils/state_dict_utils.py, peft_utils.py and loaders/lora_base.py;
kohya's networks/lora.py; mlx_lm/tuner/lora.py.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...errors import AdapterError, RecipeError
from .. import sources
from ..adapter import Adapter, read_config
from ..base_model import PIPELINE, BaseModel
from ..module_names import accepted_names
from ..types.base import PREFIX
from . import recognise as foreign
from .recognise import Entry, Form

METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's config in a safetensors file
KEPT = ("lora_alpha", "alpha_pattern", "use_rslora")


@dataclass(frozen=True)
class ConversionOptions:
    """What a foreign file does not say itself.

    Attributes:
        part: of a pipeline, such as `unet`.
        base: the base's weights, for its modules' names: a folder, a file or a Hub id.
        modules: a text file with those names, one a line, in place of the base; also for an adapter that is PEFT's,
            whose modules are then written under these names where a release of transformers renamed them.
        alpha: lora_alpha of all modules.
        base_model: the base's name to write.
    """

    part: str | None = None
    base: str | None = None
    modules: Path | None = None
    alpha: float | None = None
    base_model: str | None = None


def open_as_peft(source: str, hints: ConversionOptions) -> tuple[Adapter, list[str]]:
    """(an adapter, PEFT's or not; what was done to make it PEFT's).

    Raises: AdapterError where it is none, or cannot be turned into one exactly; RecipeError for hints
        that mean nothing for it.
    """
    label = source
    found = sources.find_files(source)
    config = read_config(found.folder, label)
    form = foreign.form_of(found, config, label)
    if form is None or (form.name == "PEFT" and config is not None):
        given = [f"--{name}" for name in ("part", "alpha") if getattr(hints, name) is not None]
        if given:
            raise RecipeError(f"{', '.join(given)} is for files that are not PEFT's, and '{label}' is. Leave it out.")
        return _respelled(Adapter.load(source, base=hints.base), hints, label)
    if not form.plain:
        foreign.refuse_form(form, config, label)
    entries, remarks = _choose(form, hints, label)
    base = _base(hints)
    names, respelled = _resolve(form, entries, hints, base, label)
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float | None] = {}
    for entry, name in zip(entries, names, strict=True):
        A, B, alphas[name] = _read(form, entry, label)
        A, B = _fit(A, B, name, base, label)
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A, B
    ranks = {name: tensors[f"{PREFIX}{name}.lora_A.weight"].shape[0] for name in names}
    scaling, said = _scaling(form, entries[0].part, config, hints, ranks, alphas, label)
    made = {
        "peft_type": "LORA",
        "base_model_name_or_path": _base_name(hints, config),
        "target_modules": names,
        **({"fan_in_fan_out": True} if base is not None and any(map(base.is_conv1d, names)) else {}),
        **scaling,
    }
    what = f"{form.path.name} was {form.title}, {len(names)} modules{f' of {p}' if (p := entries[0].part) else ''}"
    return Adapter.from_tensors(made, tensors, source), [f"{what}; {said}.", *respelled, *remarks]


def _respelled(adapter: Adapter, hints: ConversionOptions, label: str) -> tuple[Adapter, list[str]]:
    """(an adapter under the names that --modules lists, if it was given; a remark on those that are other)."""
    if hints.modules is None:
        return adapter, []
    known = _module_names(hints, None) or []
    names = accepted_names(known, exactly=True)
    paths = {name: m.path if name.startswith(m.path) else name for name, m in adapter.layout.items()}
    missing = [path for path in paths.values() if path not in names]
    if missing:
        raise AdapterError(_unfit(label, missing, len(adapter.layout), known))
    moved = {path: names[path] for path in paths.values() if names[path] != path}
    inside = {name: moved[path] + name[len(path) :] for name, path in paths.items() if path in moved}
    return (adapter.renamed(moved | inside) if moved else adapter), _told(moved)


def _told(table: Mapping[str, str]) -> list[str]:
    """A remark on modules that are written under other names, which it maps to by their own."""
    if not table:
        return []
    old = min(table)
    return [f"{len(table)} modules are written under the base's names: {old!r} as {table[old]!r}."]


def _base_name(hints: ConversionOptions, config: Mapping[str, Any] | None) -> str | None:
    own = (config or {}).get("model")  # MLX-LM notes it there
    return hints.base_model or (own if isinstance(own, str) else None)


def _choose(form: Form, hints: ConversionOptions, label: str) -> tuple[list[Entry], list[str]]:
    """(the modules of the part that was asked for, a remark on the others)."""
    entries = list(form.entries)
    if form.name == "PEFT" and hints.part:  # parts of which the names know nothing
        inside = [entry for entry in entries if entry.module.startswith(f"{hints.part}.")]
        entries = [Entry(hints.part, e.module[len(hints.part) + 1 :], e.keys) for e in inside] + [
            entry for entry in entries if entry not in inside
        ]
    parts = Counter(entry.part for entry in entries)
    if hints.part is not None and hints.part not in parts:
        raise AdapterError(_no_part(form, hints.part, parts, label))
    if hints.part is None and len(parts) > 1:
        raise AdapterError(
            f"adapter '{label}': {form.path.name} holds adapters for {len(parts)} part(s): {_listed(parts)}; each "
            f"becomes an adapter of its own. Say which: --part {next(name for name in sorted(parts, reverse=True))}."
        )
    part = hints.part or next(iter(parts))
    others = [f"{name or 'no part'} ({count} modules)" for name, count in sorted(parts.items()) if name != part]
    remarks = [f"not converted, being adapters of their own: {', '.join(others)} (--part)."] if others else []
    return [entry for entry in entries if entry.part == part], remarks


def _listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name or 'no name'} ({count} modules)" for name, count in sorted(parts.items()))


def _no_part(form: Form, part: str, parts: Counter[str], label: str) -> str:
    """Return what to say of a part that a file does not have: those that it has."""
    known = Counter({name: count for name, count in parts.items() if name})
    if form.name == "PEFT":  # what the names of the modules begin with can be named as a part
        known = Counter(entry.module.partition(".")[0] for entry in form.entries)
    has = f"It has {_listed(known)}. Name one of them with --part" if known else "It has no parts. Leave --part out"
    return f"adapter '{label}': {form.path.name} has no part {part!r}. {has}."


def _base(hints: ConversionOptions) -> BaseModel | None:
    return None if hints.base is None else BaseModel.load(hints.base)


def _module_names(hints: ConversionOptions, base: BaseModel | None) -> list[str] | None:
    """The names of the base's modules, if they are known."""
    if base is not None:
        return base.modules
    if hints.modules is None:
        return None
    try:
        lines = hints.modules.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--modules {str(hints.modules)!r} cannot be read: {error}.") from None
    return sorted({line.strip() for line in lines if line.strip()})


def _resolve(
    form: Form, entries: Sequence[Entry], hints: ConversionOptions, base: BaseModel | None, label: str
) -> tuple[list[str], list[str]]:
    """(the modules' paths in the base, in order; a remark on those that the file spells otherwise)."""
    known = _module_names(hints, base)
    own = [entry.module for entry in entries]
    if known is None and form.name != "kohya":
        return own, []
    if known is None:
        raise AdapterError(
            f"adapter '{label}': kohya's names have underscores for dots ({own[0]!r}), so the names "
            "of the base's modules are needed to tell them apart. Name the base's weights with --base (for a pipeline, "
            f"those of its part, such as unet/{PIPELINE}), or a text file of the names with --modules."
        )
    table = _spellings(form, known, exactly=base is None)
    missing = [name for name in own if name not in table]
    if missing:
        raise AdapterError(_unfit(label, missing, len(entries), known))
    twofold = {name: sorted(table[name]) for name in own if len(table[name]) > 1}
    if twofold:
        module, names = next(iter(twofold.items()))
        raise AdapterError(
            f"adapter '{label}': {module!r} may be any of {', '.join(names)} ({len(twofold)} such "
            "name(s)). List the right ones alone with --modules."
        )
    found = [min(table[name]) for name in own]
    plain = {name: new for name, new in zip(own, found, strict=True) if _flat(form, new) != name}
    return found, _told(plain)


def _spellings(form: Form, known: Sequence[str], exactly: bool) -> dict[str, set[str]]:
    """The names to write, by how the file may spell them; names of the base itself come before other spellings."""
    exact: dict[str, set[str]] = {}
    for name in known:
        exact.setdefault(_flat(form, name), set()).add(name)
    others: dict[str, set[str]] = {}
    for spelling, name in accepted_names(known, exactly=exactly).items():
        others.setdefault(_flat(form, spelling), set()).add(name)
    return others | exact


def _flat(form: Form, name: str) -> str:
    """A module's name as the file has it: kohya's with underscores for dots."""
    return name.replace(".", "_") if form.name == "kohya" else name


def _unfit(label: str, missing: Sequence[str], count: int, known: Sequence[str]) -> str:
    return (
        f"adapter '{label}': {len(missing)} of its {count} modules are none of the base's, such as "
        f"{missing[0]!r}; the base has {len(known)}, such as '{known[0] if known else 'none'}'. "
        "Is it the base, and the part of it, that the adapter was trained on, with its modules named as there?"
    )


def _read(form: Form, entry: Entry, label: str) -> tuple[Tensor, Tensor, float | None]:
    """(A, B, alpha or None) of one module."""
    where = f"adapter '{label}', module {entry.module!r}"
    for side, word in (("A", "down (lora_A)"), ("B", "up (lora_B)")):
        if side not in entry.keys:
            raise AdapterError(f"{where}: there is no {word} tensor. The file is not whole: get it again.")
    A, B = (form.tensors.read(entry.keys[side]) for side in ("A", "B"))
    if form.name == "MLX":
        if A.ndim != 2 or B.ndim != 2:
            raise AdapterError(
                f"{where} is of experts ({list(A.shape)}), which cannot be converted exactly. Leave it out."
            )
        if entry.module.rsplit(".", 1)[-1] in ("embed_tokens", "wte", "word_embeddings", "embedding"):
            raise AdapterError(f"{where} is an embedding, whose conversion is not offered. Train it without.")
        A, B = A.T.contiguous(), B.T.contiguous()
    if A.ndim < 2 or B.ndim < 2 or A.shape[0] != B.shape[1] or 0 in (*A.shape, *B.shape):
        raise AdapterError(
            f"{where}: the tensors are {list(A.shape)} and {list(B.shape)}; expected [r, in] and [out, r] with the same r. "
            "The file is damaged: get it again."
        )
    return A, B, _alpha(form, entry, where)


def _alpha(form: Form, entry: Entry, where: str) -> float | None:
    if "alpha" not in entry.keys:
        return None
    tensor = form.tensors.read(entry.keys["alpha"])
    value = float(tensor.item()) if tensor.numel() == 1 else math.nan
    if not math.isfinite(value):
        raise AdapterError(f"{where}: alpha is {tensor.tolist()}; expected one finite number.")
    return value


def _fit(A: Tensor, B: Tensor, name: str, base: BaseModel | None, label: str) -> tuple[Tensor, Tensor]:
    """A and B with as many dimensions as the base's weight has, where that is known; their sizes checked."""
    if base is None:
        return A, B
    found = base.find(f"{name}.weight")
    if found is None:  # the name is newer than the checkpoint, which holds several modules that it may be
        return A, B
    shape = base.info(found).shape
    shape = shape[::-1] if base.is_conv1d(name) else shape
    plain = all(size == 1 for size in (*A.shape[2:], *B.shape[2:]))
    if plain and A.ndim != len(shape) and all(size == 1 for size in shape[2:]):
        ones = (1,) * (len(shape) - 2)
        A, B = A.reshape(*A.shape[:2], *ones), B.reshape(*B.shape[:2], *ones)
    if (B.shape[0], *A.shape[1:]) != shape:
        raise AdapterError(
            f"adapter '{label}', module {name!r}: it changes a weight of {[B.shape[0], *A.shape[1:]]}, the "
            f"base's is {list(shape)}. Is it the base that the adapter was trained on?"
        )
    return A, B


def _scaling(
    form: Form,
    part: str,
    config: Mapping[str, Any] | None,
    hints: ConversionOptions,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float | None],
    label: str,
) -> tuple[dict[str, Any], str]:
    """(the keys of the config that give every module its lora scaling, where they are from)."""
    own = {name: alpha for name, alpha in alphas.items() if alpha is not None}
    noted = _metadata(form.path, part) if form.name == "diffusers" else {}
    if (own or noted) and hints.alpha is not None:
        raise RecipeError(f"--alpha is {hints.alpha:g}, but '{label}' says its alpha itself. Leave it out.")
    if noted.get("use_dora"):
        raise AdapterError(f"adapter '{label}' is a DoRA by its metadata, which is no plain LoRA. Leave it out.")
    if own:
        each = {name: own.get(name, float(rank)) for name, rank in ranks.items()}
        lacking = len(ranks) - len(own)
        return _by_module(each), "alpha from the file" + (f", scaling 1 for {lacking} without" if lacking else "")
    if "lora_alpha" in noted:
        return {key: noted[key] for key in KEPT if key in noted}, "alpha from the file's metadata"
    if form.name == "MLX" and hints.alpha is None:
        scale = _mlx_scale(config or {}, label)
        return _by_module({name: scale * rank for name, rank in ranks.items()}), f"scaling {scale:g} from its config"
    if hints.alpha is not None:
        return {"lora_alpha": hints.alpha}, f"alpha {hints.alpha:g} as it was said"
    every = _by_module({name: float(rank) for name, rank in ranks.items()})
    if form.name == "ComfyUI":
        return every, "alpha = rank (scaling 1), as ComfyUI takes a file that gives no alpha"
    if form.name == "PEFT" or (form.name == "diffusers" and len(set(ranks.values())) > 1):
        why = "releases of diffusers differ on its scaling" if form.name == "diffusers" else "nothing tells its scaling"
        raise AdapterError(
            f"adapter '{label}': the file gives no alpha (ranks {', '.join(map(str, sorted(set(ranks.values()))))}), and "
            f"{why}. Say lora_alpha as it was trained: --alpha NUMBER."
        )
    return every, "scaling 1, as the file gives no alpha"


def _by_module(alphas: Mapping[str, float]) -> dict[str, Any]:
    """lora_alpha, and a pattern for every module that has another."""
    (most, _), *_ = Counter(alphas.values()).most_common(1)
    patterns = {f"^{_escaped(name)}": alpha for name, alpha in sorted(alphas.items()) if alpha != most}
    return {"lora_alpha": most, **({"alpha_pattern": patterns} if patterns else {})}


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace(".", "\\.")


def _mlx_scale(config: Mapping[str, Any], label: str) -> float:
    """The scaling of MLX-LM's config."""
    given = config.get("lora_parameters")
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise AdapterError(f"adapter '{label}': fine_tune_type is {kind!r}; only lora can be converted.")
    try:
        scale = float(given["scale"])  # type: ignore[index]
        if "alpha" in given:  # type: ignore[operator]
            scale *= float(given["alpha"]) / float(given["rank"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError, ZeroDivisionError):
        raise AdapterError(
            f"adapter '{label}': {sources.ADAPTER_CONFIG} gives no scale (lora_parameters is {given!r}). Say "
            "lora_alpha = scale × rank: --alpha NUMBER."
        ) from None
    if not math.isfinite(scale):
        raise AdapterError(f"adapter '{label}': its scale is {scale}; expected a finite number.")
    return scale


def _metadata(path: Path, part: str) -> dict[str, Any]:
    """PEFT's config of one part as newer releases of diffusers note it in the file; empty if they did not."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            noted = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}
    items: Iterable[tuple[str, Any]] = noted.items() if isinstance(noted, dict) else ()
    return {key.removeprefix(f"{part}."): value for key, value in items if key.startswith(f"{part}.") or not part}
