"""Merge as KnOTS does: the adapters' deltas side by side, in a basis of their common output space."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..task_vectors.delta import Delta, LowRank, Span
from ..task_vectors.factorise import Factors, Run, expand, truncate
from ..task_vectors.subspace import (
    ExplicitBases,
    basis,
    canonical,
    canonical_one,
    coordinates,
    directions,
    has_many_columns,
    lost_energy,
    orthonormal,
    pack_factors,
)
from .base import Encoding, Space


class KnotsEncoding(Encoding):
    """Hold Rᵢ = S·Vᵢᵀ of [Δ₁ | … | Δ_N] = U·S·[V₁ᵀ | … | V_Nᵀ], in factors.

    If the adapters have few columns together, everything is computed from the two Gram matrices of their factors; else
    U is computed (see `basis`).

    Attributes:
        bases: map coordinates back to the module.
        left: (K, k), float64, which gives U = [B₁ … B_N]·left; or U itself.
    """

    bases: Span | ExplicitBases
    left: Tensor

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self.deltas = deltas
        (self._make_explicit_bases if has_many_columns(deltas) else self._make_implicit_bases)()

    def _make_implicit_bases(self) -> None:
        held, own = self._factored(), self.span
        assert own is not None  # they are not many
        pairs = canonical(own)
        X: Tensor = torch.block_diag(*(X for X, _ in pairs))  # type: ignore[no-untyped-call]
        gram = X.T @ own.left @ X
        mix = orthonormal(gram)  # Q = B·X·mix is orthonormal, and T = mixᵀ·gram gives B·X = Q·T
        T = mix.T @ gram
        blocks = torch.split(T, [len(Y) for _, Y in pairs], dim=1)
        row_gram = torch.zeros(len(T), len(T), dtype=torch.float64, device=T.device)
        for block, (_, Y), at in zip(blocks, pairs, own.ranges, strict=True):  # Σ Qᵀ·Δᵢ·Δᵢᵀ·Q
            row_gram += block @ (Y @ own.right[at, at] @ Y.T) @ block.T
        rotation = directions(row_gram)[1]
        self.left = X @ mix @ rotation
        self.parts = [
            (LowRank((rotation.T @ block).float(), (Y @ delta.A.double()).float()),)
            for block, (_, Y), delta in zip(blocks, pairs, held, strict=True)
        ]
        self.bases = own

    def _make_explicit_bases(self) -> None:
        pairs = [canonical_one(delta) for delta in self._factors()]

        def columns() -> Iterable[Tensor]:  # C with C·Cᵀ = Δᵢ·Δᵢᵀ: U·S of each task vector's own decomposition
            for delta, (X, Y) in zip(self._factors(), pairs, strict=True):
                yield (delta.B.double() @ X) * (Y @ delta.A.double()).norm(dim=1)

        U, everything = basis(columns)
        left = (delta.B.double() @ X for delta, (X, _) in zip(self._factors(), pairs, strict=True))
        right = (Y @ delta.A.double() for delta, (_, Y) in zip(self._factors(), pairs, strict=True))
        both = zip(coordinates(U, left), right, strict=True)
        count = sum(len(Y) for _, Y in pairs)
        self.parts = [(part,) for part in pack_factors(both, count * (U.shape[1] + self.deltas[0].shape[1]))]
        self.bases, self.left = ExplicitBases(), U
        self.lost_energy = 0.0 if everything else lost_energy(self.deltas, (part for (part,) in self.parts))

    @property
    def bytes(self) -> int:
        """The memory that the parts and the basis take, in bytes."""
        return super().bytes + 8 * 3 * self.left.numel()

    def decode(self, merged: Sequence[Delta], rank: int | None, run: Run = map) -> Factors:
        """Return U·R, with the rows R truncated to the rank."""
        most = min(merged[0].shape)
        rows = truncate(merged[0], most if rank is None else min(rank, most), run=run)
        return expand(rows, self.bases, self.left, None)


class KnotsSpace(Space):
    """Use one output basis for all adapters, which aligns the rows of their deltas; magnitudes are those of S·Vᵀ.

    The published code decomposes a dense (out, N·in) matrix; computed from the factors, the same decomposition costs
    O((Σrᵢ)³). The adapters are brought to their canonical form before, so that it is equally exact whether an adapter's
    scale is in A or in B.

    Law: decode(encode(Δ)) = Δ; linear rules equal those of space `delta`.
    Source: Stoica et al., Model Merging with SVD to Tie the KnOTS, ICLR 2025 (arXiv 2410.19735), with
        its default column-wise stacking.
    """

    name = "knots"
    shared = True
    lossless_rank = True
    kinds = ("lora",)

    def encode(self, deltas: Sequence[Delta], rank: int | None = None) -> Encoding:
        """Return the common basis and each Rᵢ in it."""
        return KnotsEncoding(deltas)
