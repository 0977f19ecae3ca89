"""Sparsify task vectors at random, by rank or by score, a tile or a module at a time.

`trim` does so by magnitude. Functions that drop at random take their uniform numbers as arguments (see
`random_numbers`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .threshold import kth_largest
from .trim import Cut


def add_up(vectors: Iterable[Tensor]) -> Tensor:
    """Return the sum of vectors, of which there is at least one; each may be overwritten when the next one is computed.

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
    """Return probabilities that rise evenly with a magnitude's rank in its row, from density − ε to density + ε.

    Args:
        values: (…, n), rows in the last dimension.
        density: the mean probability, in (0, 1].
        epsilon: ε ≥ 0; it is reduced where density ± ε would leave [0, 1].
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
    """Drop entries by `drop_` with the probabilities of `keep_probability`, in place.

    Args:
        values, numbers, density, epsilon: as there.
        whole: the whole vector, if `values` are its entries from `start` on; all of it is ranked.
        start: see `whole`.
    """
    if whole is None:
        return drop_(values, numbers, keep_probability(values, density, epsilon))
    probabilities = keep_probability(whole, density, epsilon)[start : start + len(values)]
    return drop_(values, numbers, probabilities)


def band_(values: Tensor, cuts: tuple[Cut, ...], tile: int) -> Tensor:
    """Keep the entries that the second cut keeps and the first does not, in place."""
    above = cuts[0].apply_(values.clone(), tile)
    return cuts[1].apply_(values, tile).sub_(above)


def largest(values: Tensor, count: int) -> Tensor:
    """Return a mask of exactly `count` entries, from 1 up to their number, none of them smaller than the others.

    Law: of entries that equal the threshold the first in row-major order are in the mask.

    >>> largest(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2)
    tensor([False,  True,  True, False])
    """
    least = kth_largest(values, count)
    mask = values > least
    equal = (values == least).reshape(-1).nonzero().reshape(-1)
    mask.view(-1)[equal[: count - int(mask.sum())]] = True
    return mask
