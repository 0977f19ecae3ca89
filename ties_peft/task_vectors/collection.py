"""Give a method of merging the task vectors of one module: a lazy sequence with the operations of the papers.

    kept = task_vectors.trim(density, scope)     # which entries are kept
    signs = kept.elect("mass")                   # one sign per entry
    merged = kept.disjoint_merge(signs, "mean")  # combine the entries that agree

`trim`, `keep_band`, `drop` and `drop_by_rank` return another lazy sequence, to which they add a step. Nothing is
computed until `sum`, `disjoint_merge` or an iteration reads the values, and then each step changes every task vector as
it is read. Several threads work through large modules in tiles of rows, and compiled kernels are used for large merges
(see `kernels.backends`). Neither changes what a method computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ..errors import MethodError
from .delta import Delta, Dense, LowRank, inner, stack
from .elect import DisjointRule, ElectRule, MergeRule, SignedSums, WeightTotals
from .factorise import Sum
from .random_numbers import uniform
from .sparsify import drop_, keep_probability
from .tiles import ThreadPool, Tile, empty
from .trim import Cuts, DeclaredTrim, Densities, Scope, Trim, find_cuts


class Statistic(Protocol):
    """Provide the statistics of one module of one adapter, read by rows."""

    @property
    def norm(self) -> Callable[[], float]:
        """A function that returns the Frobenius norm over all modules of the adapter."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some rows."""

    def whole(self) -> Tensor:
        """Return all rows."""


@dataclass(frozen=True, eq=False)
class Trimmed:
    """Set the entries of each task vector below its threshold to zero, or those outside a band of magnitudes.

    Attributes:
        trim: the trim that was asked for.
        find: finds the cuts; called once.
    """

    trim: Trim
    find: Callable[[], Cuts]

    @property
    def keeps_all(self) -> bool:
        """Whether every entry is kept."""
        return self.trim.densities[-1] == 1 and all(own[-1].threshold == 0 for own in self.cuts)

    @cached_property
    def cuts(self) -> Cuts:
        """The cuts, found when they are first asked for."""
        return self.find()

    def apply(self, task_vectors: TaskVectors, place: int, values: Tensor) -> Tensor:
        """Trim the selected rows of one task vector, in place, and return them."""
        tile = task_vectors.tile_number
        *above, last = self.cuts[place]
        larger = [cut.apply_(values.clone(), tile) for cut in above]  # the entries above the band
        values = last.apply_(values, tile)
        for entries in larger:
            values.sub_(entries)
        return values


@dataclass(frozen=True)
class Dropped:
    """Keep each entry at random and divide it by its probability.

    Attributes:
        density: the probability, or its mean.
        epsilon: how far the probability is from the density at most; it rises with the rank of the magnitude. None: the
            probability is the density.
    """

    density: float
    epsilon: float | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether every entry is kept."""
        return self.density == 1

    def apply(self, task_vectors: TaskVectors, place: int, values: Tensor) -> Tensor:
        """Drop entries of the selected rows of one task vector, in place, and return them."""
        numbers = task_vectors.uniform(place)
        density = task_vectors.density_of(place, self.density)
        if self.epsilon is None:
            return drop_(values, numbers, density)
        if values.dim() > 1:  # a matrix is ranked row by row, a vector as a whole
            return drop_(values, numbers, keep_probability(values, density, self.epsilon))
        probability = keep_probability(task_vectors.deltas[place].dense(), density, self.epsilon)
        return drop_(values, numbers, probability[slice(*task_vectors.span)])


Step = Trimmed | Dropped


@dataclass(frozen=True)
class ElectedSigns:
    """Hold an election; its signs are computed when they are used.

    Attributes:
        task_vectors: those that elect.
        by: `mass`, `count`, or `none` where all values agree.
    """

    task_vectors: TaskVectors
    by: ElectRule = "mass"

    def in_tile(self, tile: TaskVectors) -> Tensor:
        """Return the elected signs, +1 or −1, of the rows that are selected in a tile."""
        electing = replace(self.task_vectors, tile=tile.tile, counts={})
        return electing.sums(MergeRule(self.by)).elected(electing.sign_vector()).mul(2).sub_(1)


@dataclass(frozen=True)
class TaskVectors:
    """Hold the weighted task vectors w·τ of one part of one module, in the coordinates of the space.

    Iterating gives one float32 tensor for each adapter that has the module, in the order of the adapters.

    Attributes:
        deltas: w·τ of each adapter that has the module.
        weights: w of each of them.
        totals: of all adapters of the merge.
        streams: for each, the key of its random numbers.
        steps: the changes that are made to each vector as it is read, in order.
        tile: the selected rows, which every reading is restricted to; None for all.
        declared: the trim over all modules; None if each trim finds its cuts from these vectors alone.
        densities: what replaces the method's own density, if it has one.
        order_statistics: for each, the values that the method asked for (see `order_statistics`); empty if it asks for none.
        signs: the vector that decides the signs, if the method was given one.
        statistics: of the whole module, for each, if the method `needs` them.
        inputs: the directions of the module's inputs that the columns represent, (columns, in), if the space has its
            own coordinates; None if each column is one input.
        pool: the threads that work through tiles, with their memory, and the kernels that they run.
        counts: for the report, summed over tiles.
    """

    deltas: Sequence[Delta]
    weights: Sequence[float]
    totals: WeightTotals = field(default_factory=WeightTotals)
    streams: Sequence[int] = ()
    steps: tuple[Step, ...] = ()
    tile: Tile | None = None
    declared: DeclaredTrim | None = None
    densities: Densities | None = None
    order_statistics: Sequence[tuple[float, ...]] = ()
    signs: Delta | None = None
    statistics: Sequence[Statistic] = ()
    inputs: Tensor | None = None
    pool: ThreadPool = field(default_factory=lambda: ThreadPool(1))
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, vectors: Sequence[Tensor], weights: Sequence[float] | None = None) -> TaskVectors:
        """Return task vectors made of tensors, for trying a method without any adapter.

        Args:
            vectors: one for each adapter, of one shape, (out, in) or (k,).
            weights: w of each, 1 by default; each tensor is multiplied by its own.
        """
        own = [1.0] * len(vectors) if weights is None else list(weights)
        deltas = [Dense(vector.float() * weight) for vector, weight in zip(vectors, own, strict=True)]
        return cls(deltas, own, WeightTotals.of(own), streams=range(len(own)))

    def __len__(self) -> int:
        return len(self.deltas)

    @property
    def adapters(self) -> int:
        """N, of all adapters of the merge, also those that lack the module."""
        return self.totals.adapters

    @property
    def total_weight(self) -> float:
        """Σw over all adapters of the merge."""
        return self.totals.weight

    @property
    def total_magnitude(self) -> float:
        """Σ|w| over all adapters of the merge."""
        return self.totals.magnitude

    def __iter__(self) -> Iterator[Tensor]:
        """Yield each vector as a tensor of its own."""
        return (values.clone() for values in self.stream())

    def stream(self) -> Iterator[Tensor]:
        """Yield each vector in memory that the next one overwrites; the caller may write into it."""
        self._find_cuts()
        for place, delta in enumerate(self.deltas):
            values = self._read(delta)
            for step in self.steps:
                values = step.apply(self, place, values)
            yield values

    def _find_cuts(self) -> None:
        """Find the cuts of all trims, before several threads need them and before their memory is in use."""
        for step in self.steps:
            if isinstance(step, Trimmed):
                _ = step.cuts

    def _read(self, delta: Delta) -> Tensor:
        """Return the selected rows of one task vector.

        Cuts and order statistics were found tile by tile, so that all rows are read by the same tiles: the bits must agree.
        """
        out = self.scratch("vector", self.shape)
        if self.tile is not None:
            return self.pool.kernels.read(delta, self.tile.rows, out)
        if not self.order_statistics and not any(isinstance(step, Trimmed) for step in self.steps):
            return delta.rows(*self.span, out=out)
        for start, stop in self.grid:
            part = out[start:stop]
            part.copy_(self.pool.kernels.read(delta, (start, stop), part))
        return out

    # what is selected

    @property
    def span(self) -> tuple[int, int]:
        """The range of selected rows."""
        return (0, self.deltas[0].shape[0]) if self.tile is None else self.tile.rows

    @property
    def tile_number(self) -> int | None:
        """The number of the selected tile; None if all rows are selected."""
        return None if self.tile is None else self.tile.number

    @property
    def out(self) -> Tensor | None:
        """Memory that the result for the selected rows may be written into."""
        return None if self.tile is None else self.tile.out

    @property
    def start(self) -> int:
        """The flat index of the first selected entry."""
        return self.span[0] * math.prod(self.shape[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of every vector read."""
        start, stop = self.span
        return (stop - start, *self.deltas[0].shape[1:])

    @cached_property
    def device(self) -> torch.device:
        """The device that holds the vectors."""
        return self.deltas[0].rows(0, 0).device

    @property
    def grid(self) -> list[tuple[int, int]]:
        """The tiles of the whole part."""
        return self.pool.tiles(self.deltas[0].shape, self.device)

    @property
    def keeps_all(self) -> bool:
        """Whether every step keeps every entry of every vector."""
        return not self.steps or (
            all(step.keeps_all for step in self.steps)
            and (self.densities is None or all(own == 1 for own in self.densities.each))
        )

    def scratch(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return float32 memory of this thread, which holds what its last use left there."""
        return self.pool.scratch(purpose, shape, self.device)

    def uniform(self, place: int) -> Tensor:
        """Return a random number in [0, 1) for each selected entry of one task vector; it depends on the entry alone."""
        return uniform(self.streams[place], self.start, self.shape).to(self.device)

    def density_of(self, place: int, density: float) -> float:
        """Return the density of one task vector, if the method asks for `density`."""
        own = self.densities
        return density if own is None or density != own.own else own.each[place]

    def sign_vector(self) -> Tensor | None:
        """Return the selected rows of the vector that decides the signs."""
        return None if self.signs is None else self.signs.rows(*self.span)

    # which entries are kept

    def trim(self, density: float, scope: Scope = "module") -> TaskVectors:
        """Keep the ⌊density·n⌋ entries of largest magnitude of each task vector; set the others to zero.

        Args:
            density: the share that is kept, in (0, 1]. A density that the user sets for one adapter or module replaces
                the method's own, not any other number.
            scope: whether magnitudes are ranked over the whole `adapter` or over each `module`. Over the adapter only
                the trim that `Method.trims` declares, since its threshold is found in all modules before the first one
                is merged.
        """
        return self._trimmed(Trim((density,), scope))

    def keep_band(self, gamma: float, density: float, scope: Scope = "module") -> TaskVectors:
        """Set the ⌊γ·n⌋ entries of largest magnitude to zero and keep the next ⌊density·n⌋; `scope` as in `trim`."""
        return self._trimmed(Trim((gamma, density), scope))

    def _trimmed(self, asked: Trim) -> TaskVectors:
        step = Trimmed(asked, self._cut_finder(asked))
        return replace(self, steps=(*self.steps, step))

    def _cut_finder(self, asked: Trim) -> Callable[[], Cuts]:
        """Return a function that finds the cuts: those declared for the declared trim, for another one from these vectors."""
        if self.declared is not None and self.declared.trim == asked and not self.steps:
            return self.declared.cuts
        if asked.scope == "adapter" and self.declared is not None:
            raise MethodError(
                "a trim with scope 'adapter' has to be declared before the merge and comes before any other step. Return "
                "it from the method's trims(), or use scope 'module'."
            )
        if self.tile is not None:
            raise MethodError(
                "a trim needs whole task vectors, and these are some rows of them. Trim before by_tiles()."
            )
        bands = [(*asked.densities[:-1], self.density_of(place, asked.densities[-1])) for place in range(len(self))]
        return lambda: [
            find_cuts(values.abs(), own, self.grid) for values, own in zip(self.stream(), bands, strict=True)
        ]

    def drop(self, density: float) -> TaskVectors:
        """Keep each entry with probability `density`, divided by it; the random numbers depend on the entry alone."""
        return replace(self, steps=(*self.steps, Dropped(density)))

    def drop_by_rank(self, density: float, epsilon: float) -> TaskVectors:
        """Keep each entry with a probability from density − ε to density + ε, rising with its rank; divide by it."""
        return replace(self, steps=(*self.steps, Dropped(density, epsilon)))

    # combine

    def elect(self, by: ElectRule = "mass") -> ElectedSigns:
        """Elect one sign per entry: that of the sum of the values (`mass`) or of their signs (`count`); 0 goes to +.

        If the merge was given an adapter that decides the signs, its sign is taken wherever it is not 0. `none` holds
        no election: all values agree.
        """
        return ElectedSigns(self, by)

    def disjoint_merge(self, signs: ElectedSigns, by: DisjointRule = "mean", normalize: bool = True) -> Delta:
        """Combine, entry by entry, the values whose sign is the elected one; 0 where there is none.

        Args:
            signs: from `elect`, of these task vectors.
            by: `mean`, `sum` or `max` (largest magnitude) of the values that agree; `mean_elected` is their sum and
                `mean_all` the sum of all values, both divided by Σ|w| over all adapters.
            normalize: divide by Σ|w| of those adapters; else by their number.
        Returns: the merged task vector; in factors if it is a weighted sum of all entries.
        """
        rule = MergeRule(signs.by, by, normalize)
        if signs.task_vectors is not self:
            return self.by_tiles(lambda tile: tile._merge_rows_by(signs.in_tile(tile), rule))
        if self._is_weighted_sum(rule):
            return self._weighted_sum(rule)
        return self.by_tiles(lambda tile: tile._merge_rows(rule))

    def _is_weighted_sum(self, rule: MergeRule) -> bool:
        """Return whether the result is a weighted sum of whole task vectors, which can be added in factors."""
        linear = len(self) == 1 or rule.sums_both_signs
        return linear and self.tile is None and self.signs is None and self.keeps_all

    def _weighted_sum(self, rule: MergeRule) -> Delta:
        if rule.disjoint in ("mean_elected", "mean_all"):
            return self.sum(1 / (self.total_magnitude if rule.normalize else self.adapters))
        alone = len(self) == 1 and rule.disjoint == "mean" and rule.normalize
        return self.sum(1 / abs(self.weights[0]) if alone else 1.0)

    def _merge_rows(self, rule: MergeRule) -> Tensor:
        """Return the disjoint merge of the selected rows, and count conflicts for the report."""
        merged, conflicts = self.pool.kernels.merge(self, rule)
        self.count(*conflicts)
        return merged

    def _merge_rows_by(self, signs: Tensor, rule: MergeRule) -> Tensor:
        """Return the same by given signs, which must be there already: both elections use the same scratch memory."""
        sums = self.sums(rule)
        self.count(*sums.conflicts())
        return sums.result(signs)

    def limits(self) -> list[float] | None:
        """Return for each vector the largest magnitude that is trimmed away.

        None if a step other than a trim changes it, or the trim also removes entries that equal the threshold.
        """
        step = self.steps[0] if len(self.steps) == 1 else None
        if not isinstance(step, Trimmed) or len(step.trim.densities) > 1:
            return None
        if any(cut.excess_in(self.tile_number) for (cut,) in step.cuts):
            return None
        return [cut.limit for (cut,) in step.cuts]

    def sums(self, rule: MergeRule) -> SignedSums:
        """Return the sums of the selected rows, over positive and over negative values, for a rule of merging."""
        total = self.total_magnitude if rule.normalize else float(self.adapters)
        sums = SignedSums(self.scratch("sums", (5, *self.shape)), rule, total)
        for values, weight in zip(self.stream(), self.weights, strict=True):
            sums.add(values, weight)
        return sums

    def count(self, conflicting: int, shared: int) -> None:
        """Add to the report's counts: entries with kept values of both signs, and entries that two or more keep."""
        for name, number in (("conflicting", conflicting), ("shared", shared)):
            self.counts[name] = self.counts.get(name, 0) + number

    def sum(self, factor: float | Sequence[float] = 1.0) -> Delta:
        """Return Σ factorᵢ·wᵢ·τᵢ; exactly, in factors of rank Σrᵢ, if every entry is kept.

        Args:
            factor: one for all, or one for each.
        """
        factors = [float(factor)] * len(self) if isinstance(factor, (int, float)) else list(factor)
        if self.tile is not None or not self.keeps_all:
            return self.by_tiles(lambda tile: tile.dense_sum(factors))
        factored = [delta for delta in self.deltas if isinstance(delta, LowRank)]
        if len(factored) == len(self.deltas):
            return Sum(factored, factors)
        return stack([delta.scaled(own) for delta, own in zip(self.deltas, factors, strict=True)])

    def dense_sum(self, factors: Sequence[float] = ()) -> Tensor:
        """Return Σ factorᵢ·wᵢ·τᵢ of the selected rows as a tensor; each factor is 1 by default."""
        total: Tensor | None = None
        for values, factor in zip(self.stream(), factors or [1.0] * len(self), strict=True):
            own = values if factor == 1 else values * factor
            total = own.clone() if total is None else total.add_(own)
        assert total is not None
        return total

    def by_tiles(self, work: Callable[[TaskVectors], Tensor]) -> Delta:
        """Return a result that several threads compute, a tile of rows at a time.

        Args:
            work: work(tile) returns the result for the rows that are selected in `tile`. Each entry of it may depend
                only on the same entry of the task vectors.
        """
        if self.tile is not None:
            return Dense(work(self))
        self._find_cuts()
        result = empty(self.deltas[0].shape, self.device)
        grid = self.grid

        def one(number: int) -> dict[str, int]:
            out = result[slice(*grid[number])]
            part = replace(self, tile=Tile(number, grid[number], out), counts={})
            merged = work(part)
            if merged is not out:
                out.copy_(merged)
            return part.counts

        for counts in self.pool.map(one, range(len(grid)), self.device.type != "cpu"):
            for what, number in counts.items():
                self.counts[what] = self.counts.get(what, 0) + number
        return Dense(result)

    # all vectors together

    def matrices(self) -> Tensor:
        """Return all task vectors stacked, (N, …), float64, for methods that need them together."""
        return torch.stack([delta.dense().double() for delta in self.deltas])

    def gram(self) -> Tensor:
        """Return the inner products ⟨wᵢτᵢ, wⱼτⱼ⟩, (N, N), float64, without multiplying factors out."""
        gram = torch.zeros(len(self), len(self), dtype=torch.float64)
        for i in range(len(self)):
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = inner(self.deltas[i], self.deltas[j])
        return gram


__all__ = ["ElectedSigns", "Statistic", "TaskVectors"]
