"""Define what a method of merging is. Each method is one file in this folder, and the folder is the list of methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..task_vectors.collection import TaskVectors
from ..task_vectors.delta import Delta, Dense, Mapped
from ..task_vectors.order_statistics import OrderStatistics
from ..task_vectors.random_numbers import uniform
from ..task_vectors.trim import Scope, Trim

Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
ABOUT_MERGE = ("entrywise", "spectral", "linear")  # statements about the `merge` of the same class


class Choice(NamedTuple):
    """The method that a merge uses.

    Attributes:
        method: with its parameters.
        reason: why another method chose it, as the report gives it; empty if it was asked for.
    """

    method: Method
    reason: str = ""


class Method(BaseModel, ABC):
    """A rule that combines the task vectors of one module.

    A method is a frozen pydantic model: its annotated fields are its parameters, and its docstring is its paper. It needs
    a `name`, a docstring and a `merge`. A complete method:

    >>> from ties_peft.methods import Density, Method, TaskVectors
    >>> class TrimmedMean(Method):
    ...     '''Average the task vectors, each trimmed to its largest entries.'''
    ...
    ...     name = "trimmed_mean"
    ...     density: Density = 0.2
    ...
    ...     def merge(self, task_vectors):
    ...         return task_vectors.trim(self.density).sum(1 / len(task_vectors))

    Try it on tensors, without any adapter:

    >>> import torch
    >>> vectors = TaskVectors.of([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])])
    >>> TrimmedMean(density=0.5).merge(vectors).dense()
    tensor([1.5000, 1.0000])

    With `@register` above the class (`from ties_peft.methods import register`) the running process knows it by its name,
    as in `ties_peft.merge([...], "trimmed_mean", density=0.5)`. With an entry point of the group `ties_peft.methods` every
    process does, also that of the command line (docs/architecture.md).

    `merge` is called once for every module, on every path, at every size. `task_vectors` holds w·τ of every adapter that
    has the module, and iterating gives one tensor for each. `trim`, `keep_band`, `drop` and `drop_by_rank` remove entries;
    `elect` and `disjoint_merge` are those of TIES; `sum` adds, exactly and in factors where every entry is kept;
    `matrices` gives all of them at once, `gram` their inner products. `adapters`, `total_weight` and `total_magnitude`
    are N, Σw and Σ|w| over all adapters of the merge, also those without the module. Do not apply λ, which multiplies
    the result of every method.

    A rule that works entry by entry is given to `by_tiles`, which calls it on a few rows at a time, so that memory stays
    small:

    >>> class Agreement(Method):
    ...     '''Average the task vectors, each entry scaled by how far the adapters agree in its sign.'''
    ...
    ...     name = "agreement"
    ...     entrywise = True
    ...
    ...     def merge(self, task_vectors):
    ...         return task_vectors.by_tiles(self._merge_rows)
    ...
    ...     def _merge_rows(self, rows):
    ...         vectors = torch.stack(list(rows))
    ...         agreement = vectors.sign().sum(0).abs() / rows.adapters
    ...         return vectors.sum(0) / rows.total_magnitude * agreement
    >>> Agreement().merge(vectors).dense()
    tensor([2.0000, 1.5000])

    Everything else has a default, and is overridden only where it differs:

    - where the method can be used: `spaces`, `kinds`, `needs`, and `check` for anything else;
    - its λ: `default_scale`, `published_scale`;
    - how it can be computed: `entrywise`, `spectral`, `linear`, `has_flat_spectrum`. They save memory and time or choose
      the rank; without them the result is right, but slower, or cut to the default rank;
    - what is found over all modules before the first merge: `trims`, `order_statistics`;
    - which other methods it stands for: `choose`;
    - its place in a row of methods such as `dare+ties`: `prepare` to stand before another, `finish` to stand after one.

    Attributes:
        name: as users write it.
        default_scale: λ where the user gives none: a number, or a formula in N, the number of adapters, such as
            "1/sqrt(N)".
        published_scale: λ as published, where it measured worse than the default; a user who sets it is warned.
        spaces: in which it can be used.
        kinds: the PEFT types that it can merge: `ia3`, and `lora` for LoRA and all types that become LoRA.
        source: the paper, with its number on arXiv.
        entrywise: whether each entry of the result depends on the same entry of the task vectors alone, apart from the
            trims and drops of `TaskVectors`, which do not count.
        spectral: whether it works on singular vectors. In space `delta` it then gets the task vectors in shared
            orthonormal bases, where they are small and the result is the same.
        joint: whether `prepare` must get all adapters at once.
        needs: the statistics that must lie beside every adapter, `fisher` or `gram`; None for none.

    `entrywise`, `spectral` and `linear` are statements about one `merge`. A subclass of a method that overrides `merge`
    does not inherit them; it states those that hold for its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str]
    default_scale: ClassVar[float | str] = 1.0
    published_scale: ClassVar[float | None] = None
    spaces: ClassVar[tuple[str, ...]] = ("delta", "core", "knots")
    kinds: ClassVar[tuple[str, ...]] = ("lora", "ia3")
    source: ClassVar[str] = ""
    entrywise: ClassVar[bool] = False
    spectral: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    needs: ClassVar[str | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Reset the statements about an inherited `merge` in a class with its own."""
        super().__pydantic_init_subclass__(**kwargs)
        if "merge" in vars(cls):
            for name in ABOUT_MERGE:
                if name not in vars(cls):
                    setattr(cls, name, vars(Method)[name])

    @abstractmethod
    def merge(self, task_vectors: TaskVectors) -> Tensor | Delta:
        """Return the merged task vector of one module, without the scale λ: a tensor of its shape, or factors."""

    def choose(
        self, kind: str, space: str = "delta", own_densities: bool = False, rank: int | None = None, total: int = 0
    ) -> Choice:
        """Return the method that a merge uses in place of this one; by default this one.

        Args:
            kind: the PEFT type that is written, `lora` or `ia3`.
            space: the coordinates that were asked for.
            own_densities: whether an adapter has a density of its own.
            rank: of the result, where a number was asked for.
            total: Σrᵢ.
        """
        return Choice(self)

    @classmethod
    def chooses(cls) -> bool:
        """Return whether it stands for other methods, by `choose`, and is none itself."""
        return cls.choose is not Method.choose

    def prepare(self, deltas: Sequence[Delta], streams: Sequence[int]) -> Sequence[Delta]:
        """Return the task vectors that the next method in the row gets.

        Args:
            deltas: w·τ of all adapters if the method is `joint`, else of any of them.
            streams: for each, the key of its random numbers.
        """
        raise TypeError(f"method '{self.name}' cannot stand before another")

    def finish(self, merged: Delta, task_vectors: TaskVectors) -> Delta:
        """Return the result of the row of methods, changed by this one.

        A method that has both `prepare` and `finish` does both when it stands before another.

        Args:
            merged: the result of the methods before it.
            task_vectors: as they were before any preparation.
        """
        raise TypeError(f"method '{self.name}' cannot stand after another")

    @classmethod
    def prepares(cls) -> bool:
        """Return whether it can stand before another method."""
        return cls.prepare is not Method.prepare

    @classmethod
    def finishes(cls) -> bool:
        """Return whether it can stand after another method."""
        return cls.finish is not Method.finish

    def trims(self) -> Trim | None:
        """Return the trim that `merge` will ask for; None if each of its trims is of one module.

        A threshold over the whole adapter must be known before the first module is merged, so it is declared here. A
        method that has the parameters `density` and `scope`, and no `order_statistics`, need not override this.
        """
        density, scope = getattr(self, "density", None), getattr(self, "scope", None)
        return None if density is None or scope is None or self.order_statistics() else Trim((density,), scope)

    def order_statistics(self) -> Sequence[OrderStatistics]:
        """Return the order statistics that `merge` needs; each can use the values found for those before it."""
        return ()

    def linear(self, adapters: int) -> bool:
        """Return whether the result for this many adapters is a weighted sum of task vectors, exact at rank Σrᵢ."""
        return False

    def has_flat_spectrum(self) -> bool:
        """Return whether all directions of the result, or all but the first few, are about equally strong.

        A smaller rank would leave out directions that count as much as those it keeps. Rank `auto` therefore keeps all
        of them, and a smaller rank is warned of.
        """
        return False

    def check(self, weights: Sequence[float], space: str) -> str | None:
        """Return why the method cannot be used with these weights in this space; None if it can."""
        return None


def merge_to_delta(method: Method, task_vectors: TaskVectors) -> Delta:
    """Return the result of a method's `merge` as a `Delta`."""
    result = method.merge(task_vectors)
    return Dense(result.float()) if isinstance(result, Tensor) else result


def masked(delta: Delta, change: Callable[[Tensor, Tensor], Tensor], stream: int) -> Mapped:
    """Return a task vector of which change(values, uniform numbers) is read: for a `prepare` that drops at random.

    Args:
        delta: the task vector.
        change: must commute with scaling.
        stream: the key of the random numbers, of which each entry has its own (see `random_numbers`).
    """

    def apply(values: Tensor, start: int, drawn: bool) -> Tensor:
        numbers = uniform(stream + 1 if drawn else stream, start, tuple(values.shape))
        return change(values, numbers.to(values.device))

    return Mapped(delta, apply)


__all__ = [
    "Choice",
    "Density",
    "Method",
    "OrderStatistics",
    "Scope",
    "TaskVectors",
    "Trim",
    "masked",
    "merge_to_delta",
]
