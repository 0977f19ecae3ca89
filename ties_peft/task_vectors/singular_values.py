"""Spectrum: the singular value decompositions that matrix methods share, in float64.

A LoRA's task vector has far fewer directions than entries. Singular vectors of singular values that
are zero are arbitrary: two correct decompositions of one matrix disagree about them, and a method
that uses them has no result of its own. Everything here works on the *support*, the directions that
are there; what lies under a share of the largest singular value is rounding, and no direction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .delta import Delta, LowRank
from .factorise import balance

SUPPORT = 1e-5  # of the largest singular value: float32 factors are exact to 1e-7 of it
ALIKE = 1e-4  # singular values of stacked unit vectors under this share say that some of them are one direction


@dataclass(frozen=True)
class Spectrum:
    """U·diag(S)·Vᵀ on its support.

    Attributes:
        U: (rows, r), orthonormal columns.
        S: (r,), falling.
        Vt: (r, columns), orthonormal rows.
    """

    U: Tensor
    S: Tensor
    Vt: Tensor

    def __len__(self) -> int:
        return len(self.S)

    def dense(self) -> Tensor:
        """The matrix."""
        return (self.U * self.S) @ self.Vt

    def top(self, count: int | None) -> Spectrum:
        """The `count` largest directions; all of them for None."""
        return Spectrum(self.U[:, :count], self.S[:count], self.Vt[:count])

    def with_values(self, S: Tensor) -> Spectrum:
        """The same directions with other values."""
        return replace(self, S=S)


def spectrum(matrix: Tensor, negligible: float = SUPPORT, beside: float = 0.0) -> Spectrum:
    """The thin singular value decomposition of a matrix, on its support, in float64.

    Args:
        matrix: (rows, columns).
        negligible: the share of the largest singular value under which one is rounding.
        beside: a size that the matrix is what is left of: no direction is there for being large
            among remains that are all rounding.
    Law: `spectrum(M).dense()` is M to rounding; a matrix of zeros has no direction.
    """
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    count = int((negligible * S[:1].clamp_min(beside) < S).sum())
    return Spectrum(U[:, :count], S[:count], Vt[:count])


def spectra(matrices: Iterable[Tensor]) -> list[Spectrum]:
    """Those of several matrices, without the ones that are zero."""
    return [found for found in map(spectrum, matrices) if len(found)]


def polar(matrix: Tensor) -> Tensor:
    """U·Vᵀ of U·S·Vᵀ: the nearest matrix whose columns (or rows, if it is wide) are orthonormal.

    Columns that depend on each other have no such neighbour; they are left in the space that they
    span, which is where every choice agrees.

    Law: polar(Q) = Q for orthonormal Q; polar(M·E) = polar(M)·E for orthogonal E.
    """
    found = spectrum(matrix, ALIKE)
    return found.U @ found.Vt


def orthogonalised(parts: Sequence[Spectrum]) -> Tensor:
    """polar([U₁ … U_N])·diag(S₁ … S_N)·polar([V₁ … V_N])ᵀ: all directions made to stand apart.

    Law: it does not depend on the order of the parts; one part comes back as it is.
    """
    left, right = polar(torch.cat([p.U for p in parts], 1)), polar(torch.cat([p.Vt for p in parts], 0))
    return (left * torch.cat([p.S for p in parts])) @ right


def balanced(delta: Delta) -> LowRank:
    """U·√S and √S·Vᵀ of a task vector's own singular value decomposition; one direction of zeros if it is zero.

    Law: it depends on the task vector alone, not on its factors, up to the sign of each direction.
    """
    if isinstance(delta, LowRank):
        found = balance(delta) if delta.rank else delta
    else:
        one = spectrum(delta.dense())
        root = one.S.sqrt()
        found = LowRank((one.U * root).float(), (root.unsqueeze(1) * one.Vt).float())
    if found.rank:
        return found
    return LowRank(found.B.new_zeros(delta.shape[0], 1), found.A.new_zeros(1, delta.shape[1]))


def norm(delta: Delta) -> float:
    """‖delta‖, the Frobenius norm, in float64 without a float64 copy of what is dense."""
    if isinstance(delta, LowRank):
        B, A = delta.B.double(), delta.A.double()
        square = float(((B.T @ B) * (A @ A.T)).sum())
        return 0.0 if square < 0 else math.sqrt(square)  # NaN stays NaN
    return float(torch.linalg.vector_norm(delta.dense(), dtype=torch.float64))
