"""The Karcher mean: the mean direction on the sphere."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Karcher(Method):
    """Find the mean direction of the task vectors on the sphere, and give it their mean norm, for each module.

        u = argmin_{‖u‖ = 1} Σ |wᵢ|·angle(u, wᵢ·τᵢ)²
        τ = Σ ‖wᵢ·τᵢ‖ / Σ |wᵢ| · u

    The result is a weighted sum, hence exact at rank Σrᵢ. Its coefficients are computed from the Gram matrix alone: the
    iteration starts at the mean of the unit vectors and follows the mean of the tangent vectors. The average of N
    orthogonal adapters has a norm smaller than theirs by the factor √N; this mean does not. An adapter without the module
    counts in Σ |wᵢ|.

    Law: adapters of one direction give that direction at the mean norm; two adapters with equal weights give slerp at
        t = ½; the result has the mean norm; weights (2, 1) and (10, 5) mean the same; directions that cancel have no
        mean, and give zero.
    Source: Karcher, Riemannian Center of Mass and Mollifier Smoothing, 1977; as a merge, mergekit's
        `karcher` (Goddard et al., 2024, arXiv 2403.13257), whose number of steps and tolerance are the
        defaults here. There the mean is of whole models with equal weights, and starts from the first where the
        directions cancel; here it is of weighted task vectors, and their order does not matter.
    """

    name = "karcher"
    source = "Karcher, 1977; mergekit, arXiv 2403.13257"

    max_iter: int = Field(10, ge=1, description="largest number of steps")
    tol: float = Field(1e-5, gt=0, allow_inf_nan=False, description="stop at a step of this many radians or fewer")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Compute the coefficients from the Gram matrix of the unit vectors."""
        gram, weights = task_vectors.gram(), torch.tensor(task_vectors.weights, dtype=torch.float64).abs()
        norms = gram.diagonal().clamp_min(0).sqrt()
        nonzero = norms > 0
        units = torch.where(nonzero, 1 / torch.where(nonzero, norms, 1.0), 0.0)
        cosines = (gram * units * units.unsqueeze(1)).clamp(-1, 1)
        mean = self._mean(cosines, weights * nonzero / (weights * nonzero).sum().clamp_min(1e-300))
        factors: list[float] = (float(norms.sum()) / task_vectors.total_magnitude * mean * units).tolist()
        return task_vectors.sum(factors)

    def _mean(self, cosines: Tensor, weights: Tensor) -> Tensor:
        """Return the coefficients by which unit vectors give their mean direction; zeros if they cancel."""
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
        """Return true: the result is a weighted sum."""
        return True


MIN_SINE = 1e-4  # sin θ; below it θ is 0 or π but for the rounding of factors in float32


def _norm(mixed: Tensor, cosines: Tensor) -> Tensor:
    """Return the norm of a linear combination of unit vectors, given their cosines."""
    return (mixed @ cosines @ mixed).clamp_min(0).sqrt()
