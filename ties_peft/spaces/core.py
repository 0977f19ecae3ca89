"""Core space: shared orthonormal bases of all adapters' B's and A's, in which a layer is a small square.

With L an orthonormal basis of all columns of [B₁ … B_N] and R one of all rows of [A₁; …; A_N], every
Δᵢ = L·Mᵢ·Rᵀ exactly, Mᵢ = Lᵀ·Δᵢ·R of shape (K, K), K ≤ Σrᵢ. A merge of the Mᵢ has rank ≤ K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..delta import Delta, Dense, LowRank
from ..spectrum import balanced, orthonormal
from .base import Encoding, Space

UNBALANCED = 1e-7  # share under which a direction is rounding where one adapter's B may dwarf another's


class CoreEncoding(Encoding):
    """The Mᵢ, and the bases that lead back.

    Attributes:
        left: L, (out, k₁), float32.
        right: Rᵀ, (k₂, in), float32.

    Args:
        negligible: see `directions`.
    """

    def __init__(self, deltas: Sequence[LowRank], negligible: float | None = None) -> None:
        B, A = torch.cat([d.B for d in deltas], 1).double(), torch.cat([d.A for d in deltas], 0).double()
        gram_b, gram_a = B.T @ B, A @ A.T
        mix_b, mix_a = orthonormal(gram_b, negligible), orthonormal(gram_a, negligible)
        self.left, self.right = (B @ mix_b).float(), (mix_a.T @ A).float()
        self.inputs = self.right
        to_left, to_right = mix_b.T @ gram_b, gram_a @ mix_a  # Lᵀ·B and A·R, a block of columns or rows for each
        ends = torch.tensor([d.rank for d in deltas]).cumsum(0).tolist()
        self.parts = [
            (Dense((to_left[:, e - d.rank : e] @ to_right[e - d.rank : e]).float()),)
            for d, e in zip(deltas, ends, strict=True)
        ]

    def decode(self, merged: Sequence[Delta]) -> Delta:
        """L·M·Rᵀ, in factors."""
        core = merged[0]
        if isinstance(core, LowRank):
            return LowRank(self.left @ core.B, core.A @ self.right)
        return LowRank(self.left @ core.dense(), self.right)


class CompressedEncoding(Encoding):
    """Core coordinates cut to a shared rank-r subspace before the merge.

    Source: compress-then-merge (arXiv 2606.03723): the Mᵢ, brought to λᵢ = b·‖Mᵢ‖ + (1 − b)·mean‖M‖,
    give the subspace by a Tucker-2 decomposition (HOSVD, then alternating until it settles); the
    task vectors themselves are projected unscaled.
    """

    ROUNDS, SETTLED = 100, 1e-6

    def __init__(self, core: CoreEncoding, rank: int, blend: float) -> None:
        self.core = core
        matrices = torch.stack([parts[0].dense().double() for parts in core.parts])
        norms = matrices.flatten(1).norm(dim=1)
        wanted = blend * norms + (1 - blend) * norms.mean()
        scaled = matrices * (wanted / norms.clamp_min(1e-300)).view(-1, 1, 1)
        self.left, self.right = _tucker(scaled, rank, self.ROUNDS, self.SETTLED)
        self.inputs = self.right.T.float() @ core.right
        self.parts = [(Dense((self.left.T @ matrix @ self.right).float()),) for matrix in matrices]

    def decode(self, merged: Sequence[Delta]) -> Delta:
        """(L·U₀)·O·(U₁ᵀ·Rᵀ), of rank r by construction."""
        inner = LowRank((self.left @ merged[0].dense().double()).float(), self.right.T.float())
        return self.core.decode((inner,))


class CoreSpace(Space):
    """A layer as a K × K problem, without loss; balanced, so that it has one meaning.

    Elementwise rules depend on the basis, and published Core Space takes it from B and A as they
    happen to be factored: the same adapters written as (B·G, G⁻¹·A) then merge to something else.
    Here each adapter is first brought to its canonical form, the SVD of its own delta, which makes
    the bases a function of the deltas alone. `balanced=false` is the published form.

    Law: decode(encode(Δ)) = Δ; linear and spectral rules equal those of space `delta`; with
        `balanced` neither the gauge of an adapter nor the order of adapters matters.
    Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, 2025
        (arXiv 2509.17786), which also ignores the lora scaling; `compress_first` is CtM (arXiv
        2606.03723).
    """

    name: ClassVar[str] = "core"
    shared: ClassVar[bool] = True
    lossless_rank: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("lora",)

    balanced: bool = Field(True, description="bring each adapter to its canonical form first; false: as published")
    compress_first: bool = Field(False, description="cut to a shared subspace of the output's rank before merging")
    norm_blend: float = Field(0.25, ge=0, le=1, description="compress_first: 1 keeps norms apart, 0 makes them equal")

    def encode(self, deltas: Sequence[Delta], rank: int | None = None) -> Encoding:
        """Shared bases, and every Mᵢ in them."""
        factored = [delta for delta in deltas if isinstance(delta, LowRank)]
        core = CoreEncoding([balanced(d) for d in factored]) if self.balanced else CoreEncoding(factored, UNBALANCED)
        if self.compress_first and rank is not None:
            return CompressedEncoding(core, rank, self.norm_blend)
        return core


def _tucker(matrices: Tensor, rank: int, rounds: int, settled: float) -> tuple[Tensor, Tensor]:
    """Orthonormal U₀ (k₁, r) and U₁ (k₂, r) that keep most of Σ‖U₀ᵀ·M·U₁‖²."""
    left = _leading(torch.einsum("nij,nkj->ik", matrices, matrices), rank)
    right = _leading(torch.einsum("nij,nik->jk", matrices, matrices), rank)
    before = 0.0
    for _ in range(rounds):
        half = matrices @ right
        left = _leading(torch.einsum("nir,nkr->ik", half, half), rank)
        half = left.T @ matrices
        right = _leading(torch.einsum("nri,nrk->ik", half, half), rank)
        kept = float((half @ right).square().sum())
        if kept - before <= settled * kept:
            break
        before = kept
    return left, right


def _leading(gram: Tensor, rank: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -min(rank, len(gram)) :].flip(1)
