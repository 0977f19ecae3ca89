"""The laws of the verbs: trim, elect, factorise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from laws.strategies import law, percents, seeds, signed
from oracles import definition
from torch import Tensor

from ties_peft.task_vectors.collection import TaskVectors
from ties_peft.task_vectors.delta import LowRank, Span
from ties_peft.task_vectors.elect import MergeRule, SignedSums
from ties_peft.task_vectors.factorise import OVERSAMPLE, SMALL_SIDE, Factors, compress, factorise, leading_rows
from ties_peft.task_vectors.trim import kept_count

elections = st.sampled_from(["mass", "count"])
disjoints = st.sampled_from(["mean", "sum", "max"])
integers = st.integers(-4, 4).map(float)


def trim(values: Tensor, density: float) -> Tensor:
    (kept,) = TaskVectors.of([values]).trim(density)
    return kept


@st.composite
def stacks(draw: st.DrawFn) -> Tensor:
    """(N, n) small integers, so that magnitudes repeat and sums are often exactly zero."""
    count, length = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    return torch.tensor(draw(st.lists(integers, min_size=count * length, max_size=count * length))).view(count, length)


@law
@given(percents, st.integers(1, 10_000))
@example(29, 100)
def test_the_number_kept_is_that_of_the_decimal(percent: int, entries: int) -> None:
    assert kept_count(percent / 100, entries) == percent * entries // 100


@law
@given(st.lists(integers, min_size=1, max_size=40), percents)
def test_trim_keeps_the_first_of_equal_magnitudes(entries: list[float], percent: int) -> None:
    values = torch.tensor(entries)
    expected = definition.trim({"m": values.double().numpy()}, percent / 100, "module")["m"]
    assert trim(values, percent / 100).tolist() == expected.tolist()


@law
@given(seeds, percents)
def test_trim_keeps_exactly_as_many_as_asked(seed: int, percent: int) -> None:
    values = torch.randn(7, 9, generator=torch.Generator().manual_seed(seed))
    kept = trim(values, percent / 100)
    assert int((kept != 0).sum()) == percent * 63 // 100
    assert torch.equal(kept[kept != 0], values[kept != 0])


@law
@given(stacks(), elections, disjoints, st.data())
def test_streamed_is_as_defined_in_any_order(stack: Tensor, by: str, disjoint: str, data: st.DataObject) -> None:
    sums = SignedSums(torch.full((5, stack.shape[1]), torch.nan), MergeRule(by, disjoint))
    for place in data.draw(st.permutations(range(len(stack)))):
        sums.add(stack[place].clone())
    wide = stack.double().numpy()
    signs = definition.elect(wide, by)
    expected = definition.disjoint_merge(wide, [1.0] * len(wide), signs, disjoint, normalize=True)
    assert sums.result().tolist() == pytest.approx(expected)
    assert (sums.elected() * 2 - 1).tolist() == signs.tolist()


@law
@given(stacks(), elections, disjoints, st.booleans(), st.lists(signed, min_size=5, max_size=5), st.data())
def test_a_weighted_ballot_is_as_defined(
    stack: Tensor, by: str, disjoint: str, normalize: bool, weights: list[float], data: st.DataObject
) -> None:
    weights = weights[: len(stack)]
    given_signs = torch.tensor(data.draw(st.lists(integers, min_size=stack.shape[1], max_size=stack.shape[1])))
    sums = SignedSums(torch.empty(5, stack.shape[1]), MergeRule(by, disjoint, normalize))
    for vector, weight in zip(stack, weights, strict=True):
        sums.add(vector.clone(), weight)
    wide = stack.double().numpy()
    elected = definition.elect(wide, by)
    for signs in (None, given_signs):
        decided = elected if signs is None else np.where(signs != 0, np.sign(signs), elected)
        expected = definition.disjoint_merge(wide, weights, decided, disjoint, normalize)
        assert sums.result(signs).tolist() == pytest.approx(expected, rel=1e-5)


@st.composite
def matrices(draw: st.DrawFn) -> LowRank:
    """B·A, square, tall or wide, of any rank from 0 up to its smaller side and beyond."""
    rows, columns, rank = draw(st.integers(1, 14)), draw(st.integers(1, 14)), draw(st.integers(1, 16))
    generator = torch.Generator().manual_seed(draw(seeds))
    B, A = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return LowRank(B * draw(st.sampled_from([0.0, 1e-4, 1.0, 1e4])), A * torch.logspace(0, -3, rank).unsqueeze(1))


def assert_best(factors: Factors, matrix: Tensor, rank: int, slack: float = 1.0) -> None:
    """Within `slack` of the best error of that rank, and honest about it."""
    wide = matrix.double().numpy()
    squares = np.linalg.svd(wide, compute_uv=False) ** 2
    total, lost = squares.sum(), squares[rank:].sum()
    assert factors.delta.rank <= rank
    error = np.linalg.norm(wide - factors.delta.dense().double().numpy())
    assert error <= slack * lost**0.5 + 1e-5 * total**0.5
    assert factors.total == pytest.approx(total, rel=1e-5)
    assert factors.total - factors.kept == pytest.approx(error**2, rel=1e-3, abs=1e-5 * total)


def assert_balanced(delta: LowRank) -> None:
    """BᵀB = AAᵀ: half precision loses as much on one side as on the other."""
    left, right = delta.B.T @ delta.B, delta.A @ delta.A.T
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4 * float(left.norm()) + 1e-30)


@law
@given(matrices(), st.integers(1, 16))
def test_factorise_is_best(delta: LowRank, rank: int) -> None:
    factors = factorise(delta.dense(), rank)
    assert_best(factors, delta.dense(), rank)
    assert_balanced(factors.delta)


@law
@given(matrices(), st.integers(1, 16))
def test_compress_is_best(delta: LowRank, rank: int) -> None:
    factors = compress(delta, rank)
    assert_best(factors, delta.B.double() @ delta.A.double(), rank)
    assert_balanced(factors.delta)


@law
@given(matrices())
def test_a_matrix_of_zeros_has_all_its_energy(delta: LowRank) -> None:
    zeros = LowRank(torch.zeros_like(delta.B), delta.A)
    for factors in (factorise(zeros.dense(), 3), compress(zeros, 3)):
        assert factors.energy == 1.0
        assert not factors.delta.dense().any()


ROWS, COLUMNS = SMALL_SIDE + 60, SMALL_SIDE + 20


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("informed", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_factorise_is_within_a_hundredth_where_the_sides_are_large(wide: bool, informed: bool) -> None:
    shape = (COLUMNS, ROWS) if wide else (ROWS, COLUMNS)
    deltas = [LowRank(noise(shape[0], 8, seed=n), noise(8, shape[1], seed=n + 9)) for n in range(3)]
    flat = torch.stack([trim(delta.dense(), 0.2) for delta in deltas]).sum(0)
    start = leading_rows(Span(deltas), 12 + OVERSAMPLE) if informed else None
    factors = factorise(flat, 12, start)
    assert_best(factors, flat, 12, slack=1.01)
    assert_balanced(factors.delta)


def test_factorise_is_within_a_hundredth_even_of_noise() -> None:
    matrix = noise(ROWS, COLUMNS, seed=0)
    assert_best(factorise(matrix, 64), matrix, 64, slack=1.01)


@pytest.mark.parametrize("rank", [5, 9])
def test_factorise_is_exact_where_a_large_matrix_has_a_low_rank(rank: int) -> None:
    matrix = noise(ROWS, 5, seed=1) @ noise(5, COLUMNS, seed=2)
    assert_best(factorise(matrix, rank), matrix, rank)
    assert_best(factorise(torch.zeros(ROWS, COLUMNS), rank), torch.zeros(ROWS, COLUMNS), rank)
