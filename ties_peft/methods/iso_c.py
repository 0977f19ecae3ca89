"""Iso-C: a sum with equal singular values."""

from __future__ import annotations

from torch import Tensor

from ..task_vectors.delta import Delta, Dense
from ..task_vectors.singular_values import spectrum
from .base import Method, TaskVectors


class IsoC(Method):
    """Sum the task vectors, then make all singular values of the sum equal.

        Σ wᵢ·τᵢ = U·S·Vᵀ
        τ = mean(S) · U·Vᵀ

    It stands alone or after another method, whose result it changes: ties+iso_c, in space core.

    Law: every singular value of the result is the mean of those of the sum, so that the nuclear norm is unchanged; a sum
        with equal singular values is unchanged; an adapter of zeros equals an absent one.
    Source: Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific
        Subspaces, ICML 2025 (arXiv 2502.04959). As published, the mean is over all min(out, in)
        singular values, and those that are 0 are raised to it too. The singular vectors of these are arbitrary for LoRAs,
        so that most of the result's energy would lie where no adapter has any. Here the mean is over the singular values
        above 0, and only these change, as in Core Space (arXiv 2509.17786): the mean is larger than the published one by
        the factor min(out, in)/Σrᵢ, so that a λ tuned for it is not to be reused. For eight adapters λ = 1.3 was best on
        validation rows.
    """

    name = "iso_c"
    source = "Marczak et al., ICML 2025, arXiv 2502.04959"
    kinds = ("lora",)
    spaces = ("delta", "core")
    spectral = True

    def has_flat_spectrum(self) -> bool:
        """Return true."""
        return True

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """Return the sum with equal singular values."""
        return _flattened(task_vectors.matrices().sum(0))

    def finish(self, merged: Delta, task_vectors: TaskVectors) -> Delta:
        """Return the result of the methods before it with equal singular values."""
        return Dense(_flattened(merged.dense()).float())


def _flattened(matrix: Tensor) -> Tensor:
    found = spectrum(matrix)
    return found.with_values(found.S.mean().expand_as(found.S)).dense()
