"""Decompose matrices by singular values, in float64, for the methods that work on them.

A LoRA's task vector has a far lower rank than its size allows. The singular vectors of singular values that are zero
are arbitrary: two correct decompositions of one matrix differ in them, and so would the result of a method that used
them. All functions here are therefore restricted to the *support*, the directions whose singular value is more than
rounding: more than a small share of the largest one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .delta import Delta, LowRank
from .factorise import compress

# The share of the largest singular value below which one is rounding; float32 factors are exact to 1e-7 of it.
SUPPORT = 1e-5
# Below this share, singular values of stacked unit vectors show that some of these are the same direction.
ALIKE = 1e-4


@dataclass(frozen=True)
class Spectrum:
    """Hold the singular value decomposition U·diag(S)·Vᵀ on its support.

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
        """Return the matrix."""
        return (self.U * self.S) @ self.Vt

    def top(self, count: int | None) -> Spectrum:
        """Return the `count` largest directions; all of them for None."""
        return Spectrum(self.U[:, :count], self.S[:count], self.Vt[:count])

    def with_values(self, S: Tensor) -> Spectrum:
        """Return the same directions with other singular values."""
        return replace(self, S=S)


def spectrum(matrix: Tensor, negligible: float = SUPPORT, at_least: float = 0.0) -> Spectrum:
    """Return the thin singular value decomposition of a matrix, on its support, in float64.

    Args:
        matrix: (rows, columns).
        negligible: the share of the largest singular value below which one is rounding.
        at_least: a size that replaces the largest singular value if that is smaller, such as the norm of the matrix of
            which this one is a remainder that may be nothing but rounding.
    Law: `spectrum(M).dense()` is M to rounding; a matrix of zeros has no direction.
    """
    U, S, Vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    count = int((negligible * S[:1].clamp_min(at_least) < S).sum())
    return Spectrum(U[:, :count], S[:count], Vt[:count])


def spectra(matrices: Iterable[Tensor]) -> list[Spectrum]:
    """Return the decompositions of several matrices, without those that are zero."""
    return [found for found in map(spectrum, matrices) if len(found)]


def spectrum_of(delta: Delta) -> Spectrum:
    """Return the decomposition of a task vector; that of factors without multiplying them out."""
    if not isinstance(delta, LowRank):
        return spectrum(delta.dense())
    left, right = torch.linalg.qr(delta.B.double()), torch.linalg.qr(delta.A.double().T)
    inner = spectrum(left.R @ right.R.T)
    return Spectrum(left.Q @ inner.U, inner.S, inner.Vt @ right.Q.T)


def polar(matrix: Tensor) -> Tensor:
    """Return U·Vᵀ of U·S·Vᵀ, the nearest matrix whose columns (or rows, if it is wide) are orthonormal.

    If columns depend on each other, only the directions that they span are kept; the others would be arbitrary.

    Law: polar(Q) = Q for orthonormal Q; polar(M·E) = polar(M)·E for orthogonal E.
    """
    found = spectrum(matrix, ALIKE)
    return found.U @ found.Vt


def orthogonalised(parts: Sequence[Spectrum]) -> Tensor:
    """Return polar([U₁ … U_N])·diag(S₁ … S_N)·polar([V₁ … V_N])ᵀ: the directions of all parts made orthogonal.

    Law: it does not depend on the order of the parts; one part comes back as it is.
    """
    left, right = polar(torch.cat([p.U for p in parts], 1)), polar(torch.cat([p.Vt for p in parts], 0))
    return (left * torch.cat([p.S for p in parts])) @ right


def balanced(delta: Delta) -> LowRank:
    """Return the canonical form of a task vector: U·√S and √S·Vᵀ of its singular value decomposition.

    A task vector of zeros has one direction of zeros.

    Law: it depends on the task vector alone, not on its factors, up to the sign of each direction.
    """
    if isinstance(delta, LowRank):
        found = compress(delta, delta.rank).delta if delta.rank else delta
        assert isinstance(found, LowRank)
    else:
        one = spectrum(delta.dense())
        root = one.S.sqrt()
        found = LowRank((one.U * root).float(), (root.unsqueeze(1) * one.Vt).float())
    if found.rank:
        return found
    return LowRank(found.B.new_zeros(delta.shape[0], 1), found.A.new_zeros(1, delta.shape[1]))
