"""Placement: the part of a pipeline, and the modules in it, that each module of a file of another format belongs to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .formats import LoraModule
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
from .module_names import TEXT_TOWER

TEXT_PARTS = {"te": 0, "te1": 0, "te2": 1, "te3": 2}  # of kohya's names: which of `TEXT_ENCODERS`
COMFYUI_TEXT = re.compile(r"(clip_l|clip_g|t5xxl)\.(?:transformer\.)?(.+)")
COMFYUI_PARTS = {"clip_l": 0, "clip_g": 1, "t5xxl": 2}
DENOISERS = ("", UNET, TRANSFORMER, NATIVE)
BARE_TEXT = ("encoder.layers.", "embeddings.", "final_layer_norm")  # without the prefix that new transformers lack
T5 = "encoder.block."


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
