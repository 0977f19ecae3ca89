"""LoRA-LEGO: clusters of the adapters' rank-one units."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.singular_values import spectra, spectrum
from .base import Method, TaskVectors

ROUNDS = 100
Clusters = Annotated[int, Field(ge=1)]


class Lego(Method):
    """Split all adapters into rank-one units, cluster these, and replace each cluster by one unit.

        wᵢ·τᵢ = Σⱼ bⱼ·aⱼᵀ = Σⱼ Sⱼ·uⱼ·vⱼᵀ,   K units in all
        c = leading rank-one part of the mean of a cluster, brought to the mean norm of its units
        τ = √(K / clusters) · Σ c

    The clusters are those of k-means on the units as matrices. It starts with the units that together explain most of the
    others, without random numbers. The rank of the result is the number of clusters.

    Law: with as many clusters as units it is the sum; one adapter comes back unchanged; an adapter of zeros equals
        an absent one.
    Source: Zhao et al., Merging LoRAs like Playing LEGO, ICLR 2025 (arXiv 2409.16167). As published, a unit
        is a column of B concatenated with a row of A as they were trained, k-means starts at random, a cluster is replaced
        by the mean of its [b; a], and norms are maxima of entries (as read in the code of arXiv 2606.03723). But [b; a] and
        [−b; −a] are the same unit, and one adapter has many factorisations. Here the units are those of the adapter's
        singular value decomposition, compared by ⟨b, b'⟩·⟨a, a'⟩, with Frobenius norms, so that the result depends on no
        sign, factorisation, basis or seed.
    """

    name = "lego"
    source = "Zhao et al., ICLR 2025, arXiv 2409.16167"
    kinds = ("lora",)
    spaces = ("delta", "core")
    spectral = True

    clusters: Clusters | None = Field(None, description="rank of the result; none for the largest rank of the inputs")

    def merge(self, task_vectors: TaskVectors) -> Tensor:
        """Cluster all units at once, in shared bases."""
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
    """Return the indices of the units of each cluster, given the inner products of all units."""
    starts = _initial_units(similarity, count)
    labels = (similarity.diagonal()[starts] - 2 * similarity[:, starts]).argmin(1)
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(labels).to(similarity.dtype)
        member = member[:, member.any(0)]  # without empty clusters
        share = member / member.sum(0)
        within = similarity @ share
        before, labels = labels, ((share * within).sum(0) - 2 * within).argmin(1)
        if torch.equal(before, labels):
            break
    return [(labels == label).nonzero().flatten() for label in torch.unique(labels)]


def _initial_units(similarity: Tensor, count: int) -> list[int]:
    """Return the units that k-means starts with, chosen one after another so that the least is left unexplained."""
    sizes = similarity.diagonal()
    distance = sizes.unsqueeze(1) + sizes - 2 * similarity
    unexplained, chosen = sizes, list[int]()
    for _ in range(min(count, len(sizes))):
        gain = (unexplained - distance).clamp_min(0).sum(1)
        best = int(gain.argmax())
        if float(gain[best]) <= 1e-10 * float(sizes.max()):  # every other unit equals a chosen one
            break
        chosen.append(best)
        unexplained = unexplained.minimum(distance[best])
    return chosen


def _representative(left: Tensor, right: Tensor) -> Tensor:
    """Return the leading rank-one part of Σ bⱼ·aⱼᵀ, with the mean norm of the units."""
    out, mix = torch.linalg.qr(left)
    lead = spectrum(mix @ right).top(1)
    norms = left.norm(dim=0) * right.norm(dim=1)
    representative: Tensor = out @ lead.with_values(norms.mean().expand_as(lead.S)).dense()
    return representative
