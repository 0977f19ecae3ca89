"""More columns than a side has: sums, core and KnOTS space against their definitions in float64, and no array of Σr × Σr."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import definition
from oracles.definition import Array
from torch.utils._python_dispatch import TorchDispatchMode

import ties_peft
from ties_peft.spaces.core import CoreEncoding
from ties_peft.spaces.knots import KnotsEncoding
from ties_peft.task_vectors.delta import LowRank
from ties_peft.task_vectors.factorise import Sum, compress, gram_is_cheaper
from ties_peft.task_vectors.subspace import products

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
SHAPE = (24, 30)
ROADS = {  # how many columns are few, and up to which length the rows' Gram matrix is made
    "rows": (2048, 4096),
    "columns": (2048, 1),
    "sketch with room for all": (35, 1),
}


def random_deltas(ranks: list[int], shape: tuple[int, int] = SHAPE, seed: int = 0) -> list[LowRank]:
    draw = torch.Generator().manual_seed(seed)
    gains = [math.exp(n % 3) for n in range(len(ranks))]
    return [
        LowRank(gain * torch.randn(shape[0], r, generator=draw), torch.randn(r, shape[1], generator=draw))
        for gain, r in zip(gains, ranks, strict=True)
    ]


def exact(delta: LowRank) -> Array:
    return delta.B.double().numpy() @ delta.A.double().numpy()


CASES = {
    "many": random_deltas([16] * 4),
    "unequal": random_deltas([1, 20, 7, 12]),
    "rank 1": random_deltas([1] * 40),
    "repeated": random_deltas([16, 16, 3]) * 2,
    "a zero": [*random_deltas([16, 16]), LowRank(torch.zeros(24, 8), torch.randn(8, 30))],
}


def take(monkeypatch: pytest.MonkeyPatch, road: str) -> None:
    widest, square = ROADS[road]
    monkeypatch.setattr("ties_peft.task_vectors.subspace.MAX_GRAM_SIDE", widest)
    monkeypatch.setattr("ties_peft.spaces.base.MAX_GRAM_SIDE", widest)
    monkeypatch.setattr("ties_peft.task_vectors.subspace.SQUARE", square)


def core_bases(deltas: list[Array]) -> tuple[Array, Array]:
    """Left and right: the singular vectors of all U·√S side by side, and of all V·√S."""
    sides: tuple[list[Array], list[Array]] = [], []
    for delta in deltas:
        U, S, Vt = np.linalg.svd(delta, full_matrices=False)
        sides[0].append(U * np.sqrt(S))
        sides[1].append(Vt.T * np.sqrt(S))
    left, right = (np.linalg.svd(np.hstack(side), full_matrices=False) for side in sides)
    return left[0], right[0]


def spread(deltas: list[LowRank], encoding: Any) -> float:
    """How far what the parts are decoded to is from the task vectors, a share of their energy."""
    back = [encoding.decode(parts, None).delta for parts in encoding.parts]
    apart = sum(np.square(exact(b) - exact(d)).sum() for b, d in zip(back, deltas, strict=True))
    return float(apart / sum(np.square(exact(d)).sum() for d in deltas))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("case", CASES)
def test_core_coordinates_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, road: str, case: str) -> None:
    take(monkeypatch, road)
    deltas = CASES[case]
    encoding = CoreEncoding(deltas)
    left, right = core_bases([exact(delta) for delta in deltas])
    for delta, (part,) in zip(deltas, encoding.parts, strict=True):
        wanted, seen = left.T @ exact(delta) @ right, part.dense().double().numpy()
        rows, columns = (min(pair) for pair in zip(wanted.shape, seen.shape, strict=True))
        # a basis vector has one direction but two signs
        np.testing.assert_allclose(np.abs(seen), np.abs(wanted)[:rows, :columns], atol=1e-4 * np.abs(wanted).max())
    assert encoding.lost_energy == 0
    assert spread(deltas, encoding) < 1e-11


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("case", CASES)
def test_knots_coordinates_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, road: str, case: str) -> None:
    take(monkeypatch, road)
    deltas = CASES[case]
    encoding = KnotsEncoding(deltas)
    U, S, _ = np.linalg.svd(np.hstack([exact(delta) for delta in deltas]), full_matrices=False)
    U = U[:, 1e-5 * S[0] < S]
    for delta, (part,) in zip(deltas, encoding.parts, strict=True):
        wanted, seen = U.T @ exact(delta), part.dense().double().numpy()
        np.testing.assert_allclose(np.abs(seen), np.abs(wanted), atol=1e-4 * np.abs(wanted).max())
    assert encoding.lost_energy == 0
    assert spread(deltas, encoding) < 1e-11


@pytest.mark.parametrize("kind", [CoreEncoding, KnotsEncoding])
def test_what_has_no_place_is_measured_and_near_the_least_there_could_be(
    monkeypatch: pytest.MonkeyPatch, kind: type[CoreEncoding | KnotsEncoding]
) -> None:
    monkeypatch.setattr("ties_peft.task_vectors.subspace.MAX_GRAM_SIDE", 16)
    monkeypatch.setattr("ties_peft.spaces.base.MAX_GRAM_SIDE", 16)
    monkeypatch.setattr("ties_peft.task_vectors.subspace.SQUARE", 1)
    deltas = random_deltas([16] * 4)
    encoding = kind(deltas)
    assert encoding.lost_energy == pytest.approx(spread(deltas, encoding), rel=1e-4)
    arrays = [exact(delta) for delta in deltas]
    left, right = core_bases(arrays)
    if kind is KnotsEncoding:
        left, right = np.linalg.svd(np.hstack(arrays))[0], np.eye(30)
    kept = right.shape[1] if kind is KnotsEncoding else 16
    best = sum(np.square(left[:, :16].T @ a @ right[:, :kept]).sum() for a in arrays)
    least = 1 - best / sum(np.square(a).sum() for a in arrays)
    assert 0.99 * least < encoding.lost_energy < 1.2 * least


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("few", [True, False])
def test_a_merge_says_what_has_no_place(
    make_lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, space: str, few: bool
) -> None:
    if few:
        for module in ("task_vectors.subspace", "spaces.base", "merging.measure"):
            monkeypatch.setattr(f"ties_peft.{module}.MAX_GRAM_SIDE", 6)
        monkeypatch.setattr("ties_peft.task_vectors.subspace.SQUARE", 1)
    paths = [make_lora(f"a{n}", rank=4, seed=n) for n in range(4)]
    merged = ties_peft.merge(paths, method="task_arithmetic", space=space, rank="max")
    said = [warning for warning in merged.report.warnings if "leading directions" in warning]
    assert len(said) == few and all("keeps the 6 leading directions" in warning for warning in said)
    assert merged.report.to_dict()["warnings"] == merged.report.warnings


SUMS = {
    "rows": ([16] * 5, SHAPE, [1.0] * 5),
    "columns": ([2, 3], SHAPE, [0.5, -2.0]),
    "few columns": ([8] * 6, (300, 260), [1, -2, 0.5, 3, 1, 1e-3]),
    "weights": ([16] * 5, SHAPE, [0.5, -1, 2, 1, 1]),
    "rank 1": ([1] * 60, SHAPE, [1.0] * 60),
    "very many": ([16] * 130, SHAPE, [1.0] * 130),  # 2080 columns
    "one side small": ([16] * 5, (24, 1500), [1.0] * 5),
    "large": ([30] * 20, (650, 700), [1.0] * 20),  # 600 columns, more than two thirds of a side that is not small
}


@pytest.mark.parametrize("case", SUMS)
def test_a_sum_has_the_best_factors(case: str) -> None:
    ranks, shape, factors = SUMS[case]
    deltas = random_deltas(ranks, shape)
    whole = sum(f * exact(delta) for delta, f in zip(deltas, factors, strict=True))
    S = np.linalg.svd(whole, compute_uv=False)
    for rank in (1, 5, 24):
        found = compress(Sum(deltas, factors), rank)
        assert isinstance(found.delta, LowRank)
        error, optimum = np.linalg.norm(whole - exact(found.delta)), np.sqrt(np.square(S[rank:]).sum())
        assert error <= optimum * (1 + 1e-6) + 1e-6 * S[0]
        assert found.total == pytest.approx(np.square(S).sum(), rel=1e-6)
        assert found.kept == pytest.approx(np.square(S[:rank]).sum(), rel=1e-6)


def test_of_very_many_columns_no_gram_matrix_is_made_however_large_the_sides() -> None:
    assert gram_is_cheaper(2048, 4096) and not gram_is_cheaper(2049, 4096)


def test_a_sum_that_cancels_is_zero() -> None:
    deltas = random_deltas([16] * 3)
    found = compress(Sum([*deltas, *deltas], [1, 2, -1, -1, -2, 1]), 8)
    assert found.total < 1e-20 * sum(np.square(exact(delta)).sum() for delta in deltas)


def test_a_sum_that_nearly_cancels_is_what_is_left() -> None:
    first, other = random_deltas([16] * 2, (300, 260))
    near = LowRank(first.B, first.A + 1e-5 * other.A)  # of A's rows none is quite another's
    S = np.linalg.svd(exact(first) - exact(near), compute_uv=False)
    found = compress(Sum([first, near], [1, -1]), 5)
    assert found.total == pytest.approx(np.square(S).sum(), rel=1e-4)
    assert found.kept == pytest.approx(np.square(S[:5]).sum(), rel=1e-4)


def test_a_sum_has_no_more_directions_than_its_columns() -> None:
    deltas = random_deltas([8] * 3, (300, 260))
    found = compress(Sum([LowRank(deltas[0].B, delta.A) for delta in deltas], [1.0] * 3), 12)
    whole = deltas[0].B.double() @ sum(delta.A.double() for delta in deltas)
    assert found.delta.rank == 8
    np.testing.assert_allclose(found.delta.dense().numpy(), whole.numpy(), atol=1e-4)


def test_a_sum_is_a_task_vector_like_any_other() -> None:
    deltas, factors = random_deltas([3, 1, 4]), [1.0, -2.0, 0.5]
    total = Sum(deltas, factors)
    whole = sum(f * exact(delta) for delta, f in zip(deltas, factors, strict=True))
    assert (total.shape, total.rank) == (SHAPE, 8)
    for seen in (total.dense(), total.rows(0, 24), (total.B @ total.A), total.dense_float64()):
        np.testing.assert_allclose(seen.numpy(), whole, atol=1e-5)
    np.testing.assert_allclose(total.scaled(3).rows(5, 9).numpy(), 3 * whole[5:9], atol=1e-4)


def test_products_are_those_of_the_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ties_peft.task_vectors.subspace.STRIP", 7)
    for deltas in CASES.values():
        stack = np.stack([exact(delta).reshape(-1) for delta in deltas])
        np.testing.assert_allclose(products(deltas).numpy(), stack @ stack.T, rtol=1e-9, atol=1e-9)


class Largest(TorchDispatchMode):
    """Remembers the most numbers that a tensor had."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            self.most = max(self.most, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return made


@pytest.mark.parametrize(("method", "space"), [("average", "delta"), ("ties", "core"), ("ties", "knots")])
def test_no_array_of_all_columns_squared(make_lora: Callable[..., Path], method: str, space: str) -> None:
    """130 adapters of rank 16 are 2080 columns, whose square is 4.3 million."""
    one = torch.get_num_threads()
    paths = [make_lora(f"a{n}", rank=16, seed=n, shapes={"layers.0.q": SHAPE}) for n in range(130)]
    torch.set_num_threads(1)
    try:
        with Largest() as largest, warnings.catch_warnings():
            merged = ties_peft.merge(paths, method=method, space=space, rank="max")
    finally:
        torch.set_num_threads(one)
    assert 0 < largest.most <= 2080 * 256
    vectors = [definition.read(path) for path in paths]
    if method == "average":
        wanted = definition.average(vectors, [1.0] * 130)["layers.0.q"]
        np.testing.assert_allclose(merged.delta("layers.0.q").numpy(), wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("space", ["core", "knots"])
def test_ties_of_many_is_the_definition(make_lora: Callable[..., Path], space: str) -> None:
    shapes = {"layers.0.q": SHAPE, "layers.1.q": (40, 20)}
    paths = [make_lora(f"a{n}", rank=13, seed=n, shapes=shapes) for n in range(6)]
    vectors = [definition.read(path) for path in paths]
    bases = {}
    for name in shapes:
        own = [vector[name] for vector in vectors]
        bases[name] = core_bases(own)
        if space == "knots":
            bases[name] = np.linalg.svd(np.hstack(own), full_matrices=False)[0], np.eye(shapes[name][1])
    inside = [{n: bases[n][0].T @ v @ bases[n][1] for n, v in vector.items()} for vector in vectors]
    wanted = definition.ties(inside, [1.0] * 6)
    merged = ties_peft.merge(paths, "ties", space=space, rank="max")
    for name, (left, right) in bases.items():
        whole = left @ wanted[name] @ right.T
        np.testing.assert_allclose(merged.delta(name).numpy(), whole, atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize("space", ["delta", "core", "knots", "factors"])
@pytest.mark.parametrize("setting", ["KEPT_BYTES", "MAX_GRAM_SIDE"])
def test_what_is_kept_and_what_is_read_again_changes_no_bit(
    make_lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, space: str, setting: str
) -> None:
    paths = [make_lora(f"a{n}", rank=5, seed=n) for n in range(4)]
    asked: dict[str, Any] = {"space": space, "weights": [1, 2, -1, 0.5], "rank": 8}
    if space != "factors":
        asked["sign_from"] = paths[2]
    plain = ties_peft.merge(paths, **asked)
    monkeypatch.setattr(f"ties_peft.merging.encoding.{setting}", 0)
    again = ties_peft.merge(paths, **asked)
    assert all(torch.equal(plain.delta(name), again.delta(name)) for name in plain.modules)
    assert plain.report.to_dict()["cosines"] == again.report.to_dict()["cosines"]


def test_small_encodings_are_made_once(make_lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = CoreEncoding.__init__
    monkeypatch.setattr(CoreEncoding, "__init__", lambda self, *given: (made.append(1), plain(self, *given))[1])
    paths = [make_lora(f"a{n}", seed=n) for n in range(3)]
    ties_peft.merge(paths, "ties", space="core", rank=8)
    assert len(made) == 3  # modules
    monkeypatch.setattr("ties_peft.merging.encoding.KEPT_BYTES", 0)
    ties_peft.merge(paths, "ties", space="core", rank=8)
    assert len(made) > 6


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("kept", [True, False])
def test_cuts_are_the_same_sought_a_few_adapters_at_a_time(
    make_lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, space: str, kept: bool
) -> None:
    paths = [make_lora(f"a{n}", seed=n) for n in range(5)]
    plain = ties_peft.merge(paths, "ties", space=space, rank=8)
    monkeypatch.setattr("ties_peft.merging.thresholds.BATCH", 2)
    if not kept:
        monkeypatch.setattr("ties_peft.merging.encoding.KEPT_BYTES", 0)
    told: list[int] = []
    again = ties_peft.merge(paths, "ties", space=space, rank=8, progress=lambda stage, done, of: told.append(done))
    assert told[: 3 if kept else 1] == ([2, 4, 5] if kept else [5])
    assert all(torch.equal(plain.delta(name), again.delta(name)) for name in plain.modules)
    assert [line.kept for line in plain.report.adapters] == [line.kept for line in again.report.adapters]
