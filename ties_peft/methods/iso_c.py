"""Iso-C: a sum with a flat spectrum."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..task_vectors.delta import Delta, Dense
from ..task_vectors.singular_values import spectrum
from .base import Method, TaskVectors


class IsoC(Method):
    """Sum, then give every direction of the sum the same strength.

        Σ wᵢ·τᵢ = U·S·Vᵀ
        τ = mean(S) · U·Vᵀ

    It stands alone or after another method, whose result it flattens: ties+iso_c, in space core.

    Law: every singular value of the result is the mean of those of the sum, so that their sum (the
        nuclear norm) stays; it does nothing to what is flat already; an adapter of zeros equals an
        absent one.
    Source: Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
        Subspaces, ICML 2025 (arXiv 2502.04959). Published, the mean is over all min(out, in) singular
        values and the null directions are lifted with the rest; of LoRAs those are arbitrary (most of the
        result's energy would then lie outside what any adapter does). Here both are over the support, as
        in Core Space (arXiv 2509.17786); the mean is larger than the published by min(out, in)/Σrᵢ, and a
        tuned λ does not carry over. On eight adapters 1.3 was best (found on validation rows).
    """

    name: ClassVar[str] = "iso_c"
    source: ClassVar[str] = "Marczak et al., ICML 2025, arXiv 2502.04959"
    kinds: ClassVar[tuple[str, ...]] = ("lora",)
    spaces: ClassVar[tuple[str, ...]] = ("delta", "core")
    spectral: ClassVar[bool] = True

    def has_flat_spectrum(self) -> bool:
        """Whether the result has one: always."""
        return True

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """The sum, flattened."""
        return _flattened(task_vectors.matrices().sum(0))

    def finish(self, merged: Delta, task_vectors: TaskVectors) -> Delta:
        """What another method made, flattened."""
        return Dense(_flattened(merged.dense()).float())


def _flattened(matrix: Tensor) -> Tensor:
    found = spectrum(matrix)
    return found.with_values(found.S.mean().expand_as(found.S)).dense()
