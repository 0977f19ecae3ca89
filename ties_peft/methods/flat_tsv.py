"""TSV-Merge with a spectrum that becomes flatter with the number of adapters."""

from __future__ import annotations

from torch import Tensor

from ..task_vectors.singular_values import Spectrum, orthogonalised, spectra
from .base import Method, TaskVectors


class FlatTsv(Method):
    """Merge as TSV does, with flatter singular values of each adapter the more adapters there are.

        wᵢ·τᵢ = Uᵢ·Sᵢ·Vᵢᵀ of rank rᵢ,   qᵢ = ‖wᵢ·τᵢ‖ / √rᵢ,   f = 1 − 1/N
        τ = polar([U₁ … U_N]) · diag(Sᵢ^(1−f) · qᵢ^f) · polar([V₁ … V_N])ᵀ

    It has no parameter: one adapter keeps its spectrum, for two the logarithms of the singular values are halfway to equal,
    and for many the spectrum is flat, so that large directions of a few adapters do not dominate. N counts the adapters
    that have the module. Where Σrᵢ exceeds the number of rows or columns, the concatenations are wide, polar gives them
    orthonormal rows, and the result is weaker.

    All directions of a flat spectrum count: leave the rank at `auto`, which keeps all of them; use `tsv` for a smaller rank.

    Law: one adapter comes back unchanged; two of equal flat spectra and orthogonal directions are summed;
        a common factor of all weights is a factor of the result; an adapter of zeros equals an absent one.
    Source: our own, after Gargiulo et al. (tsv) and Marczak et al. (iso_c), whose flat spectrum is the limit
        for large N. f = 1 − 1/N was chosen on validation rows of eight tasks at N = 2, 4, 6 and 8; on test rows, at N = 8,
        it is equal to Iso-C at the λ tuned for that (−0.16 ± 0.16 points). That is one base model, one family of tasks and
        equal ranks: check it on your adapters. On the six sample adapters it is equal to TIES and worse than
        `tsv` with λ = 1/⁴√N (benchmarks/results).
    """

    name = "flat_tsv"
    source = "our own, after arXiv 2412.00081 and 2502.04959"
    kinds = ("lora",)
    spaces = ("delta", "core")
    spectral = True

    def has_flat_spectrum(self) -> bool:
        """Return true."""
        return True

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """Combine all of them at once, in shared bases."""
        matrices = task_vectors.matrices()
        found = spectra(matrices)
        return orthogonalised([_flattened(one, 1 - 1 / len(found)) for one in found]) if found else matrices[0]


def _flattened(one: Spectrum, share: float) -> Spectrum:
    """Return S^(1 − share)·q^share with q the root mean square of S."""
    level = one.S.square().mean().sqrt()
    return one.with_values(one.S ** (1 - share) * level**share)
