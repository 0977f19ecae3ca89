"""Compute the best rank-r factors of a merged task vector, and the energy that this rank keeps.

Two functions compute the truncated singular value decomposition M ≈ U·S·Vᵀ without decomposing a large matrix in full:

- `compress`, where M is B·A (a linear merge): exact, from two small Gram matrices; if B has more columns than the
  smaller side of M is long, exact from the Gram matrix of that side.
- `factorise`, where M is a matrix: exact from the Gram matrix of its smaller side if that is small, else by subspace
  iteration from an informed start, until another round does not help.

Both return balanced factors B = U·√S, A = √S·Vᵀ, which lose least in half precision.

Sources: Eckart and Young (1936); Halko, Martinsson and Tropp (2011), algorithm 4.4. The merged delta of TIES has a flat
spectrum, for which an unrefined sketch is 20 to 40 % worse than the optimum; one or two rounds from the leading row
space of the plain sum bring this below 0.1 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from .delta import GRAM_ROWS, Delta, LowRank, Span, eigh, gram

# How to call a function on several blocks: `map`, or `ThreadPool.map`, which does it on threads.
Run = Callable[[Callable[[Tensor], Tensor], Sequence[Tensor]], Iterable[Tensor]]

OVERSAMPLE = 8  # directions that an iteration has beyond the rank asked for
SMALL_SIDE = 640  # up to this length of the smaller side its Gram matrix is cheaper than iterating, and exact
MIN_GAIN = 5e-4  # an iteration ends when a round lowers the error by a smaller share than this
ROUNDS = 12
MAX_GRAM_SIDE = 2048  # Σrᵢ up to which Gram matrices of Σrᵢ × Σrᵢ are made
BAND = 512  # rows of a large product that one thread computes at a time
NOISE = 1e-14  # eigenvalues of a float64 Gram matrix below this share of the largest are rounding


class Bases(Protocol):
    """Map coordinates back to the module: by a `Span`, or by `ExplicitBases`."""

    def columns(self, mix: Tensor) -> Tensor:
        """Return the columns that have these coordinates, (out, r), float32."""

    def rows(self, mix: Tensor) -> Tensor:
        """Return the rows that have these coordinates, (r, in), float32."""


class Sum(LowRank):
    """Hold Σ fᵢ·Δᵢ exactly, with rank Σrᵢ; B and A are only concatenated when they are used.

    Attributes:
        deltas: Δᵢ = Bᵢ·Aᵢ, of one shape.
        factors: fᵢ.
    """

    def __init__(self, deltas: Sequence[LowRank], factors: Sequence[float]) -> None:
        self.deltas, self.factors = tuple(deltas), tuple(factors)

    @cached_property
    def B(self) -> Tensor:
        """[f₁·B₁ … f_N·B_N], (out, Σrᵢ)."""
        return torch.cat([delta.scaled(f).B for delta, f in zip(self.deltas, self.factors, strict=True)], 1)

    @cached_property
    def A(self) -> Tensor:
        """[A₁; …; A_N], (Σrᵢ, in)."""
        return torch.cat([delta.A for delta in self.deltas], 0)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.deltas[0].shape

    @property
    def rank(self) -> int:
        """Σrᵢ."""
        return sum(delta.rank for delta in self.deltas)

    @property
    def mix(self) -> Tensor:
        """The factor fᵢ of each column of [B₁ … B_N], (Σrᵢ,), float64."""
        parts = [torch.full((d.rank,), f, dtype=torch.float64) for d, f in zip(self.deltas, self.factors, strict=True)]
        return torch.cat(parts).to(self.deltas[0].B.device)

    def scaled(self, factor: float) -> Sum:
        """Return factor · Σ fᵢ·Δᵢ."""
        return Sum(self.deltas, [f * factor for f in self.factors])

    def to(self, device: torch.device) -> Sum:
        """Return the same sum on another device."""
        return Sum([delta.to(device) for delta in self.deltas], self.factors)

    def dense_float64(self) -> Tensor:
        """Return the sum multiplied out, (out, in), float64."""
        total = torch.zeros(self.shape, dtype=torch.float64, device=self.deltas[0].B.device)
        for delta, factor in zip(self.deltas, self.factors, strict=True):
            total.addmm_(delta.B.double(), delta.A.double(), alpha=factor)
        return total


@dataclass(frozen=True)
class Factors:
    """Hold the truncated decomposition of a matrix M.

    Attributes:
        delta: B (out, r) and A (r, in), balanced, float32; r is smaller than what was asked for if M has a smaller
            rank. A vector, which has no rank, is held whole.
        kept: the sum of the squared singular values that are kept.
        total: ‖M‖², the squared Frobenius norm before truncation.
        edge: σᵣ₊₁ / σᵣ, the first singular value that is dropped over the last that is kept; 0 if none is dropped. At 1
            the rank divides equal singular values, and which of them are kept is arbitrary.
    """

    delta: Delta
    kept: float
    total: float
    edge: float = 0.0

    def scaled(self, factor: float) -> Factors:
        """Return the decomposition of factor · M."""
        square = factor**2
        return replace(self, delta=self.delta.scaled(factor), kept=self.kept * square, total=self.total * square)

    def restored(self) -> Factors:
        """Return the same directions, scaled to the norm of M."""
        if self.kept <= 0:
            return self
        return replace(self, delta=self.delta.scaled((self.total / self.kept) ** 0.5))

    @property
    def energy(self) -> float:
        """The share of the squared Frobenius norm that is kept, in [0, 1]; 1 for a zero matrix."""
        return min(1.0, self.kept / self.total) if self.total > 0 else 1.0


def factorise(matrix: Tensor, rank: int, start: Tensor | None = None, run: Run = map) -> Factors:
    """Return the best rank-`rank` factors of a matrix.

    Args:
        matrix: (out, in), float32.
        rank: at least 1; at most min(out, in) is used.
        start: (in, l), an estimate of the leading row space, l ≥ rank + OVERSAMPLE; such as `leading_rows` of what was
            merged.
        run: see `Run`.
    Law: ‖M − B·A‖ equals the optimum √(Σ_{i>r} σᵢ²) (to rounding) where the smaller side is at most SMALL_SIDE, and is
        within 1 % of it above that for merges started from their `leading_rows`. From a start orthogonal to all leading
        directions the iteration may end too early.
    """
    side = min(matrix.shape)
    rank = min(rank, side)
    width = rank + OVERSAMPLE
    if side <= SMALL_SIDE or 3 * width > side:
        return _through_gram(matrix, rank, run)
    return _by_iteration(matrix, rank, _wide(matrix, width, start), run)


@dataclass(frozen=True)
class SmallSvd:
    """Hold the singular value decomposition of B·A in the coordinates of its factors: B·A = (B·X)·diag(S)·(Y·A).

    Attributes:
        X: (K, k); B·X has orthonormal columns.
        S: (k,), falling, no zeros.
        Y: (k, K); Y·A has orthonormal rows.
        total: ‖B·A‖².
        edge: as in `Factors`, for what was dropped already.
    """

    X: Tensor
    S: Tensor
    Y: Tensor
    total: float
    edge: float = 0.0

    def top(self, rank: int) -> SmallSvd:
        """Return the `rank` largest directions."""
        edge = float(self.S[rank] / self.S[rank - 1]) if rank < len(self.S) else self.edge
        return SmallSvd(self.X[:, :rank], self.S[:rank], self.Y[:rank], self.total, edge)

    def balanced(self) -> tuple[Tensor, Tensor]:
        """Return X·√S and √S·Y."""
        root = self.S.sqrt()
        return self.X * root, root.unsqueeze(1) * self.Y


def decompose(left: Tensor, right: Tensor) -> SmallSvd:
    """Return the singular value decomposition of B·A, computed from BᵀB and A·Aᵀ alone.

    Each column of B and its row of A are first scaled to equal norms, so that the result does not depend on how an
    adapter divides its scale between them. With BᵀB = W·Λ·Wᵀ, B = Q·R for R = √Λ·Wᵀ and Q orthonormal (and likewise for
    Aᵀ), the singular values of B·A are those of the small R_B·R_Aᵀ.

    Args:
        left, right: BᵀB and A·Aᵀ, (K, K), float64.
    """
    norms_b, norms_a = left.diagonal().sqrt(), right.diagonal().sqrt()
    nonzero = (norms_b > 0) & (norms_a > 0)
    share = torch.where(nonzero, (norms_a / norms_b.clamp_min(1e-300)).sqrt(), 0.0)
    inverse = torch.where(nonzero, 1 / share, 0.0)
    root_b, back_b = _root(left * share * share.unsqueeze(1))
    root_a, back_a = _root(right * inverse * inverse.unsqueeze(1))
    U, S, Vt = torch.linalg.svd(root_b @ root_a.T, full_matrices=False)
    count = int((S[:1] * math.sqrt(NOISE) < S).sum())
    X, Y = share.unsqueeze(1) * (back_b @ U[:, :count]), (Vt[:count] @ back_a.T) * inverse
    return SmallSvd(X, S[:count], Y, float(S.square().sum()))


def squared_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Return the squares of the singular values of B·A, falling, from BᵀB and A·Aᵀ alone, (K, K), float64.

    With A·Aᵀ = Rᵀ·R by Cholesky they are the eigenvalues of R·BᵀB·Rᵀ; where A has not full rank, those of `decompose`.
    """
    R, fault = torch.linalg.cholesky_ex(right, upper=True)
    if int(fault):
        return decompose(left, right).S.square()
    squares: Tensor = torch.linalg.eigvalsh(R @ left @ R.T)
    return squares.flip(0).clamp_min(0)


def leading(left: Tensor, right: Tensor, rank: int) -> SmallSvd:
    """Return `decompose(left, right).top(rank)`, by a single eigendecomposition if the rank is small.

    With A·Aᵀ = Rᵀ·R by Cholesky, R·BᵀB·Rᵀ = V·S²·Vᵀ; then X = Rᵀ·V/S and Y = Xᵀ·BᵀB/S, and no matrix is inverted.
    """
    R, fault = torch.linalg.cholesky_ex(right, upper=True)
    if int(fault) or 2 * rank > len(right):
        return decompose(left, right).top(rank)
    square = R @ left @ R.T
    values, vectors = eigh(square)
    edge = _edge(values, rank)
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    keep = values > NOISE * values[:1].clamp_min(0)
    S = values[keep].sqrt()
    X = R.T @ vectors[:, keep] / S
    return SmallSvd(X, S, X.T @ left / S.unsqueeze(1), float(square.diagonal().sum()), edge)


def _edge(squares: Tensor, rank: int) -> float:
    """Return σᵣ₊₁ / σᵣ of squared singular values, rising; 0 where no more than rounding is beyond rank r."""
    if rank >= len(squares) or not squares[-rank - 1] > NOISE * squares[-1]:
        return 0.0
    return math.sqrt(squares[-rank - 1] / squares[-rank])


def compress(delta: LowRank, rank: int, span: Span | None = None) -> Factors:
    """Return the best rank-`rank` factors of B·A, or of a `Sum`; exact unless K and both sides exceed MAX_GRAM_SIDE.

    Args:
        delta: B (out, K) and A (K, in).
        rank: at least 1.
        span: of its factors, or of the deltas of a `Sum`, if it is known already.
    Law: equals `factorise(delta.dense(), rank)`.
    """
    total = delta if isinstance(delta, Sum) else Sum([delta], [1.0])
    side = min(delta.shape)
    if gram_is_cheaper(delta.rank, side):
        return _from_span(total, rank, span or Span(total.deltas))
    if side <= MAX_GRAM_SIDE:
        return _through_gram(total.dense_float64(), min(rank, side))
    return factorise(total.dense(), rank)


def gram_is_cheaper(columns: int, side: int) -> bool:
    """Return whether Gram matrices of so many columns cost less than one of the smaller side of the product."""
    return columns <= MAX_GRAM_SIDE and columns <= (side if side <= SMALL_SIDE else 2 * side // 3)


def _from_span(total: Sum, rank: int, span: Span) -> Factors:
    mix = total.mix
    small = leading(span.left * mix * mix.unsqueeze(1), span.right, rank)
    left, right = small.balanced()
    kept = float(small.S.square().sum())
    return Factors(LowRank(span.columns(mix.unsqueeze(1) * left), span.rows(right)), kept, small.total, small.edge)


def expand(factors: Factors, bases: Bases, left: Tensor | None, right: Tensor | None) -> Factors:
    """Return factors in the coordinates of the module: L·B and A·Rᵀ with L = [B₁ … B_N]·left, Rᵀ = right·[A₁; …; A_N].

    Args:
        factors: of a matrix in the coordinates of L and R, whose columns are orthonormal.
        bases: of the task vectors.
        left, right: (K, k) and (k, K), float64; None for a side that is in the module's coordinates already.
    """
    small = factors.delta
    assert isinstance(small, LowRank)
    B = small.B if left is None else bases.columns(left @ small.B.double())
    A = small.A if right is None else bases.rows(small.A.double() @ right)
    return replace(factors, delta=LowRank(B, A))


def truncate(
    merged: Delta, rank: int, start: Tensor | None = None, run: Run = map, span: Span | None = None
) -> Factors:
    """Return the best rank-`rank` factors of a merged task vector: `compress` if it is factored, else `factorise`.

    Args:
        merged, rank, start, run: as in `factorise`.
        span: as in `compress`.
    """
    return compress(merged, rank, span) if isinstance(merged, LowRank) else factorise(merged.dense(), rank, start, run)


def leading_rows(span: Span, width: int) -> Tensor:
    """Return the leading row space of ΣΔᵢ, (in, ≤ width), orthonormal: the informed start of `factorise`."""
    return span.rows(leading(span.left, span.right, width).Y).T


def _through_gram(matrix: Tensor, rank: int, run: Run = map) -> Factors:
    """Factorise exactly, by the eigenvectors of M·Mᵀ or Mᵀ·M, whichever is smaller, in float64."""
    M = matrix.double()
    tall = M.shape[0] > M.shape[1]
    if tall:
        M = M.T
    bands = [M[:, start : start + GRAM_ROWS] for start in range(0, M.shape[1], GRAM_ROWS)]
    square = sum(run(lambda band: gram([band.T]), bands), torch.zeros_like(M[:, :1]))
    total = float(square.diagonal().sum())
    values, vectors = eigh(square)
    U = vectors[:, -rank:].flip(1)
    rest = U.T @ M  # rows of length σ: √S·Vᵀ once divided by √σ
    S = rest.norm(dim=1)
    keep = S.square() > NOISE * values[-1].clamp_min(0)
    U, S, rest = U[:, keep], S[keep], rest[keep]
    Vt = rest / S.unsqueeze(1)
    if tall:
        U, Vt = Vt.T, U.T
    return _balanced(U, S, Vt, total, _edge(values, rank))


def _by_iteration(matrix: Tensor, rank: int, start: Tensor, run: Run) -> Factors:
    """Factorise by subspace iteration, with M and Mᵀ in turn, until the truncation error stops falling."""
    total = _energy(matrix, run)
    if total == 0:
        return Factors(LowRank(matrix[:, :0].clone(), matrix[:0].clone()), 0.0, 0.0)
    before = math.inf
    basis = _orthonormal(_product(matrix, start, run))
    for step in range(2 * ROUNDS):
        to_rows = step % 2 == 0  # `basis` is of the column space, and `image` is in the row space; else the reverse
        image = _product(matrix.T if to_rows else matrix, basis, run)
        values, vectors = eigh(gram([image]))
        kept = float(values[-rank:].clamp_min(0).sum())
        error = math.sqrt(max(0.0, total - kept))
        if error >= before * (1 - MIN_GAIN) or error <= 1e-6 * math.sqrt(total):
            break
        before = error
        basis, last = _orthonormal(image), basis
    else:
        basis = last  # of which `image` is the image
    top = vectors[:, -rank:].flip(1)
    S = values[-rank:].flip(0).clamp_min(0).sqrt()
    keep = S.square() > NOISE * values[-1:]
    top, S = top[:, keep], S[keep]
    of_basis, of_image = basis.double() @ top, (image.double() @ top) / S
    U, V = (of_basis, of_image) if to_rows else (of_image, of_basis)
    return _balanced(U, S, V.T, total, _edge(values, rank))


def _product(matrix: Tensor, thin: Tensor, run: Run) -> Tensor:
    """Return matrix · thin, computed in bands of rows that depend on the shape alone, so that threads change no bit."""
    bands = [matrix[start : start + BAND] for start in range(0, matrix.shape[0], BAND)]
    return torch.cat(list(run(lambda band: band @ thin, bands)))


def _wide(matrix: Tensor, width: int, start: Tensor | None) -> Tensor:
    """Return the start, with Gaussian directions added if it has too few columns."""
    given = matrix.new_empty(matrix.shape[1], 0) if start is None else start[:, :width]
    missing = width - given.shape[1]
    if missing <= 0:
        return given
    generator = torch.Generator().manual_seed(1)
    extra = torch.randn(matrix.shape[1], missing, generator=generator).to(matrix.device)
    if start is None:  # a round replaces the missing estimate
        extra = matrix.T @ _orthonormal(matrix @ extra)
    return torch.cat([given, extra], dim=1)


def _orthonormal(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns, (n, l), by the Gram matrix; narrower if columns depend on each other."""
    values, vectors = eigh(gram([matrix]))
    keep = values > NOISE * values[-1:].clamp_min(0)
    once = (matrix.double() @ (vectors[:, keep] / values[keep].sqrt())).float()
    root = torch.linalg.cholesky(gram([once]))  # near the identity: this corrects what rounding left
    basis: Tensor = torch.linalg.solve_triangular(root.T, once.double(), upper=True, left=False).float()
    return basis


def _energy(matrix: Tensor, run: Run = map) -> float:
    """Return ‖M‖², summed in float32 along a row and in float64 over the rows."""

    def of_band(band: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(band, dim=1)
        return norms.double().square().sum()

    return sum(map(float, run(of_band, [matrix[start : start + BAND] for start in range(0, len(matrix), BAND)])))


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return R with RᵀR = gram, and its inverse, which is zero for directions that are rounding."""
    values, vectors = eigh(gram)
    keep = values > NOISE * values[-1:].clamp_min(0)
    root = values[keep].sqrt()
    return (vectors[:, keep] * root).T, vectors[:, keep] / root


def _balanced(U: Tensor, S: Tensor, Vt: Tensor, total: float, edge: float) -> Factors:
    """Return the factors B = U·√S and A = √S·Vᵀ in float32."""
    root = S.sqrt()
    delta = LowRank((U * root).float().contiguous(), (root.unsqueeze(1) * Vt).float().contiguous())
    return Factors(delta, kept=float(S.square().sum()), total=total, edge=edge)
