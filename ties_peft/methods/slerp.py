"""Spherical interpolation between two adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Slerp(Method):
    """Interpolate spherically between the task vectors of two adapters, for each module.

        τ = ((1 − t)·‖τ₁‖ + t·‖τ₂‖) · (sin((1 − t)·θ)·û₁ + sin(t·θ)·û₂) / sin θ     (form even)
        τ = (sin((1 − t)·θ)·τ₁ + sin(t·θ)·τ₂) / sin θ                               (form mergekit)

    û are the unit vectors and θ is the angle between them. If they are colinear, τ is (1 − t)·τ₁ + t·τ₂. Both forms are a
    weighted sum, hence exact at rank r₁ + r₂, and need inner products alone.

    The forms agree if the norms are equal. If they are not, `even` interpolates the angle and the norm linearly in t, while
    the direction of `mergekit` is closer to that of the longer vector: at t = ½ and norms 1 : 6, two orthogonal vectors
    give one at 9.5° from the longer, where `even` gives 45°.

    If t is not set, it follows from the weights. For `even`, t = |w₂| / (|w₁| + |w₂|), a negative weight negates its task
    vector, and (1, 3) and (2, 6) mean the same. For `mergekit`, t = w₂ / (w₁ + w₂), or ½ if the weights sum to 0; a
    negative weight does not negate, but takes t out of [0, 1] and the result beyond one of the vectors. If t is set,
    weights multiply the task vectors first, as in every method. For a module that only one of the two has, the other
    vector is zero and t is that of the weights; zero counts as colinear for `even`, as orthogonal for `mergekit`.

    Law: t = 0 gives the first, t = 1 the second; the result of two vectors of equal norm has that norm; exchanging the
        two and t for 1 − t changes nothing; one adapter with a positive weight comes back unchanged.
    Source: Shoemake, Animating Rotation with Quaternion Curves, SIGGRAPH 1985; on models, mergekit's
        `slerp` and `nuslerp` (Goddard et al., 2024, arXiv 2403.13257). The former interpolates between whole models,
        which are so close to each other that it is nearly `average`; the latter, with a base model, between task vectors,
        which is the form `mergekit`. The form `even` is our own.
    """

    name = "slerp"
    source = "Shoemake, SIGGRAPH 1985; mergekit, arXiv 2403.13257"

    t: float | None = Field(None, ge=0, le=1, description="0: the first adapter, 1: the second; none: by the weights")
    form: Literal["even", "mergekit"] = Field(
        "even", description="treatment of unequal norms and negative weights: linear in t, or as in mergekit's nuslerp"
    )

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Compute two coefficients from a 2 × 2 Gram matrix."""
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
        """Return true: the result is a weighted sum."""
        return True

    def check(self, weights: Sequence[float], space: str) -> str | None:
        """Refuse more than two adapters."""
        return f"it is for two adapters; these are {len(weights)}. Use karcher" if len(weights) > 2 else None


MIN_SINE = 1e-4  # sin θ; below it θ is 0 or π but for the rounding of factors in float32
MIN_WEIGHT_SUM = 1e-6  # of signed weights; below it t is ½, as in mergekit


def _coefficients(t: float, norms: Sequence[float], inner: float, even: bool) -> tuple[float, float]:
    """Return the coefficients of two vectors, given their norms and their inner product."""
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
