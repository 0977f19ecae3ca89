"""Sparsify: which entries of a task vector stay, by chance, by rank or by score; and sums over many vectors.

What `trim` is for magnitudes over a whole adapter, these are for a tile or a module at a time. The
random ones are handed their uniform numbers (see `random_numbers`): they draw nothing themselves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .threshold import kth_largest
from .trim import Cut


def add_up(vectors: Iterable[Tensor]) -> Tensor:
    """Σ of vectors, of which there is at least one; each may be overwritten once the next is asked for.

    >>> add_up(torch.tensor([float(n)]) for n in (1, 2, 4))
    tensor([7.])
    """
    rest = iter(vectors)
    total = next(rest).clone()
    for vector in rest:
        total += vector
    return total


def drop_(values: Tensor, numbers: Tensor, keep: float | Tensor) -> Tensor:
    """Keep each entry with probability `keep` and divide it by that, in place.

    Args:
        values: any shape.
        numbers: uniform in [0, 1), of the same shape; an entry stays if its number is under its probability.
        keep: one probability, or one for each entry.
    Law: the expectation over the numbers is `values` wherever `keep` > 0; with `keep` 1 nothing changes.

    >>> drop_(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.6]), 0.5)
    tensor([2., 0.])
    """
    stays = numbers < keep
    divisor = keep.clamp_min(torch.finfo(keep.dtype).tiny) if isinstance(keep, Tensor) else keep
    return values.div_(divisor).masked_fill_(~stays, 0.0)


def keep_probability(values: Tensor, density: float, epsilon: float) -> Tensor:
    """Probabilities that rise in even steps with the rank of the magnitude within its row, from density − ε to density + ε.

    Args:
        values: (…, n), rows in the last dimension.
        density: the mean probability, in (0, 1].
        epsilon: ε ≥ 0; where density ± ε would leave [0, 1] it is made as small as that takes.
    Law: every row's mean is `density`; of equal magnitudes the later has the higher probability.

    >>> keep_probability(torch.tensor([3.0, -1.0, 2.0]), 0.5, 0.25)
    tensor([0.7500, 0.2500, 0.5000])
    """
    spread = min(epsilon, density, 1 - density)
    width = values.shape[-1]
    if spread == 0 or width == 1:
        return torch.full_like(values, density)
    order = values.abs().argsort(dim=-1, stable=True)
    steps = torch.linspace(density - spread, density + spread, width, device=values.device)
    return torch.empty_like(values).scatter_(-1, order, steps.expand_as(values))


def drop_by_rank_(
    values: Tensor, numbers: Tensor, density: float, epsilon: float, whole: Tensor | None = None, start: int = 0
) -> Tensor:
    """`drop_` with `keep_probability`, in place.

    Args:
        values, numbers, density, epsilon: as there.
        whole: the vector whose entries from `start` on `values` are, if it is a stretch of one: all of
            it is ranked.
        start: see `whole`.
    """
    if whole is None:
        return drop_(values, numbers, keep_probability(values, density, epsilon))
    stretch = keep_probability(whole, density, epsilon)[start : start + len(values)]
    return drop_(values, numbers, stretch)


def band_(values: Tensor, cuts: tuple[Cut, ...], tile: int) -> Tensor:
    """Keep the entries between two cuts, in place: what the second keeps and the first does not."""
    above = cuts[0].apply_(values.clone(), tile)
    return cuts[1].apply_(values, tile).sub_(above)


def largest(values: Tensor, count: int) -> Tensor:
    """A mask of exactly `count` entries, from 1 up to their number, none of them smaller than the others.

    Law: of entries that equal the threshold the first in row-major order are in the mask.

    >>> largest(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2)
    tensor([False,  True,  True, False])
    """
    least = kth_largest(values, count)
    mask = values > least
    equal = (values == least).reshape(-1).nonzero().reshape(-1)
    mask.view(-1)[equal[: count - int(mask.sum())]] = True
    return mask
