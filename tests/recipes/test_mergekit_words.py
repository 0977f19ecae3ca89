"""mergekit's recipes: which files are, and what in them has no counterpart."""

from __future__ import annotations

import pytest
import yaml

from ties_peft import Recipe, TiesPeftError
from ties_peft.merging.recipes.mergekit import METHODS, NO_COUNTERPART, is_recipe, reference

OURS = [
    "adapters: [a, b]\nmerge_method: ties\nbase_model: x",
    "models: [a, b]",
    "models: [a, b]\nmerge_method: ties",
    "models: [{model: a, parameters: {weight: 1, density: 0.3}}]\nmerge_method: ties\ndtype: float16",
    "models: [a, b]\nmerge_method: ties\nparameters: {normalize: false, scope: adapter, density: 0.3}",
    "models: [a, b]\nmerge_method: ties\nparameters: {lambda: 0.5, normalize: true}",
    "models: [a, b]\nmerge_method: iso_c\nbase_model: x",
    "models: [a, b]\nmerge_method: pico+ties\nbase_model: x",
]
THEIRS = [
    "models: [a, b]\nmerge_method: ties\nbase_model: x",
    "models: [a, b]\nmerge_method: linear",
    "models: [x+a, b]\nmerge_method: ties",
    "models: [{model: x+a}, b]\nmerge_method: task_arithmetic",
    "models: [a, b]\nmerge_method: ties\nout_dtype: float16",
    "models: [a, b]\nmerge_method: ties\ntokenizer_source: base",
    "models: [a, b]\nmerge_method: ties\ntokenizer: {source: base}",
    "models: [a, b]\nmerge_method: ties\nchat_template: auto",
    "models: [a, b]\nmerge_method: ties\nparameters: {int8_mask: true}",
    "models: [a, {model: b, parameters: {rescale: false}}]\nmerge_method: ties",
    "models: [a, b]\nmerge_method: passthrough",
]


@pytest.mark.parametrize("text", OURS)
def test_these_are_ours(text: str) -> None:
    assert not is_recipe(yaml.safe_load(text))


@pytest.mark.parametrize("text", THEIRS)
def test_these_are_theirs(text: str) -> None:
    assert is_recipe(yaml.safe_load(text))


def test_nothing_is_converted_in_a_file_of_ours() -> None:
    assert Recipe.from_yaml(OURS[0]) == Recipe(("a", "b"), method="ties", base_model="x")
    assert Recipe.from_yaml(OURS[2]) == Recipe(("a", "b"), method="ties")
    assert Recipe.from_yaml(OURS[1]) == Recipe(("a", "b"))


@pytest.mark.parametrize(
    ("text", "base", "adapter"),
    [
        ("org/a", None, "org/a"),
        ("org/a@v1", None, "org/a@v1"),
        ("org/base+org/a", "org/base", "org/a"),
        ("org/base@main+./a/b@v1", "org/base", "./a/b@v1"),
    ],
)
def test_references(text: str, base: str | None, adapter: str) -> None:
    assert reference(text) == (base, adapter)


REFUSED = [
    ("slices:\n- sources: []\nmerge_method: slerp", 1, ["`slices:`", "List the adapters under `models:`"]),
    ("merge_method: passthrough\nmodules:\n  a: {}", 2, ["`modules:`"]),
    ("models: [a, b]\nmerge_method: passthrough", 2, ["'passthrough' has no counterpart"]),
    ("models: [a, b]\nmerge_method: multislerp", 2, ["'multislerp'", "karcher"]),
    ("models: [a, b]\nmerge_method: linear\ntokeniser: x", 3, ["unknown key 'tokeniser'"]),
    ("models:\n- model: a\n  parameters: {wieght: 1}\n- b\nmerge_method: linear", 3, ["did you mean 'weight'?"]),
    ("models:\n- a\n- model: 3\nmerge_method: linear", 3, ["expected `model:`", "3"]),
    ("models:\n- a\n- x+b\n- x\nmerge_method: linear", 4, ["'x' is the base model"]),
    ("models: [a, b]\nmerge_method: ties\nbase_model: x+c", 3, ["'x+c' holds an adapter"]),
    ("models: [a, b]\nmerge_method: ties\nbase_model: x\nparameters:\n  rescale: true", 5, ["rescale: true"]),
    ("models: [a, b]\nmerge_method: ties\nbase_model: x\nparameters:\n  normalize: 1", 5, ["normalize is 1"]),
    ("models: [a, b]\nmerge_method: ties\nbase_model: x\nparameters:\n  lambda: [1, 2]", 5, ["lambda", "one number"]),
    ("models: [a, b]\nmerge_method: ties\nparameters:\n  int8_mask: true\n  densty: 1", 5, ["did you mean 'density'?"]),
    ("models:\n- x\n- a\n- model: b\n  parameters:\n    density: 2\nmerge_method: ties\nbase_model: x", 6, ["density"]),
    ("models: [a, b, c]\nmerge_method: slerp\nbase_model: a", 1, ["3"]),
    ("models: [a, b]\nmerge_method: slerp\nbase_model: a\nparameters: {t: x}", 4, ["t is 'x'"]),
    ("models: [a, b]\nmerge_method: nuslerp\nparameters:\n  nuslerp_flatten: false", 4, ["nuslerp_flatten: false"]),
    ("models: [a, b]\nmerge_method: model_stock\nbase_model: x\nparameters:\n  filter_wise: true", 5, ["filter_wise: true"]),
    ("models: [a, {model: b, parameters: {weight: [half]}}]\nmerge_method: linear", 1, ["weight", "half"]),
    ("models: [a]\nmerge_method: linear\nparameters: 3", 3, ["expected keys with values"]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "parts"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_has_no_counterpart_is_refused_with_its_line(text: str, line: int, parts: list[str]) -> None:
    with pytest.raises(TiesPeftError) as caught:
        Recipe.from_yaml(text, "mk.yaml")
    message = str(caught.value)
    assert message.startswith(f"mk.yaml, line {line}: "), message
    assert all(part in message for part in parts), message


def test_every_method_of_mergekits_is_known() -> None:
    released = {
        "linear", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "passthrough", "nearswap", "arcee_fusion",
        "task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear",
        "sce", "ram", "ramplus_tl",
    }  # fmt: skip
    assert {*METHODS, *NO_COUNTERPART} == released
