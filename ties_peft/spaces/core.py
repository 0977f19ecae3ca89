"""Merge in core space: shared orthonormal bases of all adapters' B and A, in which a module is a small square matrix.

With L an orthonormal basis of all columns of [B₁ … B_N] and R one of all rows of [A₁; …; A_N], every
Δᵢ = L·Mᵢ·Rᵀ exactly, Mᵢ = Lᵀ·Δᵢ·R of shape (K, K), K ≤ Σrᵢ. A merge of the Mᵢ has rank ≤ K.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta, Dense, LowRank, Span
from ..task_vectors.factorise import Factors, Run, expand, truncate
from ..task_vectors.subspace import (
    ExplicitBases,
    basis,
    canonical,
    canonical_one,
    coordinates,
    has_many_columns,
    lost_energy,
    orthonormal,
    pack_factors,
)
from .base import Encoding, Space

UNBALANCED = 1e-7  # share below which a direction is rounding, where one adapter's B may be far larger than another's


class CoreEncoding(Encoding):
    """Hold the Mᵢ, and the bases L and R.

    If the adapters have few columns together, everything is computed from the two Gram matrices of their factors, and L
    = [B₁ … B_N]·left is never multiplied out. If they have many, L and R are computed (see `basis`); then the task
    vectors are read again for each step, and only Mᵢ is held of an adapter, in factors. An Mᵢ is multiplied out if that
    is no larger than the adapter's own factors.

    Attributes:
        bases: map coordinates back to the module.
        left, right: (K, k₁) and (k₂, K), float64, which give L and Rᵀ when multiplied with the factors; or L and Rᵀ
            themselves.

    Args:
        deltas: the task vectors; they may be iterated over several times.
        balance: whether each adapter is brought to its canonical form first.
    """

    bases: Span | ExplicitBases
    left: Tensor
    right: Tensor

    def __init__(self, deltas: Sequence[Delta], balance: bool = True) -> None:
        self.deltas = deltas
        (self._make_explicit_bases if has_many_columns(deltas) else self._make_implicit_bases)(balance)

    def _make_implicit_bases(self, balance: bool) -> None:
        held, own = self._factored(), self.span
        assert own is not None  # since they have few columns
        left, right = own.left, own.right
        pairs = canonical(own) if balance else [_identity(delta.rank, left) for delta in held]
        X, Y = (torch.block_diag(*side) for side in zip(*pairs, strict=True))  # type: ignore[no-untyped-call]
        negligible = None if balance else UNBALANCED
        self.left = X @ orthonormal(X.T @ left @ X, negligible)
        self.right = orthonormal(Y @ right @ Y.T, negligible).T @ Y
        to_left, to_right = self.left.T @ left, right @ self.right.T  # Lᵀ·B and A·R, a block for each
        self.parts = [
            (_part(to_left[:, at] @ X, Y @ to_right[at], sum(delta.shape)),)
            for at, (X, Y), delta in zip(own.ranges, pairs, held, strict=True)
        ]
        self.bases = own

    def _make_explicit_bases(self, balance: bool) -> None:
        pairs = [canonical_one(d) if balance else _identity(d.rank, d.B.double()) for d in self._factors()]
        negligible = None if balance else UNBALANCED

        def columns() -> Iterable[Tensor]:
            return (d.B.double() @ X for d, (X, _) in zip(self._factors(), pairs, strict=True))

        def rows() -> Iterable[Tensor]:
            return ((Y @ d.A.double()).T for d, (_, Y) in zip(self._factors(), pairs, strict=True))

        (L, all_left), (R, all_right) = basis(columns, negligible), basis(rows, negligible)
        both = zip(coordinates(L, columns()), (A.T for A in coordinates(R, rows())), strict=True)
        count = sum(X.shape[1] for X, _ in pairs)
        self.parts = [(part,) for part in pack_factors(both, count * (L.shape[1] + R.shape[1]))]
        self.bases, self.left, self.right = ExplicitBases(), L, R.T
        self.lost_energy = 0.0 if all_left and all_right else lost_energy(self.deltas, (part for (part,) in self.parts))

    @property
    def bytes(self) -> int:
        """The memory that the parts and the bases take, in bytes."""
        return super().bytes + 8 * (2 * self.left.numel() + 2 * self.right.numel())

    @property
    def inputs(self) -> Tensor:
        """Rᵀ, (k₂, in), float64."""
        if isinstance(self.bases, ExplicitBases):
            return self.right
        rows: Tensor = self.right @ torch.cat([delta.A for delta in self._factors()]).double()
        return rows

    def decode(self, merged: Sequence[Delta], rank: int | None, run: Run = map) -> Factors:
        """Return L·M·Rᵀ, with the small M truncated to the rank."""
        most = min(merged[0].shape)
        small = truncate(merged[0], most if rank is None else min(rank, most), run=run)
        return expand(small, self.bases, self.left, self.right)


def _part(left: Tensor, right: Tensor, most: int) -> Delta:
    """Return Mᵢ = left·right, (k₁, rᵢ)·(rᵢ, k₂), multiplied out if it has no more than rᵢ·most entries."""
    if left.shape[0] * right.shape[1] <= left.shape[1] * most:
        return Dense((left @ right).float())
    return LowRank(left.float(), right.float())


def _identity(rank: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the identities as X and Y, which leave factors unchanged."""
    one = torch.eye(rank).to(like)
    return one, one


class CompressedEncoding(Encoding):
    """Hold core coordinates that are projected on a shared subspace of rank r before the merge.

    Source: compress-then-merge (arXiv 2606.03723): the Mᵢ, scaled to norms λᵢ = b·‖Mᵢ‖ + (1 − b)·mean‖M‖, determine the
        subspace by a Tucker-2 decomposition (HOSVD, then alternating until it converges); the task vectors themselves
        are projected unscaled.
    """

    ROUNDS, TOLERANCE = 100, 1e-6

    def __init__(self, core: CoreEncoding, rank: int, blend: float) -> None:
        self.core, self.deltas = core, core.deltas
        matrices = torch.stack([parts[0].dense().double() for parts in core.parts])
        norms = matrices.flatten(1).norm(dim=1)
        wanted = blend * norms + (1 - blend) * norms.mean()
        scaled = matrices * (wanted / norms.clamp_min(1e-300)).view(-1, 1, 1)
        self.left, self.right = _tucker(scaled, rank, self.ROUNDS, self.TOLERANCE)
        self.parts = [(Dense((self.left.T @ matrix @ self.right).float()),) for matrix in matrices]

    @property
    def inputs(self) -> Tensor:
        """U₁ᵀ·Rᵀ, (r, in), float64."""
        return self.right.T @ self.core.inputs

    def decode(self, merged: Sequence[Delta], rank: int | None, run: Run = map) -> Factors:
        """Return (L·U₀)·O·(U₁ᵀ·Rᵀ), which has rank r."""
        inner = LowRank((self.left @ merged[0].dense().double()).float(), self.right.T.float())
        return self.core.decode((inner,), rank, run)


class CoreSpace(Space):
    """Reduce a module to a K × K problem without loss, in bases that depend on the deltas alone.

    Entrywise rules depend on the basis, and published Core Space takes it from B and A as they are factored: the same
    adapters written as (B·G, G⁻¹·A) then give another merge. Here each adapter is first brought to its canonical form,
    the SVD of its delta, so that the bases depend on the deltas alone. `balanced=false` is the published form.

    Law: decode(encode(Δ)) = Δ; linear and spectral rules equal those of space `delta`; with
        `balanced` neither the gauge of an adapter nor the order of adapters matters.
    Source: Panariello et al., Accurate and Efficient Low-Rank Model Merging in Core Space, 2025
        (arXiv 2509.17786), which also ignores the lora scaling; `compress_first` is CtM (arXiv
        2606.03723).
    """

    name = "core"
    shared = True
    lossless_rank = True
    kinds = ("lora",)

    balanced: bool = Field(True, description="bring each adapter to its canonical form first; false: as published")
    compress_first: bool = Field(False, description="project on a shared subspace of the output's rank before merging")
    norm_blend: float = Field(0.25, ge=0, le=1, description="compress_first: 1 keeps norms apart, 0 makes them equal")

    def encode(self, deltas: Sequence[Delta], rank: int | None = None) -> Encoding:
        """Return the shared bases and each Mᵢ in them."""
        core = CoreEncoding(deltas, self.balanced)
        if self.compress_first and rank is not None:
            return CompressedEncoding(core, rank, self.norm_blend)
        return core


def _tucker(matrices: Tensor, rank: int, rounds: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return orthonormal U₀ (k₁, r) and U₁ (k₂, r) that maximise Σ‖U₀ᵀ·M·U₁‖² in turn."""
    left = _leading(torch.einsum("nij,nkj->ik", matrices, matrices), rank)
    right = _leading(torch.einsum("nij,nik->jk", matrices, matrices), rank)
    before = 0.0
    for _ in range(rounds):
        half = matrices @ right
        left = _leading(torch.einsum("nir,nkr->ik", half, half), rank)
        half = left.T @ matrices
        right = _leading(torch.einsum("nri,nrk->ik", half, half), rank)
        kept = float((half @ right).square().sum())
        if kept - before <= tolerance * kept:
            break
        before = kept
    return left, right


def _leading(gram: Tensor, rank: int) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -min(rank, len(gram)) :].flip(1)
