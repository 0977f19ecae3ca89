"""TSV-Merge: a sum with orthogonalised singular vectors."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from ..task_vectors.singular_values import orthogonalised, spectra
from .base import Method, TaskVectors

Directions = Annotated[int, Field(ge=1)]


class Tsv(Method):
    """Orthogonalise the singular vectors of the adapters against each other, then add.

        wᵢ·τᵢ = Uᵢ·Sᵢ·Vᵢᵀ
        τ = polar([U₁ … U_N]) · diag(S₁ … S_N) · polar([V₁ … V_N])ᵀ

    polar(M) is the nearest matrix with orthonormal columns. The norm grows as √N, like that of a sum of
    orthogonal adapters, and the default λ = 1/√N makes up for that. The published λ = 1 is as good for two sample
    adapters, and worse for four and six; there 1/√N is half a point below the best λ, N^(−1/3)
    (benchmarks/results/scales.json). For causal language models smaller λ were better than larger ones.

    Law: with λ = 1, adapters whose directions are orthogonal are summed; one adapter comes back unchanged; a negative
        weight negates; for a given λ, an adapter of zeros equals an absent one.
    Source: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025
        (arXiv 2412.00081), TSV-M. As published and in its code, every task contributes its first min(out, in)/N
        directions; of a LoRA those beyond its rank rᵢ have singular value 0 and are arbitrary
        (two correct decompositions differ by more than the result's norm). Here each contributes rᵢ directions, or
        `directions` if that is fewer. Directions that adapters share up to rounding count as one.
    """

    name = "tsv"
    default_scale = "1/sqrt(N)"
    published_scale = 1.0
    source = "Gargiulo et al., CVPR 2025, arXiv 2412.00081"
    kinds = ("lora",)
    spaces = ("delta", "core")
    spectral = True

    directions: Directions | None = Field(None, description="number of directions of each adapter; none for all")

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """Combine all of them at once, in shared bases."""
        matrices = task_vectors.matrices()
        found = [one.top(self.directions) for one in spectra(matrices)]
        return orthogonalised(found) if found else matrices[0]
