"""Placement: find what each module of a file of another format stands for.

`place` finds the part of a pipeline and the modules in it, by the names in the file; `BaseNames` finds these modules among
those of the base model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import AdapterError, RecipeError
from .base_model import PIPELINE, BaseModel
from .formats import LoraFile, LoraModule
from .image_models import (
    FLUX,
    NATIVE,
    TEXT_ENCODERS,
    TEXT_WORDS,
    TRANSFORMER,
    UNET,
    Layer,
    Shape,
    architecture_of,
    find_layers,
    part_of,
    split_words,
)
from .module_names import TEXT_TOWER, accepted_names

TEXT_PARTS = {"te": 0, "te1": 0, "te2": 1, "te3": 2}  # of kohya's names: which of `TEXT_ENCODERS`
COMFYUI_TEXT = re.compile(r"(clip_l|clip_g|t5xxl)\.(?:transformer\.)?(.+)")
COMFYUI_PARTS = {"clip_l": 0, "clip_g": 1, "t5xxl": 2}
DENOISERS = ("", UNET, TRANSFORMER, NATIVE)
BARE_TEXT = ("encoder.layers.", "embeddings.", "final_layer_norm")  # without the prefix that new transformers lack
CHECKPOINT_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of a model's own code, in one file


@dataclass(frozen=True)
class Placed:
    """A module of a file with its place.

    Attributes:
        module: as the file has it.
        part: of the pipeline; empty for a format without parts.
        layer: the modules of that part; None if the file's names have underscores for dots and no table knows them.
    """

    module: LoraModule
    part: str
    layer: Layer | None


def place(
    modules: Sequence[LoraModule], shapes: Mapping[LoraModule, Shape], joined: bool, native: bool
) -> tuple[str, list[Placed]]:
    """Return the architecture of an image model, empty if unknown, and the place of each module of its LoRA.

    Args:
        modules: of one file.
        shapes: (out, in) of each.
        joined: whether its names have underscores for dots.
        native: whether the base has the names of the model's own code, which names that no table knows then are.
    """
    by_part: dict[str, list[LoraModule]] = {}
    for module in modules:
        by_part.setdefault(module.part, []).append(module)
    architecture, found = "", []
    for part, own in by_part.items():
        if part not in DENOISERS:
            found += [_placed_text(module, joined) for module in own]
            continue
        known, placed = _placed_denoiser(part, own, shapes, joined, native)
        architecture, found = architecture or known, [*found, *placed]
    architecture = architecture or architecture_of({}, {one.part for one in found})
    return architecture, [_renumbered(one, architecture) for one in found]


def _placed_denoiser(
    part: str, modules: Sequence[LoraModule], shapes: Mapping[LoraModule, Shape], joined: bool, native: bool
) -> tuple[str, list[Placed]]:
    """Return the architecture and the places of the modules of a UNet or a transformer."""
    found = find_layers({module.module: shapes[module] for module in modules}, joined)
    if found is None and joined:
        return "", [Placed(module, NATIVE if native or not part else part, None) for module in modules]
    if found is None:
        names = [module.module for module in modules]
        own = part if part not in ("", NATIVE) else part_of(names) or part
        widths = {module.module: shapes[module][1] for module in modules}
        return architecture_of(widths), [Placed(m, own, Layer(m.module, (m.module,))) for m in modules]
    architecture, layers = found
    widths = {name: shapes[m][1] for m in modules for name in layers[m.module].modules}
    own = part_of(widths) or part or NATIVE
    return architecture or architecture_of(widths), [Placed(m, own, layers[m.module]) for m in modules]


def _placed_text(module: LoraModule, joined: bool) -> Placed:
    """Return the place of a module of a text encoder, or of another part, whose names stay as they are."""
    part, name = module.part, module.module
    comfyui = COMFYUI_TEXT.fullmatch(name) if part == "text_encoders" else None
    if comfyui is not None:
        part, name = TEXT_ENCODERS[COMFYUI_PARTS[comfyui[1]]], comfyui[2]
    elif part in TEXT_PARTS:
        part = TEXT_ENCODERS[TEXT_PARTS[part]]
    path = split_words(name, TEXT_WORDS) if joined else name
    if path is None:
        return Placed(module, part, None)
    if part in TEXT_ENCODERS and path.startswith(BARE_TEXT):
        path = f"{TEXT_TOWER}{path}"
    return Placed(module, part, Layer(path, (path,)))


def _renumbered(placed: Placed, architecture: str) -> Placed:
    """Return the place with the number of Flux's text encoder: its second one is what other models have as their third."""
    if architecture == FLUX and placed.part == TEXT_ENCODERS[2]:
        return Placed(placed.module, TEXT_ENCODERS[1], placed.layer)
    return placed


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
    base: str | BaseModel | None = None
    modules: Path | None = None
    alpha: float | None = None
    base_model: str | None = None


@dataclass(frozen=True)
class BaseNames:
    """The names of the base model's modules, as far as they are known.

    Attributes:
        file: whose modules are looked up.
        options: of the user.
        base: the base model; None if it was not given.
        label: the adapter's name in messages.
        all_parts: whether all parts of the file are read.
    """

    file: LoraFile
    options: ConversionOptions
    base: BaseModel | None
    label: str
    all_parts: bool

    def find(self, part: str, placed: Sequence[Placed]) -> tuple[list[tuple[Placed, Layer]], list[str]]:
        """Return the layer of each module of one part, and a remark on those that the base names differently."""
        known = self.known(part)
        own = [(one, one.layer) for one in placed if one.layer is not None]
        if known is None and len(own) == len(placed):
            return own, []
        if known is None:
            lacking = [one.module.module for one in placed if one.layer is None]
            raise AdapterError(
                f"adapter '{self.label}': the names of {self.file.format.name} have underscores for dots ({lacking[0]!r}), and "
                f"{len(lacking)} of {len(placed)} are of no model whose names are known here (Stable Diffusion, SDXL, SD3, "
                "Flux), so the names of the base's modules are needed to tell them apart. Name the base's weights with "
                f"--base (base=…; for a pipeline, those of its part, such as unet/{PIPELINE}), or, in `ties-peft convert`, a "
                "text file of the names with --modules (modules=…)."
            )
        if len(own) == len(placed) and any(layer.name in known for _, layer in own):
            known = [*known, *(name for _, layer in own for name in layer.modules if layer.name in known)]
        names = [one.layer.modules if one.layer is not None else (one.module.module,) for one in placed]
        table = self._spellings(known, any(one.layer is None for one in placed))
        self._check_known([name for own in names for name in own], table, known)
        layers: list[tuple[Placed, Layer]] = []
        renamed: dict[str, str] = {}
        for one, old_names in zip(placed, names, strict=True):
            new_names = self._as_in_file(one, old_names, tuple(min(table[name]) for name in old_names))
            layers.append((one, replace(one.layer or Layer(old_names[0], old_names), modules=new_names)))
            pairs = zip(old_names, new_names, strict=True)
            renamed |= {old: new for old, new in pairs if old not in (new, self.file.format.spelled(new))}
        return layers, renaming_remark(renamed)

    def known(self, part: str) -> list[str] | None:
        """Return the names of the modules of one part of the base; None if nothing names them.

        The base may be a whole pipeline, one part of it, or a checkpoint of the model's own code, which holds the denoiser and
        names the modules of text encoders differently.
        """
        known = base_names(self.options, self.base)
        if known is None:
            return None
        inside = [name.removeprefix(f"{part}.") for name in known if name.startswith(f"{part}.")] if part else []
        if inside:
            return inside
        several = self.all_parts and len(self.file.parts) > 1
        if several and part_of(known) not in (None, part):
            return None  # the base is another part of the pipeline
        for prefix in CHECKPOINT_PREFIXES:
            native = [name.removeprefix(prefix) for name in known if name.startswith(prefix)]
            if native:
                return native if part in ("unet", "transformer", NATIVE) else None
        return known

    def _as_in_file(self, one: Placed, own: tuple[str, ...], found: tuple[str, ...]) -> tuple[str, ...]:
        """Return the names to write: those of the base, but the file's own if the base, a checkpoint, only lacks a newer name."""
        newer = one.module.module
        return (newer,) if not self.all_parts and found == own == (f"{TEXT_TOWER}{newer}",) else found

    def _check_known(self, own: Sequence[str], table: Mapping[str, set[str]], known: Sequence[str]) -> None:
        missing = [name for name in own if name not in table]
        if missing:
            raise AdapterError(not_in_base(self.label, missing, len(own), known))
        ambiguous = {name: sorted(table[name]) for name in own if len(table[name]) > 1}
        if ambiguous:
            module, names = next(iter(ambiguous.items()))
            raise AdapterError(
                f"adapter '{self.label}': {module!r} may be any of {', '.join(names)} ({len(ambiguous)} such "
                "name(s)). List only the right ones with --modules (modules=…)."
            )

    def _spellings(self, known: Sequence[str], joined: bool) -> dict[str, set[str]]:
        """Return the names to write for each spelling that the file may have; the base's own names take precedence."""
        spelled = self.file.format.spelled if joined else str
        exact: dict[str, set[str]] = {}
        for name in known:
            exact.setdefault(spelled(name), set()).add(name)
        others: dict[str, set[str]] = {}
        for spelling, name in accepted_names(known, exactly=self.base is None).items():
            others.setdefault(spelled(spelling), set()).add(name)
        return others | exact


def base_names(options: ConversionOptions, base: BaseModel | None) -> list[str] | None:
    """Return the names of the base model's modules; None if neither the base nor a list of names was given.

    Raises: RecipeError if the list cannot be read.
    """
    if base is not None:
        return base.modules
    if options.modules is None:
        return None
    try:
        lines = options.modules.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"modules (--modules) {str(options.modules)!r} cannot be read: {error}. Expected a text file with one module name per line."
        ) from None
    return sorted({line.strip() for line in lines if line.strip()})


def renaming_remark(names: Mapping[str, str]) -> list[str]:
    """Return a remark on modules that are written under other names (old → new); none if there are no such modules."""
    if not names:
        return []
    old = min(names)
    return [f"{len(names)} modules are written under the base's names: {old!r} as {names[old]!r}."]


def not_in_base(label: str, missing: Sequence[str], count: int, known: Sequence[str]) -> str:
    """Return the message on modules that the base does not have."""
    return (
        f"adapter '{label}': {len(missing)} of its {count} modules are not in the base, such as {missing[0]!r}; the base has "
        f"{len(known)}, such as '{known[0] if known else 'none'}'. Is it the base, and the part of it, that the adapter was "
        "trained on, with the same module names?"
    )
