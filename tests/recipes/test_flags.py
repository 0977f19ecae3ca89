"""The command line over a recipe: the same bytes again, and what flags override."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ties_peft import Recipe, cli

Make = Callable[..., Path]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`ties-peft ARGUMENTS`: its exit status."""
    monkeypatch.setattr(sys, "argv", ["ties-peft", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


ASKED: list[list[object]] = [
    [],
    ["--weights", "norm"],
    ["--weights", "1,0.5,-1", "--density", "0.3", "--scope", "module", "--rank", "3", "--restore-norm"],
    [
        "--set",
        "density={over_layers: [0.1, 0.9]}",
        "--set",
        "elect=count",
        "--space",
        "core",
        "--set",
        "balanced=false",
    ],
    ["--densities", "0.1,0.5,0.9", "--scope", "module"],
    ["--set", "density=[{filter: up, value: 5e-1}, {value: 0.1}]", "--dtype", "float16", "--scale", "1.5"],
    ["--method", "ties+iso_c", "--space", "core", "--set", "ties.density=0.5", "--base-name", "my/base", "--seed", "5"],
]


@pytest.mark.parametrize("asked", ASKED)
def test_the_saved_recipe_makes_the_same_bytes(
    make_lora: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[object]
) -> None:
    folders = [make_lora(f"a{i}", rank=2 + i, seed=i, gain=1 + i) for i in range(3)]
    assert run(monkeypatch, "merge", *folders, "--out", tmp_path / "first", *asked) == 0
    assert run(monkeypatch, "merge", "--recipe", tmp_path / "first/recipe.yaml", "--out", tmp_path / "second") == 0
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def dry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[dict[str, Any], str]:
    """The recipe that the command line asks for, and what went to standard error."""
    capsys.readouterr()
    assert run(monkeypatch, "merge", *arguments, "--dry-run", "--json") == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    found: dict[str, Any] = json.loads(captured.out)["recipe"]
    return found, captured.err


@pytest.fixture
def written(make_lora: Make, tmp_path: Path) -> Path:
    """A recipe that sets most things, over three adapters."""
    folders = [make_lora(f"a{i}", seed=i) for i in range(3)]
    recipe = Recipe(
        tuple(map(str, folders)),
        weights=(1.0, 2.0, 3.0),
        densities=(0.1, None, 0.3),
        parameters={"density": 0.5, "scope": "module", "balanced": False},
        space="core",
        scale=2.0,
        rank=5,
        seed=1,
        dtype="float16",
        base_model="org/named",
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    return tmp_path / "recipe.yaml"


def test_flags_override_the_recipe(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Recipe.from_file(written).to_dict()
    assert dry(monkeypatch, capsys, "--recipe", written)[0] == before
    flags = ["--scale", 3, "--rank", "max", "--seed", 9, "--dtype", "float32", "--base-name", "x", "--restore-norm"]
    after, _ = dry(monkeypatch, capsys, "--recipe", written, *flags)
    changed = {"scale": 3.0, "rank": "max", "seed": 9, "restore_norm": True}
    assert after["parameters"] == {**before["parameters"], **changed}
    assert (after["dtype"], after["base_model"], after["adapters"]) == ("float32", "x", before["adapters"])


def test_density_on_the_command_line_is_for_all(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in (["--density", 0.7], ["--set", "density=0.7"]):
        after, _ = dry(monkeypatch, capsys, "--recipe", written, *flag)
        assert after["parameters"]["density"] == 0.7
        assert [entry["parameters"] for entry in after["adapters"]] == [{"weight": w} for w in (1.0, 2.0, 3.0)]


def test_weights_on_the_command_line_replace_the_recipes(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after, _ = dry(monkeypatch, capsys, "--recipe", written, "--weights", "norm")
    assert after["parameters"]["weights"] == "norm"
    assert not any("weight" in entry.get("parameters", {}) for entry in after["adapters"])
    after, _ = dry(monkeypatch, capsys, "--recipe", written, "--weights", "1,1,0.5")
    assert [entry["parameters"]["weight"] for entry in after["adapters"]] == [1.0, 1.0, 0.5]


def test_adapters_on_the_command_line_take_the_place_of_the_recipes_entries(
    written: Path, make_lora: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(make_lora("other"))
    after, _ = dry(monkeypatch, capsys, other, "--recipe", written)
    assert after["adapters"] == [{"adapter": other}]
    written.write_text(Recipe((other,), weights="norm").to_yaml())
    after, _ = dry(monkeypatch, capsys, other, other, "--recipe", written)
    assert after["parameters"]["weights"] == "norm"


def test_another_method_or_space_drops_the_parameters_that_it_lacks(
    written: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    after, _ = dry(monkeypatch, capsys, "--recipe", written, "--method", "pico+ties")
    assert after["parameters"]["density"] == 0.5 and after["parameters"]["balanced"] is False
    after, _ = dry(monkeypatch, capsys, "--recipe", written, "--space", "knots")
    assert "balanced" not in after["parameters"] and after["parameters"]["scope"] == "module"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--weights", "norms"], "--weights is 'norms'"),
        (["--set", "density"], "expected NAME=VALUE"),
        (["--set", "densty=1"], "did you mean 'density'?"),
        (["--set", "density={over_layers: [0.1, 2]}"], "a density is 2"),
        (["--densities", "0.1,2,1"], "a density is 2"),
        (["--densities", "0.1,2"], "2 densities for 3 adapters"),
        (["--densities", "0.1,much"], "--densities is '0.1,much'; expected numbers with commas between"),
        (["--set", "density=[0.1,"], "density"),
        (["--weights", "1"], "1 weight for 3 adapters"),
    ],
)
def test_flags_that_are_wrong(
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "merge", "--recipe", written, "--dry-run", *flags) == 2
    assert message in capsys.readouterr().err
