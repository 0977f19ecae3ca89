"""Merge A and B separately, as PEFT's plain `ties` does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ..task_vectors.delta import Delta, Dense, LowRank
from ..task_vectors.factorise import Factors, Run, compress
from .base import Encoding, Space


class FactorsEncoding(Encoding):
    """Hold two parts, ±√|c|·A and √|c|·B with c = w·s."""

    def __init__(self, deltas: Sequence[Delta]) -> None:
        self.deltas = deltas
        self.parts = [_split(delta, 1.0) for delta in deltas]

    def weighted(self, place: int, weight: float) -> tuple[Delta, ...]:
        """Return A and B with the weight divided evenly between them, its sign on A."""
        return _split(self.deltas[place], weight)

    def weights(self, weight: float) -> tuple[float, ...]:
        """Return √|w| for each factor, so that a single adapter is unchanged."""
        root = math.sqrt(abs(weight))
        return root, root

    def decode(self, merged: Sequence[Delta], rank: int | None, run: Run = map) -> Factors:
        """Return the product of the merged factors."""
        product = LowRank(merged[1].dense(), merged[0].dense())
        return compress(product, product.rank if rank is None else rank)


class FactorsSpace(Space):
    """Trim, elect and merge A and B separately; kept for compatibility.

    The merged product has cross terms: with masks Mᵢ for A and Nᵢ for B it is a mean over pairs of (Nᵢ∘Bᵢ)·(Mⱼ∘Aⱼ), of
    which only those with i = j belong to an adapter. It also depends on how each adapter is factored: (B·G, G⁻¹·A) is
    the same adapter and gives another result.

    Law: with equal lora scalings and unit weights it equals PEFT's `ties`.
    """

    name = "factors"
    scopes = ("module",)
    kinds = ("lora",)

    def encode(self, deltas: Sequence[Delta], rank: int | None = None) -> Encoding:
        """Return A and B of each task vector."""
        return FactorsEncoding(deltas)

    def check(self, ranks: Mapping[str, Sequence[int]]) -> str | None:
        """Return what is wrong if the ranks of a module differ."""
        mixed = {name: sorted(set(found)) for name, found in ranks.items() if len(set(found)) > 1}
        if not mixed:
            return None
        name, found = next(iter(mixed.items()))
        return (
            f"it merges A with A and B with B, which needs equal ranks; module '{name}' has {found} "
            f"({len(mixed)} such modules). Use space 'delta'"
        )


def _split(delta: Delta, weight: float) -> tuple[Delta, ...]:
    """Return A and B with c = w·s divided evenly between them, its sign on A; equal c give equal parts."""
    if not isinstance(delta, LowRank):
        raise TypeError("space 'factors' is for LoRA")
    c = weight * delta.scaling
    root = math.sqrt(abs(c))
    return Dense(delta.A * math.copysign(root, c)), Dense(delta.B * (root / delta.scaling if delta.scaling else 0.0))
