"""Pico: weaken the output directions that the adapters share, before a merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..task_vectors.delta import Delta, LowRank, norm, stack
from ..task_vectors.singular_values import balanced
from .base import Method, TaskVectors


class Pico(Method):
    """Weaken the output directions that the adapters share, merge, and restore the norm.

        [B₁ … B_N] = U·S·Vᵀ,   shareⱼ = Sⱼ² / Σ S²,   aⱼ = 1 / (1 + (N − 1)·shareⱼ)
        Bᵢ' = Bᵢ + U·(diag(a) − 1)·Uᵀ·Bᵢ
        τ = D · mean ‖wᵢ·τᵢ‖ / ‖D‖   for the merge D of the Bᵢ'·Aᵢ

    It stands before another method (pico+ties, pico+tsv); alone, the merge D is the sum. The norm is restored before λ is
    applied: pico+task_arithmetic with scale 1 is pico.

    Law: one adapter comes back unchanged; the norm of the result is λ times the mean norm of the task
        vectors; an adapter of zeros equals an absent one.
    Source: Tang and Yang, Crowded in B-Space: Calibrating Shared Directions for LoRA Merging, 2026 (arXiv
        2604.16826). As published, Bᵢ is the trained factor, so that the same adapter factored as
        (B·G, G⁻¹·A) gives another result; here Bᵢ = Uᵢ·√Sᵢ of the adapter's singular value decomposition, so that the
        result depends on the task vectors alone.
    """

    name = "pico"
    source = "Tang and Yang, 2026, arXiv 2604.16826"
    kinds = ("lora",)
    joint = True

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Return the sum of the calibrated task vectors, with its norm restored."""
        return self.finish(stack(self.prepare(task_vectors.deltas, task_vectors.streams)), task_vectors)

    def linear(self, adapters: int) -> bool:
        """Return true: alone it adds calibrated factors of unchanged rank."""
        return True

    def prepare(self, deltas: Sequence[Delta], streams: Sequence[int]) -> Sequence[Delta]:
        """Return every task vector with its B calibrated, in factors."""
        factors = [balanced(delta) for delta in deltas]
        B = torch.cat([own.B for own in factors], 1).double()
        energies, vectors = torch.linalg.eigh(B.T @ B)
        others = sum(bool(own.B.any()) for own in factors) - 1
        weaker = 1 / (1 + others * energies.clamp_min(0) / energies.sum().clamp_min(1e-300))
        calibrated = B @ ((vectors * weaker) @ vectors.T)  # U·diag(a)·Uᵀ·B with U = B·vectors/S, without dividing
        blocks = torch.split(calibrated.float(), [own.rank for own in factors], dim=1)
        return [LowRank(block.contiguous(), own.A) for block, own in zip(blocks, factors, strict=True)]

    def finish(self, merged: Delta, task_vectors: TaskVectors) -> Delta:
        """Return the result of the methods before it, scaled to the mean norm of the task vectors."""
        sizes = [size for size in map(norm, task_vectors.deltas) if size > 0]
        found = norm(merged)
        return merged.scaled(sum(sizes) / len(sizes) / found) if found > 0 else merged
