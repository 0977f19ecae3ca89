"""The mean of directions on the sphere."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Karcher(Method):
    """The direction nearest to all task vectors along the sphere, at their mean length, module by module.

        u = argmin_{‖u‖ = 1} Σ |wᵢ|·angle(u, wᵢ·τᵢ)²
        τ = Σ ‖wᵢ·τᵢ‖ / Σ |wᵢ| · u

    It is a weighted sum, hence exact at rank Σrᵢ, and found from the Gram matrix alone, by steps along the
    tangent mean from the plain mean of the unit vectors. A plain average of N orthogonal adapters is
    shorter than they are by √N; this is not. An adapter that lacks the module counts in Σ |wᵢ|.

    Law: adapters of one direction give that direction at the mean length; for two with equal weights it
        is slerp at t = ½; the result has the mean norm; weights (2, 1) and (10, 5) mean the same;
        directions that cancel have no mean, and give zero.
    Source: Karcher, Riemannian Center of Mass and Mollifier Smoothing, 1977; as a merge, mergekit's
        `karcher` (Goddard et al., 2024, arXiv 2403.13257), whose numbers of steps and tolerance are the
        defaults here. It turns whole weights with equal weights, and starts from the first where the
        directions cancel; here it is task vectors, weighted, in no order.
    """

    name: ClassVar[str] = "karcher"
    source: ClassVar[str] = "Karcher, 1977; mergekit, arXiv 2403.13257"

    max_iter: int = Field(10, ge=1, description="the most steps to take")
    tol: float = Field(1e-5, gt=0, allow_inf_nan=False, description="the step, in radians, that is the last")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Coefficients from the Gram matrix of the unit vectors."""
        gram, weights = task_vectors.gram(), torch.tensor(task_vectors.weights, dtype=torch.float64).abs()
        norms = gram.diagonal().clamp_min(0).sqrt()
        there = norms > 0
        units = torch.where(there, 1 / torch.where(there, norms, 1.0), 0.0)
        cosines = (gram * units * units.unsqueeze(1)).clamp(-1, 1)
        mean = self._mean(cosines, weights * there / (weights * there).sum().clamp_min(1e-300))
        factors: list[float] = (float(norms.sum()) / task_vectors.total_magnitude * mean * units).tolist()
        return task_vectors.sum(factors)

    def _mean(self, cosines: Tensor, weights: Tensor) -> Tensor:
        """The coefficients of unit vectors that make their mean direction, zeros if they cancel."""
        mean = weights
        if _norm(mean, cosines) < self.tol:
            return torch.zeros_like(mean)
        mean = mean / _norm(mean, cosines)
        for _ in range(self.max_iter):
            along = (cosines @ mean).clamp(-1, 1)
            angles = along.acos()
            logarithms = weights * torch.where(angles.sin() > MIN_SINE, angles / angles.sin(), 1.0)
            step = logarithms - (logarithms @ along) * mean
            size = _norm(step, cosines)
            if size < self.tol:
                break
            mean = size.cos() * mean + size.sin() / size * step
            mean = mean / _norm(mean, cosines)
        return mean

    def linear(self, adapters: int) -> bool:
        """Always."""
        return True


MIN_SINE = 1e-4  # sin of an angle that is 0 or π to the rounding of factors in float32: nothing to follow


def _norm(mixed: Tensor, cosines: Tensor) -> Tensor:
    """The norm of a mixture of unit vectors."""
    return (mixed @ cosines @ mixed).clamp_min(0).sqrt()
