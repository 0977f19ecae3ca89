"""Foreign: files that are adapters, but not PEFT's: diffusers, kohya, MLX, and configs of somebody's own.

A file is known by the names of its tensors:

    diffusers  unet.….attn1.to_k.lora.down.weight, ….attn1.processor.to_k_lora.down.weight, unet.….lora_A.weight
    kohya      lora_unet_down_blocks_0_….lora_down.weight, with ….alpha; dots and underscores are one
    LyCORIS    the same with hada_…, lokr_…, lora_mid, dora_scale
    ComfyUI    diffusion_model.….lora_A.weight or .lora_down.weight, with ….alpha
    MLX        model.layers.0.….lora_a, (in, r), and lora_b, (r, out); m beside them in a DoRA
    PEFT       ….lora_A.weight, without the config that says lora_alpha

What can be turned into a PEFT adapter exactly is so by `ties-peft convert`, and the refusal says how.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from ...errors import AdapterError
from ..sources import (
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
from ..tensors import PickleFile, SafetensorsFile, TensorSource

PARTS = r"unet|text_encoder(?:_\d)?|transformer(?:_\d)?|prior|controlnet"
SIDES = {"lora_A": "A", "lora_B": "B", "down": "A", "up": "B", "lora_a": "A", "lora_b": "B"}
SIDES |= {"lora_down": "A", "lora_up": "B"}
DIFFUSERS = re.compile(
    rf"(?:(?P<part>{PARTS})\.)?(?P<module>.+?)\.(?:(?:lora|lora_linear_layer)\.(?P<side>down|up)\.weight"
    r"|(?P<peft>lora_A|lora_B)\.weight|(?P<alpha>alpha))"
)
PROCESSOR = re.compile(
    rf"(?:(?P<part>{PARTS})\.)?(?P<module>.+?)\.(?P<to>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight"
)
KOHYA = re.compile(
    r"lora_(?P<part>unet|te\d?|transformer|prior_unet|prior_te)_(?P<module>.+)\.(?:lora_(?P<side>down|up)\.weight|(?P<alpha>alpha))"
)
LYCORIS = re.compile(
    r"(?:lora|lycoris)_.+\.(hada_|lokr_|lora_mid|dora_scale|oft_|glora_|diff|a1\.|w_norm)"
    r"|(?!base_model\.model\.).+\.(hada_(?=w\d_[ab]|t\d)|lokr_(?=w\d|t2)|lora_mid(?=\.weight)|dora_scale|diff(?=_b$|$))"
)
VARIANTS = {  # of LyCORIS, by a part of the tensors' names
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a middle factor (lora_mid)",
    "dora_scale": "DoRA",
    "oft_": "OFT",
    "glora_": "GLoRA",
    "a1.": "GLoRA",
    "diff": "full differences",
    "w_norm": "norms",
}
COMFYUI = re.compile(
    r"(?P<part>diffusion_model|text_encoders)\.(?P<module>.+)\."
    r"(?:(?P<side>lora_A|lora_B|lora_down|lora_up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
MLX = re.compile(r"(?P<module>.+)\.(?P<side>lora_a|lora_b)")
PEFT = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.(?P<side>lora_A|lora_B)(?:\.(?P<name>[^.]+))?\.weight")
TEXT_ENCODER = {
    "to_q": "q_proj",
    "to_k": "k_proj",
    "to_v": "v_proj",
    "to_out": "out_proj",
}  # of diffusers' first releases
SURE = ("unet.", "text_encoder", "transformer.transformer_blocks.", "transformer.single_transformer_blocks.", "prior.")


@dataclass
class Entry:
    """One adapted module of a foreign file.

    Attributes:
        part: of a pipeline, such as `unet`; empty where the file has no such parts.
        module: as the file spells it.
        keys: the names of its tensors: A, (r, in); B, (out, r); alpha, if the file has one.
    """

    part: str
    module: str
    keys: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """What a file is.

    Attributes:
        name: diffusers, kohya, LyCORIS, ComfyUI, MLX, PEFT.
        path: the file.
        tensors: in it.
        entries: its modules.
        rest: the names of tensors that belong to none.
        variant: what its updates are, where they are no plain LoRA: DoRA, LoHa, …
    """

    name: str
    path: Path
    tensors: TensorSource
    entries: tuple[Entry, ...]
    rest: tuple[str, ...]
    variant: str = ""

    @property
    def plain(self) -> bool:
        """Whether it is a plain LoRA and nothing else, so that it can be converted."""
        return not self.variant and not self.rest

    @property
    def title(self) -> str:
        """What it is, in words."""
        return TITLES[self.name] + (f" of type {self.variant}" if self.variant else "")

    @property
    def parts(self) -> Counter[str]:
        """How many modules each part of a pipeline has."""
        return Counter(entry.part for entry in self.entries)

    def __str__(self) -> str:
        counts = ", ".join(f"{part}: {count}" if part else str(count) for part, count in sorted(self.parts.items()))
        return f"{self.path.name} is {self.title} ({counts or 'no'} modules that are plain LoRA)"


TITLES = {
    "diffusers": "a LoRA of diffusers",
    "kohya": "a LoRA of kohya's trainers",
    "LyCORIS": "a LyCORIS adapter",
    "ComfyUI": "a LoRA with ComfyUI's names",
    "MLX": "an adapter of MLX-LM",
    "PEFT": "a LoRA with PEFT's names",
}


def recognise(path: Path, label: str) -> Form | None:
    """What a file of weights is, by the names of its tensors; None where it is no LoRA known here.

    Raises: AdapterError where it cannot be read.
    """
    tensors = (SafetensorsFile if path.suffix == ".safetensors" else PickleFile)(path, label)
    name = _name(tensors.names, path)
    if name is None:
        return None
    entries: dict[tuple[str, str], Entry] = {}
    rest = []
    for key in tensors.names:
        found = _read_name(name, key)
        if found is None:
            rest.append(key)
            continue
        part, module, side = found
        entry = entries.setdefault((part, module), Entry(part, module))
        if side in entry.keys:
            raise AdapterError(f"adapter '{label}': {key!r} and {entry.keys[side]!r} are one tensor. Keep one of them.")
        entry.keys[side] = key
    return Form(name, path, tensors, tuple(entries[key] for key in sorted(entries)), tuple(rest), _variant(name, rest))


def _variant(form: str, rest: Sequence[str]) -> str:
    """Return what the tensors that belong to no plain LoRA make of a file; nothing where they do not tell."""
    if form == "MLX":
        return "DoRA" if any(name.endswith(".m") for name in rest) else ""
    marks = [found[1] or found[2] for name in rest if form == "LyCORIS" and (found := LYCORIS.match(name))]
    return ", ".join(dict.fromkeys(VARIANTS[mark] for mark in marks))


def _name(names: Sequence[str], path: Path) -> str | None:
    if any(LYCORIS.match(name) for name in names):
        return "LyCORIS"
    if any(KOHYA.fullmatch(name) for name in names):
        return "kohya"
    if any(MLX.fullmatch(name) for name in names):
        return "MLX"
    if any(found is not None and found["side"] for found in map(COMFYUI.fullmatch, names)):
        return "ComfyUI"
    own = [name for name in names if DIFFUSERS.fullmatch(name) or PROCESSOR.fullmatch(name)]
    if any(not PEFT.fullmatch(name) and not name.endswith(".alpha") for name in own):
        return "diffusers"
    if own and (path.name in OTHER_WEIGHT_FILES or any(name.startswith(SURE) for name in own)):
        return "diffusers"
    return "PEFT" if any(PEFT.fullmatch(name) for name in names) else None


def _read_name(form: str, key: str) -> tuple[str, str, str] | None:
    """(part, module, side) of a tensor's name; None where it is not a plain LoRA's."""
    if form == "PEFT":
        found = PEFT.fullmatch(key)
        return ("", found["module"], SIDES[found["side"]]) if found else None
    if form == "MLX":
        found = MLX.fullmatch(key)
        return ("", found["module"], SIDES[found["side"]]) if found else None
    if form in ("kohya", "LyCORIS", "ComfyUI"):
        found = (COMFYUI if form == "ComfyUI" else KOHYA).fullmatch(key)
        return (found["part"], found["module"], SIDES.get(found["side"] or "", "alpha")) if found else None
    found = PROCESSOR.fullmatch(key)
    if found:
        part, outer = found["part"] or "", found["module"].removesuffix(".processor")
        own = TEXT_ENCODER[found["to"]] if part.startswith("text_encoder") else found["to"]
        return part, f"{outer}.{'to_out.0' if own == 'to_out' else own}", SIDES[found["side"]]
    found = DIFFUSERS.fullmatch(key)
    if found is None:
        return None
    side = "alpha" if found["alpha"] else SIDES[found["side"] or found["peft"]]
    return found["part"] or "", found["module"].replace(".processor.", "."), side


def candidate(found: AdapterFiles) -> Path | None:
    """The file of weights that a foreign adapter most likely is."""
    if found.weights is not None:
        return found.weights
    known = [found.folder / name for name in (*WEIGHT_FILES, *OTHER_WEIGHT_FILES)]
    others = sorted(found.folder.glob("*.safetensors")) if found.folder.is_dir() else []
    return next((path for path in (*known, *others) if path.is_file()), None)


def refuse(found: AdapterFiles, config: Mapping[str, Any] | None, label: str) -> None:
    """Say what an adapter's files are where they are not PEFT's, and what to do.

    Args:
        found: the files.
        config: adapter_config.json; None where there is none.
        label: how messages name the adapter.
    Raises: AdapterError, unless the config has a peft_type and no other file of weights was named.
    """
    form = form_of(found, config, label)
    if form is None and config is not None and "peft_type" in config:
        return
    if form is not None and (form.name != "PEFT" or config is None):
        refuse_form(form, config, label)
    if config is None:
        _refuse_bare(found, label)
    _refuse_config(config, label)


def form_of(found: AdapterFiles, config: Mapping[str, Any] | None, label: str) -> Form | None:
    """What an adapter's files are where they are not PEFT's; None where they are, or are nothing known here."""
    own = config is not None and "peft_type" in config
    if own and (found.weights is None or found.weights.name in WEIGHT_FILES):
        return None
    path = candidate(found)
    form = recognise(path, label) if path is not None else None
    if form is not None and form.name == "MLX" and (config or {}).get("fine_tune_type") == "dora":
        form = replace(form, variant="DoRA")
    return None if form is None or (own and form.name == "PEFT") else form


def refuse_form(form: Form, config: Mapping[str, Any] | None, label: str) -> NoReturn:
    """Say what a foreign file is, and how it is turned into a PEFT adapter, if it can be.

    Raises: AdapterError.
    """
    way = f"ties-peft convert {shlex.quote(label)} --out DIR"
    if len(form.parts) > 1:
        way += f" --part {' or '.join(sorted(form.parts))}"
    rest = f"; {len(form.rest)} other tensors, such as {form.rest[0]!r}" if form.rest else ""
    if not form.plain:
        what = "ties_peft cannot merge or convert it: its updates are no plain LoRA"
        raise AdapterError(
            f"adapter '{label}': {form}{rest}, not a PEFT adapter. {what}. Leave it out, or convert it where it was made."
        )
    if form.name == "PEFT":
        raise AdapterError(
            f"adapter '{label}': {form}, but there is no {ADAPTER_CONFIG} beside it, and lora_alpha stands nowhere else. "
            f"Put the {ADAPTER_CONFIG} that belongs to it there, or say the alpha: `{way} --alpha NUMBER`."
        )
    why = ""
    if form.name == "kohya":
        way += " --base FILE"
        why = " Its names have underscores for dots, so FILE, the base's weights, is needed to tell them apart."
    if form.name == "MLX" and config is None:
        raise AdapterError(
            f"adapter '{label}': {form}, not a PEFT adapter, and there is no {ADAPTER_CONFIG} beside it that gives its scale. "
            f"Put MLX-LM's there, or say the alpha (scale × rank): `{way} --alpha NUMBER`."
        )
    raise AdapterError(
        f"adapter '{label}': {form}, not a PEFT adapter. Turn it into one with `{way}` and merge that.{why}"
    )


def other_model(folder: Path) -> str | None:
    """Return what a folder without an adapter holds instead: a full model; None where nothing tells."""
    for name in FULL_MODEL_CONFIGS:
        try:
            config = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        table = config if isinstance(config, dict) else {}
        named = [table[key] for key in ("architectures", "_class_name", "model_type") if table.get(key)]
        what = named[0][0] if named and isinstance(named[0], list) else next(iter(named), name)
        return f"a full model ({what})"
    return None


def _refuse_bare(found: AdapterFiles, label: str) -> NoReturn:
    inside = adapter_subfolders(found.folder)
    if inside and found.weights is None:
        names = ", ".join(inside[:20]) + (", …" if len(inside) > 20 else "")
        raise AdapterError(
            f"adapter '{label}': there is no {ADAPTER_CONFIG} in it, but in {len(inside)} of its sub-folders: {names}. "
            f"Name one, such as {label}{'/' if found.folder.name == label.rpartition('/')[2] else ':'}{inside[0]}."
        )
    model = other_model(found.folder)
    if model is not None:
        raise AdapterError(
            f"adapter '{label}' is {model}, not an adapter: there is no {ADAPTER_CONFIG} beside its config. ties_peft merges "
            "adapters, and mergekit full models. Name the folder of an adapter that was trained on it."
        )
    if found.weights is not None:
        raise AdapterError(
            f"adapter '{label}': there is no {ADAPTER_CONFIG} beside {found.weights.name}, and its tensors are no "
            "LoRA's. Name the folder that PEFT's save_pretrained wrote."
        )
    suffixes = [path.suffix for path in found.folder.glob("*")] if found.folder.is_dir() else []
    if GGUF in suffixes and not set(suffixes) & set(WEIGHT_SUFFIXES):
        refuse_gguf(label)
    seen = f" It holds {list_folder(found.folder)}." if found.folder.is_dir() else ""
    hint = " None of them is a LoRA that is known here." if set(suffixes) & set(WEIGHT_SUFFIXES) else ""
    raise AdapterError(
        f"adapter '{label}': there is no {ADAPTER_CONFIG} in it.{seen}{hint} Name the folder that PEFT's save_pretrained wrote."
    )


def _refuse_config(config: Mapping[str, Any], label: str) -> NoReturn:
    if config.get("fine_tune_type") == "full":
        raise AdapterError(
            f"adapter '{label}' was trained in full by MLX-LM (fine_tune_type is 'full'): its files hold whole weights and "
            "no adapter. Leave it out."
        )
    if {"lora_parameters", "fine_tune_type", "lora_layers"} & config.keys():
        raise AdapterError(
            f"adapter '{label}': {ADAPTER_CONFIG} is of MLX-LM, not of PEFT, and there are no adapters.safetensors beside it. "
            f"With them, `ties-peft convert {shlex.quote(label)} --out DIR` turns it into a PEFT adapter."
        )
    if isinstance(config.get("config"), dict) and {"model_class", "model_name", "model_type"} & config.keys():
        raise AdapterError(
            f"adapter '{label}': {ADAPTER_CONFIG} is of the library `adapters` (AdapterHub), not of PEFT; ties_peft cannot merge "
            "or convert that. Train it with PEFT, or leave it out."
        )
    keys = ", ".join(str(key)[:30] for key in sorted(config)[:8]) or "none"
    raise AdapterError(
        f"adapter '{label}': {ADAPTER_CONFIG} has no peft_type, so it is not PEFT's (its keys: {keys}). If it is a PEFT adapter "
        'all the same, write its type into that file, such as "peft_type": "LORA"; otherwise leave it out.'
    )
