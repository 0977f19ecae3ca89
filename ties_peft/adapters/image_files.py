"""Write LoRAs of image models: diffusers' `pytorch_lora_weights.safetensors`, and the format of kohya's trainers.

    diffusers   part.module.lora_A.weight and .lora_B.weight, with PEFT's config of each part in the metadata
    kohya       lora_unet_…, lora_te…: .lora_down.weight, .lora_up.weight and .alpha, in the names of `image_models.layers_of`

Where one layer of the model's own code holds several modules of diffusers, their factors are joined: side by side where
they share A, else as blocks, Δ = [B₁A₁; B₂A₂] = diag(B₁, B₂)·[A₁; A₂].

The files' metadata, which says how a LoRA was trained, is described and written here too.

Sources: diffusers' loaders/lora_base.py, sd-scripts' networks/lora.py, lora_flux.py and lora_sd3.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .image_models import FLUX, NATIVE, SD, SD3, SDXL, TEXT_ENCODERS, Layer, layers_of
from .module_names import TEXT_TOWER
from .tensors import TensorFile

METADATA = "lora_adapter_metadata"  # diffusers' key of PEFT's config in a file's metadata
TEXT_PREFIXES = {  # of kohya's names, for the text encoders of each architecture
    SD: ("lora_te",),
    SDXL: ("lora_te1", "lora_te2"),
    SD3: ("lora_te1", "lora_te2", "lora_te3"),
    FLUX: ("lora_te1", "lora_te3"),
}
VERSIONS = {SDXL: "sdxl_base_v1-0", FLUX: "flux1"}  # of ss_base_model_version, by which A1111 lists a LoRA
SHARED_KEYS = (  # of a file's metadata, kept where all inputs agree
    "ss_base_model_version",
    "ss_v2",
    "modelspec.architecture",
    "modelspec.prediction_type",
    "modelspec.resolution",
)
TRIGGERS = "modelspec.trigger_phrase"
LONGEST_TEXT, MOST_TAGS = 300, 10  # of a file's metadata, as shown
SHOWN_KEYS = {  # of a file's metadata: how the card and `inspect` call them
    TRIGGERS: "trigger words",
    "ss_output_name": "name",
    "modelspec.title": "title",
    "ss_sd_model_name": "trained on",
    "ss_base_model_version": "base version",
    "modelspec.architecture": "architecture",
    "ss_network_module": "network",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_num_train_images": "images",
    "ss_epoch": "epochs",
    "ss_steps": "steps",
    "ss_learning_rate": "learning rate",
    "ss_clip_skip": "clip skip",
    "modelspec.author": "author",
    "modelspec.license": "licence",
}


@dataclass(frozen=True)
class ModuleLora:
    """The LoRA of one module: Δ = alpha/r · B·A.

    Attributes:
        part: of the pipeline.
        module: its path in that part, in diffusers' names.
        A, B: the factors.
        alpha: as in PEFT.
    """

    part: str
    module: str
    A: Tensor
    B: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """r."""
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        """alpha/r."""
        return self.alpha / self.rank


def diffusers_file(loras: Sequence[ModuleLora]) -> TensorFile:
    """Return the file that `load_lora_weights` of diffusers' pipelines loads."""
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part in sorted({lora.part for lora in loras}):
        own = [lora for lora in loras if lora.part == part]
        for lora in own:
            tensors[f"{part}.{lora.module}.lora_A.weight"] = lora.A
            tensors[f"{part}.{lora.module}.lora_B.weight"] = lora.B
        config |= {f"{part}.{key}": value for key, value in _peft_config(own).items()}
    return TensorFile(tensors, {METADATA: json.dumps(config, indent=2, sort_keys=True)})


def _peft_config(loras: Sequence[ModuleLora]) -> dict[str, Any]:
    """Return PEFT's config of one part; patterns only where ranks or alphas differ."""
    names = [lora.module.removeprefix(TEXT_TOWER) for lora in loras]
    ranks, alphas = ([getattr(lora, key) for lora in loras] for key in ("rank", "alpha"))
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "target_modules": sorted(names),
        "rank_pattern": {name: own for name, own in zip(names, ranks, strict=True) if own != rank},
        "alpha_pattern": {name: _whole(own) for name, own in zip(names, alphas, strict=True) if own != alpha},
    }


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


def kohya_file(
    architecture: str, loras: Sequence[ModuleLora], compress: bool, metadata: Mapping[str, str]
) -> TensorFile:
    """Return the file that kohya's trainers, A1111, Forge and ComfyUI load.

    Args:
        architecture: of the image model; empty for one whose names stay as they are.
        loras: whose names that architecture has.
        compress: whether joined layers are written at the rank that their values have.
        metadata: of the training, to write.
    """
    tensors: dict[str, Tensor] = {}
    named = []
    for part in sorted({lora.part for lora in loras}):
        own = {lora.module: lora for lora in loras if lora.part == part}
        if part in TEXT_ENCODERS or part == NATIVE:
            named += [(_spelled(architecture, part, lora.module), lora) for lora in own.values()]
        else:
            named += [
                (_spelled(architecture, part, layer.name), _joined(layer, own, compress))
                for layer in _layers(architecture, own)
            ]
    for name, lora in named:
        alpha = torch.tensor(lora.alpha, dtype=lora.A.dtype)
        exact = alpha.item() == lora.alpha
        tensors[f"{name}.alpha"] = alpha if exact else torch.tensor(lora.alpha, dtype=torch.float32)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = lora.A, lora.B
    ranks, alphas = (Counter(getattr(lora, key) for _, lora in named) for key in ("rank", "alpha"))
    facts = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": str(_whole(alphas.most_common(1)[0][0])),
        **({"ss_base_model_version": VERSIONS[architecture]} if architecture in VERSIONS else {}),
    }
    return TensorFile(tensors, facts | dict(metadata))


def _layers(architecture: str, loras: Mapping[str, ModuleLora]) -> list[Layer]:
    shapes = {name: (lora.B.shape[0], lora.A.shape[1]) for name, lora in loras.items()}
    return layers_of(architecture, shapes) or []


def _spelled(architecture: str, part: str, name: str) -> str:
    """Return kohya's name of a module."""
    joined = name.replace(".", "_")
    if part in TEXT_ENCODERS:
        return f"{TEXT_PREFIXES[architecture or SD][TEXT_ENCODERS.index(part)]}_{joined}"
    return f"lora_unet_{joined}"


def _joined(layer: Layer, loras: Mapping[str, ModuleLora], compress: bool) -> ModuleLora:
    """Return the LoRA of a layer that holds one or several modules; those without a LoRA have rows of zeros."""
    own = {name: loras[name] for name in layer.modules if name in loras}
    first = next(iter(own.values()))
    if len(layer.modules) == 1:
        B = torch.cat(first.B.chunk(2)[::-1]) if layer.swapped else first.B
        return ModuleLora(first.part, layer.name, first.A, B, first.alpha)
    heights = layer.whole_heights({name: lora.B.shape[0] for name, lora in own.items()}, first.A.shape[1])
    shared = all(torch.equal(lora.A, first.A) and lora.alpha == first.alpha for lora in own.values())
    A = first.A if shared else torch.cat([lora.A for lora in own.values()])
    B = torch.zeros(sum(heights), A.shape[0], dtype=first.B.dtype)
    row = column = 0
    for name, height in zip(layer.modules, heights, strict=True):
        if name in own:
            factor = own[name].scaling / first.scaling
            values = own[name].B if factor == 1 else own[name].B * factor
            B[row : row + height, column : column + own[name].rank] = values
            column += 0 if shared else own[name].rank
        row += height
    joined = ModuleLora(first.part, layer.name, A, B, first.scaling * A.shape[0])
    return joined if shared or not compress else _compressed(joined)


def _compressed(lora: ModuleLora) -> ModuleLora:
    """Return the same LoRA at the lowest rank from which it differs by no more than the rounding of its dtype."""
    left, upper = torch.linalg.qr(lora.B.double() * lora.scaling)
    right, lower = torch.linalg.qr(lora.A.double().T)
    U, S, V = torch.linalg.svd(upper @ lower.T)
    tail = S.square().flip(0).cumsum(0).flip(0).sqrt()  # the norm of what each rank leaves out
    rank = max(1, int((tail > max(torch.finfo(lora.A.dtype).eps, 1e-6) * tail[0]).sum()))
    root = S[:rank].sqrt()
    A, B = (root[:, None] * V[:rank]) @ right.T, (left @ U[:, :rank]) * root
    return ModuleLora(lora.part, lora.module, A.to(lora.A.dtype), B.to(lora.B.dtype), float(rank))


def shared_metadata(inputs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the metadata to write: what all inputs agree on, and the trigger words of all."""
    found = {key: {own.get(key) for own in inputs} for key in SHARED_KEYS}
    same = {key: values.pop() for key, values in found.items() if len(values) == 1}
    triggers = list(dict.fromkeys(own[TRIGGERS] for own in inputs if own.get(TRIGGERS)))
    kept = {key: value for key, value in same.items() if value}
    return kept | ({TRIGGERS: ", ".join(triggers)[:LONGEST_TEXT]} if triggers else {})


def describe_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what a file's metadata says of its training, shortened: what → text."""
    given = {what: metadata.get(key) for key, what in SHOWN_KEYS.items()}
    shown = {what: text[:LONGEST_TEXT] for what, text in given.items() if text and text != "None"}
    tags = frequent_tags(metadata)
    return shown | ({"frequent tags": ", ".join(tags)} if tags else {})


def frequent_tags(metadata: Mapping[str, str]) -> list[str]:
    """Return the tags that occur most often in the captions of a training, by kohya's ss_tag_frequency."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for folder in folders.values():
            counts.update({str(tag).strip(): int(count) for tag, count in folder.items()})
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []
    return [tag[:60] for tag, _ in counts.most_common(MOST_TAGS) if tag]
