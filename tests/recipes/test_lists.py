"""One number per adapter, and numbers over the layers: two spellings, the same in a call, a command and a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.run_command import run
from oracles import definition

import ties_peft
from ties_peft import Recipe, RecipeError
from ties_peft.merging.merge import merge_recipe

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]
SHAPES = {"layers.0.q": (12, 10), "layers.1.q": (12, 10), "layers.2.q": (9, 11)}
OVER_LAYERS = {"over_layers": [0.2, 0.9]}
EACH, LAYERS = "densities=[0.2, 0.9]", "density={'over_layers': [0.2, 0.9]}"
FULL = {"scope": "module", "rank": "max", "dtype": "float32"}


@pytest.fixture
def folders(make_lora: Make) -> list[Path]:
    return [make_lora(f"a{n}", seed=n, shapes=SHAPES) for n in range(2)]


def ties(folders: Sequence[Path], density: Callable[[int, int], float]) -> definition.Vectors:
    """TIES by definition, where adapter i keeps density(i, layer) of a module."""
    kept = []
    for place, folder in enumerate(folders):
        vectors = definition.read(folder)
        kept.append(
            {
                name: definition.trim({name: own}, density(place, int(name.split(".")[1])), "module")[name]
                for name, own in vectors.items()
            }
        )
    return {
        name: definition.disjoint_merge(stack, [1.0] * len(stack), definition.elect(stack, "mass"), "mean", True)
        for name, stack in definition.stacks(kept).items()
    }


def assert_close(merged: ties_peft.Adapter, expected: definition.Vectors) -> None:
    for name, wanted in expected.items():
        np.testing.assert_allclose(merged.delta(name).numpy(), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


PER_ADAPTER = [[0.2, 0.9], (0.2, 0.9), np.array([0.2, 0.9]), torch.tensor([0.2, 0.9], dtype=torch.float64)]


@pytest.mark.parametrize("densities", PER_ADAPTER, ids=lambda given: type(given).__name__)
def test_densities_are_one_per_adapter(folders: list[Path], densities: Any) -> None:
    merged = ties_peft.merge(folders, densities=densities, **FULL)
    assert_close(merged, ties(folders, lambda place, layer: (0.2, 0.9)[place]))
    assert Recipe.from_yaml(merged.recipe.to_yaml()) == merged.recipe
    assert_close(merge_recipe(merged.recipe), ties(folders, lambda place, layer: (0.2, 0.9)[place]))


def test_a_density_over_layers_is_a_gradient_for_all(folders: list[Path]) -> None:
    expected = ties(folders, lambda place, layer: (0.2, 0.55, 0.9)[layer])
    merged = ties_peft.merge(folders, density=OVER_LAYERS, **FULL)
    assert_close(merged, expected)
    assert merged.recipe.parameters["density"] == [0.2, 0.9]  # as mergekit writes it
    assert_close(merge_recipe(Recipe.from_yaml(merged.recipe.to_yaml())), expected)


def test_both_at_once(folders: list[Path]) -> None:
    """One adapter's own density is a gradient, the other's is the density for all."""
    merged = ties_peft.merge(folders, densities=[OVER_LAYERS, None], density=0.4, **FULL)
    assert_close(merged, ties(folders, lambda place, layer: 0.4 if place else (0.2, 0.55, 0.9)[layer]))
    nested = ties_peft.merge(folders, densities=[[0.2, 0.9], 0.4], **FULL)
    assert nested.recipe.densities == ([0.2, 0.9], 0.4)
    assert_close(nested, ties(folders, lambda place, layer: 0.4 if place else (0.2, 0.55, 0.9)[layer]))


def test_a_weight_over_layers(folders: list[Path]) -> None:
    spelled = [
        ties_peft.merge(folders, weights=[own, 1.0], rank="max") for own in ({"over_layers": [1, 0.2]}, [1, 0.2])
    ]
    assert spelled[0].recipe == spelled[1].recipe
    given = {"filter": "q", "value": {"over_layers": [1, 0.2]}}
    merged = ties_peft.merge(folders, "task_arithmetic", weights=[given, 1.0], scale=1.0, rank="max", dtype="float32")
    first, second = map(definition.read, folders)
    layers = {name: (1, 0.6, 0.2)[int(name.split(".")[1])] for name in SHAPES}
    assert_close(merged, {name: layers[name] * first[name] + second[name] for name in SHAPES})


COMMANDS: Mapping[str, tuple[list[str], Mapping[str, Any]]] = {
    "per adapter": (["--densities", "0.2,0.9"], {"densities": [0.2, 0.9]}),
    "over layers": (["--set", "density={over_layers: [0.2, 0.9]}"], {"density": OVER_LAYERS}),
}


@pytest.mark.parametrize("flags", COMMANDS)
def test_the_command_line_is_the_call(folders: list[Path], tmp_path: Path, flags: str) -> None:
    given, asked = COMMANDS[flags]
    done = run("merge", *folders, "--out", tmp_path / "out", "--scope", "module", *given)
    assert done.code == 0, done.err
    called = ties_peft.merge(list(map(str, folders)), scope="module", **asked)
    assert Recipe.from_file(tmp_path / "out/recipe.yaml") == called.recipe
    written = ties_peft.Adapter.load(tmp_path / "out")
    assert all(torch.equal(written.delta(name), called.delta(name)) for name in called.modules)


def test_densities_on_the_command_line_take_the_place_of_a_recipes(folders: list[Path], tmp_path: Path) -> None:
    recipe = Recipe(tuple(map(str, folders)), densities=(0.1, None), parameters={"density": 0.5})
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    done = run("merge", "--recipe", tmp_path / "r.yaml", "--densities", "0.2,0.9", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert Recipe.from_file(tmp_path / "out/recipe.yaml").densities == (0.2, 0.9)


def test_a_recipes_list_is_a_gradient_as_in_mergekit(folders: list[Path]) -> None:
    text = "adapters: [{}, {}]\nparameters: {{scope: module, rank: max, density: {}}}\n"
    for spelled in ("[0.2, 0.9]", "{over_layers: [0.2, 0.9]}"):
        merged = merge_recipe(Recipe.from_yaml(text.format(*folders, spelled)))
        assert_close(merged, ties(folders, lambda place, layer: (0.2, 0.55, 0.9)[layer]))


def test_a_recipe_with_densities_is_told_where_they_stand(folders: list[Path]) -> None:
    text = "adapters: [{}, {}]\nparameters:\n  densities: [0.2, 0.9]\n"
    with pytest.raises(RecipeError, match=r"line 3: .*densities.* `density:` .* own entry"):
        Recipe.from_yaml(text.format(*folders))


# -- what could mean two things


def loaded(folders: Sequence[Path]) -> Any:
    """A PEFT model with the two adapters."""
    peft = pytest.importorskip("peft")
    base = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.ModuleDict() for _ in SHAPES)})
    for name, (rows, columns) in SHAPES.items():
        base["layers"][int(name.split(".")[1])]["q"] = torch.nn.Linear(columns, rows)  # type: ignore[index]
    model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    return model


def worth(adapter: ties_peft.Adapter) -> float:
    return 0.0


CALLS: Mapping[str, Callable[..., Any]] = {
    "merge": ties_peft.merge,
    "prepare": lambda folders, **asked: ties_peft.prepare(folders, **asked).merge(),
    "plan.merge": lambda folders, **asked: ties_peft.prepare(folders).merge(**asked),
    "add_merged_adapter": lambda folders, **asked: ties_peft.add_merged_adapter(
        loaded(folders), ["a", "b"], "c", **asked
    ),
    "search": lambda folders, **asked: ties_peft.search(folders, worth, budget=1, method="ties", parameters=asked),
}
LISTS = [[0.2, 0.9], (0.2, 0.9), np.array([0.2, 0.9]), torch.tensor([0.2, 0.9]), [0.2], [1, 0.5, 0.2]]


@pytest.mark.parametrize("call", CALLS)
def test_a_plain_list_is_refused_with_both_spellings(folders: list[Path], call: str) -> None:
    for density in LISTS:
        for name in ("density", "ties.density"):
            with pytest.raises(RecipeError) as caught:
                CALLS[call](folders, **{name: density})
            assert all(text in str(caught.value) for text in (f"{name} is [", "densities=[", "'over_layers': ["))
    with pytest.raises(RecipeError) as caught:
        CALLS[call](folders, density=[0.2, 0.9])
    for text in (EACH, "--densities 0.2,0.9", LAYERS, "--set 'density={over_layers: [0.2, 0.9]}'"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [
        ["--density", "0.2,0.9"],
        ["--density", "0.2, 0.9"],
        ["--set", "density=[0.2, 0.9]"],
        ["--set", "ties.density=[0.2,0.9]"],
    ],
)
def test_on_the_command_line_too(folders: list[Path], tmp_path: Path, flags: list[str]) -> None:
    done = run("merge", *folders, "--out", tmp_path / "out", *flags)
    assert done.code == 2 and not (tmp_path / "out").exists()
    assert "--densities 0.2,0.9" in done.err and "density={over_layers: [0.2, 0.9]}'" in done.err


def test_in_a_search_on_the_command_line_too(folders: list[Path], tmp_path: Path) -> None:
    task = tmp_path / "task.yaml"
    task.write_text("rows: rows.jsonl\n")
    flags = ("--task", task, "--out", tmp_path / "out", "--method", "ties", "--set", "density=[0.2, 0.9]")
    done = run("search", *folders, *flags)
    assert done.code == 2 and "--densities 0.2,0.9" in done.err


def test_densities_for_every_adapter_and_a_density_for_all(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="every adapter has a density of its own"):
        ties_peft.merge(folders, density=0.5, densities=[0.2, 0.9])
    done = run("merge", *folders, "--out", tmp_path / "out", "--density", "0.5", "--densities", "0.2,0.9")
    assert done.code == 2 and "every adapter has a density of its own" in done.err


# -- what is no list


MAPPINGS: Mapping[str, Callable[..., Any]] = {
    "merge": ties_peft.merge,
    "prepare": ties_peft.prepare,
    "search": lambda given: ties_peft.search(given, worth, budget=1),
    "distil": ties_peft.distil,
    "few_shot_signs": lambda given: ties_peft.few_shot_signs(given, []),
}


@pytest.mark.parametrize("call", MAPPINGS)
def test_adapters_in_a_mapping_or_a_set_are_refused(folders: list[Path], call: str) -> None:
    """A mapping's values would be ignored; a set has no order, by which weights are given."""
    first, second = map(str, folders)
    with pytest.raises(RecipeError, match=r"are a dict; .*merge\(\['.*', '.*'\], weights=\[1, 5\]\)"):
        MAPPINGS[call]({first: 1, second: 5})
    with pytest.raises(RecipeError, match=r"are a set.*expected a list"):
        MAPPINGS[call]({first, second})
    for one in (first, folders[0], ties_peft.Adapter.load(first)):
        with pytest.raises(RecipeError, match="expected a list"):
            MAPPINGS[call](one)


def test_loaded_adapters_in_a_mapping_are_refused(folders: list[Path]) -> None:
    with pytest.raises(RecipeError, match=r"are a dict; .*weights=\[1, 5\]"):
        ties_peft.add_merged_adapter(loaded(folders), {"a": 1, "b": 5}, "c")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["weights", "densities"])
def test_weights_and_densities_in_a_mapping_are_refused(folders: list[Path], name: str) -> None:
    for given in ({str(folders[0]): 1.0}, OVER_LAYERS, 0.5, "half"):
        with pytest.raises(RecipeError, match=rf"the {name} are .*expected .*one .*per adapter"):
            ties_peft.merge(folders, **{name: given})  # type: ignore[arg-type]


def test_what_is_no_gradient(folders: list[Path]) -> None:
    for given in ({"over_layers": 0.5}, {"over_layers": []}, {"over_layer": [0.2, 0.9]}, {"over_layers": ["a"]}):
        with pytest.raises(RecipeError, match=r"\{over_layers: \[.*\]\}"):
            ties_peft.merge(folders, density=given)


def test_a_search_keeps_them(folders: list[Path]) -> None:
    asked = {"method": "ties", "rank": "max", "densities": [0.2, 0.9]}
    found = ties_peft.search(
        folders, worth, {"scale": [0.5, 2.0]}, 2, controls=(), parameters={"scope": "module"}, **asked
    )
    expected = ties(folders, lambda place, layer: (0.2, 0.9)[place])
    assert_close(found.adapter, {name: found.recipe.scale * own for name, own in expected.items()})
