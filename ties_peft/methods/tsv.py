"""TSV-Merge: the adapters' singular vectors made to stand apart."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from ..spectrum import orthogonalised, spectra
from .base import Method, TaskVectors

Directions = Annotated[int, Field(ge=1)]


class Tsv(Method):
    """Make the adapters' singular vectors orthogonal to one another, then sum.

        wᵢ·τᵢ = Uᵢ·Sᵢ·Vᵢᵀ
        τ = polar([U₁ … U_N]) · diag(S₁ … S_N) · polar([V₁ … V_N])ᵀ

    polar(M) is the nearest matrix with orthonormal columns. The norm grows like √N, as that of a sum of
    orthogonal adapters does, and the default λ = 1/√N makes up for that. λ = 1 is as published: on sample adapters it
    is as good for two, and worse for four and six. There 1/√N is half a point under the best λ, N^(−1/3)
    (benchmarks/results/scales.json); for causal language models smaller ones were better than larger ones.

    Law: with λ = 1, adapters whose directions are orthogonal are summed; one adapter comes back unchanged; a negative
        weight negates; for a given λ, an adapter of zeros equals an absent one.
    Source: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025
        (arXiv 2412.00081), TSV-M. Published and in its code, every task gives its first min(out, in)/N
        directions; of a LoRA those beyond its rank rᵢ belong to singular values of zero and are arbitrary
        (two correct decompositions differ by more than the result's norm). Here each gives its own rᵢ, or
        fewer by `directions`. Directions that adapters share to within rounding are counted as one.
    """

    name: ClassVar[str] = "tsv"
    default_scale: ClassVar[float | str] = "1/sqrt(N)"
    published_scale: ClassVar[float | None] = 1.0
    source: ClassVar[str] = "Gargiulo et al., CVPR 2025, arXiv 2412.00081"
    kinds: ClassVar[tuple[str, ...]] = ("lora",)
    spaces: ClassVar[tuple[str, ...]] = ("delta", "core")
    spectral: ClassVar[bool] = True

    directions: Directions | None = Field(None, description="how many of each adapter's directions; none for all")

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """All of them together, in the small space."""
        matrices = task_vectors.matrices()
        found = [one.top(self.directions) for one in spectra(matrices)]
        return orthogonalised(found) if found else matrices[0]
