"""Merged deltas and the report's figures against the definitions in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PREFIX, lora_config, lora_tensors, write_adapter
from oracles import definition
from oracles.definition import Vectors

import ties_peft

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Folders = list[Path]
Q, UP, SECOND, HEAD = "layers.0.q", "layers.0.up", "layers.1.q", "lm_head"
SIZES = {Q: (12, 10), UP: (20, 12), SECOND: (12, 10), HEAD: (40, 10)}
UNIT = (1.0, 1.0, 1.0, 1.0)
WEIGHTS = (1.0, 2.5, -0.75, 0.5)
ONE_ABSENT = (1.0, 0.0, 2.0, 3.0)


def shapes(*modules: str) -> dict[str, tuple[int, int]]:
    return {module: SIZES[module] for module in modules}


@pytest.fixture
def loras(make_lora: Callable[..., Path]) -> Folders:
    """Ranks 4 and 8, four lora scalings, one rsLoRA, one with patterns; no module is in all of them."""
    return [
        make_lora("plain", rank=4, alpha=8, seed=1, shapes=shapes(Q, UP)),
        make_lora("wide", rank=8, alpha=4, seed=2, shapes=shapes(Q, UP, SECOND)),
        make_lora("rs", rank=8, alpha=2, seed=3, shapes=shapes(UP, SECOND), use_rslora=True),
        make_lora(
            "patterns",
            rank=4,
            alpha=6,
            seed=4,
            shapes=shapes(Q, SECOND),
            rank_pattern={"layers.1.q": 8},
            alpha_pattern={"ayers.0.q": 99, r"layers\.0\..": 5, "q": 3},
        ),
    ]


@pytest.fixture
def ia3s(make_ia3: Callable[..., Path]) -> Folders:
    """Vectors on outputs and on a feed-forward input; no module is in all of them."""
    k, down, second = {"layers.0.k": (12, False)}, {"layers.0.down": (20, True)}, {"layers.1.k": (12, False)}
    vectors = [k | down, k | down | second, down | second, k | second]
    return [make_ia3(f"i{seed}", seed=seed, vectors=v) for seed, v in enumerate(vectors)]


@pytest.fixture(params=["loras", "ia3s"])
def folders(request: pytest.FixtureRequest) -> Folders:
    return request.getfixturevalue(request.param)


def read(folders: Folders) -> list[Vectors]:
    return [definition.read(folder) for folder in folders]


def merge(folders: Folders, weights: Any = None, **asked: Any) -> ties_peft.Merged:
    """At full rank, where the kind has one."""
    rank = "max" if ties_peft.Adapter.load(folders[0]).peft_type.has_rank else "auto"
    return ties_peft.merge(folders, weights=weights, rank=rank, **asked)


def assert_equal(merged: ties_peft.Adapter, expected: Vectors) -> None:
    assert list(merged.modules) == sorted(expected)
    for module, vector in expected.items():
        error = np.linalg.norm(merged.delta(module).numpy() - vector)
        assert error <= 1e-4 * np.linalg.norm(vector), module


def test_adapters_are_read_as_defined(folders: Folders) -> None:
    for folder in folders:
        assert_equal(ties_peft.Adapter.load(folder), definition.read(folder))


@pytest.mark.parametrize("weights", [UNIT, WEIGHTS, ONE_ABSENT])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("method", ["average", "task_arithmetic"])
def test_linear_methods(folders: Folders, method: str, weights: tuple[float, ...], scale: float | None) -> None:
    asked = {} if scale is None else {"scale": scale}
    expected = getattr(definition, method)(read(folders), weights, **asked)
    assert_equal(merge(folders, weights, method=method, **asked), expected)


@pytest.mark.parametrize("weights", [UNIT, WEIGHTS, ONE_ABSENT])
@pytest.mark.parametrize("density", [0.2, 0.29, 1.0])
@pytest.mark.parametrize("scope", ["adapter", "module"])
def test_ties(folders: Folders, scope: str, density: float, weights: tuple[float, ...]) -> None:
    expected = definition.ties(read(folders), weights, density, scope)
    assert_equal(merge(folders, weights, density=density, scope=scope), expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("disjoint", ["mean", "sum", "max"])
@pytest.mark.parametrize("elect", ["mass", "count"])
def test_elections_and_disjoint_merges(folders: Folders, elect: str, disjoint: str, normalize: bool) -> None:
    asked: dict[str, Any] = {"density": 0.6, "disjoint": disjoint, "normalize": normalize, "scale": 1.5}
    expected = definition.ties(read(folders), WEIGHTS, elect_by=elect, **asked)
    assert_equal(merge(folders, WEIGHTS, elect=elect, **asked), expected)


@pytest.mark.parametrize("disjoint, normalize", [("mean", True), ("mean", False), ("sum", True), ("max", True)])
@pytest.mark.parametrize("density", [0.5, 1.0])
def test_one_adapter_with_a_weight(folders: Folders, density: float, disjoint: str, normalize: bool) -> None:
    asked: dict[str, Any] = {"density": density, "disjoint": disjoint, "normalize": normalize}
    for folder, weight in zip(folders, (3.0, -0.5, 1.0, -1.0), strict=True):
        assert_equal(merge([folder], [weight], **asked), definition.ties(read([folder]), [weight], **asked))


def test_ties_without_a_word_is_the_papers(folders: Folders) -> None:
    assert_equal(
        merge(folders, method="ties"), definition.ties(read(folders), UNIT, density=0.2, scope="adapter", scale=1.0)
    )


@pytest.mark.parametrize("elect", ["mass", "count"])
def test_signs_from_an_adapter_where_it_has_any(loras: Folders, tmp_path: Path, elect: str) -> None:
    tensors = lora_tensors(shapes(Q, UP), rank=4, seed=9)
    tensors[f"{PREFIX}{UP}.lora_B.weight"][::2] = 0
    giver = write_adapter(tmp_path / "giver", lora_config(shapes(Q, UP), rank=4, alpha=8), tensors)
    expected = definition.ties(read(loras), WEIGHTS, density=0.5, elect_by=elect, sign_from=definition.read(giver))
    assert_equal(merge(loras, WEIGHTS, density=0.5, elect=elect, sign_from=giver), expected)


def test_signs_from_an_ia3(ia3s: Folders, make_ia3: Callable[..., Path]) -> None:
    giver = make_ia3("giver", seed=9, vectors={"layers.0.k": (12, False)})
    expected = definition.ties(read(ia3s), UNIT, density=0.5, sign_from=definition.read(giver))
    assert_equal(merge(ia3s, density=0.5, sign_from=ties_peft.Adapter.load(giver)), expected)


def test_a_vocabulary_is_trimmed_on_its_own(make_lora: Callable[..., Path]) -> None:
    folders = [make_lora(f"v{seed}", seed=seed, shapes=shapes(Q, HEAD)) for seed in (1, 2)]
    merged = merge(folders, density=0.3)
    assert_equal(merged, definition.ties(read(folders), (1, 1), density=0.3))
    assert [line.kept for line in merged.report.adapters] == [36 + 120] * 2
    assert any(HEAD in warning for warning in merged.report.warnings)


@pytest.mark.parametrize("scope", ["adapter", "module"])
@pytest.mark.parametrize("density", [0.001, 0.29, 0.77])
def test_the_report_counts_what_the_trim_kept(folders: Folders, scope: str, density: float) -> None:
    report = merge(folders, density=density, scope=scope).report
    for line, vectors in zip(report.adapters, read(folders), strict=True):
        groups = definition.trim_groups(vectors, scope)
        sizes = [sum(vectors[module].size for module in group) for group in groups]
        assert line.kept == sum(definition.kept_count(density, n) for n in sizes)
        assert line.entries == sum(sizes)


def test_the_report_knows_norms_and_cosines(folders: Folders) -> None:
    report, rows = merge(folders, WEIGHTS).report, definition.matrix(read(folders))
    norms = np.linalg.norm(rows, axis=1)
    assert [line.norm for line in report.adapters] == pytest.approx(norms, rel=1e-5)
    assert np.array(report.cosines) == pytest.approx(rows @ rows.T / np.outer(norms, norms), abs=1e-5)


@pytest.mark.parametrize("density", [0.2, 0.8])
def test_the_report_knows_where_signs_differ(folders: Folders, density: float) -> None:
    report = merge(folders, WEIGHTS, density=density).report
    trimmed = definition.trim_all(read(folders), WEIGHTS, density, "adapter")
    assert report.conflict == pytest.approx(definition.conflict(trimmed))
    for line in report.modules:
        own = [{line.name: vectors[line.name]} for vectors in trimmed if line.name in vectors]
        assert line.conflict == pytest.approx(definition.conflict(own))


@pytest.mark.parametrize("rank", [1, 3, 11])
@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_a_small_rank_keeps_what_a_singular_value_decomposition_would(loras: Folders, method: str, rank: int) -> None:
    merged = ties_peft.merge(loras, method, weights=WEIGHTS, rank=rank, scale=0.7)
    whole = getattr(definition, method)(read(loras), WEIGHTS, scale=0.7)
    best = {module: definition.energies(vector, rank) for module, vector in whole.items()}
    for line in merged.report.modules:
        kept, total = best[line.name]
        assert (line.energy, line.norm) == pytest.approx((kept / total, total**0.5), rel=1e-4)
        error = np.linalg.norm(merged.delta(line.name).numpy() - whole[line.name])
        assert error <= 1.01 * max(0, total - kept) ** 0.5 + 1e-5 * total**0.5
    kept, total = np.sum(list(best.values()), axis=0)
    assert (merged.report.energy, merged.report.norm) == pytest.approx((kept / total, total**0.5), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_report_knows_what_rounding_lost(folders: Folders, dtype: str) -> None:
    exact, rounded = merge(folders, dtype="float32"), merge(folders, dtype=dtype)
    whole, written = (np.concatenate([a.delta(m).numpy().ravel() for m in a.modules]) for a in (exact, rounded))
    lost = np.linalg.norm(written - whole) / np.linalg.norm(whole)
    assert rounded.report.rounding == pytest.approx(lost, rel=1e-2)
    assert exact.report.rounding == 0 < lost
