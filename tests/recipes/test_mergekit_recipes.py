"""mergekit's recipes: known by a clear rule, read as mergekit means them, and every difference said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import pytest
import yaml

from ties_peft import Recipe, RecipeError, merge, methods
from ties_peft.merging.merge import merge_recipe
from ties_peft.merging.recipes.mergekit import METHODS

Make = Callable[..., Path]
HERE = {info.name for info in methods()}


def file(method: str, *models: Any, **top: Any) -> str:
    """A recipe as mergekit's users write it."""
    entries = [model if isinstance(model, dict) else {"model": str(model)} for model in models]
    return yaml.safe_dump({"models": entries, "merge_method": method, **top}, sort_keys=False)


def model(name: object, **parameters: Any) -> dict[str, Any]:
    return {"model": str(name), "parameters": parameters}


def said(recipe: Recipe, key: str) -> str:
    """The notes on one key."""
    return " ".join(note for note in recipe.notes if note.startswith(f"{key}: "))


@pytest.fixture
def folders(make_lora: Make) -> list[Path]:
    return [make_lora(f"a{i}", rank=2 + i, seed=i) for i in range(3)]


TYPICAL = """
models:
  - model: org/base
    # no parameters necessary for base model
  - model: org/base+org/a
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: org/b@v1
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters:
  normalize: true
  int8_mask: true
tokenizer_source: union
chat_template: auto
dtype: float16
"""


def test_a_typical_file() -> None:
    recipe = Recipe.from_yaml(TYPICAL)
    assert recipe.adapters == ("org/a", "org/b@v1")
    assert recipe.weights == ([0, 0.3, 0.7, 1], [{"filter": "mlp", "value": 0.5}, {"value": 0}])
    assert recipe.densities == (0.5, [1, 0.7, 0.1])
    assert (recipe.method, recipe.scale, recipe.base_model, recipe.dtype) == ("ties", 1.0, "org/base", "float16")
    assert recipe.parameters["scope"] == "module"
    for key in ("adapters", "parameters.int8_mask", "tokenizer_source", "chat_template", "dtype", "parameters.scope"):
        assert said(recipe, key), key
    assert "org/base is the base model itself" in said(recipe, "adapters")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_what_is_written_is_ours_and_makes_the_same(folders: list[Path], tmp_path: Path) -> None:
    models = [model(f"org/base+{folder}", weight=1 + i, density=0.4) for i, folder in enumerate(folders)]
    text = file("ties", *models, base_model="org/base", parameters={"lambda": 0.8, "int8_mask": True})
    merged = merge_recipe(Recipe.from_yaml(text))
    merged.save(tmp_path / "out")
    assert "models:" not in (tmp_path / "out/recipe.yaml").read_text()
    again = merge_recipe(Recipe.from_file(tmp_path / "out/recipe.yaml"))
    again.save(tmp_path / "again")
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_every_conversion_stands_in_the_report(folders: list[Path]) -> None:
    text = file("ties", *folders, base_model="org/base", tokenizer_source="base", parameters={"int8_mask": True})
    recipe = Recipe.from_yaml(text)
    with pytest.warns(UserWarning, match="int8_mask"):
        report = merge_recipe(recipe).report
    assert set(recipe.notes) <= set(report.warnings)


def test_the_bases_of_base_plus_lora_are_remembered() -> None:
    one = Recipe.from_yaml(file("linear", "org/base@v2+org/a", "org/base@v2+org/b"))
    assert (one.adapters, one.base_model) == (("org/a", "org/b"), "org/base")
    two = Recipe.from_yaml(file("linear", "org/base+org/a", "org/other+org/b"))
    assert two.base_model is None
    assert "org/base, org/other" in said(two, "adapters")


def test_a_base_that_the_adapters_do_not_name_is_warned_of(folders: list[Path]) -> None:
    text = file("task_arithmetic", *(f"some/model+{folder}" for folder in folders))
    with pytest.warns(UserWarning, match="some/model"):
        report = merge_recipe(Recipe.from_yaml(text)).report
    assert any("org/base" in warning and "some/model" in warning for warning in report.warnings)
    text = file("task_arithmetic", *(f"/models/base+{folder}" for folder in folders))
    assert not any(
        "/models/base" in w for w in merge_recipe(Recipe.from_yaml(text)).report.warnings if "named" not in w
    )


def one(i: int, name: str) -> float:
    return 1.0


def vectors(folders: list[Path]) -> list[by_hand.Vectors]:
    return [by_hand.vectors(folder) for folder in folders]


def scaled(values: by_hand.Vectors, factor: float) -> by_hand.Vectors:
    return {name: factor * vector for name, vector in values.items()}


def merged(text: str, rank: object = "max") -> Any:
    """The merge of a file, without loss; a parameter of ours may stand in theirs."""
    values = yaml.safe_load(text)
    values["parameters"] = {**(values.get("parameters") or {}), "rank": rank}
    return merge_recipe(Recipe.from_yaml(yaml.safe_dump(values)))


def test_ties_trims_each_tensor_and_divides_by_the_agreeing_weights(folders: list[Path]) -> None:
    models = [model(f, weight=w, density=d) for f, w, d in zip(folders, (1.0, 2.0, 0.5), (0.5, 0.3, 0.8), strict=True)]
    text = file("ties", *models, base_model="org/base", parameters={"lambda": 1.5})
    expected = by_hand.ties(
        vectors(folders), lambda i, n: (1.0, 2.0, 0.5)[i], lambda i, n: (0.5, 0.3, 0.8)[i], "module"
    )
    by_hand.assert_close(merged(text), scaled(expected, 1.5))


def test_ties_keeps_everything_where_no_density_is_given(folders: list[Path]) -> None:
    models = [model(folders[0], weight=1), model(folders[1], weight=1, density=0.3), model(folders[2], weight=1)]
    text = file("ties", *models, base_model="org/base")
    expected = by_hand.ties(vectors(folders), one, lambda i, n: (1.0, 0.3, 1.0)[i], "module")
    by_hand.assert_close(merged(text), expected)
    assert "1.0" in said(Recipe.from_yaml(text), "parameters.density")


def test_ties_without_normalize_is_the_sum_of_those_that_agree(folders: list[Path]) -> None:
    text = file("ties", *folders, base_model="org/base", parameters={"normalize": False, "weight": 2.0, "density": 0.4})
    expected = merge(folders, weights=[2, 2, 2], density=0.4, scope="module", disjoint="sum", rank="max")
    assert by_hand.same_tensors(merged(text), expected)


def test_negative_weights_in_ties_are_said_to_differ() -> None:
    for weight in (-1, [1, -1], [{"filter": "mlp", "value": -1}]):
        recipe = Recipe.from_yaml(file("ties", model("a", weight=weight), "b", base_model="x"))
        assert "Σ|w|" in said(recipe, "parameters.normalize")
    assert not said(Recipe.from_yaml(file("ties", model("a", weight=2), "b", base_model="x")), "parameters.normalize")


def test_task_arithmetic_has_lambda_1(folders: list[Path]) -> None:
    text = file("task_arithmetic", *(model(f, weight=0.5) for f in folders), base_model="org/base")
    expected = by_hand.weighted_sum(vectors(folders), lambda i, n: 0.5)
    by_hand.assert_close(merged(text), expected)
    assert "1.0" in said(Recipe.from_yaml(text), "parameters.scale")
    with_lambda = file(
        "task_arithmetic", *folders, base_model="b", parameters={"lambda": 0.3, "weight": 0.5, "density": 0.1}
    )
    by_hand.assert_close(merged(with_lambda), scaled(expected, 0.3))
    assert "no density" in said(Recipe.from_yaml(with_lambda), "parameters.density")


def test_task_arithmetic_normalized_is_the_average(folders: list[Path]) -> None:
    text = file(
        "task_arithmetic", *folders, parameters={"lambda": 0.5, "weight": 3.0, "normalize": True}, base_model="b"
    )
    by_hand.assert_close(merged(text), scaled(by_hand.weighted_sum(vectors(folders), one), 0.5 / 3))


def test_linear_is_the_average(folders: list[Path]) -> None:
    text = file("linear", *(model(f, weight=i + 1) for i, f in enumerate(folders)))
    total = by_hand.weighted_sum(vectors(folders), lambda i, n: i + 1.0)
    by_hand.assert_close(merged(text), scaled(total, 1 / 6))
    by_hand.assert_close(
        merged(text.replace("merge_method: linear", "merge_method: linear\nparameters: {normalize: false}")), total
    )
    assert "average" in said(Recipe.from_yaml(text), "merge_method")


def test_a_weight_for_all_fills_what_an_adapters_own_leaves_open(folders: list[Path]) -> None:
    own = [{"filter": "up", "value": 2.0}]
    models = [model(folders[0], weight=own), *folders[1:]]
    text = file("task_arithmetic", *models, base_model="b", parameters={"weight": 0.5, "lambda": 1})
    expected = by_hand.weighted_sum(vectors(folders), lambda i, n: 2.0 if i == 0 and "up" in n else 0.5)
    by_hand.assert_close(merged(text), expected)


def test_slerp_runs_from_the_base_model_to_the_other(folders: list[Path]) -> None:
    a, b = map(str, folders[:2])
    for models, start, t in (([a, b], a, 0.25), ([b, a], a, 0.25), ([b], a, 0.25)):
        text = file("slerp", *(f"x+{name}" for name in models), base_model=f"x+{start}", parameters={"t": t})
        result, expected = merged(text), merge([a, b], "slerp", t=0.25, rank="max")
        by_hand.assert_close(result, {name: expected.delta(name).numpy() for name in expected.modules})
        assert Recipe.from_yaml(text).base_model == "x"


def test_slerps_t_may_vary(folders: list[Path]) -> None:
    a, b = map(str, folders[:2])
    t = [{"filter": "up", "value": 0.25}, {"value": [0.5, 1.0]}]
    result = merged(file("slerp", a, b, base_model=a, parameters={"t": t}))
    for name, turn in {"layers.0.up": 0.25, "layers.0.q": 0.5, "layers.1.q": 1.0}.items():
        expected = merge([a, b], "slerp", t=turn, rank="max").delta(name).numpy()
        by_hand.assert_close_to(result.delta(name).numpy(), expected)


def test_nuslerp_takes_its_form_and_t_from_the_weights(folders: list[Path]) -> None:
    a, b = map(str, folders[:2])
    text = file("nuslerp", model(a, weight=1), model(b, weight=3), base_model="org/base")
    expected = merge([a, b], "slerp", t=0.75, form="mergekit", rank="max")
    by_hand.assert_close(merged(text), {name: expected.delta(name).numpy() for name in expected.modules})
    assert "a negative weight" in said(Recipe.from_yaml(text), "parameters.form")
    asked = Recipe.from_yaml(text + "parameters: {form: even}\n")
    assert asked.parameters["form"] == "even"
    assert not said(asked, "parameters.form")


def test_a_recipe_of_sce_says_that_mergekit_may_ignore_the_energies() -> None:
    assert "1e-6" in said(Recipe.from_yaml(file("sce", "a", "b", base_model="x")), "merge_method")


def test_karcher_and_model_stock_run_as_they_are(folders: list[Path]) -> None:
    assert by_hand.same_tensors(
        merged(file("karcher", *folders, parameters={"max_iter": 3, "tol": 1e-3}, dtype="float32", base_model="b")),
        merge(folders, "karcher", max_iter=3, tol=1e-3, rank="max", base_model="b"),
    )
    assert by_hand.same_tensors(
        merged(file("model_stock", "org/base", *folders, base_model="org/base", parameters={"filter_wise": False})),
        merge(folders, "model_stock", rank="max"),
    )


SUMS = [
    ("dare_linear", "dare", {"density": 0.5}, {"density": 0.5, "scale": 1.0}),
    ("dare_linear", "dare", {}, {"density": 1.0, "scale": 1.0}),
    ("dare_ties", "dare_ties", {"density": 0.5}, {"density": 0.5, "disjoint": "sum", "scale": 1.0}),
    ("dare_ties", "dare_ties", {"density": 0.5, "normalize": True}, {"density": 0.5, "disjoint": "mean"}),
    ("breadcrumbs", "breadcrumbs", {"density": 0.5, "gamma": 0.1}, {"density": 0.5, "gamma": 0.1, "scale": 1.0}),
    ("breadcrumbs_ties", "breadcrumbs_ties", {"density": 0.5}, {"density": 0.5, "gamma": 0.01, "disjoint": "sum"}),
    ("della", "della", {"density": 0.5}, {"density": 0.5, "epsilon": 0.15, "disjoint": "mean"}),
    ("della", "della", {"density": 0.5, "epsilon": 0.1, "normalize": False, "lambda": 2}, {"density": 0.5, "epsilon": 0.1, "disjoint": "sum", "scale": 2}),
    ("della_linear", "della_linear", {"density": 0.5}, {"density": 0.5, "epsilon": 0.15, "scale": 1.0}),
    ("sce", "sce", {"select_topk": 0.3}, {"select_topk": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("theirs", "ours", "given", "expected"), SUMS)
def test_the_family_of_sums(
    folders: list[Path], theirs: str, ours: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    if ours not in HERE:
        pytest.skip(f"{ours} is not here")
    fields = {p.name for info in methods() if info.name == ours for p in info.parameters}
    scope = {"scope": "module"} if "scope" in fields else {}
    text = file(theirs, *folders, base_model="org/base", parameters=given)
    assert by_hand.same_tensors(merged(text), merge(folders, ours, rank="max", **scope, **expected))


@pytest.mark.parametrize(("theirs", "ours", "given", "expected"), SUMS[:1])
def test_a_sum_that_is_divided_by_its_weights(
    folders: list[Path], theirs: str, ours: str, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    if ours not in HERE:
        pytest.skip(f"{ours} is not here")
    models = [model(folder, weight=2.0) for folder in folders]
    text = file(theirs, *models, base_model="org/base", parameters={**given, "normalize": True})
    plain = merge(folders, ours, weights=[2, 2, 2], rank="max", density=0.5, scale=1 / 6)
    assert by_hand.same_tensors(merged(text), plain)


def test_densities_of_single_models_reach_every_method_that_has_one(folders: list[Path]) -> None:
    for theirs, rule in METHODS.items():
        if "density" in rule.takes and rule.method in HERE:
            models = [model(f, weight=1, density=d) for f, d in zip(folders, (0.9, 0.2, 0.5), strict=True)]
            result = merged(file(theirs, *models, base_model="org/base"), rank=4)
            uniform = merged(file(theirs, *folders, base_model="org/base", parameters={"density": 0.9}), rank=4)
            assert not by_hand.same_tensors(result, uniform), theirs


def test_out_dtype_is_what_is_written() -> None:
    recipe = Recipe.from_yaml(file("linear", "a", "b", dtype="float32", out_dtype="bfloat16"))
    assert recipe.dtype == "bfloat16"
    assert "float32" in said(recipe, "dtype")


def test_parameters_of_ours_win_over_what_is_converted() -> None:
    text = file(
        "ties", "a", "b", base_model="x", parameters={"scope": "adapter", "rank": 8, "space": "core", "seed": 3}
    )
    recipe = Recipe.from_yaml(text)
    assert (recipe.rank, recipe.space, recipe.seed, recipe.parameters["scope"]) == (8, "core", 3, "adapter")
    assert not said(recipe, "parameters.scope")


def test_numbers_that_differ_between_models_where_ours_is_one() -> None:
    if "breadcrumbs" not in HERE:
        pytest.skip("breadcrumbs is not here")
    text = file("breadcrumbs", model("a", gamma=0.1), model("b", gamma=0.2), base_model="x")
    with pytest.raises(RecipeError, match="line 7: gamma differs between adapters"):
        Recipe.from_yaml(text)
    same = file("breadcrumbs", model("a", gamma=0.1), model("b", gamma=0.1), base_model="x")
    assert Recipe.from_yaml(same).parameters["gamma"] == 0.1


def test_flags_take_the_notes_on_what_they_override(folders: list[Path]) -> None:
    from ties_peft.merging.recipes.overrides import overridden

    path = folders[0].parent / "mk.yaml"
    path.write_text(file("ties", *folders, base_model="org/base", parameters={"int8_mask": True}))
    plain = overridden(path, None, {}, {}, None)
    assert said(plain, "parameters.scope") and said(plain, "parameters.density")
    scope = overridden(path, None, {}, {"scope": "adapter"}, None)
    assert not said(scope, "parameters.scope") and said(scope, "parameters.density")
    average = overridden(path, None, {"method": "average"}, {}, None)
    assert not any(note.startswith("parameters.") for note in average.notes)
