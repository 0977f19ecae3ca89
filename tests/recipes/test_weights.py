"""Equal-norm weights, and negative ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest
from conftest import write_adapter
from safetensors.torch import load_file

from ties_peft import Adapter, Recipe, RecipeError, merge, prepare
from ties_peft.merging.members import equal_norm_weights
from ties_peft.merging.merge import merge_recipe

Make = Callable[..., Path]


def length(folder: Path) -> float:
    return float(np.sqrt(sum((v**2).sum() for v in by_hand.vectors(folder).values())))


@pytest.fixture
def unequal(make_lora: Make) -> list[Path]:
    """Three adapters whose norms are far apart."""
    return [make_lora(f"a{i}", rank=2 + i, seed=i, gain=gain) for i, gain in enumerate((0.1, 1.0, 12.0))]


def test_the_formula() -> None:
    assert equal_norm_weights([1.0, 3.0]) == [2.0, 2 / 3]
    assert equal_norm_weights([5.0, 5.0, 5.0]) == [1.0, 1.0, 1.0]
    assert equal_norm_weights([1.0, 0.0, 3.0]) == [2.0, 0.0, 2 / 3]


@pytest.mark.parametrize(
    "asked",
    [{"method": "ties"}, {"method": "average"}, {"method": "task_arithmetic"}, {"space": "core"}, {"scope": "module"}],
)
def test_norm_is_the_same_as_those_weights_by_hand(unequal: list[Path], asked: dict[str, Any]) -> None:
    norms = [length(folder) for folder in unequal]
    weights = [float(np.mean(norms)) / norm for norm in norms]
    merged = merge(unequal, weights="norm", rank="max", **asked)
    assert [line.weight for line in merged.report.adapters] == pytest.approx(weights, rel=1e-6)
    given = merge(unequal, weights=[line.weight for line in merged.report.adapters], rank="max", **asked)
    assert by_hand.same_tensors(merged, given)


def test_all_are_brought_to_one_length_and_the_total_stays(unequal: list[Path]) -> None:
    lines = merge(unequal, weights="norm").report.adapters
    weighted = [line.weight * line.norm for line in lines]
    assert weighted == pytest.approx([weighted[0]] * 3)
    assert sum(weighted) == pytest.approx(sum(line.norm for line in lines))


def test_the_norm_is_that_of_the_whole_adapter(make_lora: Make) -> None:
    small = make_lora("small", seed=1, shapes={"layers.0.q": (12, 10)})
    large = make_lora("large", seed=2)
    lines = merge([small, large], weights="norm").report.adapters
    assert lines[0].weight / lines[1].weight == pytest.approx(length(large) / length(small), rel=1e-6)


def test_ia3_vectors_too(make_ia3: Make) -> None:
    folders = [make_ia3("a", seed=1), make_ia3("b", seed=2)]
    lines = merge(folders, weights="norm").report.adapters
    norms = [length(folder) for folder in folders]
    assert [line.weight for line in lines] == pytest.approx([np.mean(norms) / norm for norm in norms], rel=1e-6)


def test_one_adapter_comes_back_unchanged(make_lora: Make) -> None:
    folder = make_lora("a")
    merged = merge([folder], "average", weights="norm", rank="max")
    assert merged.report.adapters[0].weight == 1.0
    by_hand.assert_close(merged, by_hand.vectors(folder))


def test_an_adapter_of_zeros_is_absent_and_warned_of(unequal: list[Path], make_lora: Make) -> None:
    nothing = make_lora("nothing", gain=0.0)
    with pytest.warns(UserWarning, match="nothing: left out of the merge, because the norm is 0"):
        merged = merge([*unequal, nothing], weights="norm")
    assert by_hand.same_tensors(merged, merge(unequal, weights="norm"))
    with pytest.raises(RecipeError, match="all of them are 0"):
        merge([nothing], weights="norm")


def test_the_report_states_it(unequal: list[Path]) -> None:
    report = merge(unequal, weights="norm").report
    assert report.to_dict()["weights"] == "norm"
    assert "norm: the mean" in str(report)
    assert merge(unequal).report.to_dict()["weights"] == "given"


def test_the_recipe_says_norm_and_makes_it_again(unequal: list[Path]) -> None:
    merged = merge(unequal, weights="norm")
    assert merged.recipe.to_dict()["parameters"]["weights"] == "norm"
    again = Recipe.from_yaml(merged.recipe.to_yaml())
    assert again == merged.recipe
    assert by_hand.same_tensors(merged, merge_recipe(again))


def test_a_prepared_merge_takes_it(unequal: list[Path]) -> None:
    prepared = prepare(unequal, "core").merge(weights="norm")
    assert by_hand.same_tensors(prepared, merge(unequal, space="core", weights="norm"))


@pytest.mark.parametrize("weights", ["norms", "1,2", 1.0, [1, "norm"]])
def test_what_is_neither_norm_nor_weights(unequal: list[Path], weights: Any) -> None:
    with pytest.raises(RecipeError, match=r"expected (norm|a finite)"):
        merge(unequal[:2], weights=weights)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_must_be_finite(unequal: list[Path], weight: float) -> None:
    with pytest.raises(RecipeError, match=f"the weights contain {weight}; expected finite numbers"):
        merge(unequal, weights=[1, weight, 1])


def negated(folder: Path) -> Path:
    """The adapter with every B, or every l − 1, negated."""
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {n: -t if "lora_B" in n else 2 - t if n.endswith("ia3_l") else t for n, t in tensors.items()}
    config = json.loads((folder / "adapter_config.json").read_text())
    return write_adapter(folder.with_name(f"minus-{folder.name}"), config, changed)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize(
    "asked",
    [
        {"method": "task_arithmetic"},
        {"method": "task_arithmetic", "space": "core"},
        {"method": "ties"},
        {"method": "ties", "elect": "count", "scope": "module"},
        {"method": "ties", "disjoint": "sum", "density": 1.0},
        {"method": "ties", "space": "knots"},
    ],
)
def test_weight_minus_one_is_the_negated_adapter(
    make_lora: Make, make_ia3: Make, kind: str, asked: dict[str, Any]
) -> None:
    if kind == "ia3" and "space" in asked:
        pytest.skip("(IA)³ is in space delta only")
    make = make_lora if kind == "lora" else make_ia3
    keep, forget = make("keep", seed=1), make("forget", seed=2)
    full = {"rank": "max"} if kind == "lora" else {}
    unlearned = merge([keep, forget], weights=[1, -1], **full, **asked)
    expected = merge([keep, negated(forget)], **full, **asked)
    by_hand.assert_close(unlearned, {name: expected.delta(name).numpy() for name in expected.modules})


def test_an_average_adds_the_negated_adapter_and_divides_by_the_sum_of_the_weights(make_lora: Make) -> None:
    keep, forget = make_lora("keep", seed=1), make_lora("forget", seed=2)
    kept, forgotten = by_hand.vectors(keep), by_hand.vectors(forget)
    merged = merge([keep, forget], "average", weights=[3, -1], rank="max")
    by_hand.assert_close(merged, {name: (3 * kept[name] - forgotten[name]) / 2 for name in kept})
    with pytest.raises(Exception, match="sum to 0"):
        merge([keep, forget], "average", weights=[1, -1])


def test_an_adapter_minus_itself_is_nothing(make_lora: Make) -> None:
    folder = make_lora("a")
    merged = merge([folder, folder], "task_arithmetic", weights=[1, -1])
    assert all(float(merged.delta(name).abs().max()) < 1e-5 for name in merged.modules)


def test_one_adapter_with_a_negative_weight_is_negated(make_lora: Make) -> None:
    folder = make_lora("a")
    merged = merge([Adapter.load(folder)], density=1.0, weights=[-2], rank="max")
    by_hand.assert_close(merged, {name: -v for name, v in by_hand.vectors(folder).items()})
