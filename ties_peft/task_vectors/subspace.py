"""Find orthonormal bases of the space that the factors of many task vectors span, the largest directions first.

The basis of K columns of length n comes from the Gram matrix of the columns, (K, K), if they are few; from that of the
rows, (n, n), if there are more columns than rows; and if both numbers are large, from a sketch of the MAX_GRAM_SIDE
leading directions, which is refined. Only the sketch loses energy, and the report says how much. No array of K × K is
made beyond MAX_GRAM_SIDE.

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
SQUARE = 4096  # length n up to which the Gram matrix of the rows is made
STRIP = 256  # columns that are computed with at a time
ROUNDS = 3  # that refine a sketch; on a flat spectrum it then loses less than a fifth more than the best basis
ROUNDING = 1e-6  # the share of energy that float32 may lose

Blocks = Callable[[], Iterable[Tensor]]  # returns an iterator over blocks of columns, (n, kᵢ) each, at every call


def directions(gram: Tensor, negligible: float | None = None) -> tuple[Tensor, Tensor]:
    """Return the squared singular values of a matrix M and its right singular vectors, the largest first, given MᵀM.

    Args:
        gram: MᵀM, (K, K), float64.
        negligible: the share of the largest singular value below which a direction is rounding; by default that of K
            columns in float32. Adapters that share directions share them to rounding only, and a basis must not include
            the difference.
    Returns: (k,) and (K, k). k is at least 1: M = 0 has one vector of zeros.
    """
    share = FLOAT32 * len(gram) if negligible is None else negligible
    values, vectors = eigh(gram)
    keep = values > share**2 * values[-1].clamp_min(0)
    if not keep.any():
        return values.new_ones(1), vectors.new_zeros(len(gram), 1)
    return values[keep].flip(0), vectors[:, keep].flip(1)


def orthonormal(gram: Tensor, negligible: float | None = None) -> Tensor:
    """Return X, (K, k), such that M·X has the left singular vectors of M as columns; see `directions`."""
    values, vectors = directions(gram, negligible)
    return vectors / values.sqrt()


def canonical(span: Span) -> list[tuple[Tensor, Tensor]]:
    """Return, for each task vector, X (rᵢ, k) and Y (k, rᵢ) with Bᵢ·X = U·√S and Y·Aᵢ = √S·Vᵀ of its decomposition.

    A task vector of zeros has one direction of zeros.

    Law: the products depend on the task vector alone, not on its factors, up to the sign of each direction.
    """
    return [_pair(span.left[at, at], span.right[at, at]) for at in span.ranges]


def canonical_one(delta: LowRank) -> tuple[Tensor, Tensor]:
    """Return X and Y, as `canonical` does, for one task vector."""
    B, A = delta.B.double(), delta.A.double()
    return _pair(B.T @ B, A @ A.T)


def _pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    X, Y = decompose(left, right).balanced()
    return (X, Y) if len(Y) else (X.new_zeros(len(X), 1), Y.new_zeros(1, len(X)))


def has_many_columns(deltas: Sequence[Delta]) -> bool:
    """Return whether task vectors have too many columns together for a Gram matrix of them."""
    return not gram_is_cheaper(sum(delta.rank for delta in deltas), min(deltas[0].shape))


def pack_factors(pairs: Iterable[tuple[Tensor, Tensor]], numbers: int) -> list[LowRank]:
    """Return pairs of factors as float32 in one piece of memory, so that temporary arrays do not fragment it.

    Args:
        pairs: (k₁, rᵢ) and (rᵢ, k₂).
        numbers: the entries of all of them together.
    """
    found: list[LowRank] = []
    memory: Tensor | None = None
    for pair in pairs:
        memory = pair[0].new_empty(numbers, dtype=torch.float32) if memory is None else memory
        sizes = [side.numel() for side in pair]
        left, right, memory = torch.split(memory, [*sizes, len(memory) - sum(sizes)])
        found.append(LowRank(left.view(pair[0].shape).copy_(pair[0]), right.view(pair[1].shape).copy_(pair[1])))
    return found


def lost_energy(deltas: Iterable[Delta], coordinates: Iterable[Delta]) -> float:
    """Return the share of the energy of task vectors that their coordinates lack, in [0, 1]; 0 if it is rounding."""
    whole, kept = (sum(inner(delta, delta) for delta in some) for some in (deltas, coordinates))
    share = 1 - kept / whole if whole else 0.0
    return share if share > ROUNDING else 0.0


class ExplicitBases:
    """Replace a `Span` if the bases are held: a product with them is in the module's coordinates already."""

    def columns(self, mix: Tensor) -> Tensor:
        """Return the columns, (out, r), float32."""
        return mix.float()

    def rows(self, mix: Tensor) -> Tensor:
        """Return the rows, (r, in), float32."""
        return mix.float()


def basis(blocks: Blocks, negligible: float | None = None) -> tuple[Tensor, bool]:
    """Return an orthonormal basis of columns, (n, k), float64, largest first; and whether it is complete.

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
        return directions(_row_gram(blocks, length), negligible)[1], True
    return _sketch(blocks, length), False


def coordinates(vectors: Tensor, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield Qᵀ·C for every block of columns C, (k, kᵢ), computed for many blocks at a time; Q is (n, k)."""
    for batch in _batches(blocks):
        yield from torch.split(vectors.T @ torch.cat(batch, 1), [block.shape[1] for block in batch], dim=1)


def _row_gram(blocks: Blocks, length: int) -> Tensor:
    """Return Σ C·Cᵀ over all blocks C, (n, n)."""
    total: Tensor | None = None
    for strip in _strips(blocks):
        total = strip.new_zeros(length, length) if total is None else total
        total.addmm_(strip, strip.T)
    assert total is not None
    return total


def _sketch(blocks: Blocks, length: int) -> Tensor:
    """Return nearly the MAX_GRAM_SIDE leading directions: random mixtures, refined by subspace iteration."""
    draw = torch.Generator().manual_seed(0)
    sketch: Tensor | None = None
    for strip in _strips(blocks):
        mix = torch.randn(strip.shape[1], MAX_GRAM_SIDE, generator=draw).to(strip)
        sketch = strip @ mix if sketch is None else sketch.addmm_(strip, mix)
    assert sketch is not None
    for _ in range(ROUNDS):
        Q = torch.linalg.qr(sketch).Q
        sketch = torch.zeros_like(sketch[:, : Q.shape[1]])
        for strip in _strips(blocks):
            sketch.addmm_(strip, strip.T @ Q)
    Q = torch.linalg.qr(sketch).Q
    rotation = directions(_row_gram(lambda: (Q.T @ strip for strip in _strips(blocks)), Q.shape[1]))[1]
    leading: Tensor = Q @ rotation
    return leading


def _batches(blocks: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the blocks in float64, about STRIP columns at a time."""
    waiting: list[Tensor] = []
    for block in blocks:
        waiting.append(block.double())
        if sum(part.shape[1] for part in waiting) >= STRIP:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _strips(blocks: Blocks) -> Iterator[Tensor]:
    """Return an iterator over all columns, about STRIP at a time."""
    return (torch.cat(batch, 1) for batch in _batches(blocks()))


def products(deltas: Sequence[LowRank]) -> Tensor:
    """Return ⟨Δᵢ, Δⱼ⟩, (N, N), float64: sums over blocks of BᵀB ∘ A·Aᵀ, of which a few are computed at a time."""
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
    """Return ranges of successive task vectors that have about STRIP columns together."""
    edges, width = [0], 0
    for place, rank in enumerate(ranks):
        width += rank
        if width >= STRIP or place == len(ranks) - 1:
            edges.append(place + 1)
            width = 0
    return [range(start, stop) for start, stop in pairwise(edges)]


def _side_by_side(deltas: Sequence[LowRank], places: range) -> tuple[Tensor, Tensor, Tensor]:
    """Return B and A of some task vectors, and a matrix that assigns their columns to them, (Σr, N), float64."""
    some = [deltas[place] for place in places]
    B, A = torch.cat([d.B.double() for d in some], 1), torch.cat([d.A.double() for d in some], 0)
    owner = torch.block_diag(*(B.new_ones(delta.rank, 1) for delta in some))  # type: ignore[no-untyped-call]
    return B, A, owner
