"""Hold what was measured on each module, and reduce it to the figures of adapters and pairs over any set of modules.

With N adapters and M modules every array has the module first: (M, N) for adapters, (M, N, N) for pairs. A sum that a
whole adapter needs is the sum over its modules, so that one function gives the figures of a module, of the modules of one
depth, and of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .figure_kinds import Array, mean_of_known
from .gaussian import opposite_share


@dataclass
class Measured:
    """Hold the sums and figures of every module; NaN where a figure is undefined.

    Attributes:
        modules, adapters: M and N.
        has: which adapters have which modules, (M, N).
        products: ⟨τᵢ, τⱼ⟩, (M, N, N).
        rank, effective_rank: of each task vector, (M, N).
        overlap_in, overlap_out: ‖UᵀV‖²/min(r₁, r₂) of the row spaces and of the column spaces, (M, N, N).
        angle_in, angle_out: the smallest principal angle between these spaces, in degrees, (M, N, N).
        initial_cosine: cosine of the stored factors A, (M, N, N).
        entries: how many entries a task vector has, (M, N).
        largest_square: the squared norm of the largest 20 % of the entries of each whole adapter, by module, (M, N).
        entries_square: the squared norm of the entries that were counted, (M, N).
        both: the number of entries that both adapters keep, (M, N, N); on its diagonal, that one adapter keeps.
        opposite: the number of those whose signs differ, (M, N, N).
    """

    modules: int
    adapters: int
    has: Array = field(init=False)
    products: Array = field(init=False)
    rank: Array = field(init=False)
    effective_rank: Array = field(init=False)
    overlap_in: Array = field(init=False)
    overlap_out: Array = field(init=False)
    angle_in: Array = field(init=False)
    angle_out: Array = field(init=False)
    initial_cosine: Array = field(init=False)
    entries: Array = field(init=False)
    largest_square: Array = field(init=False)
    entries_square: Array = field(init=False)
    both: Array = field(init=False)
    opposite: Array = field(init=False)

    def __post_init__(self) -> None:
        single, pair = (self.modules, self.adapters), (self.modules, self.adapters, self.adapters)
        self.has = np.zeros(single, bool)
        for name in ("rank", "entries", "largest_square", "entries_square"):
            setattr(self, name, np.zeros(single))
        for name in ("products", "both", "opposite"):
            setattr(self, name, np.zeros(pair))
        self.effective_rank = np.full(single, np.nan)
        for name in ("overlap_in", "overlap_out", "angle_in", "angle_out", "initial_cosine"):
            setattr(self, name, np.full(pair, np.nan))

    def of_adapters(self, at: Sequence[int]) -> dict[str, Array]:
        """Return the figures of all adapters over some modules, (N,) each."""
        squares = self.squares_by_module[at]
        return {
            "norm": np.sqrt(squares.sum(0)),
            "rank": self.rank[at].max(0),
            "effective_rank": _ratio((np.nan_to_num(self.effective_rank[at]) * squares).sum(0), squares.sum(0)),
            "redundancy": _ratio(self.largest_square[at].sum(0), self.entries_square[at].sum(0)),
        }

    def of_pairs(self, at: Sequence[int]) -> dict[str, Array]:
        """Return the figures of all pairs over some modules, (N, N) each."""
        squares, both = self.squares_by_module[at].sum(0), self.both[at].sum(0)
        kept = np.diagonal(both)
        conflict = _ratio(self.opposite[at].sum(0), both)
        predicted = _ratio((self.predicted_by_module[at] * self.both[at]).sum(0), both)
        return {
            "cosine": _ratio(self.products[at].sum(0), np.sqrt(np.outer(squares, squares))),
            "sign_conflict": conflict,
            "predicted_conflict": predicted,
            "excess_conflict": conflict - predicted,
            "kept_overlap": _ratio(both, kept[:, None] + kept[None, :] - both),
            "overlap_in": mean_of_known(self.overlap_in[at]),
            "overlap_out": mean_of_known(self.overlap_out[at]),
            "angle_in": mean_of_known(self.angle_in[at]),
            "angle_out": mean_of_known(self.angle_out[at]),
            "initial_cosine": mean_of_known(self.initial_cosine[at]),
        }

    @cached_property
    def squares_by_module(self) -> Array:
        """‖τᵢ‖² on each module, (M, N)."""
        squares: Array = np.maximum(np.diagonal(self.products, axis1=1, axis2=2), 0.0)
        return squares

    @cached_property
    def predicted_by_module(self) -> Array:
        """The sign conflict that Gaussian entries of the same cosine and the same kept shares would have, (M, N, N)."""
        first, second = np.triu_indices(self.adapters, 1)
        norms = np.sqrt(self.squares_by_module)
        cosines = _ratio(self.products, norms[:, :, None] * norms[:, None, :])[:, first, second]
        share = np.nan_to_num(_ratio(np.diagonal(self.both, axis1=1, axis2=2), self.entries))
        found: Array = np.zeros_like(self.products)
        found[:, first, second] = opposite_share(np.nan_to_num(cosines), share[:, first], share[:, second])
        found += found.transpose(0, 2, 1).copy()
        return found


def _ratio(part: Array, whole: Array) -> Array:
    """Return part/whole; NaN where the whole is 0."""
    ratio: Array = np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) > 0)
    return ratio
