"""Dual bases: a merge that acts on each adapter's directions as that adapter alone does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.singular_values import Spectrum, spectrum, spectrum_of
from .base import Method, TaskVectors

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
ALIKE = 0.2  # singular values of stacked unit vectors under this say that some are one direction: two of cosine 0.96


class Dual(Method):
    """Divide shared directions by how much they are shared, so that adapters act on their own directions alone.

        wᵢ·τᵢ = Uᵢ·Sᵢ·Vᵢᵀ of rank rᵢ,   U = [U₁ … U_N],   V = [V₁ … V_N]
        n = N·Σ‖wᵢ·τᵢ‖² / ‖Σ wᵢ·τᵢ‖²       how many independent task vectors there are: N, or 1 for N equal ones
        a = 1 − 1/n²                        how far shared directions are divided
        S̄ᵢ ∝ Sᵢ^(1−f), ‖S̄ᵢ‖ = ‖Sᵢ‖, f = 1 − 1/n    spectra flattened
        τ ∝ (U·Uᵀ)⁻ᵃ·U · diag(S̄₁ … S̄_N) · Vᵀ·(V·Vᵀ)⁻ᵃ,   ‖τ‖² = (3 − 2/n)·Σ‖wᵢ·τᵢ‖²/N

    For a = 1 the outer factors are the dual bases: UᵢᵀτVⱼ is 0 for i ≠ j and diag(S̄ᵢ) for i = j, and of all matrices
    with this property τ is the smallest. What several adapters write into one output direction, such as the label words
    of classifiers, is then not added up. The sum (`task_arithmetic`) is a = 0, `tsv` and `flat_tsv` are a = ½. The norm
    of the result does not grow with N, the number of all adapters: one that lacks the module counts as a τ of zeros,
    because adapters disturb each other across modules too. The result has no small directions: leave the rank at
    `auto`, which keeps all of Σrᵢ.

    Law: one adapter, or N equal ones, come back unchanged; a common factor of all weights is a factor of the result;
        the order does not matter.
    Source: our own. Orthogonalised singular vectors are from Gargiulo et al. (arXiv 2412.00081), flat spectra from
        Marczak et al. (arXiv 2502.04959). Chosen on validation rows of a language model's and an encoder's adapters; both are
        judged on test rows in docs/measurements.md.
    """

    name = "dual"
    source = "our own, after arXiv 2412.00081 and 2502.04959"
    kinds = ("lora",)
    spaces = ("delta", "core")
    spectral = True

    flatten: Share | None = Field(None, description="f, how far each spectrum is flattened; none for 1 − 1/n")

    def has_flat_spectrum(self) -> bool:
        """Return whether the spectra are flattened."""
        return self.flatten != 0

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """Combine all of them at once, in shared bases."""
        gram = task_vectors.gram()
        total, added = float(gram.trace()), float(gram.sum())
        if not total:
            return torch.zeros(task_vectors.shape)
        n = _independent(added, total, task_vectors.adapters)
        flatten = 1 - 1 / n if self.flatten is None else self.flatten
        found = [one for one in map(spectrum_of, task_vectors.deltas) if len(one)]
        together = _dual([_flattened(one, flatten) for one in found], 1 - 1 / n**2)
        size = float(torch.linalg.vector_norm(together))
        return together * (((3 - 2 / n) * total / task_vectors.adapters) ** 0.5 / size) if size else together


def _independent(added: float, total: float, count: int) -> float:
    """Return n = N·Σ‖τᵢ‖²/‖Στᵢ‖², at least 1 and, where task vectors cancel each other, at most 2N."""
    return max(1.0, count * total / max(added, total / 2))


def _flattened(one: Spectrum, share: float) -> Spectrum:
    """Return S^(1 − share), scaled to the norm of S."""
    values = one.S ** (1 - share)
    return one.with_values(values * (torch.linalg.vector_norm(one.S) / torch.linalg.vector_norm(values)))


def _dual(parts: Sequence[Spectrum], power: float) -> Tensor:
    """Return (U·Uᵀ)⁻ᵃ·U·diag(S)·Vᵀ·(V·Vᵀ)⁻ᵃ of the stacked directions."""
    left = _divided(torch.cat([part.U for part in parts], 1), power)
    right = _divided(torch.cat([part.Vt for part in parts], 0), power)
    return (left * torch.cat([part.S for part in parts])) @ right


def _divided(stack: Tensor, power: float) -> Tensor:
    """Return (M·Mᵀ)⁻ᵃ·M: each singular value σ of a stack of unit vectors becomes σ^(1−2a)."""
    found = spectrum(stack)
    values = torch.where(found.S > ALIKE, found.S.clamp_min(ALIKE) ** (1 - 2 * power), torch.zeros_like(found.S))
    return found.with_values(values).dense()
