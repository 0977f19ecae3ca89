"""Space: the coordinates in which task vectors meet. One file in this folder each; the folder is the list.

A space turns each adapter's task vector into one or more *parts*, which a method merges each on its
own, and turns the merged parts back into one task vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..task_vectors.delta import Delta, LowRank, Mapped, Span, inner
from ..task_vectors.factorise import MAX_GRAM_SIDE, Factors, Run
from ..task_vectors.subspace import STRIP, products
from ..task_vectors.trim import Scope


class Encoding(ABC):
    """Some task vectors of one module in the coordinates that they share.

    Attributes:
        deltas: the task vectors.
        parts: for each of them, in the order given, its parts.
    """

    deltas: Sequence[Delta]
    parts: Sequence[tuple[Delta, ...]]

    @property
    def inputs(self) -> Tensor | None:
        """What the columns of a part stand for, orthonormal rows of inputs, (columns, in); None: an input each."""
        return None

    def prepare_decode(self, rank: int) -> Callable[[], None] | None:
        """What `decode` of a dense result at a rank needs that hangs on the task vectors alone, to be done before; or None."""
        return None

    @abstractmethod
    def decode(self, merged: Sequence[Delta], rank: int | None, run: Run = map) -> Factors:
        """The task vector that the merged parts make, at a rank; as it is for None, where its kind has none.

        Args:
            merged: the parts.
            rank: of the result, at most.
            run: how to call a function on several blocks, see `factorise`.
        """

    @cached_property
    def span(self) -> Span | None:
        """What the task vectors span; None where they are not all held in factors, or have too many."""
        factored = self._factored()
        few = 0 < sum(delta.rank for delta in factored) <= MAX_GRAM_SIDE
        return Span(factored) if few else None

    @property
    def lost_energy(self) -> float:
        """The share of the task vectors' energy that the coordinates have no room for; 0 where they hold everything."""
        return 0.0

    @property
    def bytes(self) -> int:
        """What its parts take in memory."""
        return sum(_bytes(part) for parts in self.parts for part in parts)

    @cached_property
    def products(self) -> Tensor:
        """⟨τᵢ, τⱼ⟩, (N, N), float64."""
        factored = self._factored()
        if not factored:
            return torch.tensor([[inner(a, b) for b in self.deltas] for a in self.deltas], dtype=torch.float64)
        few = sum(delta.rank for delta in factored) <= 2 * STRIP
        return self.span.products() if few and self.span is not None else products(factored)

    def squares(self) -> list[float]:
        """‖τᵢ‖²."""
        return [inner(delta, delta) for delta in self.deltas]

    def _factored(self) -> list[LowRank]:
        """The task vectors, if all of them are held in factors."""
        factored = [delta for delta in self.deltas if isinstance(delta, LowRank)]
        return factored if len(factored) == len(self.deltas) else []

    def weighted(self, place: int, weight: float) -> tuple[Delta, ...]:
        """The parts of w·τ."""
        return tuple(part.scaled(weight) for part in self.parts[place])

    def weights(self, weight: float) -> tuple[float, ...]:
        """The weight that each part carries in a disjoint mean."""
        return (weight,) * len(self.parts[0])


class Space(BaseModel, ABC):
    """A choice of coordinates: a frozen model whose fields are its parameters.

    Attributes:
        name: as users write it.
        shared: whether the coordinates depend on all the adapters together.
        lossless_rank: whether the merged vector's rank is at most Σrᵢ for any method.
        scopes: over what a trim may rank magnitudes; the first is used where the user names none.
        kinds: the kinds of adapter it makes sense for.
        in_factors: whether it takes every matrix as B·A.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    shared: ClassVar[bool] = False
    lossless_rank: ClassVar[bool] = False
    scopes: ClassVar[tuple[Scope, ...]] = ("adapter", "module")
    kinds: ClassVar[tuple[str, ...]] = ("lora", "ia3")
    in_factors: ClassVar[bool] = True

    @abstractmethod
    def encode(self, deltas: Sequence[Delta], rank: int | None = None) -> Encoding:
        """The task vectors of one module in this space's coordinates.

        Args:
            deltas: of all adapters that have the module, or of any one where nothing is shared.
            rank: of the output, for a space that compresses before it merges.
        """

    def check(self, ranks: Mapping[str, Sequence[int]]) -> str | None:
        """What is wrong with using it on modules of these ranks; None if nothing."""
        return None


def _bytes(part: Delta) -> int:
    if isinstance(part, Mapped):
        return _bytes(part.source)
    held = (part.B, part.A) if isinstance(part, LowRank) else (part.values,)
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
