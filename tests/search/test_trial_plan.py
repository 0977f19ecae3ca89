"""How many trials a search has, what chooses them, and what its result says of that."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from worker import NegativeDistance

import ties_peft
from ties_peft import Recipe, RecipeError
from ties_peft.search.found import Control, better_controls
from ties_peft.search.trial_plan import TrialPlan
from ties_peft.search.tuning import Tuning

Make = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
NINE = {"method": ["ties", "task_arithmetic", "average"], "scale": [0.3, 1.0, 3.0]}


@pytest.fixture
def folders(make_lora: Make) -> list[str]:
    return [str(make_lora(name, seed=seed)) for seed, name in enumerate("abc")]


def given_warnings(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ties_peft.TiesPeftWarning)
        result = function()
    return result, [str(one.message) for one in caught if one.category is ties_peft.TiesPeftWarning]


PLANS: list[tuple[dict[str, Any] | None, str | None, int | None, TrialPlan]] = [
    (NINE, None, None, TrialPlan("grid", 9, 9)),
    (NINE, None, 9, TrialPlan("grid", 9, 9)),
    (NINE, None, 8, TrialPlan("auto", 8)),
    (NINE, "grid", 4, TrialPlan("grid", 4, 9)),
    (NINE, "grid", 100, TrialPlan("grid", 9, 9)),
    (NINE, "auto", None, TrialPlan("auto", 40)),
    (NINE, "random", 3, TrialPlan("random", 3)),
    ({"seed": list(range(100))}, "grid", None, TrialPlan("grid", 100, 100)),
    ({"seed": list(range(100))}, None, None, TrialPlan("auto", 40)),
    ({"seed": list(range(100))}, None, 100, TrialPlan("grid", 100, 100)),
    ({"adapters": "some"}, None, None, TrialPlan("grid", 8, 8)),
    ({"adapters": "some", "method": ["auto", "ties"]}, None, None, TrialPlan("grid", 16, 16)),
    ({**NINE, "density": [0.1, 1.0]}, None, None, TrialPlan("auto", 40)),
    ({**NINE, "weights": [0, 2]}, None, None, TrialPlan("auto", 40)),
    (None, None, None, TrialPlan("auto", 40)),
]


@pytest.mark.parametrize(("tune", "sampler", "budget", "expected"), PLANS)
def test_the_grid_is_the_default_where_the_budget_covers_it(
    tune: dict[str, Any] | None, sampler: str | None, budget: int | None, expected: TrialPlan
) -> None:
    tuning = Tuning.read(Recipe(adapters=("a", "b", "c")), tune)
    assert TrialPlan.read(sampler, budget, tuning) == expected


def test_a_grid_needs_choices() -> None:
    tuning = Tuning.read(Recipe(adapters=("a", "b")))
    with pytest.raises(RecipeError, match=r"weights\.0, weights\.1 can take any value of a range"):
        TrialPlan.read("grid", None, tuning)


def test_all_combinations_are_tried_once(folders: list[str]) -> None:
    found = ties_peft.search(folders, NegativeDistance(folders), NINE, controls=())
    assert len({tuple(trial.setting.values()) for trial in found.trials}) == len(found.trials) == 9
    assert (found.sampler, found.combinations) == ("grid", 9)
    assert {key: found.to_dict()[key] for key in ("sampler", "combinations")} == {"sampler": "grid", "combinations": 9}
    lines = str(found).splitlines()
    start = lines.index("combinations, the best first")
    scores = [float(line.split()[-1]) for line in lines[start + 2 : start + 11]]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(found.score, abs=1e-4)
    assert lines[start + 2].split()[:2] == [found.recipe.method, str(found.recipe.scale)]
    assert "score  what the given function returns; larger is better" in lines
    assert "tried  all 9 combinations, by the sampler grid" in lines


def test_every_subset_of_the_adapters_is_a_combination(folders: list[str]) -> None:
    """The empty one is the base model."""
    found = ties_peft.search(folders, lambda adapter: -adapter.norm(), {"adapters": "some"}, controls=())
    assert len(found.trials) == found.combinations == 8
    assert found.adapter.norm() == 0
    assert not any(found.trials[-1].setting.values())


def test_a_grid_that_is_cut_off_is_warned_of_before_its_trials(folders: list[str]) -> None:
    asked: dict[str, Any] = {"tune": NINE, "sampler": "grid", "budget": 4, "controls": ()}
    found, given = given_warnings(lambda: ties_peft.search(folders, NegativeDistance(folders), **asked))
    text = "the budget is 4, so the grid tries only the first 4 of its 9 combinations."
    assert given[0].startswith(text)
    assert given == found.warnings
    assert "tried  4 of 9 combinations, by the sampler grid" in str(found)
    with warnings.catch_warnings(), pytest.raises(ties_peft.TiesPeftWarning, match=text):
        warnings.simplefilter("error", ties_peft.TiesPeftWarning)
        ties_peft.search(folders, lambda adapter: pytest.fail("a trial was made"), **asked)


def test_a_stored_study_keeps_its_sampler(folders: list[str], tmp_path: Path) -> None:
    """As of a version without the default grid, or of a budget below the number of combinations."""
    asked: dict[str, Any] = {"tune": NINE, "controls": (), "storage": tmp_path / "s.db"}
    first = ties_peft.search(folders, NegativeDistance(folders), budget=4, **asked)
    assert (first.sampler, first.combinations) == ("tpe", None)
    with pytest.raises(
        RecipeError, match=r"has the sampler tpe, and grid would be used now.*sampler='tpe', --sampler tpe"
    ):
        ties_peft.search(folders, NegativeDistance(folders), **asked)
    more = ties_peft.search(folders, NegativeDistance(folders), budget=6, sampler="tpe", **asked)
    assert more.trials[:4] == first.trials


def test_a_grid_is_continued_with_a_larger_budget(folders: list[str], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"tune": NINE, "storage": tmp_path / "s.db"}
    few = ties_peft.search(folders, NegativeDistance(folders), budget=4, sampler="grid", **asked)
    whole = ties_peft.search(folders, NegativeDistance(folders), **asked)
    assert whole.trials[:4] == few.trials
    fresh = ties_peft.search(folders, NegativeDistance(folders), NINE)
    assert whole.to_dict() == fresh.to_dict()


@pytest.mark.parametrize(
    ("tune", "name"),
    [
        (None, "random weights"),
        ({"weights": {"low": 0, "high": 1, "points": 2}}, "random weights"),
        ({"scale": [0.5, 1.5]}, "random settings"),
        ({"weights": [0, 1], "method": ["ties", "average"]}, "random settings"),
    ],
)
@pytest.mark.parametrize("asked", ["random weights", "random settings"])
def test_the_random_control_is_named_by_what_is_tuned(folders: list[str], tune: Any, name: str, asked: str) -> None:
    stages: set[str] = set()
    found = ties_peft.search(
        folders,
        NegativeDistance(folders),
        tune,
        2,
        controls=(asked,),
        progress=lambda stage, done, of: stages.add(stage.partition(" · ")[0]),
    )
    assert [control.name for control in found.controls] == [name]
    assert stages == {"search", name}


def test_a_setting_that_was_tried_is_not_tried_again_as_a_control(folders: list[str]) -> None:
    """The control itself is scored once."""
    seen: list[Any] = []

    def count(adapter: Any) -> float:
        seen.append(adapter)
        return float(adapter.norm())

    ties_peft.search(folders, count, NINE, controls=("random settings",))
    assert len(seen) == 10


def test_a_control_that_scores_better_is_warned_of(folders: list[str]) -> None:
    tune = {"scale": [0.1, 0.2, 0.3]}
    found, given = given_warnings(
        lambda: ties_peft.search(folders, lambda a: a.norm(), tune, controls=("best single",))
    )
    text = f"what was found scores {found.score:.4f}, and a control scores better: best single ("
    assert any(one.startswith(text) for one in given)
    assert given == found.warnings
    assert text[:40] in str(found)


def test_only_a_difference_that_is_printed_counts() -> None:
    assert better_controls(-1.0, [Control("base", -1.0), Control("mean", -0.99999), Control("trained", -2.0)]) == []
    (text,) = better_controls(-1.0, [Control("base", -0.5), Control("mean", -0.9), Control("trained", -2.0)])
    assert "controls score better: base (-0.5000), mean (-0.9000). The search found nothing better than those" in text


def test_json_has_what_the_columns_hold(folders: list[str]) -> None:
    found = ties_peft.search(folders, NegativeDistance(folders), NINE, controls=(), judge=lambda adapter: 1.0)
    returned = "what the given function returns; larger is better"
    assert json.loads(json.dumps(found.to_dict()))["measures"] == {"score": returned, "judged": returned}
