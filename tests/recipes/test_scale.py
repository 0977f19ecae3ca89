"""A scale that depends on the number of adapters: what may be written, what it means, and where it works."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from by_hand import same_tensors
from cli.run_command import run

import ties_peft
from ties_peft import Recipe, RecipeError
from ties_peft.merging.recipes.scale import Scale, is_scale
from ties_peft.search.tuning import Tuning

Make = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")

MEANT: dict[float | str, Callable[[int], float]] = {
    0.4: lambda n: 0.4,
    -2: lambda n: -2.0,
    "N": lambda n: n,
    "1/N": lambda n: 1 / n,
    "1/sqrt(N)": lambda n: 1 / math.sqrt(n),
    " 1 / sqrt( N ) ": lambda n: 1 / math.sqrt(n),
    "sqrt(N)": math.sqrt,
    "N^-1/4": lambda n: 1 / math.sqrt(math.sqrt(n)),
    "N^(-1/4)": lambda n: 1 / math.sqrt(math.sqrt(n)),
    "N**-0.25": lambda n: 1 / math.sqrt(math.sqrt(n)),
    "1/N^1/4": lambda n: 1 / math.sqrt(math.sqrt(n)),
    "0.7*N^-1/4": lambda n: 0.7 / math.sqrt(math.sqrt(n)),
    "1.2/sqrt(N)": lambda n: 1.2 / math.sqrt(n),
    "-3e-1*N^+2": lambda n: -0.3 * n * n,
    ".5*N^(1/2)": lambda n: 0.5 * math.sqrt(n),
}
NONSENSE: list[Any] = [
    "",
    "0.4",
    "n",
    "2N",
    "N-1",
    "N+1",
    "1/N/2",
    "1 0*N",
    "N^",
    "N^(-1/4",
    "N^-1/4)",
    "N^-1/0",
    "N^N",
    "N^1e999",
    "1e999*N",
    "nan*N",
    "inf/N",
    "sqrt(6)",
    "1/sqrt(M)",
    "1/√N",
    "٣*N",
    "__import__('os').getcwd()",
    "N; N",
    "N\n*N",
    [1, 2],
    {"N": 1},
    True,
    math.nan,
    math.inf,
]


@pytest.mark.parametrize("value", MEANT)
@pytest.mark.parametrize("adapters", [1, 2, 6, 81])
def test_what_is_written_means_what_it_says(value: float | str, adapters: int) -> None:
    assert is_scale(value)
    assert Scale.read(value).at(adapters) == pytest.approx(MEANT[value](adapters), rel=1e-14)


@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_anything_else_is_refused_with_the_forms_that_are_accepted(value: Any) -> None:
    assert not is_scale(value)
    with pytest.raises(RecipeError) as caught:
        Scale.read(value)
    message = str(caught.value)
    assert "\n" not in message
    for form in ("the scale is", "finite number", "1/N", "1/sqrt(N)", "N^-1/4", "0.7*N^-1/4"):
        assert form in message


def test_a_scale_beyond_every_number_is_refused(make_lora: Make) -> None:
    adapters = [make_lora("a"), make_lora("b", seed=1)]
    with pytest.raises(RecipeError, match=r"'N\^1e9' is beyond every number for 2 adapters"):
        ties_peft.merge(adapters, scale="N^1e9")


@pytest.fixture
def three(make_lora: Make) -> list[Path]:
    return [make_lora(name, seed=seed, rank=2 + seed) for seed, name in enumerate("abc")]


@pytest.mark.parametrize("method", ["ties", "tsv", "pico+ties"])
def test_a_formula_is_the_number_that_it_stands_for(three: list[Path], method: str) -> None:
    space = "core" if "+" in method else "delta"
    by_formula = ties_peft.merge(three, method, space, scale="N^-1/4")
    assert same_tensors(by_formula, ties_peft.merge(three, method, space, scale=3**-0.25))
    assert by_formula.report.scale == 3**-0.25
    assert "0.76 = N^-1/4 for 3 adapters" in " ".join(str(by_formula.report).split())


def test_an_adapter_of_weight_zero_does_not_count(three: list[Path]) -> None:
    merged = ties_peft.merge(three, "task_arithmetic", scale="1/N", weights=[1, 0, 1])
    assert merged.report.scale == 0.5
    assert same_tensors(merged, ties_peft.merge([three[0], three[2]], "task_arithmetic", scale=0.5))


def test_a_number_has_no_formula(three: list[Path]) -> None:
    report = ties_peft.merge(three, scale=0.5).report
    assert report.formula is None
    assert "N^" not in str(report) and "for 3 adapters" not in str(report)


def test_a_recipe_keeps_the_text(three: list[Path], tmp_path: Path) -> None:
    merged = ties_peft.merge(three, scale="1/sqrt(N)")
    saved = Recipe.from_file(merged.save(tmp_path / "out") / "recipe.yaml")
    assert saved.scale == "1/sqrt(N)"
    assert json.loads((tmp_path / "out/provenance.json").read_text())["report"]["scale"] == 3**-0.5
    text = (tmp_path / "out/recipe.yaml").read_text().replace("scale:", "lambda:")
    assert Recipe.from_yaml(text) == saved


def test_the_command_line_takes_it_and_says_the_value(three: list[Path], tmp_path: Path) -> None:
    outcome = run("merge", *three, "--out", tmp_path / "out", "--scale", "0.7*N^-1/4", "--json")
    found = json.loads(outcome.out)
    assert found["recipe"]["parameters"]["scale"] == "0.7*N^-1/4"
    assert (found["report"]["scale"], found["report"]["formula"]) == (0.7 * 3**-0.25, "0.7*N^-1/4")
    plain = json.loads(run("merge", *three, "--out", tmp_path / "two", "--scale", "0.5", "--json").out)
    assert plain["recipe"]["parameters"]["scale"] == 0.5


@pytest.mark.parametrize("command", ["merge", "search"])
def test_the_command_line_refuses_anything_else_with_one_line(three: list[Path], tmp_path: Path, command: str) -> None:
    task = tmp_path / "task.yaml"
    task.write_text("name: x\n")
    extra = ("--task", task) if command == "search" else ()
    outcome = run(command, *three, "--out", tmp_path / "out", "--scale", "N^^2", *extra)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "N^^2" in outcome.err and "0.7*N^-1/4" in outcome.err


def test_prepared_merges_take_it(three: list[Path]) -> None:
    plan = ties_peft.prepare(three, "core")
    assert same_tensors(plan.merge("tsv", scale="1/N"), ties_peft.merge(three, "tsv", "core", scale="1/N"))
    assert plan.merge("tsv", scale="1/N").report.scale == 1 / 3


def tuning(asked: dict[str, Any], **recipe: Any) -> Tuning:
    return Tuning.read(Recipe(("a", "b", "c"), **recipe), asked)


def test_a_search_may_choose_among_formulas() -> None:
    read = tuning({"scale": ["N^-1/4", 0.4]}, method="tsv")
    assert read.to_recipe({"scale": "N^-1/4"}).scale == "N^-1/4"
    with pytest.raises(RecipeError, match=r"N\^\^2.*expected choices .* a finite number, or a formula"):
        tuning({"scale": ["N^-1/4", "N^^2"]})


def test_a_search_over_a_range_starts_where_the_formula_lies() -> None:
    assert tuning({"scale": [0.1, 2.0]}, scale="1/N").initial_setting() == {"scale": pytest.approx(1 / 3)}
    assert tuning({"scale": [0.5, 2.0]}, scale="1/N").initial_setting() == {"scale": 0.5}


def test_a_search_keeps_a_formula_that_it_does_not_tune(three: list[Path]) -> None:
    found = ties_peft.search(
        three, lambda adapter: -float(adapter.delta(adapter.modules[0]).norm()), {"density": [0.2, 0.9]}, 2,
        method="ties", scale="1/sqrt(N)", controls=(),
    )  # fmt: skip
    assert found.recipe.scale == "1/sqrt(N)"
    assert found.adapter.report.scale == 3**-0.5
