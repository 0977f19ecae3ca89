"""The unified vector of EMR-Merging."""

from __future__ import annotations

from ..task_vectors.delta import Delta
from .base import Method, TaskVectors


class Emr(Method):
    """Elect one sign per entry, and take the largest magnitude that agrees with it.

        γ = sign(Σ wᵢ·τᵢ)
        τ = γ · max_{i: sign(wᵢ·τᵢ) = γ} |wᵢ·τᵢ|

    The paper also keeps a mask and a rescaler for every task, which are applied when the task is known; one adapter for
    all tasks cannot hold them.

    Law: one adapter with weight 1 comes back unchanged; it is `ties` at density 1 with disjoint `max`.
    Source: Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, NeurIPS 2024 (arXiv
        2405.17461), step "elect". A sum of exactly 0 elects +, as in `ties`; in the authors' code −.
    """

    name = "emr"
    source = "Huang et al., NeurIPS 2024, arXiv 2405.17461"
    entrywise = True

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Elect, and take the largest that agrees."""
        return task_vectors.disjoint_merge(task_vectors.elect(), "max")

    def linear(self, adapters: int) -> bool:
        """Return whether there is one adapter."""
        return adapters == 1
