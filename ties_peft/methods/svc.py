"""Singular value calibration: weaken directions to which several adapters contribute."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta, Dense
from ..task_vectors.singular_values import SUPPORT, Spectrum, spectrum
from .base import Method, TaskVectors


class Svc(Method):
    """Weaken the directions of a merged task vector to which several adapters contribute.

        D = U·S·Vᵀ,   a = uᵣᵀ·D,   aᵢ = uᵣᵀ·wᵢ·τᵢ,   sᵢ = ⟨a, aᵢ⟩ / ‖aᵢ‖²
        τ = U · diag(N / Σᵢ max(α, sᵢ) · Sᵣ) · Vᵀ

    sᵢ is the share of adapter i's response in output direction uᵣ that the merge has: above 1 the direction is counted more
    than once. It stands after another method (ties+svc in space core); alone it changes the sum.

    Law: one adapter comes back unchanged; N copies of one adapter give that adapter; for N adapters that
        share no output direction it is the sum times N / (1 + (N − 1)·α); an adapter of zeros equals an
        absent one.
    Source: Li et al., When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging, ICML 2026
        (arXiv 2602.05536), with the α of its README (1 in its argument parser). An adapter without a response in a
        direction counts as α there, as in its code. As published, the sum is scaled by 0.3 before;
        here λ is applied after, which is the same if every sᵢ exceeds α.
    """

    name = "svc"
    source = "Li et al., ICML 2026, arXiv 2602.05536"
    kinds = ("lora",)
    spaces = ("delta", "core")
    spectral = True

    alpha: float = Field(0.1, gt=0, allow_inf_nan=False, description="the smallest value of an adapter's share sᵢ")

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """Return the calibrated sum."""
        matrices = task_vectors.matrices()
        return self._calibrated(matrices.sum(0), matrices)

    def finish(self, merged: Delta, task_vectors: TaskVectors) -> Delta:
        """Return the result of the methods before it, calibrated against the task vectors."""
        return Dense(self._calibrated(merged.dense().double(), task_vectors.matrices()).float())

    def _calibrated(self, matrix: Tensor, tasks: Tensor) -> Tensor:
        found = spectrum(matrix)
        shares = [_share(found, task).clamp_min(self.alpha) for task in tasks if task.any()]
        return found.with_values(found.S / torch.stack(shares).mean(0)).dense() if shares else matrix


def _share(merged: Spectrum, task: Tensor) -> Tensor:
    """Return sᵢ of every direction; 0 where the adapter's response is rounding."""
    whole, own = merged.S.unsqueeze(1) * merged.Vt, merged.U.T @ task
    size = own.square().sum(1)
    responds = size > (SUPPORT * task.norm()) ** 2
    return torch.where(responds, (whole * own).sum(1) / torch.where(responds, size, 1.0), 0.0)
