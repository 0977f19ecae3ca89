"""RegMean: the least squares solution for the outputs of all adapters."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ..task_vectors.delta import Delta, Dense, LowRank, stack
from .base import Method, TaskVectors


class RegMean(Method):
    """Find the matrix whose outputs on each adapter's inputs are closest to those of that adapter.

        G̃ᵢ = α·Gᵢ + (1 − α)·diag(Gᵢ),   Gᵢ = E[x·xᵀ] over the inputs of the module under adapter i
        τ  = (Σ wᵢ·τᵢ·G̃ᵢ) · (Σ |wᵢ|·G̃ᵢ)⁻¹,   of least norm where the sum is singular

    At α = 1 it is the least squares solution of Σ wᵢ·E‖(τ − τᵢ)·x‖². A smaller α, which is `off_diagonal`, makes the
    inverse better conditioned. The result has rank Σrᵢ and is computed in factors. In space `core` the problem is
    restricted to the input directions of the adapters: with R an orthonormal basis of the rows of all A,
    τ = (Σ wᵢ·τᵢ·R·Cᵢ) · (Σ |wᵢ|·Cᵢ)⁻¹·Rᵀ and Cᵢ = Rᵀ·G̃ᵢ·R. An adapter without a module does not count there. It needs
    the statistics `gram` beside every adapter (`ties-peft statistics`).

    Law: with equal Gᵢ and positive weights it is the average; one adapter with a positive weight comes back unchanged;
        the order of the adapters does not matter; if every G̃ᵢ is block diagonal in the span of R and its complement,
        spaces `delta` and `core` agree.
    Source: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023 (arXiv
        2212.09849), on task vectors, which is equivalent since all share the base model. G is a mean over inputs, so
        that an adapter with more rows does not count more. Of the ten configurations in the authors' code that set α, one
        has 0.9, the default here, and nine have 0.1; where it is not set, α = 1. LoRM (Salami et al., Closed-form Merging
        of Parameter-Efficient Modules, arXiv 2410.17961) alternates between solving for A and for B, at a fixed rank: at
        α = 1 its error Σ wᵢ·E‖(τ − τᵢ)·x‖² is at best that of this solution at rank `max`, which needs no iteration.
    """

    name = "regmean"
    kinds = ("lora",)
    spaces = ("delta", "core")
    source = "Jin et al., ICLR 2023, arXiv 2212.09849"
    needs = "gram"

    off_diagonal: float = Field(0.9, ge=0, le=1, description="α, the factor of off-diagonal entries")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Solve one symmetric system for the module, with the rows of all adapters' A as right-hand sides."""
        grams = (self._gram(task_vectors, place) for place in range(len(task_vectors)))
        total: Tensor | None = None
        rows = []
        for gram, delta, weight in zip(grams, task_vectors.deltas, task_vectors.weights, strict=True):
            total = gram * abs(weight) if total is None else total.add_(gram, alpha=abs(weight))
            rows.append((delta.A if isinstance(delta, LowRank) else delta.dense()).double() @ gram)
        assert total is not None
        solved = torch.split(_solve(total, torch.cat(rows)).float(), [len(one) for one in rows])
        return stack(
            [
                LowRank(d.B, A) if isinstance(d, LowRank) else Dense(A)
                for d, A in zip(task_vectors.deltas, solved, strict=True)
            ]
        )

    def linear(self, adapters: int) -> bool:
        """Return true: the result is Σ Bᵢ·Aᵢ' with changed A, exact at rank Σrᵢ."""
        return True

    def _gram(self, task_vectors: TaskVectors, place: int) -> Tensor:
        """Return G̃ of one adapter in the coordinates of the columns, float64."""
        gram = task_vectors.statistics[place].whole().to(task_vectors.device).double()
        gram = self.off_diagonal * gram + (1 - self.off_diagonal) * torch.diag(gram.diagonal())
        if task_vectors.inputs is None:
            return gram
        basis = task_vectors.inputs.double()
        return basis @ gram @ basis.T


def _solve(gram: Tensor, rows: Tensor) -> Tensor:
    """Return rows · gram⁻¹, of least norm where gram is singular.

    Args:
        gram: (k, k), symmetric positive semidefinite up to rounding.
        rows: (m, k).
    """
    used = gram.diagonal() > 0  # an input that was always 0 has coefficient 0
    if not used.any():
        return torch.zeros_like(rows)
    size = gram.diagonal()[used].sqrt()  # normalise, so that large inputs do not hide small ones
    factor, failed = torch.linalg.cholesky_ex(gram[used][:, used] / size / size.unsqueeze(1))
    if not failed and float(factor.diagonal().min()) > MIN_PIVOT:
        solved = torch.zeros_like(rows)
        solved[:, used] = torch.cholesky_solve((rows[:, used] / size).T, factor).T / size
        return solved
    values, vectors = torch.linalg.eigh(gram)
    kept = values > torch.finfo(torch.float32).eps * len(gram) * values[-1]
    vectors = vectors[:, kept]
    least: Tensor = ((rows @ vectors) / values[kept]) @ vectors.T
    return least


MIN_PIVOT = 1e-2  # of the normalised Cholesky factor's diagonal; its square is far above the rounding of float32
