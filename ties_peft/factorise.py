"""Factorise: the best rank-r factors of a merged task vector, and what that rank lost.

Two roads to the truncated singular value decomposition M ≈ U·S·Vᵀ, none of which decomposes a large
matrix in full:

- `compress`: M is already B·A with few columns (a linear merge): exact, from two small Gram matrices.
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
from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import Delta, LowRank

Run = Callable[[Callable[[Tensor], Tensor], Sequence[Tensor]], Iterable[Tensor]]

OVERSAMPLE = 16  # directions carried beyond the rank asked for
SMALL_SIDE = 640  # up to here a Gram matrix is cheaper than iterating, and exact
HELPED = 5e-4  # a round that lowers the error by a smaller share than this was the last
ROUNDS = 12
BAND = 512  # rows of a large product that one thread computes at a time
NOISE = 1e-14  # eigenvalues of a float64 Gram matrix below this share of the largest are rounding


@dataclass(frozen=True)
class Factors:
    """A truncated decomposition.

    Attributes:
        delta: B (out, r) and A (r, in), balanced, float32; r may be less than what was asked for
            where the matrix has no more directions. A vector, which has no rank, stands whole.
        kept: Σ of the squared singular values kept.
        total: ‖M‖², the squared Frobenius norm before truncation.
    """

    delta: Delta
    kept: float
    total: float

    def scaled(self, factor: float) -> Factors:
        """factor · the decomposition."""
        return Factors(self.delta.scaled(factor), self.kept * factor**2, self.total * factor**2)

    def restored(self) -> Factors:
        """The same directions, scaled so that they have the norm of the whole."""
        if self.kept <= 0:
            return self
        return Factors(self.delta.scaled((self.total / self.kept) ** 0.5), self.kept, self.total)

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
        run: how to call a function on several blocks; `Workers.map` does it on threads.
    Law: ‖M − B·A‖ equals the optimum √(Σ_{i>r} σᵢ²) (to rounding) where the smaller side is at most
        SMALL_SIDE, and is within 1 % of it above that for merges started from their `row_space`. A
        start orthogonal to all that matters can stop the iteration too early.
    """
    side = min(matrix.shape)
    rank = min(rank, side)
    width = rank + OVERSAMPLE
    if side <= SMALL_SIDE or 3 * width > side:
        return _through_gram(matrix, rank)
    return _by_iteration(matrix, rank, _orthonormal(_wide(matrix, width, start)), run)


def compress(delta: LowRank, rank: int) -> Factors:
    """The best rank-`rank` factors of B·A, never multiplied out; exact to rounding.

    Each column of B shares its norm with its row of A first, so that the result does not depend on
    how an adapter happens to be scaled. With BᵀB = W·Λ·Wᵀ, B = Q·R for R = √Λ·Wᵀ and Q orthonormal
    (and likewise for Aᵀ), the singular values of B·A are those of the small R_B·R_Aᵀ.

    Args:
        delta: B (out, K) and A (K, in).
        rank: at least 1.
    Law: equals `factorise(delta.dense(), rank)`.
    """
    B, A = delta.B.double(), delta.A.double()
    norms_b, norms_a = B.norm(dim=0), A.norm(dim=1)
    share = torch.where((norms_b > 0) & (norms_a > 0), (norms_a / norms_b.clamp_min(1e-300)).sqrt(), 0.0)
    B, A = B * share, A / torch.where(share > 0, share, 1.0).unsqueeze(1) * (share > 0).unsqueeze(1)
    left, left_inverse = _root(B.T @ B)
    right, right_inverse = _root(A @ A.T)
    U, S, Vt = torch.linalg.svd(left @ right.T)
    total = float(S.square().sum())
    U, S, Vt = _leading(U, S, Vt, rank)
    return _balanced(B @ (left_inverse @ U), S, (Vt @ right_inverse.T) @ A, total)


def balance(delta: LowRank) -> LowRank:
    """The canonical form of B·A: U·√S and √S·Vᵀ of its own singular value decomposition.

    Law: it depends on the product alone, up to the sign of each direction.
    """
    canonical = compress(delta, delta.rank).delta
    assert isinstance(canonical, LowRank)
    return canonical


def row_space(deltas: list[LowRank], width: int, seed: int = 0) -> Tensor:
    """The leading row space of Σ B·A, (in, width), by a few rounds of subspace iteration.

    It streams over the deltas, so that its memory does not grow with their number: the informed
    start of `factorise`.
    """
    first = deltas[0]
    guess = _gaussian(first.A.shape[1], width, seed).to(first.A.device)
    for _ in range(3):
        image = sum((d.B @ (d.A @ guess) for d in deltas[1:]), first.B @ (first.A @ guess))
        guess = _orthonormal(sum((d.A.T @ (d.B.T @ image) for d in deltas[1:]), first.A.T @ (first.B.T @ image)))
    return guess


def _through_gram(matrix: Tensor, rank: int) -> Factors:
    """Exact: the eigenvectors of M·Mᵀ or Mᵀ·M, whichever is smaller, in float64."""
    M = matrix.double()
    tall = M.shape[0] > M.shape[1]
    if tall:
        M = M.T
    total = float(M.square().sum())
    values, vectors = torch.linalg.eigh(M @ M.T)
    U = vectors[:, -rank:].flip(1)
    rest = U.T @ M  # rows of length σ: √S·Vᵀ once divided by √σ
    S = rest.norm(dim=1)
    keep = S.square() > NOISE * values[-1].clamp_min(0)
    U, S, rest = U[:, keep], S[keep], rest[keep]
    Vt = rest / S.unsqueeze(1)
    return _balanced(Vt.T, S, U.T, total) if tall else _balanced(U, S, Vt, total)


def _by_iteration(matrix: Tensor, rank: int, guess: Tensor, run: Run) -> Factors:
    """Subspace iteration until the error of the rank-r truncation stops falling."""
    total = _energy(matrix)
    before = math.inf
    for _ in range(ROUNDS):
        Q = _orthonormal(_product(matrix, guess, run))
        rest = _product(matrix.T, Q, run).double().T  # Qᵀ·M, (l, in)
        values, vectors = torch.linalg.eigh(rest @ rest.T)
        kept = float(values[-rank:].clamp_min(0).sum())
        error = math.sqrt(max(0.0, total - kept))
        if error >= before * (1 - HELPED) or error <= 1e-6 * math.sqrt(total):
            break
        before = error
        guess = _orthonormal(rest.T.float())
    top = vectors[:, -rank:].flip(1)
    S = values[-rank:].flip(0).clamp_min(0).sqrt()
    keep = S.square() > NOISE * float(values[-1])
    top, S = top[:, keep], S[keep]
    return _balanced(Q.double() @ top, S, (top.T @ rest) / S.unsqueeze(1), total)


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
    basis: Tensor = torch.linalg.qr(matrix.double()).Q
    return basis.float()


def _energy(matrix: Tensor) -> float:
    """‖M‖², a band of rows at a time, the bands summed in float64."""
    return sum(
        float(torch.linalg.vector_norm(matrix[start : start + 16])) ** 2 for start in range(0, matrix.shape[0], 16)
    )


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R with RᵀR = gram, and the R⁻¹ that maps back (zero for directions that are rounding)."""
    values, vectors = torch.linalg.eigh(gram)
    keep = values > NOISE * values[-1].clamp_min(0)
    root = values[keep].sqrt()
    return (vectors[:, keep] * root).T, vectors[:, keep] / root


def _leading(U: Tensor, S: Tensor, Vt: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    count = min(rank, int((S[:1] * math.sqrt(NOISE) < S).sum())) if len(S) else 0
    return U[:, :count], S[:count], Vt[:count]


def _balanced(U: Tensor, S: Tensor, Vt: Tensor, total: float) -> Factors:
    """B = U·√S and A = √S·Vᵀ in float32."""
    root = S.sqrt()
    delta = LowRank((U * root).float().contiguous(), (root.unsqueeze(1) * Vt).float().contiguous())
    return Factors(delta, kept=float(S.square().sum()), total=total)
