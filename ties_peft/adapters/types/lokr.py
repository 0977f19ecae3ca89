"""LoKr: Δ = s·W₁⊗W₂, a Kronecker product of two small matrices, each whole or of rank r; s = alpha/r; read only.

Its rank is rank(W₁)·rank(W₂): (U₁V₁)⊗(U₂V₂) = (U₁⊗U₂)·(V₁⊗V₂). On a convolution W₂ includes the kernel: as it is, flattened,
or with a core tensor (Tucker form).
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

W1, W2, CORE = "lokr_w1", "lokr_w2", "lokr_t2"
EXPECTED = "lokr_w1 or lokr_w1_a and lokr_w1_b, and lokr_w2 or lokr_w2_a and lokr_w2_b, whose shapes fit"


class LoKr(PeftType):
    """Low-rank Kronecker product (Edalati et al., KronA, 2022; Yeh et al., LyCORIS, ICLR 2024)."""

    name = "lokr"
    title = "LoKr"
    config_name = "LOKR"
    suffixes = (W1, "lokr_w1_a", "lokr_w1_b", W2, "lokr_w2_a", "lokr_w2_b", CORE)

    def module(self, name: str, parts: Mapping[str, str], contents: Contents) -> ModuleInfo:
        """Return a layer with two to five tensors."""
        shapes = contents.shapes(parts)
        first, second = _size(shapes, W1), _size(shapes, W2)
        if first is None or second is None or len(first[0]) != 2 or 0 in first[0] + second[0]:
            raise contents.damaged(name, shapes, EXPECTED)
        rank = contents.number("r", "rank_pattern", name, 8)
        scaling = contents.number("alpha", "alpha_pattern", name, 8) / (rank or 1)
        (out1, in1), (out2, in2, *size) = first[0], second[0]
        shape, kernel = (out1 * out2, in1 * in2 * math.prod(size)), tuple(size)
        if CORE in parts:
            kernel = contents.tucker_kernel_size(shape, kernel, name)
        kernel = kernel or contents.kernel_size(shape, name)
        most = min(shape) if size else min(first[1] * second[1], *shape)
        keys = tuple(parts[end] for end in self.suffixes if end in parts)
        return ModuleInfo(name, shape, most, keys, scaling, kernel_size=kernel, rank_is_trained=False)

    def read(self, module: ModuleInfo, tensors: TensorSource, base: BaseModel | None) -> Delta:
        """Return factors if their rank is less than the layer's smaller side, else a dense matrix."""
        parts = {key.rpartition(".")[2]: tensors.read(key).double() for key in module.keys}
        second = _factors(parts, W2) if CORE not in parts and (W2 not in parts or parts[W2].dim() == 2) else None
        if second is not None and module.rank < min(module.shape):
            first = _factors(parts, W1)
            left, right = torch.kron(first[0], second[0]), torch.kron(first[1], second[1])
            return LowRank((left * module.scaling).float(), right.float())
        return Dense((_product(parts) * module.scaling).reshape(module.shape).float())


def _size(shapes: dict[str, tuple[int, ...]], which: str) -> tuple[tuple[int, ...], int] | None:
    """Return the shape of W₁ or W₂, kernel sizes last, and its largest rank; None if its tensors do not fit."""
    whole, left, right = (shapes.get(which + end) for end in ("", "_a", "_b"))
    if whole is not None:
        return (whole, min(whole[:2])) if len(whole) >= 2 else None
    if left is None or right is None or len(left) != 2 or len(right) != 2:
        return None
    core = shapes.get(CORE) if which == W2 else None
    if core is not None:
        fits = len(core) == 4 and (core[0], core[1]) == (left[0], right[0])
        return ((left[1], right[1], *core[2:]), min(left[1], right[1])) if fits else None
    return ((left[0], right[1]), min(left[1], left[0], right[1])) if left[1] == right[0] else None


def _factors(parts: dict[str, Tensor], which: str) -> tuple[Tensor, Tensor]:
    """Return U and V with W = U·V; one of them is the identity if W is stored as one matrix."""
    if which not in parts:
        return parts[f"{which}_a"], parts[f"{which}_b"]
    whole = parts[which]
    if whole.shape[0] <= whole.shape[1]:
        return torch.eye(whole.shape[0], dtype=whole.dtype), whole
    return whole, torch.eye(whole.shape[1], dtype=whole.dtype)


def _product(parts: dict[str, Tensor]) -> Tensor:
    """Return W₁⊗W₂ as PEFT computes it: W₁ is expanded for a W₂ of four dimensions; for three `torch.kron` pads it."""
    first = parts[W1] if W1 in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]
    if CORE in parts:
        second = torch.einsum("ijkl,ip,jr->prkl", parts[CORE], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        second = parts[W2] if W2 in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]
    if second.dim() == 4:
        first = first[:, :, None, None]
    return torch.kron(first, second.contiguous())
