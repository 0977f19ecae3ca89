"""Every fast path equals the plain one: compiled loops, thresholds by counting, reading by offset, Gram algebra."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ties_peft
from ties_peft import fast
from ties_peft.delta import LowRank, Span, gram
from ties_peft.factorise import _orthonormal, leading_rows
from ties_peft.tensors import SafetensorsFile
from ties_peft.threshold import Search

SHAPES = {"layers.0.q": (37, 53), "layers.0.up": (130, 61), "layers.1.q": (24, 24)}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("numba")
    monkeypatch.setattr(fast, "WORTH", 0)
    monkeypatch.setattr(fast, "_loaded", [])
    yield


def folders(make_lora: Callable[..., Path], rank: int = 4) -> list[Path]:
    return [make_lora(f"a{n}", rank=rank, seed=n, shapes=SHAPES) for n in range(4)]


@pytest.mark.parametrize("tile", [97, 1 << 18])
@pytest.mark.parametrize(
    "asked", [{}, {"weights": [1, 2, 0.5, -1]}, {"elect": "count"}, {"disjoint": "sum"}, {"scope": "module"}]
)
def test_compiled_loops_change_no_bit(
    make_lora: Callable[..., Path], compiled: None, monkeypatch: pytest.MonkeyPatch, tile: int, asked: dict[str, object]
) -> None:
    monkeypatch.setattr("ties_peft.tiles.TILE", tile)
    for module in ("threshold", "survey"):
        monkeypatch.setattr(f"ties_peft.{module}.WHOLE", 500)
    paths = folders(make_lora)
    monkeypatch.setattr(fast, "WORTH", 1 << 62)
    plain = ties_peft.merge(paths, rank=16, **asked)
    monkeypatch.setattr(fast, "WORTH", 0)
    quick = ties_peft.merge(paths, rank=16, **asked)
    assert (plain.report.loops, quick.report.loops.split()[0]) == ("torch", "numba")
    assert all(torch.equal(plain.delta(name), quick.delta(name)) for name in SHAPES)
    assert [line.kept for line in plain.report.adapters] == [line.kept for line in quick.report.adapters]


def test_the_compiled_count_is_the_plain_one_for_every_length(compiled: None) -> None:
    fast.load(1)
    loops = fast.kernels()
    assert loops is not None
    for length in (1, 7, 8, 9, 64, 1001):
        values = np.random.default_rng(length).integers(-5, 6, length).astype(np.float32)
        for low, high in ((0, 5), (2, 3), (3, 3), (6, 9), (0, np.inf)):
            room, marks = np.empty(length + 1, np.float32), np.empty(length, np.uint8)
            above, inside = loops.count(values, np.float32(low), np.float32(high), room, marks)
            sizes = np.abs(values)
            assert above == np.count_nonzero(sizes > high)
            assert np.array_equal(room[:inside], sizes[(sizes >= low) & (sizes <= high)])


@pytest.mark.parametrize("few", [0, 1 << 19])  # counting values, collecting them
@pytest.mark.parametrize("steps", [4, 1 << 19])
@pytest.mark.parametrize("kind", ["smooth", "repeated", "zeros"])
@pytest.mark.parametrize("misled", [False, True])
def test_a_threshold_is_the_kth_largest(
    monkeypatch: pytest.MonkeyPatch, few: int, steps: int, kind: str, misled: bool
) -> None:
    for name, value in (("FEW", few), ("STEPS", steps), ("WHOLE", 10)):
        monkeypatch.setattr(f"ties_peft.threshold.{name}", value)
    draw = np.random.default_rng(0)
    values = np.abs(draw.standard_normal(3000)).astype(np.float32)
    values = {"smooth": values, "repeated": np.round(values, 1), "zeros": values * (draw.random(3000) < 0.4)}[kind]
    for keep in (1, 2, 600, 1500, 2999):
        sample = np.sort(values)[:50] if misled else draw.choice(values, 50)
        search = Search(len(values), keep, [(sample, len(values) / 50)])
        search.bracket()
        for _ in range(60):
            if search.threshold is not None:
                break
            low, high = search.ends
            search.open()
            for block in np.split(values, [700, 1900]):
                search.add(int((block > high).sum()), block[(block >= low) & (block <= high)])
            search.close()
        expected = np.sort(values)[-keep]
        assert search.threshold == expected
        assert search.equal == np.count_nonzero(values == expected)
        assert search.spare == keep - np.count_nonzero(values > expected)


def test_reading_by_offset_is_what_the_library_reads(make_lora: Callable[..., Path]) -> None:
    path = make_lora("a", rank=3, shapes=SHAPES) / "adapter_model.safetensors"
    file = SafetensorsFile(path, "a")
    for name, tensor in load_file(path).items():
        assert torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype
    file.expect(file.names)  # no more than a hint


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
