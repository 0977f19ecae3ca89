"""Every fast path equals the plain one: compiled kernels, thresholds by counting, reading by offset, Gram algebra."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ties_peft
from ties_peft.adapters.adapter import Adapter
from ties_peft.adapters.tensors import SafetensorsFile
from ties_peft.task_vectors.delta import LowRank, Span, gram
from ties_peft.task_vectors.factorise import _orthonormal, leading_rows
from ties_peft.task_vectors.kernels import backends as fast
from ties_peft.task_vectors.threshold import ThresholdSearch
from ties_peft.task_vectors.tiles import ThreadPool

SHAPES = {"layers.0.q": (37, 53), "layers.0.up": (130, 61), "layers.1.q": (24, 24)}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("numba")
    monkeypatch.setattr(fast, "MIN_ENTRIES", 0)
    yield


def folders(make_lora: Callable[..., Path], rank: int = 4) -> list[Path]:
    return [make_lora(f"a{n}", rank=rank, seed=n, shapes=SHAPES) for n in range(4)]


@pytest.mark.parametrize("tile", [97, 1 << 18])
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"weights": [1, 2, 0.5, -1]},
        {"weights": [1, 2, 0.5, -1], "normalize": False},
        {"elect": "count"},
        {"disjoint": "sum"},
        {"disjoint": "max"},
        {"scope": "module"},
        {"density": 1},
        {"method": "dare_ties"},
        {"method": "breadcrumbs_ties"},
    ],
)
def test_compiled_loops_are_the_plain_ones_within_float32(
    make_lora: Callable[..., Path], compiled: None, monkeypatch: pytest.MonkeyPatch, tile: int, asked: dict[str, object]
) -> None:
    monkeypatch.setattr("ties_peft.task_vectors.tiles.TILE", tile)
    for module in ("task_vectors.threshold", "merging.thresholds"):
        monkeypatch.setattr(f"ties_peft.{module}.SORTED_SIZE", 500)
    paths = folders(make_lora)
    monkeypatch.setattr(fast, "MIN_ENTRIES", 1 << 62)
    plain = ties_peft.merge(paths, rank=24, **{"method": "ties", **asked})
    monkeypatch.setattr(fast, "MIN_ENTRIES", 0)
    quick = ties_peft.merge(paths, rank=24, **{"method": "ties", **asked})
    assert (plain.report.loops, quick.report.loops.split()[0]) == ("torch", "numba")
    for name in SHAPES:
        torch.testing.assert_close(quick.delta(name), plain.delta(name), rtol=1e-4, atol=1e-5)
    assert [line.kept for line in plain.report.adapters] == [line.kept for line in quick.report.adapters]
    assert plain.report.conflict == quick.report.conflict


def adapter_of(delta: LowRank) -> ties_peft.Adapter:
    """A LoRA on one module, in memory."""
    names = {"B": "base_model.model.m.lora_B.weight", "A": "base_model.model.m.lora_A.weight"}
    config = {"peft_type": "LORA", "r": delta.rank, "lora_alpha": delta.rank, "target_modules": ["m"]}
    return Adapter.from_tensors(config, {names["B"]: delta.B, names["A"]: delta.A})


def ties_by_definition(dense: list[np.ndarray], weights: list[float], density: float, disjoint: str) -> np.ndarray:
    """TIES on one module in float64, equal magnitudes cut by position."""
    kept = []
    for values, weight in zip(dense, weights, strict=True):
        flat = (weight * values).reshape(-1)
        stay = np.argsort(-np.abs(flat), kind="stable")[: round(10 * density) * flat.size // 10]
        trimmed = np.zeros_like(flat)
        trimmed[stay] = flat[stay]
        kept.append(trimmed.reshape(values.shape))
    stack, divisor_weight = np.stack(kept), np.abs(np.array(weights)).reshape(-1, 1, 1)
    side = np.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(stack) == side
    total = (stack * agree).sum(0)
    return total if disjoint == "sum" else total / np.maximum((agree * divisor_weight).sum(0), 1e-30)


@pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [
        (1, 1, [1]),
        (3, 5, [1, 2]),
        (7, 256, [4, 4, 4]),
        (9, 257, [1, 5, 16, 3, 2]),
        (6, 300, [33, 40, 50]),  # more columns than a side
        (37, 513, [7] * 9),
    ],
)
@pytest.mark.parametrize("disjoint", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["smooth", "repeated", "zeros"])
def test_the_fused_vote_is_the_definition_in_float64(
    compiled: None,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    columns: int,
    ranks: list[int],
    disjoint: Literal["mean", "sum"],
    kind: str,
) -> None:
    monkeypatch.setattr("ties_peft.task_vectors.tiles.TILE", 3 * columns)  # tails of three rows and fewer
    for module in ("task_vectors.threshold", "merging.thresholds"):
        monkeypatch.setattr(f"ties_peft.{module}.SORTED_SIZE", 10)
    deltas = random_deltas(ranks, rows, columns)
    if kind == "repeated":  # whole numbers: exact in float32, and many alike
        deltas = [LowRank(d.B.sign(), d.A.sign()) for d in deltas]
    if kind == "zeros":
        deltas = [LowRank(d.B * (n != 0), d.A * (torch.arange(columns) % 3 > 0)) for n, d in enumerate(deltas)]
    weights = [[1.0, -1.0, 2.0, 0.5][n % 4] for n in range(len(ranks))]
    adapters = [adapter_of(delta) for delta in deltas]
    merged = ties_peft.merge(adapters, weights=weights, density=0.3, disjoint=disjoint, rank=min(rows, columns))
    assert merged.report.loops.startswith("numba")
    expected = ties_by_definition([d.B.double().numpy() @ d.A.double().numpy() for d in deltas], weights, 0.3, disjoint)
    np.testing.assert_allclose(
        merged.delta("m").numpy(), expected, rtol=1e-4, atol=2e-5 * max(1, np.abs(expected).max())
    )
    assert [line.kept for line in merged.report.adapters] == [3 * rows * columns // 10] * len(ranks)


@pytest.mark.parametrize("few", [0, 1 << 19])  # counting values, collecting them
@pytest.mark.parametrize("steps", [4, 1 << 19])
@pytest.mark.parametrize("kind", ["smooth", "repeated", "zeros"])
@pytest.mark.parametrize("misled", [False, True])
def test_a_threshold_is_the_kth_largest(
    monkeypatch: pytest.MonkeyPatch, few: int, steps: int, kind: str, misled: bool
) -> None:
    for name, value in (("MAX_VALUES", few), ("BINS", steps), ("SORTED_SIZE", 10)):
        monkeypatch.setattr(f"ties_peft.task_vectors.threshold.{name}", value)
    draw = np.random.default_rng(0)
    values = np.abs(draw.standard_normal(3000)).astype(np.float32)
    values = {"smooth": values, "repeated": np.round(values, 1), "zeros": values * (draw.random(3000) < 0.4)}[kind]
    for keep in (1, 2, 600, 1500, 2999):
        sample = np.sort(values)[:50] if misled else draw.choice(values, 50)
        search = ThresholdSearch(len(values), keep, [(sample, len(values) / 50)])
        search.set_bracket()
        for _ in range(60):
            if search.threshold is not None:
                break
            low, high = search.bracket
            search.start_pass()
            for number, block in enumerate(np.split(values, [700, 1900])):
                search.add(int((block > high).sum()), [block[(block >= low) & (block <= high)]], number)
            search.finish_pass()
        expected = np.sort(values)[-keep]
        assert search.threshold == expected
        assert search.equal == np.count_nonzero(values == expected)
        assert search.equal_kept == keep - np.count_nonzero(values > expected)


def test_reading_by_offset_is_what_the_library_reads(make_lora: Callable[..., Path]) -> None:
    path = make_lora("a", rank=3, shapes=SHAPES) / "adapter_model.safetensors"
    file = SafetensorsFile(path, "a")
    for name, tensor in load_file(path).items():
        assert torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype
    file.prefetch(file.names)  # no more than a hint


def test_a_file_cut_short_after_it_was_opened_is_damaged(make_lora: Callable[..., Path]) -> None:
    path = make_lora("a") / "adapter_model.safetensors"
    file = SafetensorsFile(path, "a")
    last = file.names[-1]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ties_peft.TiesPeftError, match=r"changed while it was read|not a whole safetensors file"):
        for name in (*file.names, last):
            file.read(name)


def random_deltas(ranks: list[int], rows: int, columns: int) -> list[LowRank]:
    draw = torch.Generator().manual_seed(3)
    return [LowRank(torch.randn(rows, r, generator=draw), torch.randn(r, columns, generator=draw)) for r in ranks]


@pytest.mark.parametrize("rows", [1, 31, 2100])
def test_gram_algebra_is_the_dense_one(rows: int) -> None:
    deltas = random_deltas([1, 40, 3, 30], rows, 45)
    X = torch.cat([d.B for d in deltas], 1).double()
    torch.testing.assert_close(gram([d.B for d in deltas]), X.T @ X)
    dense = torch.stack([d.B.double() @ d.A.double() for d in deltas]).flatten(1)
    torch.testing.assert_close(Span(deltas).products(), dense @ dense.T)


def test_the_informed_start_is_the_leading_row_space() -> None:
    deltas = random_deltas([5, 2], 90, 70)
    start = leading_rows(Span(deltas), 4)
    _, _, Vt = torch.linalg.svd(sum(d.B.double() @ d.A.double() for d in deltas))
    torch.testing.assert_close(start.double() @ start.double().T, Vt[:4].T @ Vt[:4], atol=1e-6, rtol=0)


def test_orthonormal_bases_are_orthonormal_to_rounding_however_the_columns_lean() -> None:
    columns = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    leaning = columns[:, :1] + 1e-3 * columns
    for matrix in (columns, leaning, columns * 10.0 ** torch.arange(-6, 6)):
        Q = _orthonormal(matrix).double()
        assert (Q.T @ Q - torch.eye(Q.shape[1])).abs().max() < 1e-6


def test_threads_give_results_in_order_and_the_first_fault() -> None:
    pool = ThreadPool(3)
    assert pool.map(lambda n: n * n, range(100)) == [n * n for n in range(100)]

    def fails(n: int) -> int:
        if n == 5:
            raise ValueError(n)
        return n

    with pytest.raises(ValueError, match="5"):
        pool.map(fails, range(50))
    assert pool.map(lambda n: n, range(4)) == [0, 1, 2, 3]  # it goes on after a fault
    pool.close()


def test_a_plan_goes_on_with_the_threads_of_its_last_merge_but_not_with_another_processs(
    make_lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = ties_peft.prepare(folders(make_lora), space="knots")
    first = plan.merge(rank=8)
    (pool,) = plan._cache.pool
    plan.merge(rank=4)
    assert plan._cache.pool == [pool]
    process = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)  # as in a fork, which has none of its parent's threads
    again = plan.merge(rank=8)
    assert plan._cache.pool != [pool]
    assert all(torch.equal(first.delta(name), again.delta(name)) for name in SHAPES)


def test_what_a_process_merged_before_changes_no_bit(
    make_lora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    paths = folders(make_lora)
    before = ties_peft.merge(paths, "ties", rank=8)
    monkeypatch.setattr(fast, "MIN_ENTRIES", 0)
    assert ties_peft.merge(paths, "ties", rank=8).report.loops.startswith("numba")
    monkeypatch.undo()
    after = ties_peft.merge(paths, "ties", rank=8)
    assert (before.report.loops, after.report.loops) == ("torch", "torch")
    assert all(torch.equal(before.delta(name), after.delta(name)) for name in SHAPES)
