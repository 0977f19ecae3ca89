"""The default method: what it stands for, what selects TIES instead, and that the report and the recipe say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.run_command import run
from recipes.by_hand import same_tensors

import ties_peft
from ties_peft import Recipe
from ties_peft.merging.merge import merge_recipe
from ties_peft.methods import TaskVectors, find_method

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]


@pytest.fixture
def loras(make_lora: Make) -> list[Path]:
    return [make_lora(name, seed=seed, rank=2 + seed) for seed, name in enumerate("abc")]


@pytest.fixture
def vectors(make_ia3: Make) -> list[Path]:
    return [make_ia3(name, seed=seed) for seed, name in enumerate("abc")]


def test_it_is_dual_for_lora_at_full_rank_and_says_why(loras: list[Path]) -> None:
    merged = ties_peft.merge(loras)
    assert same_tensors(merged, ties_peft.merge(loras, method="dual"))
    assert (merged.report.method, merged.report.rank) == ("dual", 2 + 3 + 4)
    assert "LoRA" in merged.report.chosen and "chosen by auto" in str(merged.report)
    assert not ties_peft.merge(loras, method="dual").report.chosen


def test_a_rank_that_cuts_keeps_the_spectra(loras: list[Path]) -> None:
    cut = ties_peft.merge(loras, rank=5)
    assert same_tensors(cut, ties_peft.merge(loras, method="dual", rank=5, flatten=0.0))
    assert "rank 5 is under Σrᵢ = 9" in cut.report.chosen
    for rank in (9, "max"):
        assert same_tensors(ties_peft.merge(loras, rank=rank), ties_peft.merge(loras, method="dual", rank=rank))


def test_it_is_rms_sum_for_ia3(vectors: list[Path]) -> None:
    merged = ties_peft.merge(vectors)
    assert same_tensors(merged, ties_peft.merge(vectors, method="rms_sum"))
    assert merged.report.method == "rms_sum" and "(IA)³" in merged.report.chosen


TIES: Mapping[str, tuple[dict[str, Any], str]] = {
    "density": ({"density": 0.5}, "density"),
    "elect and scope": ({"elect": "count", "scope": "module"}, "elect, scope"),
    "a default of TIES, given": ({"density": 0.2}, "density"),
    "densities": ({"densities": [0.5, None, 0.3]}, "density"),
    "equal densities": ({"densities": [0.5, 0.5, 0.5]}, "density"),
    "a schedule": ({"density": {"over_layers": [0.2, 0.9]}}, "density"),
    "a space": ({"space": "knots"}, "knots"),
    "factors": ({"space": "factors", "scope": "module"}, "scope"),
}


@pytest.mark.parametrize("case", TIES)
def test_what_is_of_ties_selects_ties(make_lora: Make, case: str) -> None:
    adapters = [make_lora(name, seed=seed) for seed, name in enumerate("abc")]
    asked, named = TIES[case]
    merged = ties_peft.merge(adapters, **asked)
    assert same_tensors(merged, ties_peft.merge(adapters, method="ties", **asked))
    assert merged.report.method == "ties" and named in merged.report.chosen


def test_the_recipe_keeps_what_was_asked_and_gives_the_same_again(loras: list[Path]) -> None:
    for asked in ({}, {"density": 0.4}):
        merged = ties_peft.merge(loras, **asked)
        text = merged.recipe.to_yaml()
        assert "merge_method: auto" in text
        assert same_tensors(merge_recipe(Recipe.from_yaml(text)), merged)


def test_a_prepared_merge_and_the_command_line_agree(loras: list[Path], tmp_path: Path) -> None:
    merged = ties_peft.merge(loras)
    assert same_tensors(ties_peft.prepare(loras).merge(), merged)
    assert run("merge", *map(str, loras), "--out", str(tmp_path / "out")).code == 0
    assert same_tensors(ties_peft.Adapter.load(tmp_path / "out"), merged)
    shown = run("merge", *map(str, loras), "--density", "0.3", "--dry-run").out
    assert "ties" in shown and "density is a parameter of TIES" in shown


def test_an_unknown_parameter_is_refused_with_the_known_ones(loras: list[Path]) -> None:
    with pytest.raises(ties_peft.MethodError, match=r"densty.*density"):
        ties_peft.merge(loras, densty=0.3)


def rms_sum(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """Σx/‖Σx‖ times the root mean square of the norms; λ at most 1."""
    total = sum(vectors)
    size = np.sqrt(np.mean([np.sum(v**2) for v in vectors]))
    return total * min(1.0, size / np.linalg.norm(total))


@pytest.mark.parametrize("shape", [(7,), (5, 6)])
@pytest.mark.parametrize("cancelling", [False, True])
def test_rms_sum_equals_its_definition(shape: tuple[int, ...], cancelling: bool) -> None:
    draw = np.random.default_rng(5)
    found = [draw.standard_normal(shape) for _ in range(3)]
    if cancelling:
        found[2] = 1e-3 * found[2] - found[0] - found[1]
    result = find_method("rms_sum")().merge(TaskVectors.of([torch.from_numpy(v) for v in found]))
    dense = result if isinstance(result, torch.Tensor) else result.dense()
    np.testing.assert_allclose(dense.numpy(), rms_sum(found), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_equal_adapters_come_back(make_lora: Make, make_ia3: Make, kind: str) -> None:
    make = make_lora if kind == "lora" else make_ia3
    merged = ties_peft.merge([make(name, seed=1) for name in "abc"], dtype="float32")
    one = ties_peft.Adapter.load(make("d", seed=1))
    for name in one.modules:
        np.testing.assert_allclose(merged.delta(name), one.delta(name), rtol=1e-4, atol=1e-5)
