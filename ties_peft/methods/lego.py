"""LoRA-LEGO: the adapters' rank-one units, sorted into clusters of alike ones."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.singular_values import spectra, spectrum
from .base import Method, TaskVectors

ROUNDS = 100
Clusters = Annotated[int, Field(ge=1)]


class Lego(Method):
    """Take all adapters apart into rank-one units, cluster them, and let one unit speak for each cluster.

        wᵢ·τᵢ = Σⱼ bⱼ·aⱼᵀ = Σⱼ Sⱼ·uⱼ·vⱼᵀ,   K units in all
        c = leading rank-one part of the mean of a cluster, brought to the mean norm of its units
        τ = √(K / clusters) · Σ c

    Clusters are those of k-means on the units as the matrices that they are. They start with the units
    that explain most of all others, which needs no random numbers. The result has as many ranks as
    clusters.

    Law: as many clusters as units: the sum; one adapter comes back unchanged; an adapter of zeros equals
        an absent one.
    Source: Zhao et al., Merging LoRAs like Playing LEGO, ICLR 2025 (arXiv 2409.16167). Published, units
        are the columns of B joined to the rows of A as they were trained, k-means starts at random, the
        mean of [b; a] speaks, and norms are maxima of entries (as read in the code of arXiv 2606.03723).
        But [b; a] and [−b; −a] are one unit, and a trained factor is one of many for the same adapter. Here
        units are those of the adapter's own singular value decomposition, ⟨b, b'⟩·⟨a, a'⟩ compares them,
        and norms are Frobenius, so that neither signs nor factors nor basis nor a seed matters.
    """

    name: ClassVar[str] = "lego"
    source: ClassVar[str] = "Zhao et al., ICLR 2025, arXiv 2409.16167"
    kinds: ClassVar[tuple[str, ...]] = ("lora",)
    spaces: ClassVar[tuple[str, ...]] = ("delta", "core")
    spectral: ClassVar[bool] = True

    clusters: Clusters | None = Field(None, description="rank of the result; none for the largest of the inputs")

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """All units together, in the small space."""
        matrices = task_vectors.matrices()
        found = spectra(matrices)
        if not found:
            return matrices[0]
        left = torch.cat([one.U * one.S.sqrt() for one in found], 1)
        right = torch.cat([one.Vt * one.S.sqrt().unsqueeze(1) for one in found], 0)
        similarity = (left.T @ left) * (right @ right.T)
        clusters = _clusters(similarity, self.clusters or max(map(len, found)))
        representatives = [_representative(left[:, cluster], right[cluster]) for cluster in clusters]
        merged: Tensor = torch.stack(representatives).sum(0) * (len(similarity) / len(clusters)) ** 0.5
        return merged


def _clusters(similarity: Tensor, count: int) -> list[Tensor]:
    """The members of each cluster, given the inner products of all units."""
    starts = _initial_units(similarity, count)
    labels = (similarity.diagonal()[starts] - 2 * similarity[:, starts]).argmin(1)
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(labels).to(similarity.dtype)
        member = member[:, member.any(0)]  # a cluster that nobody is left in is none
        share = member / member.sum(0)
        within = similarity @ share
        before, labels = labels, ((share * within).sum(0) - 2 * within).argmin(1)
        if torch.equal(before, labels):
            break
    return [(labels == label).nonzero().flatten() for label in torch.unique(labels)]


def _initial_units(similarity: Tensor, count: int) -> list[int]:
    """Units that together leave least unexplained, one after another, each the best next one."""
    sizes = similarity.diagonal()
    distance = sizes.unsqueeze(1) + sizes - 2 * similarity
    left, chosen = sizes, list[int]()
    for _ in range(min(count, len(sizes))):
        gain = (left - distance).clamp_min(0).sum(1)
        best = int(gain.argmax())
        if float(gain[best]) <= 1e-10 * float(sizes.max()):  # every other unit is a copy of a chosen one
            break
        chosen.append(best)
        left = left.minimum(distance[best])
    return chosen


def _representative(left: Tensor, right: Tensor) -> Tensor:
    """The leading direction of Σ bⱼ·aⱼᵀ at the mean norm of the units."""
    out, mix = torch.linalg.qr(left)
    lead = spectrum(mix @ right).top(1)
    norms = left.norm(dim=0) * right.norm(dim=1)
    representative: Tensor = out @ lead.with_values(norms.mean().expand_as(lead.S)).dense()
    return representative
