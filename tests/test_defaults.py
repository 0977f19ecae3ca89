"""One set of defaults: every way to ask for a merge has the same, by its signature and by what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from cli.run_command import run
from torch import Tensor

import ties_peft
from ties_peft import Adapter, Recipe, cli
from ties_peft.merging.merge import merge_recipe
from ties_peft.merging.options import OPTIONS
from ties_peft.methods import make_stages

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]
SHAPES = {"layers.0.q": (12, 10), "layers.1.q": (12, 10), "layers.2.q": (9, 11)}
VECTORS = {"layers.0.q": (12, False), "layers.1.q": (12, False)}
CALLS: Mapping[str, Callable[..., Any]] = {
    "merge": ties_peft.merge,
    "prepare": ties_peft.prepare,
    "Prepared.merge": ties_peft.Prepared.merge,
    "add_merged_adapter": ties_peft.add_merged_adapter,
    "search": ties_peft.search,
}
LEFT = {("add_merged_adapter", name) for name in ("method", "space", "rank")}  # None, since PEFT's names may say it


def defaults(call: str) -> dict[str, Any]:
    parameters = inspect.signature(CALLS[call]).parameters
    return {name: own.default for name, own in parameters.items() if own.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("call", [call for call in CALLS if call != "merge"])
def test_a_call_agrees_with_merge_on_every_parameter_that_both_have(call: str) -> None:
    own, merging = defaults(call), defaults("merge")
    shared = {name for name in own.keys() & merging.keys() if (call, name) not in LEFT}
    assert {name: own[name] for name in shared} == {name: merging[name] for name in shared}
    assert len(shared) > 3 and all(own[name] is None for asked, name in LEFT if asked == call)


def test_a_call_is_the_recipe_with_nothing_asked() -> None:
    asked = Recipe(("a",))
    assert Recipe.from_yaml("adapters: [a]") == asked
    own = defaults("merge")
    shared = own.keys() & vars(asked).keys()
    assert {"method", "space", "rank", "seed", "scale", "weights", "densities", "restore_norm"} <= shared
    assert {name: own[name] for name in shared} == {name: getattr(asked, name) for name in shared}


# The options that a call does not have, because `prepare` has them or the model is loaded already.
LACKING = {
    "merge": set(),
    "prepare and Prepared.merge": {"base_model", "target"},
    "add_merged_adapter": {"base", "base_model", "target", "heads", "allow_disjoint"},
}


@pytest.mark.parametrize("calls", LACKING)
def test_a_call_has_every_option_of_a_merge(calls: str) -> None:
    """The signatures are written out for editors and type checkers; here they are held to the one list of options."""
    own = {name: value for call in calls.split(" and ") for name, value in defaults(call).items()}
    expected = {name: option.default for name, option in OPTIONS.items() if name not in LACKING[calls]}
    expected |= {name: None for call, name in LEFT if call == calls}
    assert {name: own[name] for name in own.keys() & OPTIONS.keys()} == expected


def test_every_option_of_a_merge_is_a_flag_and_a_key_of_a_recipe() -> None:
    merging = options("merge")
    for name, option in OPTIONS.items():
        assert option.flag in merging[name].opts and merging[name].help, name
    values = {
        "scale": 2.5,
        "rank": 3,
        "seed": 4,
        "heads": "drop",
        "dtype": "float16",
        "target": "vllm",
        "space": "core",
    }
    values |= {"restore_norm": True, "allow_disjoint": True, "method": "average", "base_model": "x", "base": "y"}
    values |= {"weights": (2.0,), "densities": None}
    assert values.keys() == OPTIONS.keys()
    asked = Recipe(("a",), **values)
    assert Recipe.from_yaml(asked.to_yaml()) == asked


def test_no_call_has_a_default_of_its_own_for_a_methods_parameter() -> None:
    method = make_stages(Recipe.method, {}).method
    for call in CALLS:
        assert not {n: v for n, v in defaults(call).items() if n in type(method).model_fields and v is not None}, call


def options(command: str) -> dict[str, Any]:
    root = typer.main.get_command(cli.app)
    return {str(option.name): option for option in root.commands[command].params}  # type: ignore[attr-defined]


def test_the_command_line_leaves_defaults_to_the_recipe_and_shows_them() -> None:
    """`merge` must tell what was typed from what was not, since a recipe's value stands between."""
    merging, asked = options("merge"), Recipe(("a",))
    fields = type(make_stages(asked.method, {}).method).model_fields
    shown = {"method": asked.method, "space": asked.space, "rank": asked.rank, "seed": asked.seed, "heads": asked.heads}
    shown |= {name: fields[name].default for name in ("density", "scope")}
    assert {name: merging[name].show_default for name in shown} == {name: str(value) for name, value in shown.items()}
    assert all(merging[name].default is None for name in shown)
    assert merging["device"].default == defaults("merge")["device"]


def test_the_command_line_searches_as_the_call_does() -> None:
    searching, called = options("search"), defaults("search")
    shared = searching.keys() & called.keys() - {"tune", "controls", "storage", "parameters"}
    assert {"method", "space", "rank", "scale", "densities", "seed", "penalty", "budget", "device"} <= shared
    assert {name: searching[name].default for name in shared} == {name: called[name] for name in shared}


@pytest.mark.parametrize(
    ("command", "call", "own"),
    [
        ("search", ties_peft.search, {"out", "task", "settings", "trained", "force", "as_json"}),
        ("distil", ties_peft.distil, {"out", "task", "force", "as_json"}),
    ],
)
def test_every_flag_reaches_the_call_of_its_command(command: str, call: Callable[..., Any], own: set[str]) -> None:
    """Those of one name are passed on as they are, and the command itself reads the others."""
    assert options(command).keys() - inspect.signature(call).parameters.keys() - {"help"} == own


# -- by result


@pytest.fixture(params=["lora", "ia3"])
def folders(request: pytest.FixtureRequest, make_lora: Make, make_ia3: Make) -> list[Path]:
    if request.param == "ia3":
        return [make_ia3(f"a{n}", seed=n, vectors=VECTORS) for n in range(3)]
    return [make_lora(f"a{n}", seed=n, shapes=SHAPES, rank=4 + n) for n in range(3)]


def loaded(folders: list[Path]) -> Any:
    """A PEFT model with the adapters, named by their place."""
    peft = pytest.importorskip("peft")
    base = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.ModuleDict() for _ in SHAPES)})
    for name, (rows, columns) in SHAPES.items():
        base["layers"][int(name.split(".")[1])]["q"] = torch.nn.Linear(columns, rows)  # type: ignore[index]
    model = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="0")
    for place, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(place))
    return model


def by_command(folders: list[Path]) -> Adapter:
    out = folders[0].parent / "by-command"
    done = run("merge", *folders, "--out", out)
    assert done.code == 0, done.err
    return Adapter.load(out)


def by_recipe(folders: list[Path]) -> Adapter:
    return merge_recipe(Recipe.from_yaml(f"adapters: [{', '.join(map(str, folders))}]"))


def by_search(folders: list[Path]) -> Adapter:
    """Its first trial is the recipe as it is."""
    return ties_peft.search(folders, lambda adapter: 0.0, {"seed": [0, 9]}, 1, controls=()).adapter


WAYS: Mapping[str, Callable[[list[Path]], Adapter]] = {
    "prepare": lambda folders: ties_peft.prepare(folders).merge(),
    "add_merged_adapter": lambda folders: ties_peft.add_merged_adapter(loaded(folders), ["0", "1", "2"], "merged"),
    "search": by_search,
    "command line": by_command,
    "recipe": by_recipe,
}


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {name: adapter.tensors.read(name) for name in adapter.tensors.names}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_what_merge_gives(folders: list[Path], way: str) -> None:
    expected, found = tensors(ties_peft.merge(folders)), tensors(WAYS[way](folders))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
