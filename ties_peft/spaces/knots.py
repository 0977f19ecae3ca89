"""KnOTS: the adapters' deltas side by side, in the basis of their common output space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from ..delta import Delta, LowRank
from ..spectrum import balanced, directions, orthonormal
from .base import Encoding, Space


class KnotsEncoding(Encoding):
    """Rᵢ = S·Vᵢᵀ of [Δ₁ | … | Δ_N] = U·S·[V₁ᵀ | … | V_Nᵀ], kept in factors.

    Attributes:
        basis: U, (out, k), float32.
    """

    def __init__(self, deltas: Sequence[LowRank]) -> None:
        B = torch.cat([d.B for d in deltas], 1).double()
        gram = B.T @ B
        mix = orthonormal(gram)  # Q = B·mix is orthonormal, and T = mixᵀ·gram gives B = Q·T
        T = mix.T @ gram
        blocks = torch.split(T, [d.rank for d in deltas], dim=1)
        spread = torch.zeros(len(T), len(T), dtype=torch.float64, device=T.device)
        for block, delta in zip(blocks, deltas, strict=True):  # Σ Qᵀ·Δᵢ·Δᵢᵀ·Q
            A = delta.A.double()
            spread += block @ (A @ A.T) @ block.T
        turn = directions(spread)[1]
        self.basis = (B @ (mix @ turn)).float()
        self.parts = [
            (LowRank((turn.T @ block).float(), delta.A),) for block, delta in zip(blocks, deltas, strict=True)
        ]

    def decode(self, merged: Sequence[Delta]) -> Delta:
        """U·R."""
        merged_rows = merged[0]
        if isinstance(merged_rows, LowRank):
            return LowRank(self.basis @ merged_rows.B, merged_rows.A)
        return LowRank(self.basis, merged_rows.dense())


class KnotsSpace(Space):
    """One output basis for all, in which the rows of the deltas are aligned; magnitudes are those of S·Vᵀ.

    The published code takes a dense SVD of (out, N·in) matrices; from the factors the same
    decomposition costs a (Σrᵢ)³ problem. The adapters are balanced before, so that it is as exact for one
    whose scale sits in A as for one whose scale sits in B; the basis does not depend on that.

    Law: decode(encode(Δ)) = Δ; linear rules equal those of space `delta`.
    Source: Stoica et al., Model Merging with SVD to Tie the KnOTS, ICLR 2025 (arXiv 2410.19735), with
        its default column-wise stacking.
    """

    name: ClassVar[str] = "knots"
    shared: ClassVar[bool] = True
    lossless_rank: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("lora",)

    def encode(self, deltas: Sequence[Delta], rank: int | None = None) -> Encoding:
        """The common basis, and every Rᵢ in it."""
        return KnotsEncoding([balanced(delta) for delta in deltas if isinstance(delta, LowRank)])
