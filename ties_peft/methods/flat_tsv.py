"""TSV with a spectrum that flattens as adapters become many."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..task_vectors.singular_values import Spectrum, orthogonalised, spectra
from .base import Method, TaskVectors


class FlatTsv(Method):
    """TSV-Merge with each adapter's singular values drawn towards their own level, more so the more adapters.

        wᵢ·τᵢ = Uᵢ·Sᵢ·Vᵢᵀ of rank rᵢ,   qᵢ = ‖wᵢ·τᵢ‖ / √rᵢ,   f = 1 − 1/N
        τ = polar([U₁ … U_N]) · diag(Sᵢ^(1−f) · qᵢ^f) · polar([V₁ … V_N])ᵀ

    It has no number to choose: one adapter keeps its spectrum, two keep half of its shape, and for many
    the spectrum is flat, where large directions of a few no longer drown the others. N counts the
    adapters that have the module. Where Σrᵢ is more than the module has rows or columns, the stacks are
    wide, polar gives them orthonormal rows, and the result is weaker by what no longer fits.

    A flat spectrum has no leading part: leave the rank at `auto`, which keeps all of it, and take `tsv` to cut.

    Law: one adapter comes back unchanged; two of equal flat spectra and orthogonal directions are summed;
        a common factor of all weights is a factor of the result; an adapter of zeros equals an absent one.
    Source: our own, after Gargiulo et al. (tsv) and Marczak et al. (iso_c), whose flat spectrum is the limit
        for large N. f = 1 − 1/N was chosen on validation rows of eight tasks at N = 2, 4, 6 and 8: on test,
        at N = 8, level with Iso-C at the λ tuned for it (−0.16 ± 0.16 points). One base model, one family of
        task_vectors, equal ranks: see whether it holds on yours. On the six sample adapters it is level with TIES and
        behind `tsv` with λ = 1/⁴√N (benchmarks/results).
    """

    name: ClassVar[str] = "flat_tsv"
    source: ClassVar[str] = "our own, after arXiv 2412.00081 and 2502.04959"
    kinds: ClassVar[tuple[str, ...]] = ("lora",)
    spaces: ClassVar[tuple[str, ...]] = ("delta", "core")
    spectral: ClassVar[bool] = True

    def has_flat_spectrum(self) -> bool:
        """Whether the result has one: always."""
        return True

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """All of them together, in the small space."""
        matrices = task_vectors.matrices()
        found = spectra(matrices)
        return orthogonalised([_flattened(one, 1 - 1 / len(found)) for one in found]) if found else matrices[0]


def _flattened(one: Spectrum, share: float) -> Spectrum:
    """S^(1 − share)·q^share with q the root mean square of S."""
    level = one.S.square().mean().sqrt()
    return one.with_values(one.S ** (1 - share) * level**share)
