"""LoHa: Δ = s·(W₁ₐ·W₁ᵦ)∘(W₂ₐ·W₂ᵦ), the entrywise product of two products of rank r, s = alpha/r; read only.

Its rank is up to r²: the entrywise products of the columns of W₁ₐ and W₂ₐ are the columns of B, those of the rows of W₁ᵦ and
W₂ᵦ the rows of A. Convolutions may have a core tensor for each product (Tucker form).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...task_vectors.delta import Delta, Dense, LowRank
from ..base_model import BaseModel
from ..contents import Contents
from ..tensors import TensorSource
from .base import ModuleInfo, PeftType

PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")
EXPECTED = (
    "hada_w1_a and hada_w2_a [out, r], hada_w1_b and hada_w2_b [r, in], or [r, out], [r, in] and hada_t1, hada_t2 "
    "[r, r, k, k]"
)


class LoHa(PeftType):
    """Low-rank Hadamard product (Hyeon-Woo et al., FedPara, ICLR 2022; Yeh et al., LyCORIS, ICLR 2024)."""

    name = "loha"
    title = "LoHa"
    config_name = "LOHA"
    suffixes = (*PARTS, *CORES)

    def module(self, name: str, parts: Mapping[str, str], contents: Contents) -> ModuleInfo:
        """Return a layer with four matrices, or with four matrices and two core tensors."""
        shapes = contents.shapes(parts)
        core, size = shapes.get(CORES[0], ()), _sizes(shapes)
        if size is None or len(parts) not in (4, 6):
            raise contents.damaged(name, shapes, EXPECTED)
        out, width, rank = size
        scaling = contents.number("alpha", "alpha_pattern", name, 8) / rank
        shape = out, width * math.prod(core[2:])
        kernel = contents.tucker_kernel_size(shape, core[2:], name) if core else contents.kernel_size(shape, name)
        keys = tuple(parts[end] for end in self.suffixes if end in parts)
        most = min(shape) if core else min(rank * rank, *shape)
        return ModuleInfo(name, shape, most, keys, scaling, kernel_size=kernel, rank_is_trained=False)

    def read(self, module: ModuleInfo, tensors: TensorSource, base: BaseModel | None) -> Delta:
        """Return factors if r² is less than the layer's smaller side, else a dense matrix."""
        parts = [tensors.read(key).double() for key in module.keys]
        if len(parts) > len(PARTS):
            first, second = _tucker(parts[0], parts[1], parts[4]), _tucker(parts[2], parts[3], parts[5])
            return Dense((first * second).flatten(1).mul_(module.scaling).float())
        left, right = _pairs(parts[0].T, parts[2].T).T, _pairs(parts[1], parts[3])
        if module.rank < min(module.shape):
            return LowRank((left * module.scaling).float().contiguous(), right.float().contiguous())
        return Dense(((parts[0] @ parts[1]) * (parts[2] @ parts[3]) * module.scaling).float())


def _sizes(shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
    """Return (out, in, r); None if the shapes do not fit each other."""
    if not all(len(shapes.get(end, ())) == 2 for end in PARTS):
        return None
    (a1, b1, a2, b2), core = (shapes[end] for end in PARTS), shapes.get(CORES[0])
    rank, width = b1
    out = a1[1] if core else a1[0]
    outer = (rank, out) if core else (out, rank)
    fits = (a1, a2, b2) == (outer, outer, (rank, width)) and 0 not in (*outer, width)
    if core is not None:
        fits = fits and core == shapes.get(CORES[1]) and len(core) == 4 and core[:2] == (rank, rank)
    return (out, width, rank) if fits else None


def _pairs(first: Tensor, second: Tensor) -> Tensor:
    """Return the entrywise products of each row of one with each row of the other, (r², n)."""
    return (first.unsqueeze(1) * second.unsqueeze(0)).flatten(0, 1)


def _tucker(outer: Tensor, inner: Tensor, core: Tensor) -> Tensor:
    """Return Σ core[p, q, …]·outer[p, out]·inner[q, in], (out, in, k, k)."""
    return torch.einsum("pqkl,po,qi->oikl", core, outer, inner)
