"""VeRA: Δ = diag(b)·B·diag(d)·A, with one pair A, B for all layers, of which each uses the first rows or columns; read only.

No tensor of the file has a layer's input size, so the base model's shapes are needed. Projections that were not saved are
drawn again as PEFT draws them, from the key in the config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import AdapterError
from ...task_vectors.delta import LowRank
from ..base_model import BaseModel
from ..contents import Contents
from ..tensors import TensorSource
from .base import ModuleInfo, PeftType

B_DIAGONAL, D_DIAGONAL = "vera_lambda_b", "vera_lambda_d"
SHARED_A, SHARED_B = "base_model.vera_A", "base_model.vera_B"


class Vera(PeftType):
    """Vector-based random matrix adaptation (Kopiczko et al., VeRA, ICLR 2024)."""

    name = "vera"
    title = "VeRA"
    config_name = "VERA"

    def layout(self, contents: Contents) -> dict[str, ModuleInfo]:
        """Return the layers with their two diagonals."""
        layers, tensors = contents.layers((B_DIAGONAL, D_DIAGONAL)), contents.tensors
        contents.require_base("is a VeRA, whose file does not tell the sizes of the layers it adapts")
        shapes = {name: _shape(name, parts, contents) for name, parts in layers.items()}
        largest = tuple(max((shape[side] for shape in shapes.values()), default=0) for side in (0, 1))
        saved = {SHARED_A, SHARED_B} <= set(tensors.names)
        shared = (SHARED_A, SHARED_B) if saved else ()
        seed = () if saved else (_projection_key(contents), *largest)
        if saved:
            _check_projections(contents, largest)
        return {
            name: ModuleInfo(
                name,
                shapes[name],
                tensors.info(parts[D_DIAGONAL]).shape[0],
                (parts[B_DIAGONAL], parts[D_DIAGONAL], *shared),
                details=seed,
            )
            for name, parts in layers.items()
        }

    def read(self, module: ModuleInfo, tensors: TensorSource, base: BaseModel | None) -> LowRank:
        """Return diag(b)·B and diag(d)·A, cut to the layer's size."""
        b, d, *shared = (tensors.read(key).to(torch.float32) for key in module.keys)
        first, second = shared or _drawn(module.rank, *module.details)
        out, width = module.shape
        return LowRank(b.unsqueeze(1) * second[:out], (d.unsqueeze(1) * first[:, :width]).contiguous())


def _projection_key(contents: Contents) -> int:
    """Return the seed of projections that were not saved."""
    key = contents.config.get("projection_prng_key", 0)
    if not isinstance(key, int) or isinstance(key, bool):
        raise AdapterError(
            f"adapter '{contents.label}': its projections were not saved, and projection_prng_key is {key!r}; "
            "expected a whole number. Correct adapter_config.json."
        )
    return key


def _check_projections(contents: Contents, largest: tuple[int, ...]) -> None:
    """Refuse saved projections that are too small for the layers."""
    wide, tall = (contents.tensors.info(key).shape for key in (SHARED_A, SHARED_B))
    if len(wide) != 2 or len(tall) != 2 or wide[1] < largest[1] or tall[0] < largest[0]:
        raise AdapterError(
            f"adapter '{contents.label}': vera_A is {list(wide)} and vera_B {list(tall)}, too small for layers of "
            f"{largest[0]} × {largest[1]} in the base. Is it the base that the adapter was trained on?"
        )


def _shape(name: str, parts: Mapping[str, str], contents: Contents) -> tuple[int, int]:
    """Return (out, in) of a layer: out from its diagonal, in from the base's weight."""
    if len(parts) < 2:
        raise AdapterError(
            f"{contents.where(name)}: there is {next(iter(parts))} alone. Save the adapter again, whole."
        )
    out = contents.tensors.info(parts[B_DIAGONAL]).shape[0]
    known = contents.base_shape(name)
    if known is None or len(known) != 2 or out not in known:
        raise AdapterError(
            f"{contents.where(name)}: its vera_lambda_b has {out} entries, the base's weight is {known and list(known)}. "
            "Is it the base that the adapter was trained on?"
        )
    return out, known[1] if known[0] == out else known[0]


def _drawn(rank: int, key: int, out: int, width: int) -> tuple[Tensor, Tensor]:
    """Draw A (r, in) and B (out, r) as PEFT does: uniform in ±√(6/columns), Kaiming's bound."""
    generator = torch.Generator(device="cpu").manual_seed(key)
    drawn = []
    for shape in ((rank, width), (out, rank)):
        bound = math.sqrt(3.0) * math.sqrt(2) / math.sqrt(shape[1])
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]
