"""The compiled kernels against float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from sampling import covering

pytest.importorskip("numba", reason="the extra fast is not installed")

from ties_peft.task_vectors.delta import Dense, LowRank, Mapped
from ties_peft.task_vectors.kernels import numba_kernels
from ties_peft.task_vectors.kernels.backends import NumbaKernels, TorchKernels

Factors = list[tuple[np.ndarray, np.ndarray]]
SHAPES = [  # rows, columns, ranks
    (1, 1, [1]),
    (3, 5, [1, 2]),
    (32, 32, [4, 4, 4]),  # one block, whole
    (33, 33, [1, 5, 16, 3, 2, 7, 1, 33]),
    (6, 31, [33, 40, 50]),  # more columns than a side
    (7, 50, [7] * 9),
    (37, 70, [3] * 5),
]
KINDS = ["smooth", "repeated", "zeros"]


def multiply(factors: Factors) -> list[np.ndarray]:
    made = []
    for B, A in factors:
        out = torch.full((len(B), A.shape[1]), torch.nan)
        numba_kernels.multiply(torch.from_numpy(B), torch.from_numpy(A), out)
        made.append(out.numpy())
    return made


def count(B: np.ndarray, A: np.ndarray, low: float, high: float) -> tuple[int, np.ndarray]:
    return numba_kernels.count(torch.from_numpy(B), torch.from_numpy(A), low, high)


def merge(factors: Factors, below: list[float], weights: list[float], mean: bool) -> tuple[np.ndarray, tuple[int, int]]:
    out = torch.full((len(factors[0][0]), factors[0][1].shape[1]), torch.nan)
    pairs = [(torch.from_numpy(B), torch.from_numpy(A)) for B, A in factors]
    counts = numba_kernels.merge(pairs, below, weights, mean, out)
    return out.numpy(), counts


def draw(rows: int, columns: int, ranks: list[int], kind: str) -> Factors:
    """Factors that are random; or of ±1, so that products are whole, exact and often alike; or with zeros."""
    source = np.random.default_rng(len(ranks) * columns + rows)
    made = []
    for n, rank in enumerate(ranks):
        B, A = (source.standard_normal(shape).astype(np.float32) for shape in ((rows, rank), (rank, columns)))
        if kind == "repeated":
            B, A = np.sign(B), np.sign(A)
        if kind == "zeros":
            B, A = B * np.float32(n != 0), A * (np.arange(columns) % 3 > 0).astype(np.float32)
        made.append((B, A))
    return made


def quantile(values: np.ndarray, share: float) -> np.float32:
    """One of the magnitudes, so that the comparison is with an entry that is there to the bit."""
    sizes = np.sort(np.abs(values).reshape(-1))
    return sizes[int(share * (sizes.size - 1))]


CASES = [(kind, *shape) for kind, shape in product(KINDS, SHAPES)]


def shape_and_kind(case: Any) -> tuple[Any, ...]:
    return case[0], repr(case[1:4]), *case[4:]


@pytest.mark.parametrize(("kind", "rows", "columns", "ranks"), covering(CASES, shape_and_kind, "product"))
def test_a_product_is_that_of_float64_within_rounding(rows: int, columns: int, ranks: list[int], kind: str) -> None:
    factors = draw(rows, columns, ranks, kind)
    for (B, A), made in zip(factors, multiply(factors), strict=True):
        exact = B.astype(np.float64) @ A.astype(np.float64)
        bound = B.shape[1] * 2.0**-23 * (np.abs(B).astype(np.float64) @ np.abs(A))
        assert (np.abs(made - exact) <= bound).all()
        assert kind != "repeated" or np.array_equal(made, exact)


@pytest.mark.parametrize(("kind", "rows", "columns", "ranks"), covering(CASES, shape_and_kind, "count"))
def test_counts_are_those_of_the_product(rows: int, columns: int, ranks: list[int], kind: str) -> None:
    """The ends of the bracket are entries: one that rounded otherwise would be missing."""
    factors = draw(rows, columns, ranks, kind)
    for (B, A), values in list(zip(factors, multiply(factors), strict=True))[-2:]:
        sizes = np.abs(values)
        for low, high in ((0.8, 0.85), (0.5, 0.5), (0.0, 1.0)):
            ends = quantile(values, low), quantile(values, high)
            above, inside = count(B, A, *ends)
            assert above == np.count_nonzero(sizes > ends[1])
            assert np.array_equal(np.sort(inside), np.sort(sizes[(sizes >= ends[0]) & (sizes <= ends[1])]))
        above, inside = count(B, A, 0.0, np.inf)
        assert (above, len(inside)) == (0, sizes.size)


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "ranks", "mean"),
    covering([(*case, mean) for case, mean in product(CASES, [True, False])], shape_and_kind, "merge"),
)
def test_a_merge_is_the_definition_in_float64_on_the_product(
    rows: int, columns: int, ranks: list[int], kind: str, mean: bool
) -> None:
    """The largest magnitude that is cut is an entry's: one that rounded otherwise would be kept."""
    factors = draw(rows, columns, ranks, kind)
    values = [made.astype(np.float64) for made in multiply(factors)]
    shares = [(0.0, 0.7, 0.8)[n % 3] for n in range(len(ranks))]
    below = [0.0 if share == 0 else float(quantile(each, share)) for each, share in zip(values, shares, strict=True)]
    below[-1] = np.inf if len(ranks) == 8 else below[-1]  # one that nothing is kept of
    weights = [(1.0, 2.0, 0.25)[n % 3] for n in range(len(ranks))]
    kept = np.stack([np.where(np.abs(each) > least, each, 0.0) for each, least in zip(values, below, strict=True)])
    positive, negative = np.maximum(kept, 0).sum(0), np.minimum(kept, 0).sum(0)
    lead = positive + negative
    agree = np.sign(kept) == np.where(lead >= 0, 1.0, -1.0)
    expected = (kept * agree).sum(0)
    if mean:
        expected /= np.maximum((agree * np.array(weights)[:, None, None]).sum(0), 1e-30)
    out, counts = merge(factors, below, weights, mean)
    clear = (lead == 0) | (np.abs(lead) > 1e-5)  # a sum that is nearly zero may round to either side
    np.testing.assert_allclose(out[clear], expected[clear], rtol=2e-6, atol=1e-30)
    assert clear.all() or clear.mean() > 0.98
    assert counts == (((positive > 0) & (negative < 0)).sum(), ((kept != 0).sum(0) > 1).sum())


@pytest.mark.parametrize("kind", ["factored", "dense", "rank 0", "changed"])
def test_both_kernels_read_and_count_every_kind_of_task_vector(kind: str) -> None:
    """Those that the compiled code does not know are left to torch."""
    (B, A), *_ = draw(37, 70, [3], "repeated")
    factors = LowRank(torch.from_numpy(B), torch.from_numpy(A))
    delta = {
        "factored": factors,
        "dense": Dense(factors.dense()),
        "rank 0": LowRank(factors.B[:, :0], factors.A[:0]),
        "changed": Mapped(factors, lambda values, start, drawn: values * 2),
    }[kind]
    rows, brackets = (5, 30), [(np.float32(1), np.float32(2)), (np.float32(0), np.float32(np.inf))]
    read, counted = [], []
    for kernels in (TorchKernels(), NumbaKernels()):
        out = torch.full((25, 70), torch.nan)
        read.append(kernels.read(delta, rows, out).clone())
        counted.append(kernels.count(delta, rows, brackets, lambda: torch.empty(25, 70)))
    assert torch.equal(*read) and torch.equal(read[0], delta.dense()[slice(*rows)])
    for (above, inside), (other, values) in zip(*counted, strict=True):
        assert above == other and np.array_equal(np.sort(inside), np.sort(values))
    assert counted[0][0][0] == int((read[0].abs() > 2).sum())
