"""Method: one way of combining task vectors. One file in this folder each; the folder is the list.

A method is a frozen pydantic model: its fields are its parameters, its docstring is its paper, and
it has one `merge`. Some can also stand before another method (`prepare`) or after one (`finish`), as
`dare` in dare+ties or `iso_c` in ties+iso_c. What it is handed is a `TaskVectors`: the weighted task vectors of one part of
one module, lazily, with a length, iterable again and again. A streaming method loops once and keeps
accumulators; an iterative one loops again; one that only sums asks for the exact sum.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .. import fused
from ..delta import Delta, Dense, LowRank, Mapped, inner, stack
from ..draws import key, uniform
from ..elect import Ballot, Combine, Election, Vote
from ..factorise import Sum
from ..fast import Loops
from ..statistics import Statistic
from ..tiles import Workers, empty
from ..trim import KEEP_ALL, Cut, Scope

Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


@dataclass(frozen=True)
class Trim:
    """A wish for exact cuts by magnitude.

    Attributes:
        densities: the shares of bands of magnitudes, from the largest down; a cut is found at the
            lower end of each. A density set for one adapter or module replaces the last, which is
            kept whole: those above give way where together they exceed 1.
        scope: over what magnitudes are ranked.
    """

    densities: tuple[float, ...]
    scope: Scope = "adapter"


@dataclass(frozen=True)
class Ranking:
    """A wish for order statistics of values that a method gives to all entries of each adapter.

    Attributes:
        values: values(task_vectors) gives for each of them the values of the entries at hand, float32, any sign; each
            is good until the next is asked for.
        ranks: ranks(entries, density) are the ranks wanted of so many values, 1 for the largest.
        scope: over what the values are ranked.
    """

    values: Callable[[TaskVectors], Iterable[Tensor]]
    ranks: Callable[[int, float], Sequence[int]]
    scope: Scope


@dataclass(frozen=True)
class Task:
    """One adapter's weighted task vector w·τ, on the rows at hand.

    Attributes:
        vector: float32; it may be written into, and is good until the next one is asked for.
        weight: w.
        cuts: where the trim that the method asked for cuts it, one cut for each density.
        tile: which tile of the part this is.
        start: flat index of the first entry at hand.
        stream: of this adapter's random numbers on this part.
        density: the share to keep of it, if the method has a density: its own, or one set for the adapter.
        levels: the values of the ranks that the method asked for, of all its rankings in order.
    """

    vector: Tensor
    weight: float
    cuts: tuple[Cut, ...]
    tile: int
    start: int
    stream: int
    density: float | None = None
    levels: tuple[float, ...] = ()

    def trimmed(self, number: int = 0) -> Tensor:
        """The vector, cut in place where density `number` cuts it."""
        return self.cuts[number].apply_(self.vector, self.tile) if self.cuts else self.vector

    def uniform(self) -> Tensor:
        """One number in [0, 1) for each entry at hand, the same in every tiling."""
        return uniform(self.stream, self.start, tuple(self.vector.shape)).to(self.vector.device)


@dataclass
class TaskVectors:
    """The task vectors of one part of one module, restricted to a tile where the method allows it.

    Attributes:
        deltas: w·τ of each adapter that has the module, whole.
        weights: w of each of them.
        cuts: for each, where it is cut; empty where the method trims nothing.
        densities: for each, the share to keep of it; empty where the method has no density.
        levels: for each, the values of the ranks that the method asked for; empty where it asks for none.
        total_weight: Σw over all adapters of the merge, also those that lack the module.
        total_heft: Σ|w| over them.
        adapters: how many adapters the merge has, also those that lack the module.
        rows: the range of rows at hand; None for all.
        tile: the number of that range in the part's grid.
        grid: the ranges in which a vector is read whose rows are all at hand: those in which its cuts and levels were found, so
            that the numbers have the same bits; empty to read it at once.
        signs: the vector that decides the signs, if the method was given one.
        statistics: of each, where the method `needs` them, those of the whole module.
        inputs: the directions among the module's inputs that the columns stand for, (columns, in), where the
            space has coordinates of its own; None where each column is one input.
        streams: of each one's random numbers.
        room: gives memory by purpose and shape, its content left from the last use.
        loops: the compiled loops, if the merge uses them.
        out: where the merge of the rows at hand may be written, of their shape, and then be returned.
        tally: numbers that a method wants summed over tiles for the report.
    """

    deltas: Sequence[Delta]
    weights: Sequence[float]
    cuts: Sequence[tuple[Cut, ...]] = ()
    densities: Sequence[float] = ()
    levels: Sequence[tuple[float, ...]] = ()
    total_weight: float = 1.0
    total_heft: float = 1.0
    adapters: int = 1
    rows: tuple[int, int] | None = None
    tile: int = 0
    grid: Sequence[tuple[int, int]] = ()
    signs: Delta | None = None
    statistics: Sequence[Statistic] = ()
    inputs: Tensor | None = None
    streams: Sequence[int] = ()
    room: Callable[[str, Sequence[int]], Tensor] = lambda purpose, shape: torch.empty(*shape)
    loops: Loops | None = None
    out: Tensor | None = None
    tally: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.deltas)

    def __iter__(self) -> Iterator[Task]:
        start = self.span[0] * math.prod(self.shape[1:])
        for place, (delta, weight) in enumerate(zip(self.deltas, self.weights, strict=True)):
            vector = self._read(delta)
            cuts = self.cuts[place] if self.cuts else ()
            stream = self.streams[place] if self.streams else place
            density = self.densities[place] if self.densities else None
            levels = self.levels[place] if self.levels else ()
            yield Task(vector, weight, cuts, self.tile, start, stream, density, levels)

    def _read(self, delta: Delta) -> Tensor:
        """The rows at hand of one task vector, in memory that the next one takes."""
        out = self.room("vector", self.shape)
        if not self.grid:
            return fused.read(delta, self.span, out, self.loops, self.room)
        for start, stop in self.grid:
            part = out[start:stop]
            part.copy_(fused.read(delta, (start, stop), part, self.loops, self.room))
        return out

    @property
    def span(self) -> tuple[int, int]:
        """The range of rows at hand."""
        return self.rows or (0, self.deltas[0].shape[0])

    @property
    def device(self) -> torch.device:
        """Where the vectors live."""
        return self.deltas[0].rows(0, 0).device

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every vector at hand."""
        start, stop = self.span
        return (stop - start, *self.deltas[0].shape[1:])

    @property
    def untouched(self) -> bool:
        """Whether neither a cut nor a density under 1 takes anything away from any of them."""
        return all(cuts[-1].threshold == 0 for cuts in self.cuts) and all(share == 1 for share in self.densities)

    @property
    def whole(self) -> bool:
        """Whether all rows are at hand, untouched: a method that is linear on them can answer in factors."""
        return self.rows is None and self.untouched

    def sign_vector(self) -> Tensor | None:
        """The rows at hand of the vector that decides the signs."""
        return None if self.signs is None else self.signs.rows(*self.span)

    def vectors(self) -> Iterator[Tensor | None]:
        """Of each, all of it if it is a vector; None if it is a matrix, whose tiles have whole rows."""
        yield from (delta.dense() if len(delta.shape) == 1 else None for delta in self.deltas)

    def sum(self, factor: float | Sequence[float] = 1.0) -> Delta:
        """Σ factorᵢ · wᵢ·τᵢ, exactly: factors side by side, at rank Σrᵢ."""
        factors = [factor] * len(self.deltas) if isinstance(factor, (int, float)) else factor
        factored = [delta for delta in self.deltas if isinstance(delta, LowRank)]
        if len(factored) == len(self.deltas):
            return Sum(factored, factors)
        return stack([delta.scaled(f) for delta, f in zip(self.deltas, factors, strict=True)])

    def matrices(self) -> Tensor:
        """All of them at once, (N, …), float64: for methods that need them together, in a small space."""
        return torch.stack([delta.dense().double() for delta in self.deltas])

    def gram(self) -> Tensor:
        """⟨wᵢτᵢ, wⱼτⱼ⟩, (N, N), float64; from factors without multiplying them out."""
        gram = torch.zeros(len(self), len(self), dtype=torch.float64)
        for i in range(len(self)):
            for j in range(i + 1):
                gram[i, j] = gram[j, i] = inner(self.deltas[i], self.deltas[j])
        return gram


class Method(BaseModel, ABC):
    """A way of combining task vectors.

    Attributes:
        name: as users write it.
        default_scale: λ where the user gives none: a number, or a formula in N, the number of adapters (see `scale`).
        spaces: where it can be used.
        kinds: of adapter it makes sense for.
        source: the paper.
        entrywise: whether `merge` may be given a few rows at a time; else it is given whole modules.
        spectral: whether it works on singular vectors. In space `delta` it is then handed the task
            vectors in shared orthonormal bases, where they are small and the result is the same.
        ordered: whether the order of the adapters matters.
        random: whether it draws numbers, so that the seed matters.
        prepares: whether it can stand before another method; `joint` if it must see all adapters at once.
        finishes: whether it can stand after another method.
        needs: the statistics that every adapter must have beside it: `fisher` or `gram`; None for none.
        declared: the `merge` that the class was made with.

    `entrywise`, `spectral`, `linear` and `election` describe one `merge` and allow faster ways to its result. A merge
    does not rely on them where a subclass has a `merge` of its own: the subclass states those that hold for it again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str]
    default_scale: ClassVar[float | str] = 1.0
    spaces: ClassVar[tuple[str, ...]] = ("delta", "core", "knots")
    kinds: ClassVar[tuple[str, ...]] = ("lora", "ia3")
    source: ClassVar[str]
    entrywise: ClassVar[bool] = False
    spectral: ClassVar[bool] = False
    ordered: ClassVar[bool] = False
    random: ClassVar[bool] = False
    prepares: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    finishes: ClassVar[bool] = False
    needs: ClassVar[str | None] = None
    declared: ClassVar[Callable[..., Tensor | Delta]]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Remember the `merge` that the class is made with."""
        super().__pydantic_init_subclass__(**kwargs)
        cls.declared = cls.merge

    @abstractmethod
    def merge(self, tasks: TaskVectors) -> Tensor | Delta:
        """The merged vector of `tasks`, before the scale: a tensor of their shape, or factors."""

    def prepare(self, deltas: Sequence[Delta], streams: Sequence[int]) -> Sequence[Delta]:
        """The task vectors as another method shall see them; all of them if `joint`, else any one alone."""
        raise TypeError(f"method '{self.name}' cannot stand before another")

    def finish(self, merged: Delta, tasks: TaskVectors) -> Delta:
        """What another method made of the task vectors, changed; `tasks` are as they were before any preparation.

        A method that can both prepare and finish does both when it stands before another.
        """
        raise TypeError(f"method '{self.name}' cannot stand after another")

    def trims(self) -> Trim | None:
        """The cuts to prepare, None for none."""
        return None

    def rankings(self) -> Sequence[Ranking]:
        """The order statistics to find before the merge, in order; each ranking sees the levels of those before it."""
        return ()

    def normalizes(self) -> bool:
        """Whether the statistics of each adapter are divided by their norm over all its modules."""
        return False

    def election(self) -> Election | None:
        """How what the trim leaves is elected and combined, of a method that does nothing else; None for others."""
        return None

    def linear(self, adapters: int) -> bool:
        """Whether the result is a weighted sum, hence exact at rank Σrᵢ."""
        return False

    def check(self, weights: Sequence[float], space: str) -> str | None:
        """What is wrong with using it on these weights in this space; None if nothing."""
        return None


def _describes(method: Method, name: str) -> bool:
    """Whether an attribute of a method is stated for the `merge` that it has: beside it, or in a subclass."""
    cls = type(method)
    where = {key: next(i for i, base in enumerate(cls.__mro__) if key in vars(base)) for key in (name, "merge")}
    return cls.merge is cls.declared and where[name] <= where["merge"]


def is_entrywise(method: Method) -> bool:
    """Return whether `merge` may be given a few rows at a time."""
    return method.entrywise and _describes(method, "entrywise")


def is_spectral(method: Method) -> bool:
    """Return whether `merge` works on singular vectors."""
    return method.spectral and _describes(method, "spectral")


def is_linear(method: Method, adapters: int) -> bool:
    """Return whether `merge` gives a weighted sum of so many task vectors."""
    return method.linear(adapters) and _describes(method, "linear")


def only_elects(method: Method) -> Election | None:
    """Return how `merge` elects and combines, if it does nothing else."""
    return method.election() if _describes(method, "election") else None


def merge_part(method: Method, tasks: TaskVectors, crew: Workers, tally: dict[str, int]) -> Delta:
    """One part: whole, or tile by tile where the method works entry by entry."""
    if not is_entrywise(method) or (is_linear(method, len(tasks)) and tasks.untouched):
        merged = method.merge(_in_one(tasks, crew, tally))
        return Dense(merged.float()) if isinstance(merged, Tensor) else merged
    result = empty(tasks.deltas[0].shape, tasks.device)
    grid = crew.tiles(result.shape, result.device)

    def tile(number: int) -> dict[str, int]:
        start, stop = grid[number]
        part = replace(tasks, rows=(start, stop), tile=number, tally={}, out=result[start:stop])
        merged = method.merge(part)
        if merged is not part.out:
            result[start:stop] = merged if isinstance(merged, Tensor) else merged.dense()
        return part.tally

    for counts in crew.map(tile, range(len(grid))):
        for what, count in counts.items():
            tally[what] = tally.get(what, 0) + count
    return Dense(result)


def _in_one(tasks: TaskVectors, crew: Workers, tally: dict[str, int]) -> TaskVectors:
    """The task vectors with all rows at hand; their cuts, which were found tile by tile, in one tile."""
    cuts = [tuple(cut.in_one() for cut in own) for own in tasks.cuts]
    grid = crew.tiles(tasks.deltas[0].shape, tasks.device) if cuts or tasks.levels else ()
    return replace(tasks, tally=tally, cuts=cuts, grid=grid)


def elect_and_merge(
    tasks: TaskVectors,
    vectors: Iterable[Tensor],
    elect: Vote = "mass",
    disjoint: Combine = "mean",
    normalize: bool = True,
    below: Sequence[float] = (),
) -> Tensor:
    """The disjoint merge of what a method leaves of the task vectors, one at a time; it counts conflicts for the report.

    Args:
        tasks: the task vectors.
        vectors: of each, in order, what is left; it is good until the next one is asked for.
        elect, disjoint, normalize: as in `Ballot`.
        below: for each, the largest magnitude that has no vote; none for zeros alone.
    """
    total = tasks.total_heft if normalize else float(tasks.adapters)
    ballot = Ballot(tasks.room("ballot", (5, *tasks.shape)), elect, disjoint, normalize, total, tasks.loops)
    for vector, weight, least in zip(vectors, tasks.weights, below or [0.0] * len(tasks), strict=True):
        ballot.cast(vector, weight, least)
    _tell(tasks, ballot.conflicts())
    return ballot.result(tasks.sign_vector())


def trim_elect_and_merge(tasks: TaskVectors, election: Election) -> Tensor:
    """`elect_and_merge` of the trimmed task vectors; in one loop where it is compiled and nothing is out of the way.

    Law: the same within float32, of exactly the same entries.
    """
    how = election.elect, election.disjoint, election.normalize
    clear = election.disjoint != "max" and all(cuts[0].whole(tasks.tile) for cuts in tasks.cuts)
    if not clear or not tasks.cuts:
        return elect_and_merge(tasks, (task.trimmed() for task in tasks), *how)
    below = [cuts[0].below for cuts in tasks.cuts]
    hefts, out, loops = fused_hefts(tasks, election), tasks.out, tasks.loops
    if hefts is None or out is None or loops is None:
        return elect_and_merge(tasks, (task.vector for task in tasks), *how, below)
    mean = election.disjoint == "mean"
    _tell(tasks, fused.vote(tasks.deltas, below, hefts, mean, tasks.span, out, loops, tasks.room))
    return out


def fused_hefts(tasks: TaskVectors, election: Election) -> list[float] | None:
    """What each one's vote adds to the divisor, where the compiled loops can hold the election; None where not."""
    plain = election.elect == "mass" and election.disjoint in ("mean", "sum")
    loops = tasks.loops
    if loops is None or not plain or tasks.signs is not None or len(tasks.shape) != 2:
        return None
    if not all(fused.fits(delta, loops) for delta in tasks.deltas):
        return None
    return [abs(weight) if election.normalize else 1.0 for weight in tasks.weights]


def _tell(tasks: TaskVectors, conflicts: tuple[int, int]) -> None:
    for name, count in zip(("conflicting", "shared"), conflicts, strict=True):
        tasks.tally[name] = tasks.tally.get(name, 0) + count


def only(tasks: TaskVectors, mean: bool) -> Delta:
    """The task vector of a single adapter, in factors: w·τ, or sign(w)·τ where a mean divides by |w|."""
    return tasks.sum(1 / abs(tasks.weights[0]) if mean else 1.0)


def scope_fault(method: Method, scope: Scope, space: str) -> str | None:
    """What is wrong with asking for a scope in a space: in `factors` only `module` has a meaning."""
    if space == "factors" and scope == "adapter" and "scope" in method.model_fields_set:
        return "scope 'adapter' is not offered in space 'factors', where A and B are each ranked on their own; use scope 'module'"
    return None


def masked(delta: Delta, change: Callable[[Tensor, Tensor], Tensor], stream: int) -> Mapped:
    """A task vector read through change(values, uniform numbers): how `prepare` drops at random.

    The numbers belong to the entries (see `draws`); change must commute with scaling.
    """

    def apply(values: Tensor, start: int, drawn: bool) -> Tensor:
        numbers = uniform(stream + 1 if drawn else stream, start, tuple(values.shape))
        return change(values, numbers.to(values.device))

    return Mapped(delta, apply)


__all__ = [
    "KEEP_ALL",
    "Density",
    "Method",
    "Ranking",
    "Scope",
    "Task",
    "TaskVectors",
    "Trim",
    "elect_and_merge",
    "is_entrywise",
    "is_linear",
    "is_spectral",
    "key",
    "masked",
    "merge_part",
    "only",
    "only_elects",
    "scope_fault",
    "trim_elect_and_merge",
]
