"""Factor space: A and B merged apart, as PEFT's plain `ties` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from ..delta import Delta, Dense, LowRank
from ..trim import Scope
from .base import Frame, Space


class FactorsFrame(Frame):
    """√|c|·B and sign(c)·√|c|·A with c = w·s, each a part of its own."""

    def encode(self, delta: Delta, weight: float) -> tuple[Delta, ...]:
        """(A, B) with the weight and the lora scaling split evenly, their signs on A."""
        if not isinstance(delta, LowRank):
            raise TypeError("space 'factors' is for LoRA")
        held = math.copysign(math.sqrt(abs(delta.scaling)), delta.scaling) or 1.0  # B holds s: give √s of it to A
        root = math.sqrt(abs(weight))
        return Dense(delta.A * (held * math.copysign(root, weight))), Dense(delta.B * (root / held))

    def decode(self, merged: Sequence[Delta]) -> Delta:
        """The product of the merged factors."""
        return LowRank(merged[1].dense(), merged[0].dense())

    def weights(self, weight: float) -> tuple[float, ...]:
        """Each factor carries √|w|, so that one adapter comes back unchanged."""
        root = math.sqrt(abs(weight))
        return root, root


class FactorsSpace(Space):
    """A and B each trimmed, elected and merged on their own; kept for compatibility.

    The merged product holds cross terms: with masks Mᵢ for A and Nᵢ for B it is a mean over pairs of
    (Nᵢ∘Bᵢ)·(Mⱼ∘Aⱼ), of which only i = j is anybody's task vector. It also depends on how each adapter
    happens to be factored: (B·G, G⁻¹·A) is the same adapter and gives another result. On real tasks it
    is level with the plain average, about seven points under space `delta`.

    Law: with equal lora scalings and unit weights it equals PEFT's `ties`.
    """

    name: ClassVar[str] = "factors"
    scopes: ClassVar[tuple[Scope, ...]] = ("module",)
    kinds: ClassVar[tuple[str, ...]] = ("lora",)

    def check(self, ranks: Sequence[int]) -> str | None:
        """All ranks must be equal."""
        found = sorted(set(ranks))
        if len(found) < 2:
            return None
        return (
            f"space 'factors' merges A with A and B with B, which needs equal ranks; found {found}. Use space 'delta'"
        )

    def frame(self, deltas: Sequence[Delta]) -> Frame:
        """The same for every module."""
        return FactorsFrame()
