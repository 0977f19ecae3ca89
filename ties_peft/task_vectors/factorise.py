"""Factorise: the best rank-r factors of a merged task vector, and what that rank lost.

Two roads to the truncated singular value decomposition M ≈ U·S·Vᵀ, none of which decomposes a large
matrix in full:

- `compress`: M is B·A with few columns (a linear merge): exact, from two small Gram matrices; with more
  columns than M has on its smaller side, exact from the Gram matrix of that side.
- `factorise`: M is a matrix: exact through the Gram matrix of its smaller side where that is small,
  else subspace iteration from an informed start, until another round no longer helps.

Both return balanced factors B = U·√S, A = √S·Vᵀ, of which half precision loses least.

Sources: Eckart and Young (1936); Halko, Martinsson and Tropp (2011), algorithm 4.4. The merged delta
of TIES has a flat spectrum, for which an unrefined sketch is 20 to 40 % off the optimum; starting
from the leading row space of the plain sum and iterating once or twice brings it under 0.1 %.
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

Run = Callable[[Callable[[Tensor], Tensor], Sequence[Tensor]], Iterable[Tensor]]


class Bases(Protocol):
    """What small factors are brought back by: a `Span`, or bases that are held."""

    def columns(self, mix: Tensor) -> Tensor:
        """Mixed columns of the left side, (out, r), float32."""

    def rows(self, mix: Tensor) -> Tensor:
        """Mixed rows of the right side, (r, in), float32."""


OVERSAMPLE = 8  # directions carried beyond the rank asked for
SMALL_SIDE = 640  # up to here a Gram matrix is cheaper than iterating, and exact
MIN_GAIN = 5e-4  # a round that lowers the error by a smaller share than this was the last
ROUNDS = 12
MAX_GRAM_SIDE = 2048  # Σrᵢ up to which Gram matrices of Σrᵢ × Σrᵢ are made
BAND = 512  # rows of a large product that one thread computes at a time
NOISE = 1e-14  # eigenvalues of a float64 Gram matrix below this share of the largest are rounding


class Sum(LowRank):
    """Σ fᵢ·Δᵢ, exactly, at rank Σrᵢ: its factors side by side, which are set so only where somebody asks for them.

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
        """The factor of each column of [B₁ … B_N], (Σrᵢ,), float64."""
        parts = [torch.full((d.rank,), f, dtype=torch.float64) for d, f in zip(self.deltas, self.factors, strict=True)]
        return torch.cat(parts).to(self.deltas[0].B.device)

    def scaled(self, factor: float) -> Sum:
        """factor · Σ fᵢ·Δᵢ."""
        return Sum(self.deltas, [f * factor for f in self.factors])

    def to(self, device: torch.device) -> Sum:
        """The same on another device."""
        return Sum([delta.to(device) for delta in self.deltas], self.factors)

    def exactly(self) -> Tensor:
        """Multiplied out in float64, (out, in)."""
        total = torch.zeros(self.shape, dtype=torch.float64, device=self.deltas[0].B.device)
        for delta, factor in zip(self.deltas, self.factors, strict=True):
            total.addmm_(delta.B.double(), delta.A.double(), alpha=factor)
        return total


@dataclass(frozen=True)
class Factors:
    """A truncated decomposition.

    Attributes:
        delta: B (out, r) and A (r, in), balanced, float32; r may be less than what was asked for
            where the matrix has no more directions. A vector, which has no rank, stands whole.
        kept: Σ of the squared singular values kept.
        total: ‖M‖², the squared Frobenius norm before truncation.
        edge: σᵣ₊₁ / σᵣ, the first singular value that is cut off over the last that is kept; 0 where none is cut off.
            1 means that the rank cuts through equal singular values, among which the choice is arbitrary.
    """

    delta: Delta
    kept: float
    total: float
    edge: float = 0.0

    def scaled(self, factor: float) -> Factors:
        """factor · the decomposition."""
        square = factor**2
        return replace(self, delta=self.delta.scaled(factor), kept=self.kept * square, total=self.total * square)

    def restored(self) -> Factors:
        """The same directions, scaled so that they have the norm of the whole."""
        if self.kept <= 0:
            return self
        return replace(self, delta=self.delta.scaled((self.total / self.kept) ** 0.5))

    @property
    def energy(self) -> float:
        """Share of the squared Frobenius norm that was kept, in [0, 1]; 1 for a zero matrix."""
        return min(1.0, self.kept / self.total) if self.total > 0 else 1.0


def factorise(matrix: Tensor, rank: int, start: Tensor | None = None, run: Run = map) -> Factors:
    """The best rank-`rank` factors of a matrix.

    Args:
        matrix: (out, in), float32.
        rank: at least 1; more than min(out, in) is cut to that.
        start: (in, l), a guess of the leading row space, l ≥ rank + OVERSAMPLE to be of use; such as
            `row_space` of what was merged.
        run: how to call a function on several blocks; `ThreadPool.map` does it on threads.
    Law: ‖M − B·A‖ equals the optimum √(Σ_{i>r} σᵢ²) (to rounding) where the smaller side is at most
        SMALL_SIDE, and is within 1 % of it above that for merges started from their `row_space`. A
        start orthogonal to all that matters can stop the iteration too early.
    """
    side = min(matrix.shape)
    rank = min(rank, side)
    width = rank + OVERSAMPLE
    if side <= SMALL_SIDE or 3 * width > side:
        return _through_gram(matrix, rank, run)
    return _by_iteration(matrix, rank, _wide(matrix, width, start), run)


@dataclass(frozen=True)
class SmallSvd:
    """The singular value decomposition of B·A in the coordinates of its factors: B·A = (B·X)·diag(S)·(Y·A).

    Attributes:
        X: (K, k); B·X has orthonormal columns.
        S: (k,), falling, no zeros.
        Y: (k, K); Y·A has orthonormal rows.
        total: ‖B·A‖².
        edge: as in `Factors`, of what was cut off already.
    """

    X: Tensor
    S: Tensor
    Y: Tensor
    total: float
    edge: float = 0.0

    def top(self, rank: int) -> SmallSvd:
        """Its `rank` largest directions."""
        edge = float(self.S[rank] / self.S[rank - 1]) if rank < len(self.S) else self.edge
        return SmallSvd(self.X[:, :rank], self.S[:rank], self.Y[:rank], self.total, edge)

    def balanced(self) -> tuple[Tensor, Tensor]:
        """X·√S and √S·Y."""
        root = self.S.sqrt()
        return self.X * root, root.unsqueeze(1) * self.Y


def decompose(left: Tensor, right: Tensor) -> SmallSvd:
    """The singular value decomposition of B·A from BᵀB and A·Aᵀ alone.

    Each column of B shares its norm with its row of A first, so that the result does not depend on
    how an adapter happens to be scaled. With BᵀB = W·Λ·Wᵀ, B = Q·R for R = √Λ·Wᵀ and Q orthonormal
    (and likewise for Aᵀ), the singular values of B·A are those of the small R_B·R_Aᵀ.

    Args:
        left, right: BᵀB and A·Aᵀ, (K, K), float64.
    """
    norms_b, norms_a = left.diagonal().sqrt(), right.diagonal().sqrt()
    there = (norms_b > 0) & (norms_a > 0)
    share = torch.where(there, (norms_a / norms_b.clamp_min(1e-300)).sqrt(), 0.0)
    inverse = torch.where(there, 1 / share, 0.0)
    root_b, back_b = _root(left * share * share.unsqueeze(1))
    root_a, back_a = _root(right * inverse * inverse.unsqueeze(1))
    U, S, Vt = torch.linalg.svd(root_b @ root_a.T, full_matrices=False)
    count = int((S[:1] * math.sqrt(NOISE) < S).sum())
    X, Y = share.unsqueeze(1) * (back_b @ U[:, :count]), (Vt[:count] @ back_a.T) * inverse
    return SmallSvd(X, S[:count], Y, float(S.square().sum()))


def leading(left: Tensor, right: Tensor, rank: int) -> SmallSvd:
    """The `rank` largest directions of B·A: `decompose(left, right).top(rank)` by one decomposition where they are few.

    With A·Aᵀ = Rᵀ·R by Cholesky, R·BᵀB·Rᵀ = V·S²·Vᵀ; then X = Rᵀ·V/S and Y = Xᵀ·BᵀB/S, and nothing is inverted.
    """
    R, fault = torch.linalg.cholesky_ex(right, upper=True)
    if int(fault) or 2 * rank > len(right):
        return decompose(left, right).top(rank)
    square = R @ left @ R.T
    values, vectors = eigh(square)
    edge = _edge(values, rank)
    values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
    there = values > NOISE * values[:1].clamp_min(0)
    S = values[there].sqrt()
    X = R.T @ vectors[:, there] / S
    return SmallSvd(X, S, X.T @ left / S.unsqueeze(1), float(square.diagonal().sum()), edge)


def _edge(squares: Tensor, rank: int) -> float:
    """Return σᵣ₊₁ / σᵣ of squared singular values, rising; 0 where no more than rounding is beyond rank r."""
    if rank >= len(squares) or not squares[-rank - 1] > NOISE * squares[-1]:
        return 0.0
    return math.sqrt(squares[-rank - 1] / squares[-rank])


def compress(delta: LowRank, rank: int, span: Span | None = None) -> Factors:
    """The best rank-`rank` factors of B·A, or of a `Sum`; exact to rounding unless both K and a side are over MAX_GRAM_SIDE.

    Args:
        delta: B (out, K) and A (K, in).
        rank: at least 1.
        span: of its factors, or of the deltas of a `Sum`, where that is there.
    Law: equals `factorise(delta.dense(), rank)`.
    """
    total = delta if isinstance(delta, Sum) else Sum([delta], [1.0])
    side = min(delta.shape)
    if gram_is_cheaper(delta.rank, side):
        return _from_span(total, rank, span or Span(total.deltas))
    if side <= MAX_GRAM_SIDE:
        return _through_gram(total.exactly(), min(rank, side))
    return factorise(total.dense(), rank)


def gram_is_cheaper(columns: int, side: int) -> bool:
    """Whether Gram matrices of so many columns cost less than one of the smaller side of their product."""
    return columns <= MAX_GRAM_SIDE and columns <= (side if side <= SMALL_SIDE else 2 * side // 3)


def _from_span(total: Sum, rank: int, span: Span) -> Factors:
    mix = total.mix
    small = leading(span.left * mix * mix.unsqueeze(1), span.right, rank)
    left, right = small.balanced()
    kept = float(small.S.square().sum())
    return Factors(LowRank(span.columns(mix.unsqueeze(1) * left), span.rows(right)), kept, small.total, small.edge)


def balance(delta: LowRank) -> LowRank:
    """The canonical form of B·A: U·√S and √S·Vᵀ of its own singular value decomposition.

    Law: it depends on the product alone, up to the sign of each direction.
    """
    canonical = compress(delta, delta.rank).delta
    assert isinstance(canonical, LowRank)
    return canonical


def expand(factors: Factors, span: Bases, left: Tensor | None, right: Tensor | None) -> Factors:
    """Factors in small coordinates, brought back: L·B and A·Rᵀ with L = [B₁ … B_N]·left, Rᵀ = right·[A₁; …; A_N].

    Args:
        factors: of a matrix in the coordinates of L and R, whose columns are orthonormal.
        span: of the task vectors.
        left, right: (K, k) and (k, K), float64; None where that side is as it shall be.
    """
    small = factors.delta
    assert isinstance(small, LowRank)
    B = small.B if left is None else span.columns(left @ small.B.double())
    A = small.A if right is None else span.rows(small.A.double() @ right)
    return replace(factors, delta=LowRank(B, A))


def truncate(
    merged: Delta, rank: int, start: Tensor | None = None, run: Run = map, span: Span | None = None
) -> Factors:
    """The best rank-`rank` factors of a merged task vector, by the road that its form allows.

    Args:
        merged, rank, start, run: as in `factorise`.
        span: as in `compress`.
    """
    return compress(merged, rank, span) if isinstance(merged, LowRank) else factorise(merged.dense(), rank, start, run)


def leading_rows(span: Span, width: int) -> Tensor:
    """The leading row space of ΣΔᵢ, (in, ≤ width), orthonormal: the informed start of `factorise`."""
    return span.rows(leading(span.left, span.right, width).Y).T


def _through_gram(matrix: Tensor, rank: int, run: Run = map) -> Factors:
    """Exact: the eigenvectors of M·Mᵀ or Mᵀ·M, whichever is smaller, in float64."""
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
    edge = _edge(values, rank)
    return _balanced(Vt.T, S, U.T, total, edge) if tall else _balanced(U, S, Vt, total, edge)


def _by_iteration(matrix: Tensor, rank: int, guess: Tensor, run: Run) -> Factors:
    """Subspace iteration from side to side, until the error of the rank-r truncation stops falling."""
    total = _energy(matrix, run)
    if total == 0:
        return Factors(LowRank(matrix[:, :0].clone(), matrix[:0].clone()), 0.0, 0.0)
    before = math.inf
    basis = _orthonormal(_product(matrix, guess, run))
    for turn in range(2 * ROUNDS):
        there = turn % 2 == 0  # from the output side to the input side
        seen = _product(matrix.T if there else matrix, basis, run)
        values, vectors = eigh(gram([seen]))
        kept = float(values[-rank:].clamp_min(0).sum())
        error = math.sqrt(max(0.0, total - kept))
        if error >= before * (1 - MIN_GAIN) or error <= 1e-6 * math.sqrt(total):
            break
        before = error
        basis, last = _orthonormal(seen), basis
    else:
        basis = last
    top = vectors[:, -rank:].flip(1)
    S = values[-rank:].flip(0).clamp_min(0).sqrt()
    keep = S.square() > NOISE * values[-1:]
    top, S = top[:, keep], S[keep]
    near, far = basis.double() @ top, (seen.double() @ top) / S
    edge = _edge(values, rank)
    return _balanced(near, S, far.T, total, edge) if there else _balanced(far, S, near.T, total, edge)


def _product(matrix: Tensor, thin: Tensor, run: Run) -> Tensor:
    """matrix · thin, in bands of rows that depend on the shape alone, so that threads change no bit."""
    bands = [matrix[start : start + BAND] for start in range(0, matrix.shape[0], BAND)]
    return torch.cat(list(run(lambda band: band @ thin, bands)))


def _wide(matrix: Tensor, width: int, start: Tensor | None) -> Tensor:
    """The start if it is wide enough, filled up with Gaussian directions if it is not."""
    given = matrix.new_empty(matrix.shape[1], 0) if start is None else start[:, :width]
    missing = width - given.shape[1]
    if missing <= 0:
        return given
    extra = _gaussian(matrix.shape[1], missing, seed=1).to(matrix.device)
    if start is None:  # one round of its own makes up for knowing nothing
        extra = matrix.T @ _orthonormal(matrix @ extra)
    return torch.cat([given, extra], dim=1)


def _gaussian(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def _orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the columns, (n, l), by the Gram matrix in float64; short of it where they depend."""
    values, vectors = eigh(gram([matrix]))
    keep = values > NOISE * values[-1:].clamp_min(0)
    once = (matrix.double() @ (vectors[:, keep] / values[keep].sqrt())).float()
    root = torch.linalg.cholesky(gram([once]))  # near the identity: what rounding left is taken out
    basis: Tensor = torch.linalg.solve_triangular(root.T, once.double(), upper=True, left=False).float()
    return basis


def _energy(matrix: Tensor, run: Run = map) -> float:
    """‖M‖², summed in float32 along a row and in float64 over the rows."""

    def some(band: Tensor) -> Tensor:
        norms: Tensor = torch.linalg.vector_norm(band, dim=1)
        return norms.double().square().sum()

    return sum(map(float, run(some, [matrix[start : start + BAND] for start in range(0, len(matrix), BAND)])))


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R with RᵀR = gram, and the R⁻¹ that maps back (zero for directions that are rounding)."""
    values, vectors = eigh(gram)
    keep = values > NOISE * values[-1:].clamp_min(0)
    root = values[keep].sqrt()
    return (vectors[:, keep] * root).T, vectors[:, keep] / root


def _balanced(U: Tensor, S: Tensor, Vt: Tensor, total: float, edge: float) -> Factors:
    """B = U·√S and A = √S·Vᵀ in float32."""
    root = S.sqrt()
    delta = LowRank((U * root).float().contiguous(), (root.unsqueeze(1) * Vt).float().contiguous())
    return Factors(delta, kept=float(S.square().sum()), total=total, edge=edge)
