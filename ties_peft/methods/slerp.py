"""Spherical interpolation between two adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Slerp(Method):
    """Turn the direction of one adapter's task vector into that of another, module by module.

        τ = ((1 − t)·‖τ₁‖ + t·‖τ₂‖) · (sin((1 − t)·θ)·û₁ + sin(t·θ)·û₂) / sin θ     (form even)
        τ = (sin((1 − t)·θ)·τ₁ + sin(t·θ)·τ₂) / sin θ                               (form mergekit)

    with û the unit vectors and θ the angle between them. Where they are colinear, τ is (1 − t)·τ₁ + t·τ₂. Both forms
    are a weighted sum, hence exact at rank r₁ + r₂, and found from inner products alone.

    The forms agree where the norms are equal. Where they are not, `even` turns evenly from one direction to the
    other, and the length goes evenly from one norm to the other; `mergekit` is drawn to the direction of the longer
    vector: at t = ½ and norms 1 : 6, two vectors at right angles give one that is 9.5° from the longer, where `even`
    has 45°.

    Without t, the weights say how far. With `even` t = |w₂| / (|w₁| + |w₂|), their signs negate, and (1, 3) and (2, 6)
    mean the same. With `mergekit` t = w₂ / (w₁ + w₂), and ½ where the weights sum to 0: a negative weight negates
    nothing, but takes t out of [0, 1] and the result beyond one of the vectors. With t, weights multiply the task
    vectors first, as everywhere. A module that only one of the two has is met by zero, at the t that the weights
    give: colinear for `even`, at right angles for `mergekit`.

    Law: t = 0 gives the first, t = 1 the second; task vectors of equal norm keep it; exchanging the two
        and t for 1 − t changes nothing; one adapter alone with a positive weight comes back unchanged.
    Source: Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985; on models, mergekit's
        `slerp` and `nuslerp` (Goddard et al., 2024, arXiv 2403.13257). The former turns whole weights, which lie
        so close to each other that it nearly is `average`; the latter, given a base model, what was added to
        the base, and is the form `mergekit`. The form `even` is our own.
    """

    name: ClassVar[str] = "slerp"
    source: ClassVar[str] = "Shoemake, SIGGRAPH 1985; mergekit, arXiv 2403.13257"

    t: float | None = Field(None, ge=0, le=1, description="0 is the first adapter, 1 the second; none: by the weights")
    form: Literal["even", "mergekit"] = Field(
        "even", description="how unequal norms and negative weights count: evenly, or as in mergekit's nuslerp"
    )

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Two coefficients, from a 2 × 2 Gram matrix."""
        even = self.form == "even"
        weights = [abs(weight) if even else weight for weight in task_vectors.weights]
        total = task_vectors.total_magnitude if even else task_vectors.total_weight
        shares = [weight / total if abs(total) > MIN_WEIGHT_SUM else 0.5 for weight in weights]
        divisors = weights if self.t is None else [1.0] * len(weights)
        if len(task_vectors) == 1:
            return task_vectors.sum((shares[0] if even else math.sin(shares[0] * math.pi / 2)) / divisors[0])
        gram = task_vectors.gram()
        norms = [float(gram[i, i]) ** 0.5 / abs(divisors[i]) for i in (0, 1)]
        inner = float(gram[0, 1]) / (divisors[0] * divisors[1])
        first, second = _coefficients(shares[1] if self.t is None else self.t, norms, inner, even)
        return task_vectors.sum([first / divisors[0], second / divisors[1]])

    def linear(self, adapters: int) -> bool:
        """Always."""
        return True

    def check(self, weights: Sequence[float], space: str) -> str | None:
        """An angle lies between two."""
        return f"it turns one adapter into another; these are {len(weights)}. Use karcher" if len(weights) > 2 else None


MIN_SINE = 1e-4  # sin θ; below it the two sines are the rounding of factors in float32
MIN_WEIGHT_SUM = 1e-6  # of signed weights: below it they give no share, in mergekit too


def _coefficients(t: float, norms: Sequence[float], inner: float, even: bool) -> tuple[float, float]:
    """The coefficients of two vectors, given their norms and their inner product."""
    first, second = norms
    of_zero = 0.0 if even else math.pi / 2
    angle = math.acos(max(-1.0, min(1.0, inner / (first * second)))) if first * second > 0 else of_zero
    if math.sin(angle) < MIN_SINE:
        return 1 - t, t
    sines = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    if not even:
        return sines
    length = (1 - t) * first + t * second
    return length * sines[0] / first, length * sines[1] / second
