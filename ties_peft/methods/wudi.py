"""WUDI-Merging in closed form."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from .base import Method, TaskVectors


class Wudi(Method):
    """Find the matrix whose outputs on the rows of each task vector match that task vector's (experimental).

        Gᵢ = τᵢᵀ·τᵢ / ‖τᵢ‖²,   G = Σ Gᵢ
        τ  = argmin Σᵢ ‖(τ − τᵢ)·τᵢᵀ‖² / ‖τᵢ‖² + ρ·‖τ − Σ τᵢ‖²
           = (Σ τᵢ·Gᵢ + ρ·Σ τᵢ) · (G + ρ)⁻¹,   ρ = ridge · mean eigenvalue of G

    Here τᵢ stands for wᵢ·τᵢ: the rows of a task vector replace the inputs that it was trained on. With a large ridge the
    result is the sum; with ridge 0 it matches every adapter on its own rows, and grows where adapters are similar.

    When to use: not for accuracy. With a ridge near 0, eight adapters reached 74 to 80, the other matrix methods 84.

    Law: ridge = 0 and adapters of independent row spaces: τ·τᵢᵀ = τᵢ·τᵢᵀ for every i; one adapter comes
        back unchanged with any ridge; an adapter of zeros equals an absent one.
    Source: Cheng et al., Whoever Started the Interference Should End It: Guiding Data-Free Model Merging
        via Task Vectors, ICML 2025 (arXiv 2503.08099). Its code takes 300 steps of Adam of size 1e-5 from
        the sum, whose effect depends on the norm of the task vectors; here a ridge towards the sum, our own, replaces
        that early stop and does not depend on the norm. The paper divides by ‖τᵢ‖², as here, and so does its code
        for vision and for language.
    """

    name = "wudi"
    source = "Cheng et al., ICML 2025, arXiv 2503.08099"
    kinds = ("lora",)
    spaces = ("delta", "core")
    spectral = True

    ridge: float = Field(0.1, ge=0, allow_inf_nan=False, description="strength of the regularisation towards the sum")

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """Solve one symmetric eigenvalue problem in shared bases."""
        matrices = task_vectors.matrices()
        given = [matrix for matrix in matrices if matrix.any()]
        if not given:
            return matrices[0]
        total = torch.stack(given).sum(0)
        grams = [matrix.T @ matrix / matrix.square().sum() for matrix in given]
        wanted = torch.stack([matrix @ gram for matrix, gram in zip(given, grams, strict=True)]).sum(0)
        values, vectors = torch.linalg.eigh(torch.stack(grams).sum(0))
        kept = values > ROUNDING * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        ridge = self.ridge * values.mean()
        merged: Tensor = (wanted + ridge * total) @ (vectors / (values + ridge)) @ vectors.T
        return merged


ROUNDING = 1e-10  # of G's largest eigenvalue; smaller ones are rounding (G holds squares)
