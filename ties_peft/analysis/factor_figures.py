"""Measure norms, cosines, ranks and subspaces from the factors alone; no task vector of a LoRA is multiplied out.

With Δᵢ = Bᵢ·Aᵢ everything follows from the Gram matrices BᵀB and A·Aᵀ of all factors side by side: ⟨Δᵢ, Δⱼ⟩ is a sum over
blocks of their entrywise product, and the orthonormal bases of the row and column spaces are mixtures of the factors
whose inner products are those matrices, mixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..task_vectors.delta import Delta, LowRank, Span, inner
from ..task_vectors.factorise import SmallSvd, decompose
from ..task_vectors.singular_values import balanced
from .figures import Measured


def measure_factors(measured: Measured, module: int, places: Sequence[int], deltas: Sequence[Delta]) -> None:
    """Fill in what one module's factors tell.

    Args:
        measured: is filled in.
        module: the number of the module.
        places: the numbers of the adapters that have it.
        deltas: their task vectors.
    """
    measured.has[module, places] = True
    if len(deltas[0].shape) == 1:
        _measure_vectors(measured, module, places, deltas)
        return
    span = Span([delta if isinstance(delta, LowRank) else balanced(delta) for delta in deltas])
    products = span.products().cpu().numpy()
    measured.products[np.ix_([module], places, places)] = products
    small = [decompose(span.left[at, at], span.right[at, at]) for at in span.ranges]
    for place, one, delta in zip(places, small, deltas, strict=True):
        measured.rank[module, place] = delta.rank
        measured.effective_rank[module, place] = effective_rank(one.S)
    for i in range(len(small)):
        for j in range(i):
            figures = _compare_spaces(span, small, i, j)
            if isinstance(deltas[i], LowRank) and isinstance(deltas[j], LowRank):
                figures["initial_cosine"] = _initial_cosine(span.right, span.ranges[i], span.ranges[j])
            for name, value in figures.items():
                matrix = getattr(measured, name)[module]
                matrix[places[i], places[j]] = matrix[places[j], places[i]] = value


def effective_rank(singular_values: Tensor) -> float:
    """Return exp of the entropy of pᵢ = σᵢ²/Σσ²; NaN for a task vector of zeros.

    Law: it is r for r equal singular values.
    """
    squares = singular_values.double().square()
    if not squares.sum() > 0:
        return math.nan
    share = squares / squares.sum()
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def _measure_vectors(measured: Measured, module: int, places: Sequence[int], deltas: Sequence[Delta]) -> None:
    """Fill in the inner products of (IA)³ vectors, which have no row and column spaces."""
    for i, first in enumerate(places):
        measured.rank[module, first] = 1
        for j, second in enumerate(places[: i + 1]):
            product = inner(deltas[i], deltas[j])
            measured.products[module, first, second] = measured.products[module, second, first] = product
        measured.effective_rank[module, first] = 1.0 if measured.products[module, first, first] > 0 else math.nan


def _compare_spaces(span: Span, small: Sequence[SmallSvd], i: int, j: int) -> dict[str, float]:
    """Return how the row spaces and the column spaces of two task vectors overlap; nothing if one is zero."""
    first, second = span.ranges[i], span.ranges[j]
    if min(len(small[i].S), len(small[j].S)) == 0:
        return {}
    rows = small[i].Y @ span.right[first, second] @ small[j].Y.T
    columns = small[i].X.T @ span.left[first, second] @ small[j].X
    found = {}
    for name, between in (("in", rows), ("out", columns)):
        cosines = torch.linalg.svdvals(between).clamp(0, 1)  # of the principal angles
        found[f"overlap_{name}"] = float(cosines.square().sum()) / min(between.shape)
        found[f"angle_{name}"] = math.degrees(math.acos(float(cosines[0])))
    return found


def _initial_cosine(right: Tensor, first: slice, second: slice) -> float:
    """Return the cosine of two factors A as they are stored, from A·Aᵀ; NaN where their ranks differ or one is zero.

    LoRA draws A at random and starts with B = 0, and a short training moves A little: a cosine near 1 shows that both
    started from the same A. Two random A have a cosine near 0.
    """
    if first.stop - first.start != second.stop - second.start:
        return math.nan
    square = float(right[first, first].trace() * right[second, second].trace())
    return float(right[first, second].trace()) / math.sqrt(square) if square > 0 else math.nan
