"""Iso-CTS: equal singular values over common and task-specific directions."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.singular_values import Spectrum, orthogonalised, spectrum
from .base import Method, TaskVectors


class IsoCts(Method):
    """Combine the leading directions of the sum with task-specific ones of each adapter, all equally strong.

        Σ wᵢ·τᵢ = U·S·Vᵀ of rank R,   n = round((R − ⌊c·R⌋) / N),   k = R − N·n
        τᵢ' = (1 − Uₖ·Uₖᵀ) · wᵢ·τᵢ = Uᵢ·Sᵢ·Vᵢᵀ,  of which the first n directions
        τ = mean(all S) · polar([U₁ … U_N Uₖ]) · polar([V₁ … V_N Vₖ])ᵀ

    Law: common = 1 is `iso_c`, and so is one adapter alone; all singular values of the result are equal if the directions
        are linearly independent; an adapter of zeros equals an absent one.
    Source: Marczak et al., No Task Left Behind, ICML 2025 (arXiv 2502.04959), with the numbers
        rounded as in its code. As published, R is min(out, in); here it is the rank of the sum, since further directions
        are arbitrary. An adapter with fewer than n directions of its own contributes those it has. Directions that are
        linearly dependent to within 1e-4 (a singular value of the concatenated unit vectors, relative to the largest)
        count as one; the published code tells them apart.
    """

    name = "iso_cts"
    source = "Marczak et al., ICML 2025, arXiv 2502.04959"
    kinds = ("lora",)
    spaces = ("delta", "core")
    spectral = True

    common: float = Field(0.8, ge=0, le=1, description="share c of the directions that is taken from the sum")

    def has_flat_spectrum(self) -> bool:
        """Return true."""
        return True

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """Combine all of them at once, in shared bases."""
        matrices = task_vectors.matrices()
        given = [matrix for matrix in matrices if matrix.any()]
        if not given:
            return matrices[0]
        total = spectrum(torch.stack(given).sum(0))
        own = round((len(total) - int(len(total) * self.common)) / len(given))
        shared = total.top(len(total) - own * len(given))
        parts = [_without_shared(matrix, shared).top(own) for matrix in given]
        return _flattened([*parts, shared])


def _without_shared(matrix: Tensor, shared: Spectrum) -> Spectrum:
    """Return the part of a matrix outside the shared output directions."""
    return spectrum(matrix - shared.U @ (shared.U.T @ matrix), at_least=float(matrix.norm()))


def _flattened(parts: list[Spectrum]) -> Tensor:
    level = torch.cat([part.S for part in parts]).mean()
    return orthogonalised([part.with_values(level.expand_as(part.S)) for part in parts])
