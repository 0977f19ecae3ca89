"""What a method is: a frozen model whose fields are its parameters, whose docstring is its paper, with one `merge`.

One file in this folder each; the folder is the list. A complete method:

>>> from ties_peft.methods import Density, Method, TaskVectors
>>> class TrimmedMean(Method):
...     '''Average the task vectors, each trimmed to its largest entries.'''
...
...     name = "trimmed_mean"
...     density: Density = 0.2
...
...     def merge(self, task_vectors):
...         return task_vectors.trim(self.density).sum(1 / len(task_vectors))
>>> import torch
>>> vectors = TaskVectors.of([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])])
>>> TrimmedMean(density=0.5).merge(vectors).dense()
tensor([1.5000, 1.0000])

`ties_peft.methods.register` makes it known by its name. `merge` is called once for every module, on every path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..task_vectors.collection import Ranking, TaskVectors
from ..task_vectors.delta import Delta, Dense, Mapped
from ..task_vectors.random_numbers import stream_key, uniform
from ..task_vectors.trim import KEEP_ALL, Scope, Trim

Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
OF_MERGE = ("entrywise", "spectral", "linear")  # what a class says of its own `merge`


class Method(BaseModel, ABC):
    """A way of combining task vectors. A subclass needs a `name`, a docstring and a `merge`.

    Attributes:
        name: as users write it.
        default_scale: λ where the user gives none: a number, or a formula in N, the number of adapters (see `scale`).
        published_scale: λ as published, where it was worse than the default: who gives it is warned.
        spaces: where it can be used.
        kinds: of adapter it makes sense for.
        source: the paper.
        entrywise: whether each entry of the result depends on the same entry of the task vectors alone.
        spectral: whether it works on singular vectors. In space `delta` it is then handed the task
            vectors in shared orthonormal bases, where they are small and the result is the same.
        ordered: whether the order of the adapters matters.
        random: whether it draws numbers, so that the seed matters.
        joint: whether its `prepare` must see all adapters at once.
        needs: the statistics that every adapter must have beside it: `fisher` or `gram`; None for none.

    `entrywise`, `spectral` and `linear` describe one `merge`: a subclass with a `merge` of its own starts from the
    defaults and states those that hold for it.
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
    ordered: ClassVar[bool] = False
    random: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    needs: ClassVar[str | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Forget what was said of an inherited `merge` where the class has its own."""
        super().__pydantic_init_subclass__(**kwargs)
        if "merge" in vars(cls):
            for name in OF_MERGE:
                if name not in vars(cls):
                    setattr(cls, name, vars(Method)[name])

    @abstractmethod
    def merge(self, task_vectors: TaskVectors) -> Tensor | Delta:
        """Return the merged task vector of one module, before the scale: a tensor of its shape, or factors."""

    def prepare(self, deltas: Sequence[Delta], streams: Sequence[int]) -> Sequence[Delta]:
        """Return the task vectors as the method that stands after this one shall see them.

        Args:
            deltas: of all adapters if the method is `joint`, else of any.
            streams: the key of each one's random numbers.
        """
        raise TypeError(f"method '{self.name}' cannot stand before another")

    def finish(self, merged: Delta, task_vectors: TaskVectors) -> Delta:
        """Return what another method made of the task vectors, changed.

        A method that can both prepare and finish does both when it stands before another.

        Args:
            merged: what the other method returned.
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
        """Return the trim that `merge` asks for, whose cuts are found before it; by default from density and scope."""
        density, scope = getattr(self, "density", None), getattr(self, "scope", None)
        return None if density is None or scope is None or self.rankings() else Trim((density,), scope)

    def rankings(self) -> Sequence[Ranking]:
        """Return the order statistics to find before the merge; each ranking sees the levels of those before it."""
        return ()

    def normalizes_statistics(self) -> bool:
        """Return whether the statistics of each adapter are divided by their norm over all its modules."""
        return False

    def linear(self, adapters: int) -> bool:
        """Return whether the result is a weighted sum of so many task vectors, hence exact at rank Σrᵢ."""
        return False

    def has_flat_spectrum(self) -> bool:
        """Whether it makes all directions of the result, or all beyond the first few, about equally strong.

        A rank that cuts such a result leaves out directions that count as much as those that stay, so that rank
        `auto` keeps all of them, and a smaller rank is warned of.
        """
        return False

    def check(self, weights: Sequence[float], space: str) -> str | None:
        """Return what is wrong with using it on these weights in this space; None if nothing."""
        return None


def merged(method: Method, task_vectors: TaskVectors) -> Delta:
    """Return what a method makes of the task vectors of one part of a module."""
    made = method.merge(task_vectors)
    return Dense(made.float()) if isinstance(made, Tensor) else made


def scope_fault(method: Method, scope: Scope, space: str) -> str | None:
    """Return what is wrong with asking for a scope in a space: in `factors` only `module` has a meaning."""
    if space == "factors" and scope == "adapter" and "scope" in method.model_fields_set:
        return "scope 'adapter' is not offered in space 'factors', where A and B are each ranked on their own; use scope 'module'"
    return None


def masked(delta: Delta, change: Callable[[Tensor, Tensor], Tensor], stream: int) -> Mapped:
    """Return a task vector that is read through change(values, uniform numbers): how `prepare` drops at random.

    The numbers belong to the entries (see `random_numbers`); change must commute with scaling.
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
    "TaskVectors",
    "Trim",
    "masked",
    "merged",
    "scope_fault",
    "stream_key",
]
