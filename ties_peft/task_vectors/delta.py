"""Represent the task vector of one adapter on one module, factored or dense.

A LoRA's task vector is Δ = s·B·A, of shape (out, in); it is held in factors, with the lora scaling s multiplied into B.
An (IA)³ task vector is l − 1, of shape (k,), and is dense. Both are float32, and both are read some rows at a time:
`rows(start, stop)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

CPU_EIGH_SIDE = 256  # up to here a matrix on another device is decomposed on the CPU; estimated, not measured
SAMPLE_SIDE = 32  # largest number of rows and columns of a block of a sample
GRAM_ROWS = 1024  # rows that are converted to float64 at a time for a Gram matrix


@dataclass(frozen=True)
class LowRank:
    """Hold Δ = B·A in factors.

    Attributes:
        B: (out, r), float32, the lora scaling multiplied in.
        A: (r, in), float32.
        scaling: the lora scaling that B contains.
    """

    B: Tensor
    A: Tensor
    scaling: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """r, the number of columns of B."""
        return self.B.shape[1]

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return rows start…stop of Δ, (stop − start, in), written into `out` if it is given.

        The same range gives the same bits each time, so that a threshold found in one pass is valid in the next.
        """
        return torch.mm(self.B[start:stop], self.A, out=out)

    def dense(self) -> Tensor:
        """Return Δ multiplied out, (out, in), float32."""
        return self.B @ self.A

    def scaled(self, factor: float) -> LowRank:
        """Return factor · Δ, with a new B."""
        return self if factor == 1 else LowRank(self.B * factor, self.A, self.scaling)

    def sample(self, count: int, draw: np.random.Generator) -> Tensor:
        """Return about `count` entries, at least one, flat: small blocks at random rows and columns.

        Every entry is equally likely. All rows, and all columns, are drawn once before any is drawn again, so that a
        share of the sample estimates that of all entries at least as well as independent draws would.
        """
        rows, columns = self.shape
        side = min(SAMPLE_SIDE, 1 << max(1, count // max(rows, columns)).bit_length() - 1)
        blocks = -(-count // side**2)
        B = self.B.index_select(0, _permuted_indices(rows, blocks * side, draw).to(self.B.device))
        A = self.A.index_select(1, _permuted_indices(columns, blocks * side, draw).to(self.A.device))
        return torch.bmm(B.view(blocks, side, -1), A.view(-1, blocks, side).transpose(0, 1)).view(-1)

    def to(self, device: torch.device) -> LowRank:
        """Return the same task vector on another device."""
        return LowRank(self.B.to(device), self.A.to(device), self.scaling)


@dataclass(frozen=True)
class Dense:
    """Hold a task vector, or a part of one, as it is: l − 1 of (IA)³, or a single factor.

    Attributes:
        values: (k,) or (rows, columns), float32.
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """(k,) or (rows, columns)."""
        return tuple(self.values.shape)

    @property
    def rank(self) -> int:
        """The largest possible rank; 1 for a vector."""
        return 1 if self.values.dim() == 1 else min(self.values.shape)

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return a copy of entries or rows start…stop."""
        part = self.values[start:stop]
        return part.clone() if out is None else out.copy_(part)

    def dense(self) -> Tensor:
        """Return the values."""
        return self.values

    def scaled(self, factor: float) -> Dense:
        """Return factor · values."""
        return self if factor == 1 else Dense(self.values * factor)

    def sample(self, count: int, draw: np.random.Generator) -> Tensor:
        """Return `count` entries, drawn independently."""
        return self.values.reshape(-1)[torch.from_numpy(draw.integers(0, self.values.numel(), count))]

    def to(self, device: torch.device) -> Dense:
        """Return the same task vector on another device."""
        return Dense(self.values.to(device))


@dataclass(frozen=True)
class Mapped:
    """Change the entries of a task vector one by one as they are read, by a random mask for example.

    Attributes:
        source: the task vector that is read.
        change: change(values, start, drawn) returns the changed values of the entries from flat index `start` on. If
            `drawn`, they are a sample, and random numbers of the same distribution suffice.
    """

    source: LowRank | Dense | Mapped
    change: Callable[[Tensor, int, bool], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's shape."""
        return self.source.shape

    @property
    def rank(self) -> int:
        """The source's rank, before the change."""
        return self.source.rank

    def rows(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return rows start…stop of the source, changed."""
        width = math.prod(self.shape[1:])
        return self.change(self.source.rows(start, stop, out), start * width, False)

    def dense(self) -> Tensor:
        """Return all rows."""
        return self.rows(0, self.shape[0])

    def scaled(self, factor: float) -> Mapped:
        """Return factor · the source, changed; the change must commute with scaling."""
        return self if factor == 1 else Mapped(self.source.scaled(factor), self.change)

    def sample(self, count: int, draw: np.random.Generator) -> Tensor:
        """Return about `count` entries of the distribution of those that are read."""
        return self.change(self.source.sample(count, draw), 0, True)

    def to(self, device: torch.device) -> Mapped:
        """Return the same task vector on another device."""
        return Mapped(self.source.to(device), self.change)


Delta = LowRank | Dense | Mapped


def _permuted_indices(length: int, count: int, draw: np.random.Generator) -> Tensor:
    """Return `count` indices: 0, 1, … length − 1 in a random order, then in another one, and so on."""
    orders = draw.permuted(np.tile(np.arange(length), (-(-count // length), 1)), axis=1)
    return torch.from_numpy(orders.reshape(-1)[:count])


def size(delta: Delta) -> int:
    """Return the number of entries of a task vector."""
    return math.prod(delta.shape)


def zero(shape: Sequence[int]) -> Delta:
    """Return a task vector of zeros."""
    if len(shape) == 1:
        return Dense(torch.zeros(shape[0]))
    return LowRank(torch.zeros(shape[0], 1), torch.zeros(1, shape[1]))


def as_factors(delta: Dense) -> LowRank:
    """Return a matrix as factors without rounding: itself and the smaller of the two identities.

    Law: as_factors(d).dense() = d.dense(), to the bit.
    """
    rows, columns = delta.values.shape
    if rows <= columns:
        return LowRank(torch.eye(rows), delta.values)
    return LowRank(delta.values, torch.eye(columns))


def stack(deltas: Sequence[Delta]) -> Delta:
    """Return the exact sum of task vectors: factors side by side (rank Σrᵢ), or values added in order.

    Law: stack(ds).dense() = Σ d.dense().
    """
    factored = [d for d in deltas if isinstance(d, LowRank)]
    if deltas and len(factored) == len(deltas):
        return LowRank(torch.cat([d.B for d in factored], dim=1), torch.cat([d.A for d in factored], dim=0))
    total = torch.zeros_like(deltas[0].dense())
    for delta in deltas:
        total += delta.dense()
    return Dense(total)


def gram(columns: Sequence[Tensor]) -> Tensor:
    """Return XᵀX, (K, K), float64, for the matrix X of all columns, a band of rows at a time.

    Args:
        columns: parts of X, (n, kᵢ) each, float32; Σkᵢ = K.
    """
    width = sum(part.shape[1] for part in columns)
    strip = 48 if width <= 512 else 192  # XᵀX is symmetric: strips that end at the diagonal are half the work
    edges = [(start, min(start + strip, width)) for start in range(0, width, strip)]
    total = torch.zeros(width, width, dtype=torch.float64, device=columns[0].device)
    for start in range(0, columns[0].shape[0], GRAM_ROWS):
        band = _beside([part[start : start + GRAM_ROWS] for part in columns]).double()
        for first, last in edges:
            total[first:last, :last] += band[:, first:last].T @ band[:, :last]
    return total.tril_().add_(total.tril(-1).T)


def eigh(square: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, rising, and eigenvectors of a symmetric matrix; small ones are computed on the CPU."""
    device = square.device
    values, vectors = torch.linalg.eigh(square.cpu() if len(square) <= CPU_EIGH_SIDE else square)
    return values.to(device), vectors.to(device)


def _beside(parts: Sequence[Tensor]) -> Tensor:
    """Return columns side by side; column-major parts stay column-major."""
    if len(parts) == 1:
        return parts[0]
    if all(part.stride(0) == 1 for part in parts):
        return torch.cat([part.T for part in parts]).T
    return torch.cat(list(parts), 1)


class Span:
    """Hold the Gram matrices of factored task vectors, from which small factorisations are computed.

    Attributes:
        deltas: Δᵢ = Bᵢ·Aᵢ, N of them, of one shape; K = Σrᵢ. They are read again where factors are multiplied.
        left, right: BᵀB and A·Aᵀ of [B₁ … B_N] and [A₁; …; A_N], (K, K), float64.
        ranges: for each delta, its range among the K.
    """

    def __init__(self, deltas: Sequence[LowRank]) -> None:
        self.deltas, held = deltas, list(deltas)
        self.left = gram([delta.B for delta in held])
        self.right = gram([delta.A.T for delta in held])
        ends = accumulate((delta.rank for delta in held), initial=0)
        self.ranges = [slice(start, end) for start, end in pairwise(ends)]

    def products(self) -> Tensor:
        """Return ⟨Δᵢ, Δⱼ⟩, (N, N), float64, the sums over blocks of the entrywise product of the Gram matrices."""
        both = self.left * self.right
        return torch.stack([both[:, at].sum(1)[other].sum() for other in self.ranges for at in self.ranges]).view(
            len(self.ranges), -1
        )

    def columns(self, mix: Tensor) -> Tensor:
        """Return [B₁ … B_N]·mix, (out, r), float32, summed in float64; mix is (K, r)."""
        return _mixed((delta.B for delta in self.deltas), mix.T).T.contiguous()

    def rows(self, mix: Tensor) -> Tensor:
        """Return mix·[A₁; …; A_N], (r, in), float32, summed in float64; mix is (r, K)."""
        return _mixed((delta.A.T for delta in self.deltas), mix)


def _mixed(parts: Iterable[Tensor], mix: Tensor) -> Tensor:
    """Return mix·[C₁ … C_N]ᵀ, (r, n), float32, of columns Cᵢ, (n, kᵢ), summed in float64."""
    total, done = mix.new_zeros(1, 1), 0
    for part in parts:
        here = mix[:, done : done + part.shape[1]]
        some = part.double().T
        total = total.addmm_(here, some) if done else here @ some
        done += part.shape[1]
    return total.float()


def inner(first: Delta, second: Delta) -> float:
    """Return ⟨first, second⟩, the sum of the products of entries, accumulated in float64.

    For factors: tr((B₁ᵀB₂)(A₂A₁ᵀ)), r₁·r₂·(out + in) products instead of out·in. For factors and a matrix D:
    the sum of B ∘ (D·Aᵀ), a band of rows at a time.
    """
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        B, A = first.B.double(), first.A.double()
        B2, A2 = (B, A) if second is first else (second.B.double(), second.A.double())
        return float(((B.T @ B2) * (A @ A2.T)).sum())
    if isinstance(first, LowRank) or isinstance(second, LowRank):
        thin, other = (first, second) if isinstance(first, LowRank) else (second, first)
        assert isinstance(thin, LowRank)
        return _inner_by_rows(thin, other)
    return float((first.dense().double() * second.dense().double()).sum())


def _inner_by_rows(thin: LowRank, other: Delta) -> float:
    B, A = thin.B.double(), thin.A.double()
    total = 0.0
    for start in range(0, B.shape[0], GRAM_ROWS):
        stop = min(start + GRAM_ROWS, B.shape[0])
        total += float((B[start:stop] * (other.rows(start, stop).double() @ A.T)).sum())
    return total


def inner_with_each(first: Delta, others: Iterable[Delta]) -> list[float]:
    """Return ⟨first, other⟩ for each of the others; the factors of the first are converted to float64 once."""
    if isinstance(first, LowRank):
        first = LowRank(first.B.double(), first.A.double())
    return [inner(first, other) for other in others]


def distance(first: Delta, second: Delta) -> float:
    """Return ‖first − second‖, the Frobenius norm of the difference, accumulated in float64."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return norm(LowRank(torch.cat([first.B, -second.B], 1), torch.cat([first.A, second.A], 0)))
    return float(torch.linalg.vector_norm(first.dense().double() - second.dense().double()))


def norm(delta: Delta) -> float:
    """Return ‖delta‖, the Frobenius norm, accumulated in float64."""
    if not isinstance(delta, LowRank):
        return float(torch.linalg.vector_norm(delta.dense(), dtype=torch.float64))
    square = inner(delta, delta)
    return 0.0 if square < 0 else math.sqrt(square)  # NaN stays NaN
