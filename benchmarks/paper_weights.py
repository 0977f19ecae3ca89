"""Experiments of `paper.py` that read weights alone: sign conflicts and magnitudes. One module of all adapters is in memory.

Every entry falls into one of 3ᴺ classes: for each of the N adapters the trim keeps it with the sign +, with −, or not. How many
entries fall into each class gives the share of sign conflicts of every subset of the adapters at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from paper_judge import magnitudes, mean
from torch import Tensor

import ties_peft

DENSITY = 0.2
BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of the sign agreement; the last bin has its upper end
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
TILE = 1 << 22  # entries of one adapter that are worked on at a time


class Weights:
    """The adapters of one kind, read module by module.

    Args:
        folders: of the adapters, by task.
        modules: how many modules are read, spread evenly over all; None for all.
    """

    def __init__(self, folders: Mapping[str, Path], modules: int | None = None) -> None:
        self.adapters = [ties_peft.Adapter.load(folder) for folder in folders.values()]
        names = sorted({name for adapter in self.adapters for name in adapter.modules})
        self.modules = names if modules is None else names[:: max(1, len(names) // modules)]
        self.norm_shares = {share: [0.0] * len(self.adapters) for share in SHARES}
        self.thresholds = [self._threshold(place) for place in range(len(self.adapters))]

    def _own(self, place: int) -> list[str]:
        return [name for name in self.modules if name in self.adapters[place].modules]

    def _threshold(self, place: int) -> float:
        """Return the least magnitude that one adapter's trim keeps; note how much of the squared norm the largest hold."""
        values = magnitudes(self.adapters[place], self._own(place)).numpy()
        values.sort()
        total = float(np.square(values, dtype=np.float64).sum())
        for share in SHARES:
            largest = values[len(values) - int(share * len(values) + 1e-9) :]
            self.norm_shares[share][place] = 100 * float(np.square(largest, dtype=np.float64).sum()) / total
        return float(values[len(values) - int(DENSITY * len(values) + 1e-9)])

    def tiles(self) -> Iterator[Tensor]:
        """Yield the entries of all adapters, (adapters, entries); zeros where an adapter lacks the module."""
        for name in self.modules:
            deltas = [adapter.delta(name) if name in adapter.modules else None for adapter in self.adapters]
            size = next(delta.numel() for delta in deltas if delta is not None)
            stack = torch.stack([torch.zeros(size) if delta is None else delta.flatten() for delta in deltas])
            yield from stack.split(TILE, 1)

    def trimmed(self, tile: Tensor) -> Tensor:
        """Return the entries that each adapter's trim keeps, zeros elsewhere."""
        return torch.where(tile.abs() >= torch.tensor(self.thresholds).unsqueeze(1), tile, 0.0)


def read(weights: Weights) -> dict[str, Any]:
    """Return everything that is read off the weights in one pass."""
    count = len(weights.adapters)
    powers = torch.tensor([3**place for place in range(count)]).unsqueeze(1)
    classes = torch.zeros(3**count, dtype=torch.int64)
    influence, agreement, squares = Bins(count + 1), Bins(len(BINS) - 1), 0.0
    trimmed_agreement = Bins(len(BINS) - 1)
    for tile in weights.tiles():
        squares += float(tile.double().square().sum())
        kept = weights.trimmed(tile)
        classes += torch.bincount(((kept.sign().long() + 1) * powers).sum(0), minlength=3**count)
        found = {**merges(tile, "no trim"), **merges(kept, "trim")}
        influence.add(kept.ne(0).sum(0), found)
        agreement.add(agreement_bin(tile), found)
        several = kept.ne(0).sum(0) >= 2
        trimmed_agreement.add(agreement_bin(kept)[several], {name: one[several] for name, one in found.items()})
    entries = int(classes.sum())
    unit = (squares / entries / count) ** 0.5
    shares = {str(share): mean(each) for share, each in weights.norm_shares.items()}
    return {
        "entries": entries,
        "modules": len(weights.modules),
        "density": DENSITY,
        "norm share": shares,
        "conflict": conflicts(classes, count),
        "by influence": influence.table(unit),
        "by agreement": agreement.table(unit),
        "by agreement of kept entries": trimmed_agreement.table(unit),
    }


def merges(vectors: Tensor, name: str) -> dict[str, Tensor]:
    """Return the magnitude of each entry when it is averaged over all, over those that are not zero, and over an elected sign."""
    total = vectors.sum(0)
    nonzero = vectors.ne(0)
    agree = (vectors.sign() == torch.where(total < 0, -1.0, 1.0)) & nonzero
    elected = (vectors * agree).sum(0) / agree.sum(0).clamp_min(1)
    disjoint = total / nonzero.sum(0).clamp_min(1)
    return {
        f"{name}, mean of all": (total / len(vectors)).abs(),
        f"{name}, mean of the kept": disjoint.abs(),
        f"{name}, elected": elected.abs(),
    }


def agreement_bin(vectors: Tensor) -> Tensor:
    """Return the bin of each entry's sign agreement: the larger of the two signs' masses over both; the last where it is zero."""
    positive, negative = vectors.clamp_min(0).sum(0), -vectors.clamp_max(0).sum(0)
    total = positive + negative
    agreement = torch.where(total > 0, torch.maximum(positive, negative) / total.clamp_min(1e-30), 1.0)
    return torch.bucketize(agreement, torch.tensor(BINS[1:-1]), right=True)


class Bins:
    """Means of several magnitudes by bins of the entries."""

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.sums: dict[str, Tensor] = {}

    def add(self, where: Tensor, found: Mapping[str, Tensor]) -> None:
        """Add entries with their bins."""
        self.counts += torch.bincount(where, minlength=self.bins)
        for name, values in found.items():
            new = torch.bincount(where, weights=values.double(), minlength=self.bins)
            self.sums[name] = self.sums[name] + new if name in self.sums else new

    def table(self, unit: float) -> dict[str, Any]:
        """Return the share of the entries in each bin in percent, and the mean magnitudes in a unit; None for an empty bin."""
        total = max(1, int(self.counts.sum()))
        means = {
            name: [round(float(one / size) / unit, 3) if size else None for one, size in zip(sums, self.counts, strict=True)]
            for name, sums in self.sums.items()
        }  # fmt: skip
        return {"share": [round(100 * int(size) / total, 3) for size in self.counts], "magnitude": means}


def conflicts(classes: Tensor, count: int) -> dict[str, list[float]]:
    """Return for 2 … N adapters, as the mean over all subsets, the share of entries with both signs, in percent.

    Args:
        classes: how many entries fall into each of the 3ᴺ classes; adapter i adds 3ⁱ times 0 for −, 1 for not kept, 2 for +.
        count: N.
    """
    numbers = torch.arange(3**count)
    signs = torch.stack([numbers // 3**place % 3 for place in range(count)])
    found: dict[str, list[float]] = {
        "adapters": [],
        "of all": [],
        "of those kept by one": [],
        "of those kept by two": [],
    }
    for size in range(2, count + 1):
        each = [_conflict(classes, signs[list(chosen)]) for chosen in itertools.combinations(range(count), size)]
        found["adapters"].append(size)
        for name, values in zip(list(found)[1:], zip(*each, strict=True), strict=True):
            found[name].append(mean(values))
    return found


def _conflict(classes: Tensor, signs: Tensor) -> Sequence[float]:
    """Return the entries with both signs in percent of all, of those that one adapter keeps, of those that two keep."""
    both = int(classes[signs.eq(0).any(0) & signs.eq(2).any(0)].sum())
    kept = signs.ne(1).sum(0)
    sizes = (int(classes.sum()), int(classes[kept >= 1].sum()), int(classes[kept >= 2].sum()))
    return [100 * both / max(1, size) for size in sizes]
