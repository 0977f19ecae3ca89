"""Basis: what the factors of many task vectors span together, in orthonormal directions, the largest first.

Of K columns of length n the directions come from the Gram matrix of the columns, (K, K), where they are
few; from that of the rows, (n, n), where they are more than their own length; and where both are large,
from the leading MAX_GRAM_SIDE of them, found by a sketch and refined. Only that last road loses anything, and
what it loses is measured and reported. No array is of K × K beyond MAX_GRAM_SIDE.

Source of the sketch: Halko, Martinsson and Tropp (2011), algorithm 4.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .delta import Delta, LowRank, Span, eigh, gram, inner
from .factorise import MAX_GRAM_SIDE, decompose, gram_is_cheaper

FLOAT32 = torch.finfo(torch.float32).eps
SQUARE = 4096  # lengths up to which the Gram matrix of the rows is made
STRIP = 256  # columns that are worked on at a time
ROUNDS = 3  # of a sketch, beyond its first look; of a flat spectrum it then loses under a fifth more than it must
ROUNDING = 1e-6  # a share of energy that float32 may lose

Blocks = Callable[[], Iterable[Tensor]]  # columns side by side, (n, kᵢ) each, as often as one asks


def directions(gram: Tensor, negligible: float | None = None) -> tuple[Tensor, Tensor]:
    """The squared singular values of a matrix M and its right singular vectors, the largest first, given MᵀM.

    Args:
        gram: MᵀM, (K, K), float64.
        negligible: the share of the largest singular value under which a direction is rounding; by
            default that of K columns in float32. Adapters that share directions do so to rounding
            only, and a basis that held the difference would have coordinates nobody is in.
    Returns: (k,) and (K, k). k is at least 1, so that there is a space at all: M = 0 has one vector of zeros.
    """
    share = FLOAT32 * len(gram) if negligible is None else negligible
    values, vectors = eigh(gram)
    there = values > share**2 * values[-1].clamp_min(0)
    if not there.any():
        return values.new_ones(1), vectors.new_zeros(len(gram), 1)
    return values[there].flip(0), vectors[:, there].flip(1)


def orthonormal(gram: Tensor, negligible: float | None = None) -> Tensor:
    """X, (K, k), such that M·X holds the left singular vectors of M; see `directions`."""
    values, vectors = directions(gram, negligible)
    return vectors / values.sqrt()


def canonical(span: Span) -> list[tuple[Tensor, Tensor]]:
    """For each task vector X, (rᵢ, k), and Y, (k, rᵢ): Bᵢ·X = U·√S and Y·Aᵢ = √S·Vᵀ of its own decomposition.

    A task vector of zeros has one direction of zeros.

    Law: the products depend on the task vector alone, not on its factors, up to the sign of each direction.
    """
    return [_pair(span.left[at, at], span.right[at, at]) for at in span.ranges]


def canonical_one(delta: LowRank) -> tuple[Tensor, Tensor]:
    """As `canonical`, of one task vector alone."""
    B, A = delta.B.double(), delta.A.double()
    return _pair(B.T @ B, A @ A.T)


def _pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    X, Y = decompose(left, right).balanced()
    return (X, Y) if len(Y) else (X.new_zeros(len(X), 1), Y.new_zeros(1, len(X)))


def has_many_columns(deltas: Sequence[Delta]) -> bool:
    """Whether task vectors have more columns together than a Gram matrix of them is worth, or may have."""
    return not gram_is_cheaper(sum(delta.rank for delta in deltas), min(deltas[0].shape))


def pack_factors(pairs: Iterable[tuple[Tensor, Tensor]], numbers: int) -> list[LowRank]:
    """Pairs of factors as float32 in one piece of memory, where what made them leaves no holes between them.

    Args:
        pairs: (k₁, rᵢ) and (rᵢ, k₂).
        numbers: how many all of them hold.
    """
    found: list[LowRank] = []
    room: Tensor | None = None
    for pair in pairs:
        room = pair[0].new_empty(numbers, dtype=torch.float32) if room is None else room
        sizes = [side.numel() for side in pair]
        left, right, room = torch.split(room, [*sizes, len(room) - sum(sizes)])
        found.append(LowRank(left.view(pair[0].shape).copy_(pair[0]), right.view(pair[1].shape).copy_(pair[1])))
    return found


def lost_energy(deltas: Iterable[Delta], seen: Iterable[Delta]) -> float:
    """The share of the energy of task vectors that is not in what a basis shows of them, in [0, 1]; 0 if it is rounding."""
    whole, there = (sum(inner(delta, delta) for delta in some) for some in (deltas, seen))
    share = 1 - there / whole if whole else 0.0
    return share if share > ROUNDING else 0.0


class ExplicitBases:
    """Stands for a `Span` where bases are held as they are: what these are multiplied with is brought back by that."""

    def columns(self, mix: Tensor) -> Tensor:
        """The columns, (out, r), float32."""
        return mix.float()

    def rows(self, mix: Tensor) -> Tensor:
        """The rows, (r, in), float32."""
        return mix.float()


def basis(blocks: Blocks, negligible: float | None = None) -> tuple[Tensor, bool]:
    """Orthonormal directions of what columns span, (n, k), float64, the largest first; and whether they are all.

    Args:
        blocks: the columns.
        negligible: as in `directions`.
    """
    sizes = [tuple(block.shape) for block in blocks()]
    length, columns = sizes[0][0], sum(size[1] for size in sizes)
    if columns <= MAX_GRAM_SIDE and (columns <= length or length > SQUARE):
        held = [block.float() for block in blocks()]
        mix = torch.split(orthonormal(gram(held), negligible), [size[1] for size in sizes])
        total = held[0].double() @ mix[0]
        for block, part in zip(held[1:], mix[1:], strict=True):
            total.addmm_(block.double(), part)
        return total, True
    if length <= SQUARE:
        return directions(_spread(blocks, length), negligible)[1], True
    return _sketched(blocks, length), False


def coordinates(vectors: Tensor, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Qᵀ·C of every block of columns C, (k, kᵢ), many of them in one product; Q is (n, k)."""
    for batch in _batches(blocks):
        yield from torch.split(vectors.T @ torch.cat(batch, 1), [block.shape[1] for block in batch], dim=1)


def _spread(blocks: Blocks, length: int) -> Tensor:
    """Σ C·Cᵀ over all blocks C, (n, n)."""
    total: Tensor | None = None
    for strip in _strips(blocks):
        total = strip.new_zeros(length, length) if total is None else total
        total.addmm_(strip, strip.T)
    assert total is not None
    return total


def _sketched(blocks: Blocks, length: int) -> Tensor:
    """The leading MAX_GRAM_SIDE directions, nearly: a random look at the columns, and a few more along what it saw."""
    draw = torch.Generator().manual_seed(0)
    seen: Tensor | None = None
    for strip in _strips(blocks):
        mix = torch.randn(strip.shape[1], MAX_GRAM_SIDE, generator=draw).to(strip)
        seen = strip @ mix if seen is None else seen.addmm_(strip, mix)
    assert seen is not None
    for _ in range(ROUNDS):
        Q = torch.linalg.qr(seen).Q
        seen = torch.zeros_like(seen[:, : Q.shape[1]])
        for strip in _strips(blocks):
            seen.addmm_(strip, strip.T @ Q)
    Q = torch.linalg.qr(seen).Q
    turn = directions(_spread(lambda: (Q.T @ strip for strip in _strips(blocks)), Q.shape[1]))[1]
    leading: Tensor = Q @ turn
    return leading


def _batches(blocks: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The same blocks, float64, of some STRIP columns at a time."""
    waiting: list[Tensor] = []
    for block in blocks:
        waiting.append(block.double())
        if sum(part.shape[1] for part in waiting) >= STRIP:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _strips(blocks: Blocks) -> Iterator[Tensor]:
    """All columns, some STRIP of them at a time."""
    return (torch.cat(batch, 1) for batch in _batches(blocks()))


def products(deltas: Sequence[LowRank]) -> Tensor:
    """⟨Δᵢ, Δⱼ⟩, (N, N), float64: sums over blocks of BᵀB ∘ A·Aᵀ, of which a strip is there at a time."""
    found = torch.zeros(len(deltas), len(deltas), dtype=torch.float64, device=deltas[0].B.device)
    groups = _groups([delta.rank for delta in deltas])
    for number, mine in enumerate(groups):
        B, A, owner = _side_by_side(deltas, mine)
        for other in groups[: number + 1]:
            B2, A2, owner2 = _side_by_side(deltas, other)
            block = owner.T @ ((B.T @ B2) * (A @ A2.T)) @ owner2
            found[mine.start : mine.stop, other.start : other.stop] = block
            found[other.start : other.stop, mine.start : mine.stop] = block.T
    return found


def _groups(ranks: Sequence[int]) -> list[range]:
    """Runs of task vectors, of about STRIP columns each."""
    edges, width = [0], 0
    for place, rank in enumerate(ranks):
        width += rank
        if width >= STRIP or place == len(ranks) - 1:
            edges.append(place + 1)
            width = 0
    return [range(start, stop) for start, stop in pairwise(edges)]


def _side_by_side(deltas: Sequence[LowRank], places: range) -> tuple[Tensor, Tensor, Tensor]:
    """B, A and whose column is whose, (Σr, N), of some of them, float64."""
    some = [deltas[place] for place in places]
    B, A = torch.cat([d.B.double() for d in some], 1), torch.cat([d.A.double() for d in some], 0)
    owner = torch.block_diag(*(B.new_ones(delta.rank, 1) for delta in some))  # type: ignore[no-untyped-call]
    return B, A, owner
