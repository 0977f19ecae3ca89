"""Drop entries of task vectors at random, and divide those that are kept by their probability.

`trim` drops by magnitude instead. The uniform numbers are arguments (see `random_numbers`).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
