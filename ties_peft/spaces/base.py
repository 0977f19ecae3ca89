"""Define what a space is: the coordinates in which task vectors are merged. Each space is one file in this folder.

A space encodes each adapter's task vector as one or more *parts*, which a method merges separately, and decodes the
merged parts to one task vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import ClassVar, cast

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ..task_vectors.delta import Delta, LowRank, Mapped, Span, inner
from ..task_vectors.factorise import MAX_GRAM_SIDE, Factors, Run
from ..task_vectors.subspace import STRIP, products
from ..task_vectors.trim import Scope


class Encoding(ABC):
    """Hold task vectors of one module in the coordinates of a space.

    Attributes:
        deltas: the task vectors.
        parts: for each of them, in the order given, its parts.
        lost_energy: the share of the task vectors' energy that the coordinates lack; 0 if they are complete.
    """

    deltas: Sequence[Delta]
    parts: Sequence[tuple[Delta, ...]]
    lost_energy: float = 0.0

    @property
    def inputs(self) -> Tensor | None:
        """The orthonormal directions of inputs that a part's columns represent, (columns, in); None: one input each."""
        return None

    def prepare_decode(self, rank: int) -> Callable[[], None] | None:
        """Return work for `decode` that can be done while the result is computed, as a function; or None."""
        return None

    @abstractmethod
    def decode(self, merged: Sequence[Delta], rank: int | None, run: Run = map) -> Factors:
        """Return the task vector of the merged parts, in factors of a rank.

        Args:
            merged: the parts.
            rank: of the result, at most; None for (IA)³, whose vectors have no rank.
            run: how to call a function on several blocks, see `factorise`.
        """

    @cached_property
    def span(self) -> Span | None:
        """The Gram matrices of the task vectors' factors; None if some are dense or the columns are too many."""
        few = 0 < sum(delta.rank for delta in self._factored()) <= MAX_GRAM_SIDE
        return Span(cast("Sequence[LowRank]", self.deltas)) if few else None

    @property
    def bytes(self) -> int:
        """The memory that the parts take, in bytes."""
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
        """Return ‖τᵢ‖² for each task vector."""
        return [inner(delta, delta) for delta in self.deltas]

    def _factored(self) -> list[LowRank]:
        """Return the task vectors if all of them are factored, else none."""
        factored = list(self._factors())
        return factored if len(factored) == len(self.deltas) else []

    def _factors(self) -> Iterator[LowRank]:
        """Iterate over the task vectors that are factored; each is read when its turn comes."""
        return (delta for delta in self.deltas if isinstance(delta, LowRank))

    def weighted(self, place: int, weight: float) -> tuple[Delta, ...]:
        """Return the parts of w·τ."""
        return tuple(part.scaled(weight) for part in self.parts[place])

    def weights(self, weight: float) -> tuple[float, ...]:
        """Return the weight of each part in a disjoint mean."""
        return (weight,) * len(self.parts[0])


class Space(BaseModel, ABC):
    """Choose coordinates: a frozen model whose fields are the parameters of the space.

    Attributes:
        name: as users write it.
        shared: whether the coordinates depend on all the adapters together.
        lossless_rank: whether the merged vector's rank is at most Σrᵢ for any method.
        scopes: over what a trim may rank magnitudes; the first is the default.
        kinds: the kinds of adapter that it applies to.
        in_factors: whether it needs every matrix as B·A.
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
        """Return the task vectors of one module in this space's coordinates.

        Args:
            deltas: of all adapters that have the module, or of any one of them if the coordinates are not `shared`.
            rank: of the output, for a space that compresses before the merge.
        """

    def check(self, ranks: Mapping[str, Sequence[int]]) -> str | None:
        """Return what is wrong with using the space on modules of these ranks; None if nothing."""
        return None


def _bytes(part: Delta) -> int:
    if isinstance(part, Mapped):
        return _bytes(part.source)
    held = (part.B, part.A) if isinstance(part, LowRank) else (part.values,)
    return sum(tensor.numel() * tensor.element_size() for tensor in held)
