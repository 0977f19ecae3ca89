"""What a search finds, what it is held against, and what it refuses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worker import LORAHUB, NegativeDistance

import ties_peft
from ties_peft import Adapter, CompatibilityError, MethodError, Recipe, RecipeError, TiesPeftError
from ties_peft.search.controls import random_adapter
from ties_peft.search.tuning import Choice, Range, Tuning

Make = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")


@pytest.fixture
def folders(make_lora: Make) -> list[str]:
    return [str(make_lora(name, seed=seed)) for seed, name in enumerate("abc")]


def test_weights_are_found_and_beat_every_control(folders: list[str]) -> None:
    objective = NegativeDistance(folders)
    found = ties_peft.search(folders, objective, penalty=0.0, judge=lambda adapter: 10 * objective(adapter), **LORAHUB)
    assert found.recipe.weights == pytest.approx((0.7, 0.0, -0.4), abs=0.05)
    assert len(found.trials) == 40
    assert [control.name for control in found.controls] == [
        "base",
        "mean",
        "best single",
        "random weights",
        "random adapters",
    ]
    scores = {control.name: control.score for control in found.controls}
    assert all(found.score > score for score in scores.values())
    assert scores["base"] == pytest.approx(-1.0)
    assert found.judged == pytest.approx(10 * found.score)
    assert all(control.judged == pytest.approx(10 * control.score) for control in found.controls)
    single = [objective(ties_peft.merge([folder], method="average")) for folder in folders]
    assert scores["best single"] == pytest.approx(max(single), abs=1e-4)
    mean = ties_peft.merge(folders, method="average", rank="max")
    assert scores["mean"] == pytest.approx(objective(mean), abs=1e-5)


def test_the_recipe_and_the_adapter_are_ordinary_ones(folders: list[str], tmp_path: Path) -> None:
    found = ties_peft.search(folders, NegativeDistance(folders), budget=8, controls=(), **LORAHUB)
    saved = Adapter.load(found.adapter.save(tmp_path / "out"))
    recipe = Recipe.from_file(tmp_path / "out" / "recipe.yaml")
    assert recipe == found.recipe
    again = ties_peft.merge(folders, recipe.method, weights=recipe.weights, scale=recipe.scale, rank=recipe.rank)
    assert again.digest == saved.digest
    assert NegativeDistance(folders)(saved) == pytest.approx(found.score)


def test_it_begins_with_nothing_and_with_the_mean(folders: list[str]) -> None:
    seen: list[Adapter] = []

    def watched(adapter: Adapter) -> float:
        seen.append(adapter)
        return -adapter.norm()

    found = ties_peft.search(folders, watched, budget=3, controls=(), **LORAHUB)
    assert seen[0].norm() == 0.0
    assert dict(found.trials[0].setting) == dict.fromkeys([f"weights.{i}" for i in range(3)], 0.0)
    assert list(found.trials[1].setting.values()) == pytest.approx([1 / 3] * 3)
    assert found.trials[0].value == 0.0
    assert found.adapter.norm() == 0.0


@pytest.mark.filterwarnings("default::ties_peft.TiesPeftWarning")
def test_it_gives_the_warnings_of_its_result_and_none_of_its_trials(make_lora: Make) -> None:
    folders = [str(make_lora("loud", gain=50)), str(make_lora("quiet", seed=1))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ties_peft.TiesPeftWarning)
        found = ties_peft.search(folders, lambda adapter: adapter.norm(), budget=8, controls=("mean",))
    given = [str(one.message) for one in caught if one.category is ties_peft.TiesPeftWarning]
    assert given == found.adapter.report.warnings != []


@pytest.mark.parametrize("rows", [1, 5, 50])
def test_the_penalty_is_on_the_mean_of_the_weights_whatever_the_rows(folders: list[str], rows: int) -> None:
    found = ties_peft.search(folders, lambda adapter: float(np.mean([1.0] * rows)), budget=12, controls=(), penalty=0.2)
    for trial in found.trials:
        assert trial.value == pytest.approx(1.0 - 0.2 * np.mean(np.abs(list(trial.setting.values()))))
        assert all(-1.5 <= weight <= 1.5 for weight in trial.setting.values())


def test_the_sum_is_exact_where_the_published_one_has_cross_terms(folders: list[str]) -> None:
    """A weight of −1 negates; in LoRAHub's product of sums it changes nothing."""
    deltas = [Adapter.load(folder).delta("layers.0.up") for folder in folders]
    tuning = Tuning.read(Recipe(adapters=tuple(folders), method="task_arithmetic", scale=1.0, rank="max"))
    recipe = tuning.to_recipe({"weights.0": -1.0, "weights.1": 0.5, "weights.2": 0.0})
    merged = ties_peft.merge(folders, recipe.method, weights=recipe.weights, scale=recipe.scale, rank="max")
    assert torch.allclose(merged.delta("layers.0.up"), -deltas[0] + 0.5 * deltas[1], atol=1e-5)


def test_one_seed_one_search(folders: list[str]) -> None:
    tune = {
        "density": [0.05, 1.0],
        "method": ["ties", "task_arithmetic"],
        "adapters": "some",
        "elect": ["mass", "count"],
    }
    asked: dict[str, Any] = {"tune": tune, "budget": 15, "controls": ("random weights",)}
    first, again, other = (
        ties_peft.search(folders, NegativeDistance(folders), **asked, seed=seed) for seed in (0, 0, 1)
    )
    assert first.to_dict() == again.to_dict()
    assert first.to_dict() != other.to_dict()


def test_the_seed_is_that_of_the_merges_too(folders: list[str]) -> None:
    found = ties_peft.search(folders, NegativeDistance(folders), budget=2, controls=(), method="dare_ties", seed=5)
    weights = found.recipe.weights
    assert found.recipe.seed == 5
    assert found.adapter.digest == ties_peft.merge(folders, "dare_ties", weights=weights, seed=5).digest
    assert found.adapter.digest != ties_peft.merge(folders, "dare_ties", weights=weights, seed=0).digest


def test_any_numbers_and_choices_of_a_recipe(folders: list[str]) -> None:
    tune = {
        "method": ["ties", "dare_ties", "average"],
        "density": {"low": 0.01, "high": 1.0, "log": True},
        "scale": [0.5, 2.0],
        "seed": [0, 9],
        "weights": {"low": 0.1, "high": 1.0, "points": 2},
        "space": ["delta", "core"],
    }
    found = ties_peft.search(folders, NegativeDistance(folders), tune, budget=20, controls=(), rank=8)
    seen = {trial.setting["method"] for trial in found.trials}
    assert len(seen) > 1
    assert isinstance(found.recipe.weights, tuple)
    assert all(len(weight) == 2 for weight in found.recipe.weights)
    assert ("density" in found.recipe.parameters) == (found.recipe.method != "average")
    assert found.adapter.report.rank == 8
    assert all(isinstance(trial.setting["seed"], int) for trial in found.trials)


def test_some_of_the_adapters(folders: list[str]) -> None:
    found = ties_peft.search(
        folders, NegativeDistance(folders), {"adapters": "some"}, budget=20, controls=(), **LORAHUB
    )
    assert found.recipe.weights == (1.0, 0.0, 0.0)


def test_vectors(make_ia3: Make) -> None:
    folders = [str(make_ia3(name, seed=seed)) for seed, name in enumerate("ab")]
    found = ties_peft.search(folders, NegativeDistance(folders), penalty=0.0, budget=30, **LORAHUB)
    assert found.recipe.weights == pytest.approx((0.7, -0.4), abs=0.05)


def test_random_adapters_have_the_shapes_and_norms_and_nothing_else(make_lora: Make, make_ia3: Make) -> None:
    for folder in (make_lora("a", rank_pattern={"up": 2}), make_ia3("v")):
        own = Adapter.load(folder)
        drawn, again, other = (random_adapter(own, seed) for seed in (0, 0, 1))
        assert drawn.digest == again.digest != other.digest
        for name in own.modules:
            assert drawn.module(name).shape == own.module(name).shape
            assert drawn.module(name).rank == own.module(name).rank
            mine, theirs = own.delta(name), drawn.delta(name)
            assert float(theirs.norm()) == pytest.approx(float(mine.norm()), rel=1e-4)
            assert abs(float((mine * theirs).sum())) < 0.8 * float(mine.norm() * theirs.norm())


def test_no_trial_is_made_again_by_a_second_call(folders: list[str], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"budget": 6, "storage": tmp_path / "s.db"}
    first = ties_peft.search(folders, NegativeDistance(folders), **asked)

    calls = []
    objective = NegativeDistance(folders)

    def watched(adapter: Adapter) -> float:
        calls.append(adapter)
        return objective(adapter)

    again = ties_peft.search(folders, watched, **asked)
    assert not calls
    assert again.to_dict() == first.to_dict()
    more = ties_peft.search(folders, watched, **{**asked, "budget": 8}, controls=())
    assert len(calls) == 2
    assert more.trials[:6] == first.trials


def test_a_study_of_another_search_is_refused(folders: list[str], tmp_path: Path) -> None:
    ties_peft.search(folders, NegativeDistance(folders), budget=2, storage=tmp_path / "s.db", controls=())
    with pytest.raises(RecipeError, match="is of another search; the two differ in adapters"):
        ties_peft.search(folders[:2], NegativeDistance(folders), budget=2, storage=tmp_path / "s.db", controls=())
    with pytest.raises(RecipeError, match="the two differ in penalty"):
        ties_peft.search(
            folders, NegativeDistance(folders), budget=2, storage=tmp_path / "s.db", controls=(), penalty=0
        )


def test_progress_is_told_of_the_search_and_of_the_controls_that_cost_as_much(folders: list[str]) -> None:
    told: list[tuple[str, int, int]] = []
    found = ties_peft.search(folders, NegativeDistance(folders), budget=5, progress=lambda *one: told.append(one))
    stages = [stage.partition(" · ")[0] for stage, _, _ in told]
    assert list(dict.fromkeys(stages)) == ["search", "random weights", "random adapters"]
    for name in dict.fromkeys(stages):
        own = [one for stage, one in zip(stages, told, strict=True) if stage == name]
        assert [(done, of) for _, done, of in own] == [(done, 5) for done in range(6)]
    best = max(trial.value for trial in found.trials)
    assert told[5][0] == f"search · best so far {best:.4f}"


FAULTS: list[tuple[dict[str, Any], type[TiesPeftError], str]] = [
    ({"budget": 0}, RecipeError, "the budget is 0"),
    ({"penalty": -1}, RecipeError, "the penalty is -1"),
    ({"tune": {}}, RecipeError, "tune names no parameter"),
    ({"tune": "method"}, RecipeError, "tune is 'method'; expected a dict"),
    ({"tune": ["method"]}, RecipeError, "expected a dict"),
    ({"tune": {"scale": {"choices": [1, 2, 3]}}}, RecipeError, "For choices give a list of three or more values"),
    ({"tune": {"scale": 2}}, RecipeError, "three or more values, or names"),
    (
        {"tune": {"method": ["ties", "fisher"]}},
        CompatibilityError,
        "tune: method=fisher cannot be merged: .* needs fisher",
    ),
    ({"tune": {"density": [0.1, 0.2, 0.3], "method": ["ties", "fisher"]}}, CompatibilityError, "tune: method=fisher"),
    (
        {"tune": {"elect": ["mass", "luck", "count"], "method": ["average", "ties"]}},
        MethodError,
        "elect=luck cannot be",
    ),
    ({"tune": {"rank": ["max", "most", "auto"]}}, RecipeError, "tune: rank=most cannot be merged: rank is 'most'"),
    ({"method": "fisher"}, CompatibilityError, "^method 'fisher' needs fisher statistics"),
    ({"tune": {"densty": [0.1, 1]}, "method": "ties"}, MethodError, "did you mean 'density'"),
    ({"tune": {"density": [0.0, 1.0]}, "method": "ties"}, MethodError, "greater than 0"),
    ({"tune": {"density": [1.0, 0.5]}, "method": "ties"}, RecipeError, "expected low < high"),
    ({"tune": {"scale": {"low": 0, "high": 1, "log": True}}}, RecipeError, "expected a lower bound above 0"),
    ({"tune": {"method": ["tiez"]}}, RecipeError, "did you mean 'ties'"),
    ({"tune": {"adapters": 2}}, RecipeError, "expected some"),
    ({"tune": {"weights": "all"}}, RecipeError, r"expected \[low, high\]"),
    ({"sampler": "nsga"}, RecipeError, "the sampler is 'nsga'"),
    ({"sampler": "cobyla", "tune": {"method": ["ties", "dare_ties"]}}, RecipeError, "only ranges are tuned"),
    ({"storage": "nosuch://db"}, RecipeError, "the study cannot be kept in 'nosuch://db'"),
    ({"controls": ["bas"]}, RecipeError, "unknown control 'bas': did you mean 'base'"),
    ({"method": "slerp"}, MethodError, "slerp"),
    ({"seed": -1}, RecipeError, "seed is -1"),
    ({"parameters": {"densty": 0.2}}, MethodError, "did you mean 'density'"),
    ({"parameters": {"densty": 0.2}, "tune": {"method": ["ties", "tsv"]}}, MethodError, "did you mean 'density'"),
]


@pytest.mark.parametrize(("change", "error", "text"), FAULTS)
def test_wrong_input_ends_before_the_first_trial(
    folders: list[str], change: dict[str, Any], error: type[TiesPeftError], text: str
) -> None:
    def never(adapter: Adapter) -> float:
        pytest.fail("a trial was made")

    with pytest.raises(error, match=text):
        ties_peft.search(folders, never, **change)


def test_an_objective_that_gives_no_number_is_said(folders: list[str]) -> None:
    with pytest.raises(RecipeError, match="the objective gave nan"):
        ties_peft.search(folders, lambda adapter: math.nan, budget=2)


def test_knobs() -> None:
    tuning = Tuning.read(Recipe(adapters=("a", "b")), {"weights": [0, 2], "elect": ["mass", "count"], "rank": [4, 8]})
    assert tuning.domains == {
        "weights.0": Range(0, 2),
        "weights.1": Range(0, 2),
        "elect": Choice(("mass", "count")),
        "rank": Range(4, 8, whole=True),
    }
    assert Range(1.0, 100.0, log=True).value_at(0.5) == pytest.approx(10.0)
    assert [Choice(("a", "b")).value_at(share) for share in (0.0, 0.49, 0.5, 0.99)] == ["a", "a", "b", "b"]
