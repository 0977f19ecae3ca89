"""Recipes: read strictly, written whole, and the same bytes again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from by_hand import same_tensors

from ties_peft import Adapter, AdapterError, MethodError, Recipe, RecipeError, TiesPeftError, merge
from ties_peft.merging.merge import merge_recipe

Make = Callable[..., Path]
TWO = ("org/a", "path/b@v1")
CONDITIONS = [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 1}]


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(("a",)),
        Recipe(TWO, weights=(1.0, -0.5)),
        Recipe(TWO, weights=([1, 0.5], CONDITIONS)),
        Recipe(TWO, weights="norm"),
        Recipe(TWO, densities=(None, 0.3)),
        Recipe(TWO, weights=(1, 2), densities=([0.1, 0.5], CONDITIONS)),
        Recipe(TWO, parameters={"density": [0.1, 0.5], "scope": "module"}),
        Recipe(TWO, parameters={"density": CONDITIONS, "elect": "count", "disjoint": "max", "normalize": False}),
        Recipe(TWO, parameters={"sign_from": "org/c", "density": 1e-7}),
        Recipe(TWO, parameters={"sign_from": None}),
        Recipe(TWO, space="core", parameters={"balanced": False, "compress_first": True, "norm_blend": 1e-3}),
        Recipe(TWO, "norm", None, "average", {}, "knots", 1e-5, 16, True, 7, "bfloat16", "org/base", True, ("x: y.",)),
        Recipe(TWO, heads="keep=b"),
        Recipe(TWO, heads="average"),
        Recipe(TWO, scale="1/sqrt(N)"),
        Recipe(TWO, scale="0.7*N^-1/4"),
        Recipe(TWO, rank="max", scale=-1.5e20, seed=2**70),
        Recipe(("1e3", "true", "007", "ü/ñ", "a: b", "- x", "null", "~", "{}", "line\nbreak", " padded ")),
        Recipe(TWO, method="iso_c", parameters={}),
        Recipe(TWO, method="pico+ties", parameters={"ties.density": 0.3, "elect": "count"}),
        Recipe(TWO, method="ties+iso_c", parameters={"ties.density": [0.3, 1]}),
    ],
)
def test_every_value_comes_back(recipe: Recipe) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_what_is_written_can_be_read_by_eye() -> None:
    shared = [1.0, 0.5]
    text = Recipe(TWO, weights=(shared, shared)).to_yaml()
    assert "&" not in text and "*" not in text


def test_defaults_are_left_out() -> None:
    assert Recipe(("a",)).to_dict() == {
        "merge_method": "auto",
        "adapters": [{"adapter": "a"}],
        "parameters": {"space": "delta", "rank": "auto", "seed": 0},
    }


def test_the_example_of_the_documents() -> None:
    text = """
merge_method: ties
adapters:                       # `models:` is accepted as its synonym
  - adapter: org/a              # `model:` likewise
    parameters: {weight: 1.0, density: 0.3}
  - adapter: path/b
parameters: {scale: 1.0, space: delta, rank: 32}
dtype: bfloat16
"""
    expected = Recipe(("org/a", "path/b"), (1.0, 1.0), (0.3, None), "ties", scale=1.0, rank=32, dtype="bfloat16")
    assert Recipe.from_yaml(text) == expected
    words = text.replace("adapters:", "models:").replace("adapter:", "model:")
    assert Recipe.from_yaml(words) == expected


def test_one_condition_needs_no_list() -> None:
    condition = {"filter": "mlp", "value": 0.5}
    text = f"adapters: [{{adapter: a, parameters: {{weight: {condition}, density: {condition}}}}}]"
    assert Recipe.from_yaml(text) == Recipe(("a",), weights=([condition],), densities=([condition],))


def test_short_forms() -> None:
    assert Recipe.from_yaml("adapters: [a, b]") == Recipe(("a", "b"))
    assert Recipe.from_yaml("adapters: [{adapter: a, parameters: }]\nparameters:") == Recipe(("a",))
    assert Recipe.from_yaml("adapters: [a]\nparameters: {lambda: 2}") == Recipe(("a",), scale=2)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".1e-2", "+1e-3", "1.0e-3", "0.001"])
def test_exponents_are_numbers(text: str) -> None:
    assert Recipe.from_yaml(f"adapters: [a]\nparameters: {{scale: {text}}}").scale == 1e-3


REFUSED = [
    ("adapters: [a]\nmerge_methd: ties", 2, ["unknown key 'merge_methd'", "did you mean 'merge_method'?"]),
    ("adapters: [a]\nparamters: {}", 2, ["did you mean 'parameters'?"]),
    ("adapters:\n  - adaptor: a", 2, ["unknown key 'adaptor'", "did you mean 'adapter'?"]),
    ("adapters:\n  - adapter: a\n    parameters: {wieght: 1}", 3, ["did you mean 'weight'?"]),
    ("adapters: [a]\nparameters:\n  rank: 4\n  densty: 0.3", 4, ["method 'auto'", "did you mean 'density'?"]),
    ("adapters: [a]\nparameters:\n  sacle: 2", 3, ["unknown parameter 'sacle'", "did you mean 'scale'?"]),
    ("adapters: [a]\nparameters:\n  space: core\n  balancd: true", 4, ["did you mean 'balanced'?"]),
    ("adapters: [a]\nparameters:\n  balanced: true", 3, ["unknown parameter 'balanced'"]),
    ("merge_method: teis\nadapters: [a]", 1, ["unknown method 'teis'", "did you mean 'ties'?"]),
    ("adapters: [a]\nmerge_method: teis\nparameters: {}", 2, ["unknown method 'teis'"]),
    ("adapters: [a]\nparameters: {}\nmerge_method: ties+teis", 3, ["unknown method 'teis'"]),
    ("merge_method: average\nadapters: [a]\nparameters:\n  density: 0.3", 4, ["method 'average'", "'density'"]),
    ("merge_method: average\nadapters:\n- adapter: a\n  parameters:\n    density: 0.3", 5, ["has no density"]),
    ("adapters: [a]\nparameters:\n  space: kore", 3, ["unknown space 'kore'", "did you mean 'core'?"]),
    ("adapters: [a]\nparameters:\n  rank: 4\n  density: 1.5", 4, ["density", "1.5"]),
    ("adapters: [a]\nparameters:\n  density: [0.5, 1.5]", 3, ["density", "1.5"]),
    ("adapters:\n- a\n- adapter: b\n  parameters:\n    density: 0", 5, ["density", "0"]),
    ("adapters: [a]\nparameters:\n  scope: moduel", 3, ["scope", "moduel"]),
    ("adapters: [a]\nparameters:\n  sign_from: 3", 3, ["sign_from is 3", "expected an adapter"]),
    ("adapters: [a]\nmerge_method: ties\nparameters:\n  ties.density: 0.3\n  density: 0.3", 3, ["one parameter"]),
    ("adapters: [a]\nmerge_method:", 2, ["merge_method is None", "expected text"]),
    ("adapters: [a]\nparameters:\n  rank:", 3, ["rank is None"]),
    ("adapters: [a]\nmerge_method: 3", 2, ["merge_method is 3", "expected text"]),
    ("merge_method: ties\nadapters: a", 2, ["expected a list of adapters", "'a'"]),
    ("merge_method: ties\nadapters: []", 2, ["expected a list of adapters"]),
    ("merge_method: ties", 1, ["expected a list of adapters"]),
    ("adapters:\n- a\n- 3", 3, ["expected keys with values", "3"]),
    ("adapters:\n- a\n- parameters: {weight: 1}", 3, ["adapter is", "path or Hub id"]),
    ("adapters:\n- a\n- adapter: ''", 3, ["adapter is", "path or Hub id"]),
    ("adapters:\n- a\n- adapter: 3", 3, ["adapter is 3", "path or Hub id"]),
    ("adapters:\n- adapter: a\n  parameters: [1]", 3, ["expected keys with values", "[1]"]),
    ("adapters:\n- adapter: a\n  parameters:\n    weight: half", 4, ["weight is 'half'", "finite number"]),
    ("adapters:\n- adapter: a\n  parameters:\n    weight: .inf", 4, ["weight is inf"]),
    ("adapters:\n- adapter: a\n  parameters:\n    weight:", 4, ["weight is None"]),
    ("adapters:\n- adapter: a\n  parameters:\n    weight: {fliter: mlp, value: 1}", 4, ["filter: PART_OF_NAME"]),
    ("adapters: [a]\nparameters: 3", 2, ["expected keys with values"]),
    ("adapters: [a]\nparameters:\n  scale: big", 3, ["scale is 'big'", "finite number"]),
    ("adapters: [a]\nparameters:\n  scale: true", 3, ["scale is True"]),
    ("adapters: [a]\nparameters:\n  rank: 1.5", 3, ["rank is 1.5", "max or auto"]),
    ("adapters: [a]\nparameters:\n  rank: 0", 3, ["rank is 0"]),
    ("adapters: [a]\nparameters:\n  rank: mx", 3, ["rank is 'mx'"]),
    ("adapters: [a]\nparameters:\n  seed: -1", 3, ["seed is -1", "0 or more"]),
    ("adapters: [a]\nparameters:\n  space: 3", 3, ["space is 3", "expected text"]),
    ("adapters: [a]\nparameters:\n  restore_norm: maybe", 3, ["restore_norm is 'maybe'", "true or false"]),
    ("adapters: [a]\nparameters:\n  weights: [1]", 3, ["weights is [1]", "norm"]),
    ("adapters:\n- adapter: a\n  parameters: {weight: 2}\nparameters:\n  weights: norm", 5, ["Keep one of the two"]),
    ("adapters: [a]\nallow_disjoint: 'no'", 2, ["allow_disjoint is 'no'", "true or false"]),
    ("adapters: [a]\nheads: mean", 2, ["heads is 'mean'", "one of error, drop, keep=NAME, average, merge"]),
    ("adapters: [a]\nheads: keep=", 2, ["heads is 'keep='"]),
    ("adapters: [a]\nheads: [drop]", 2, ["heads is ['drop']"]),
    ("adapters: [a]\ndtype: float31", 2, ["dtype is 'float31'", "float32 or float16 or bfloat16"]),
    ("adapters: [a]\nbase_model: 3", 2, ["base_model is 3"]),
    ("adapters: [a]\nnotes: 3", 2, ["notes is 3", "list of texts"]),
    ("adapters: [a]\nparameters: {}\nparameters: {}", 3, ["'parameters' stands there twice"]),
    ("adapters: [a]\nparameters:\n  density: 0.1\n  rank: 2\n  density: 0.2", 5, ["'density' stands there twice"]),
    ("adapters: [a]\nmodels: [b]", 2, ["'models'", "twice"]),
    ("adapters:\n- adapter: a\n  model: b", 3, ["'model'", "twice"]),
    ("adapters: [a]\nparameters: {lambda: 1,\n scale: 2}", 3, ["'scale'", "Keep one of them"]),
    ("- a\n- b", 1, ["expected keys with values"]),
    ("", 1, ["expected keys with values"]),
    ("just words", 1, ["expected keys with values"]),
    ("adapters: [a", 1, ["not YAML"]),
    ("adapters: [a]\nparameters: {x: !!python/name:os.system }", 2, ["not YAML"]),
    ("adapters: [a]\n---\nadapters: [b]", 2, ["not YAML"]),
]


@pytest.mark.parametrize(("text", "line", "parts"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_is_wrong_is_named_with_its_line(text: str, line: int, parts: list[str]) -> None:
    with pytest.raises((RecipeError, MethodError)) as caught:
        Recipe.from_yaml(text, "my.yaml")
    message = str(caught.value)
    assert message.startswith(f"my.yaml, line {line}: ") or (
        line == 1 and message.startswith("my.yaml, line 2: not YAML")
    )
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "adapters: &a [*a]",
        "a: &a {b: *a}",
        "[" * 3000,
        "adapters: [2024-13-45]",
        "x: &a [1,1,1,1,1,1,1,1,1]\n"
        + "\n".join(f"x{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else '*a'] * 9)}]" for i in range(9)),
        "adapters: [a]\nparameters: {scale: 1" + "0" * 5000 + "}",
        "\x00",
        "? [a]\n: b",
    ],
)
def test_yaml_that_is_a_trap_is_one_message(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text, "my.yaml")
    assert str(caught.value).startswith("my.yaml") and len(str(caught.value)) < 500


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "r.yaml", tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError, match="cannot be read"):
            Recipe.from_file(path)


def test_what_python_was_given_is_recorded_as_yaml_holds_it(make_lora: Make) -> None:
    folders = [make_lora(f"a{i}", seed=i) for i in range(3)]
    merged = merge(
        folders,
        weights=np.array([1, 0.5, 2], dtype=np.float32),
        density={"over_layers": (0.1, np.float64(0.5))},
        dtype=torch.bfloat16,
        seed=3,
        restore_norm=True,
        rank=2,
        sign_from=folders[0],
    )
    again = Recipe.from_yaml(merged.recipe.to_yaml())
    assert again == merged.recipe
    assert again.weights == (1, 0.5, 2) and again.parameters["density"] == [0.1, 0.5]
    assert same_tensors(merged, merge_recipe(again))


def test_tuples_are_schedules_too(make_lora: Make) -> None:
    folders = [make_lora(f"a{i}", seed=i) for i in range(3)]
    weights = (0.5, (1, 0.2), ({"filter": "up", "value": 2}, {"value": (1, 0)}))
    merged = merge(folders, weights=weights)
    assert merged.recipe.weights == (0.5, [1, 0.2], [{"filter": "up", "value": 2}, {"value": [1, 0]}])
    assert Recipe.from_yaml(merged.recipe.to_yaml()) == merged.recipe


def test_an_open_adapter_is_recorded_by_its_source(make_lora: Make, tmp_path: Path) -> None:
    folders = [make_lora(f"a{i}", seed=i) for i in range(3)]
    merged = merge([Adapter.load(folder) for folder in folders], sign_from=Adapter.load(folders[2]))
    again = Recipe.from_yaml(merged.recipe.to_yaml())
    assert again.adapters == tuple(map(str, folders)) and again.parameters["sign_from"] == str(folders[2])
    assert same_tensors(merged, merge_recipe(again))
    merged.save(tmp_path / "out")


@pytest.fixture
def hub(make_lora: Make, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """A Hub that has one adapter under every name; what it is asked for."""
    import huggingface_hub

    folder, asked = make_lora("hub"), []

    def download(repository: str, revision: str | None = None, **_: Any) -> str:
        asked.append((repository, revision))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_a_revision_reaches_the_hub_and_the_recipe(hub: list[tuple[str, str | None]]) -> None:
    merged = merge(["org/a@v1.0", "org/b"])
    assert hub == [("org/a", "v1.0"), ("org/b", None)]
    assert merged.recipe.adapters == ("org/a@v1.0", "org/b")
    merge_recipe(Recipe.from_yaml(merged.recipe.to_yaml()))
    assert hub[2:] == hub[:2]


def test_a_revision_given_in_python_is_recorded(hub: list[tuple[str, str | None]]) -> None:
    merged = merge([Adapter.load("org/a", revision="refs/pr/3")])
    assert merged.recipe.adapters == ("org/a@refs/pr/3",)
    assert hub == [("org/a", "refs/pr/3")]


def test_a_folder_may_have_an_at_in_its_name(make_lora: Make) -> None:
    folder = make_lora("my@adapter")
    assert Adapter.load(folder).source == str(folder)
    assert Adapter.load(folder, revision="main").source == str(folder)
    with pytest.raises(AdapterError, match="there is no such folder"):
        Adapter.load(f"{folder}@main")
    with pytest.raises(TiesPeftError, match="org/a@"):
        Adapter.load("org/a@")
