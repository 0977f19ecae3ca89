"""Spherical interpolation between two adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from ..delta import Delta
from .base import Method, TaskVectors


class Slerp(Method):
    """Turn the direction of one adapter's task vector into that of another, module by module.

        τ = ((1 − t)·‖τ₁‖ + t·‖τ₂‖) · (sin((1 − t)·θ)·û₁ + sin(t·θ)·û₂) / sin θ

    with û the unit vectors and θ the angle between them. Where they are colinear, or one is zero, τ is
    (1 − t)·τ₁ + t·τ₂. It is a weighted sum, hence exact at rank r₁ + r₂, and found from inner products
    alone.

    Without t, the weights say how far: t = |w₂| / (|w₁| + |w₂|), their signs negate, and (1, 3) and (2, 6)
    mean the same. With t, weights multiply the task vectors first, as everywhere. A module that only one
    of the two has is met by zero, at the t that the weights give.

    Law: t = 0 gives the first, t = 1 the second; task vectors of equal norm keep it; exchanging the two
        and t for 1 − t changes nothing; one adapter alone comes back unchanged.
    Source: Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985; on models, mergekit's
        `slerp` and `nuslerp` (Goddard et al., 2024, arXiv 2403.13257), of which the first turns weights
        and the second, as here, what was added to a base. Both put the two sines on vectors of their own
        lengths: equal to this for equal norms; for unequal ones their length does not go from one to the
        other evenly, as it does here.
    """

    name: ClassVar[str] = "slerp"
    source: ClassVar[str] = "Shoemake, SIGGRAPH 1985; mergekit, arXiv 2403.13257"
    ordered: ClassVar[bool] = True

    t: float | None = Field(None, ge=0, le=1, description="0 is the first adapter, 1 the second; none: by the weights")

    def merge(self, tasks: TaskVectors) -> Delta:
        """Two coefficients, from a 2 × 2 Gram matrix."""
        weights = [abs(weight) for weight in tasks.weights]
        loads = weights if self.t is None else [1.0] * len(weights)
        if len(tasks) == 1:
            return tasks.sum(weights[0] / tasks.total_heft / loads[0])
        gram = tasks.gram()
        first, second = (float(gram[i, i]) ** 0.5 / loads[i] for i in (0, 1))
        inner = float(gram[0, 1]) / (loads[0] * loads[1])
        mixed = _turned(weights[1] / sum(weights) if self.t is None else self.t, first, second, inner)
        return tasks.sum([part / load for part, load in zip(mixed, loads, strict=True)])

    def linear(self, adapters: int) -> bool:
        """Always."""
        return True

    def check(self, weights: Sequence[float], space: str) -> str | None:
        """An angle lies between two."""
        return f"it turns one adapter into another; these are {len(weights)}. Use karcher" if len(weights) > 2 else None


COLINEAR = 1e-4  # sin θ; below it the two sines are the rounding of factors in float32


def _turned(turn: float, first: float, second: float, inner: float) -> tuple[float, float]:
    """The coefficients of two vectors, given their norms and their inner product."""
    angle = math.acos(max(-1.0, min(1.0, inner / (first * second)))) if first * second > 0 else 0.0
    if math.sin(angle) < COLINEAR:
        return 1 - turn, turn
    length = ((1 - turn) * first + turn * second) / math.sin(angle)
    return length * math.sin((1 - turn) * angle) / first, length * math.sin(turn * angle) / second
