"""What the commands do and print when nothing is wrong."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from cli.run_command import Terminal, run, tree
from conftest import SHAPES
from safetensors.torch import load_file

import ties_peft
from ties_peft import Recipe, cli
from ties_peft.cli.methods import reflow

WRITTEN = ["README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json", "recipe.yaml"]
WEIGHTS = "adapter_model.safetensors"
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pair(make_lora: Make) -> tuple[str, str]:
    """Two LoRAs of unlike rank, by short relative names."""
    return make_lora("a", rank=4).name, make_lora("b", rank=2, seed=1, gain=0.5).name


# merge


def test_merge_writes_an_adapter_and_says_so(pair: tuple[str, str], here: Path) -> None:
    outcome = run("merge", *pair, "--out", "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert sorted(path.name for path in (here / "out").iterdir()) == WRITTEN
    assert sorted(path.name for path in here.iterdir()) == ["a", "b", "out"]
    merged = ties_peft.Adapter.load("out")
    expected = ties_peft.merge(list(pair))
    assert merged.modules == expected.modules
    for module in merged.modules:
        torch.testing.assert_close(merged.delta(module), expected.delta(module))


def test_the_table_holds_the_facts(pair: tuple[str, str]) -> None:
    out = run("merge", *pair, "--method", "ties", "--out", "out").out
    report = ties_peft.merge(list(pair), "ties").report
    assert "2 LoRA adapters" in out
    for line in report.adapters:
        row = next(row for row in out.splitlines() if f" {line.name} " in row)
        assert {"3", str(line.ranks[0]), f"{line.norm:.3g}", f"{line.projection:.3f}"} <= set(row.split())
    assert "keeps 20.0% of the entries" in out
    assert report.cosines is not None and report.conflict is not None
    assert f"{report.cosines[0][1]:.2f}" in out
    assert "ties in space delta, scale 1" in out
    assert "sign conflict" in out and f"{report.conflict:.1%}" in out
    assert f"keeps {report.energy:.1%} of the energy" in out
    assert "float32" in out


def test_the_report_counts_the_modules_that_adapters_share(make_lora: Make) -> None:
    first, *others = SHAPES
    a, b, c = make_lora("a"), make_lora("b", seed=1), make_lora("c", shapes={first: SHAPES[first], "more": (6, 5)})
    said = run("merge", a, b, c, "--out", "out").out
    assert f"{len(SHAPES) + 1} (1 in all adapters, 1 in one alone)" in said and len(others) == 2
    assert "in all adapters" not in run("merge", a, b, "--out", "same").out


def test_three_lines_of_python_load_the_result(pair: tuple[str, str]) -> None:
    out = run("merge", *pair, "--out", "out's").out
    lines = [line.strip() for line in out.splitlines()[-3:]]
    code = ast.parse("\n".join(lines))
    assert [type(node).__name__ for node in code.body][-2:] == ["Assign", "Assign"]
    assert "AutoModel.from_pretrained('org/base')" in lines[1]
    call = code.body[-1].value  # type: ignore[attr-defined]
    assert ast.unparse(call.func) == "PeftModel.from_pretrained"
    assert ast.literal_eval(call.args[1]) == "out's"


def test_the_lines_say_where_the_base_is_not_named(make_lora: Make) -> None:
    out = run("merge", make_lora("a", base_model_name_or_path=None), "--out", "out").out
    assert "from_pretrained('your/base-model')" in out


def test_a_long_path_is_not_broken(make_lora: Make, here: Path) -> None:
    target = here / ("long-" * 30)
    out = run("merge", make_lora("a"), "--out", target).out
    assert out.count(str(target)) == 2  # where it was written, and in the code


def test_markup_in_names_is_shown_as_it_is(make_lora: Make) -> None:
    names = make_lora("[red]a[bold]").name, make_lora("[blue]b").name
    out = run("merge", *names, "--out", "[green]out").out
    for name in (*names, "[green]out"):
        assert name in out
    assert "[red]a[bold]" in run("inspect", *names).out


def test_merge_of_ia3(make_ia3: Make) -> None:
    outcome = run("merge", make_ia3("a"), make_ia3("b", seed=1), "--out", "out")
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 (IA)³ adapters" in outcome.out
    assert "energy" not in outcome.out  # no rank, so nothing is lost to it
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"
    assert config["feedforward_modules"] == ["layers.0.down"]


def test_one_adapter_is_no_plural(make_lora: Make) -> None:
    first = run("merge", make_lora("a"), "--out", "out").out.splitlines()[0]
    assert first.rstrip() == "1 LoRA adapter"


def test_json_is_one_object_and_nothing_else(pair: tuple[str, str]) -> None:
    outcome = run("merge", *pair, "--out", "out", "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert len(outcome.out.splitlines()) == 1
    found = json.loads(outcome.out, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    assert sorted(found) == ["out", "recipe", "report"]
    assert found["out"] == "out"
    assert [line["name"] for line in found["report"]["adapters"]] == ["a", "b"]
    assert found["recipe"] == Recipe.from_file("out/recipe.yaml").to_dict()


def test_warnings_stand_once_on_standard_error(make_lora: Make) -> None:
    loud, quiet = make_lora("loud", gain=50), make_lora("quiet", seed=1)
    for flags in ((), ("--json",)):
        outcome = run("merge", loud, quiet, "--rank", "2", "--out", "out", "--force", *flags)
        assert outcome.code == 0
        lines = outcome.err.splitlines()
        assert len(lines) == len(set(lines)) == 3
        assert all(line.startswith("warning: ") for line in lines)
        assert any("loud" in line and "norms differ" in line for line in lines)
        assert any("little is left of quiet" in line for line in lines)
        assert any("rank 2" in line for line in lines)
        assert "warning: " not in outcome.out


def test_python_warns_once_too(make_lora: Make) -> None:
    with pytest.warns(ties_peft.TiesPeftWarning) as caught:
        ties_peft.merge([make_lora("a")], rank=2, density=1)
    assert [str(w.message) for w in caught if w.category is ties_peft.TiesPeftWarning] == [
        "rank 2 is smaller than the largest rank of the adapters, 4."
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("flags", [(), ("--json",), ("--out", "new/out"), ("--out", "out", "--force")])
def test_a_dry_run_writes_nothing(pair: tuple[str, str], here: Path, flags: tuple[str, ...]) -> None:
    before = tree(here)
    outcome = run("merge", *pair, "--dry-run", "--density", "0.5", *flags)
    assert (outcome.code, outcome.err) == (0, "")
    assert tree(here) == before
    if "--json" in flags:
        plan = json.loads(outcome.out)["plan"]
        assert plan["modules"] == 3 and plan["rank"] == 6 and plan["adapters"] == ["a", "b"]
    else:
        assert "nothing was written" in outcome.out


def test_a_dry_run_warns_of_what_is_known_by_then(pair: tuple[str, str]) -> None:
    assert "rank 2 is smaller than the largest rank" in run("merge", *pair, "--dry-run", "--rank", "2").err


def test_progress_is_for_terminals_only(pair: tuple[str, str]) -> None:
    outcome = run("merge", *pair, "--out", "out", "--json", err=Terminal())
    assert "merge" in outcome.err and "3/3" in outcome.err
    json.loads(outcome.out)


def test_colour_forced_on_is_no_terminal(pair: tuple[str, str]) -> None:
    """CI systems set FORCE_COLOR; a log is no place for a progress bar all the same."""
    outcome = run("merge", *pair, "--out", "out", env={"FORCE_COLOR": "1"})
    assert outcome.err == ""


def test_flags_reach_the_merge(pair: tuple[str, str]) -> None:
    flags = ("--weights", "2,-1", "--scale", "0.5", "--density", "0.4", "--scope", "module", "--rank", "3")
    rest = ("--set", "elect=count", "--set", "normalize=false", "--dtype", "bfloat16", "--base-name", "me/base")
    assert run("merge", *pair, *flags, *rest, "--out", "out").code == 0
    expected = ties_peft.merge(
        list(pair),
        weights=[2, -1],
        scale=0.5,
        density=0.4,
        scope="module",
        rank=3,
        elect="count",
        normalize=False,
        dtype=torch.bfloat16,
        base_model="me/base",
    )
    found = ties_peft.Adapter.load("out")
    assert found.dtype == torch.bfloat16
    assert found.base_name == "me/base"
    assert found.digest == expected.digest


@pytest.mark.parametrize("method", ["ties", "average", "task_arithmetic"])
def test_every_method_runs(pair: tuple[str, str], method: str) -> None:
    assert run("merge", *pair, "--method", method, "--out", "out").code == 0


# recipes


def test_a_recipe_makes_the_same_bytes_again(pair: tuple[str, str], here: Path) -> None:
    flags = ("--density", "0.3", "--weights", "2,1", "--rank", "3", "--scale", "1.5", "--dtype", "float16")
    assert run("merge", *pair, *flags, "--out", "one").code == 0
    assert run("merge", "--recipe", "one/recipe.yaml", "--out", "two").code == 0
    one, two = tree(here / "one"), tree(here / "two")
    assert one == two


def test_the_recipe_of_python_is_that_of_the_command(pair: tuple[str, str]) -> None:
    run("merge", *pair, "--density", "0.3", "--out", "one")
    ties_peft.merge(list(pair), density=0.3).save("two")
    assert Path("one/recipe.yaml").read_text() == Path("two/recipe.yaml").read_text()
    assert Path("one", WEIGHTS).read_bytes() == Path("two", WEIGHTS).read_bytes()


def test_flags_override_the_recipe(pair: tuple[str, str]) -> None:
    run("merge", *pair, "--density", "0.3", "--scale", "2", "--out", "one")
    run("merge", "--recipe", "one/recipe.yaml", "--density", "0.6", "--rank", "2", "--out", "two")
    run("merge", *pair, "--density", "0.6", "--scale", "2", "--rank", "2", "--out", "three")
    assert Path("two", WEIGHTS).read_bytes() == Path("three", WEIGHTS).read_bytes()
    assert Path("two/recipe.yaml").read_text() == Path("three/recipe.yaml").read_text()


def test_adapters_named_override_those_of_the_recipe(pair: tuple[str, str], make_lora: Make) -> None:
    """With them go the weights, which were meant for others."""
    make_lora("c", seed=2)
    run("merge", *pair, "--weights", "2,1", "--out", "one")
    assert run("merge", "b", "c", "--recipe", "one/recipe.yaml", "--out", "two").code == 0
    run("merge", "b", "c", "--out", "three")
    assert Path("two", WEIGHTS).read_bytes() == Path("three", WEIGHTS).read_bytes()


def test_another_method_drops_the_parameters_it_lacks(pair: tuple[str, str]) -> None:
    run("merge", *pair, "--density", "0.3", "--out", "one")
    assert run("merge", "--recipe", "one/recipe.yaml", "--method", "average", "--out", "two").code == 0
    assert "density" not in Recipe.from_file("two/recipe.yaml").parameters


def test_a_recipe_as_mergekit_users_write_it(pair: tuple[str, str]) -> None:
    text = """
        merge_method: ties
        models:
          - model: a
            parameters: {weight: 2.0}
          - model: b
        parameters:
          density: 0.5
          lambda: 1.5
          normalize: true
        dtype: float16
    """
    Path("recipe.yaml").write_text(text)
    assert run("merge", "--recipe", "recipe.yaml", "--out", "one").code == 0
    run("merge", *pair, "--weights", "2,1", "--density", "0.5", "--scale", "1.5", "--dtype", "float16", "--out", "two")
    assert Path("one", WEIGHTS).read_bytes() == Path("two", WEIGHTS).read_bytes()


def test_a_recipe_with_every_key_round_trips() -> None:
    recipe = Recipe(
        adapters=("org/a", "path/b"),
        weights=(1.0, -0.5),
        method="ties",
        parameters={"density": 0.3, "elect": "count"},
        scale=1.5,
        rank=32,
        seed=7,
        dtype="bfloat16",
        base_model="org/base",
        allow_disjoint=True,
    )
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()


@pytest.mark.parametrize("give", [str, Path, ties_peft.Adapter.load])
def test_the_giver_of_signs_is_in_the_recipe(pair: tuple[str, str], give: Callable[[str], Any]) -> None:
    """Whatever form it was given in, what was merged can be saved and made again."""
    merged = ties_peft.merge(list(pair), sign_from=give("b"))
    merged.save("one")
    assert run("merge", "--recipe", "one/recipe.yaml", "--out", "two").code == 0
    assert Path("one", WEIGHTS).read_bytes() == Path("two", WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "form",
    [
        {"weights": np.array([2.0, 1.0])},
        {"weights": np.array([2, 1])},
        {"weights": torch.tensor([2.0, 1.0])},
        {"density": np.float64(0.5)},
        {"density": torch.tensor(0.5)},
        {"scale": np.float64(1.5)},
        {"scale": np.float32(1.5)},
        {"rank": np.int64(3)},
        {"seed": np.int64(3)},
    ],
    ids=str,
)
def test_what_is_accepted_can_be_saved(pair: tuple[str, str], form: dict[str, Any]) -> None:
    """Numbers of NumPy and torch: taken or refused, but never taken and then impossible to write."""
    try:
        merged = ties_peft.merge(list(pair), **form)
    except ties_peft.TiesPeftError:
        return
    merged.save("out")
    assert Recipe.from_file("out/recipe.yaml").to_dict() == Recipe.from_yaml(merged.recipe.to_yaml()).to_dict()


# inspect


def test_inspect_one(make_lora: Make) -> None:
    outcome = run("inspect", make_lora("a", rank=4, alpha=8, use_rslora=True).name)
    assert (outcome.code, outcome.err) == (0, "")
    for word in ("a", "LoRA", "rank 4", "scaling 4", "org/base", "3", "304", "float32", "rsLoRA"):
        assert word in outcome.out
    assert "merged" not in outcome.out


def test_inspect_several_says_whether_they_merge(pair: tuple[str, str], make_ia3: Make) -> None:
    assert "can be merged" in run("inspect", *pair).out
    mixed = run("inspect", *pair, make_ia3("c").name)
    assert mixed.code == 0  # each is an adapter
    assert "cannot be merged" in mixed.out and "(IA)³" in mixed.out


def test_inspect_with_a_fault_shows_the_others(pair: tuple[str, str]) -> None:
    outcome = run("inspect", *pair, "nowhere")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1 and outcome.err.startswith("error: adapter 'nowhere'")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert [line[:4] for line in lines if "LoRA" in line] == [["1", "a", "LoRA", "4"], ["2", "b", "LoRA", "2"]]


def test_inspect_json(pair: tuple[str, str]) -> None:
    outcome = run("inspect", *pair, "--json")
    found = json.loads(outcome.out)
    assert outcome.err == ""
    assert [adapter["ranks"] for adapter in found["adapters"]] == [[4], [2]]
    assert found["mergeable"] is True and found["rank"] == 6 and found["faults"] == []
    faulty = run("inspect", *pair, "nowhere", "--json")
    assert faulty.code == 2
    assert len(json.loads(faulty.out)["faults"]) == 1


def test_inspect_names_what_is_unusual(make_lora: Make) -> None:
    folder = make_lora("a", base_model_name_or_path=None, alpha_pattern={"up": 2})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 99}))
    out = " ".join(run("inspect", folder).out.split())
    assert "alpha pattern" in out and "names no base model" in out and "the config says r = 99" in out


def test_inspect_says_what_is_unusual_of_a_set(make_lora: Make) -> None:
    names = [make_lora("a").name, make_lora("b", seed=1, gain=30).name, make_lora("c").name]
    seen = json.loads(run("inspect", *names, "--json").out)
    norms = [adapter["norm"] for adapter in seen["adapters"]]
    times = f"{max(norms) / min(norms):.1f}-fold"
    assert seen["mergeable"] is True
    assert [times in text and "a (" in text and "b (" in text for text in seen["warnings"]] == [True, False]
    assert seen["warnings"][1].startswith("c and a hold the same task vectors")
    assert json.loads(run("inspect", *names[::2], "--json").out)["warnings"] == seen["warnings"][1:]


# methods, version, help


def test_methods_lists_all() -> None:
    outcome = run("methods")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    for info in ties_peft.methods():
        (line,) = [line for line in lines if line.split(" ")[0] == info.name]
        assert info.summary[:30] in line
        assert f" {info.default_scale} ".replace(".0 ", " ") in line
        assert ", ".join(info.kinds) in line


def test_methods_explains_one() -> None:
    out = run("methods", "ties").out
    assert "Law" in out and "Yadav" in out and "task_arithmetic" not in out
    assert out.count("Trim each task vector, elect one sign per entry") == 1
    told = " ".join(out.split())
    for fact in ("k = ⌊density·n⌋", "0.29 of 100 is 29", "first by position", "exactly 0 elects +"):
        assert fact in told, fact
    assert "PEFT's `ties` is space `factors` for equal lora scalings and unit weights" in told


def test_the_second_column_of_formulas_is_wrapped_under_itself() -> None:
    text = "    first      the words of\n               both lines\n    second     short\n\nProse."
    assert reflow(text, 30).splitlines() == [
        "    first      the words of",
        "               both lines",
        "    second     short",
        "",
        "Prose.",
    ]
    assert reflow("    first      words that are too long", 30).splitlines() == [
        "    first      words that are",
        "               too long",
    ]


def test_methods_json() -> None:
    found = json.loads(run("methods", "--json").out)["methods"]
    names = [method["name"] for method in found]
    assert names == sorted(names)
    assert {"average", "task_arithmetic", "ties"} <= set(names)
    one = json.loads(run("methods", "ties", "--json").out)["methods"]
    assert [method["name"] for method in one] == ["ties"]
    assert {p["name"]: p["default"] for p in one[0]["parameters"]}["density"] == 0.2


def test_version() -> None:
    outcome = run("--version")
    assert outcome == (0, f"ties-peft {ties_peft.__version__}\n", "")


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "ties_peft", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ties-peft {ties_peft.__version__}\n"
    assert done.stderr == ""


def test_alone_it_shows_the_help() -> None:
    out = run().out
    for command in ("merge", "inspect", "methods"):
        assert command in out
    assert run("--help").code == 0
    assert "--density" in run("merge", "--help").out


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("command", ["methods", "merge", "inspect", "help"])
def test_a_narrow_console_is_no_fault(pair: tuple[str, str], encoding: str, command: str, here: Path) -> None:
    """Windows consoles and plain C locales cannot print Σ; that must not end a merge."""
    arguments = {"merge": ["merge", *pair, "--out", "out"], "inspect": ["inspect", *pair], "help": ["merge", "--help"]}
    out, err = TextIOWrapper(BytesIO(), encoding=encoding), StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        patch.setattr(sys, "argv", ["ties-peft", *arguments.get(command, ["methods"])])
        cli.main()
        raise SystemExit(0)
    assert not stop.value.code
    assert err.getvalue() == ""


FLAGS = {
    "merge": (
        "--allow-disjoint --base --base-name --densities --density --device --dry-run --dtype --force --heads --json --method --out "
        "--rank --recipe --report --restore-norm --scale --scope --seed --set --space --target --weights --weights-for"
    ),
    "inspect": "--base --json",
    "analyze": "--base --density --exact --json --methods --out --rank",
    "convert": (
        "--alpha --base --base-name --device --dtype --force --heads --json --modules --out --part --rank --target"
    ),
    "push": "--create-pr --json --message --private --revision",
    "methods": "--json",
    "evaluate": "--bare --base --batch-size --device --harness --harness-path --json --limit --precision --task",
    "distil": (
        "--answer-tokens --answers --base --base-name --batch-size --count --device --dtype --fit --force --json --keep-base "
        "--keep-weight --kind --out --precision --rank --rows --seed --start --state --steps --task --threads --weights"
    ),
    "search": (
        "--allow-disjoint --answer-tokens --answers --base --budget --controls --count --densities --device --force --json "
        "--judge --method --objective --out --penalty --rank --rows --sampler --scale --seed --set --space --state --storage "
        "--study --task --trained --tune"
    ),
    "signs": "--base --device --force --out --seed --steps --task",
    "statistics": "--again --base --device --json --kind --labels --seed --task",
}


def test_the_flags_are_those_that_were_meant() -> None:
    """A flag is a promise: a new one is added here on purpose."""
    root = typer.main.get_command(cli.app)
    found = {
        name: " ".join(sorted(option for p in command.params for option in p.opts if option.startswith("-")))
        for name, command in root.commands.items()  # type: ignore[attr-defined]
    }
    assert found == FLAGS
    assert [option for p in root.params for option in p.opts] == [
        "--version",
        "--install-completion",
        "--show-completion",
    ]


def test_the_weights_of_the_command_are_loadable(pair: tuple[str, str]) -> None:
    run("merge", *pair, "--out", "out")
    assert all(key.startswith("base_model.model.layers.") for key in load_file(f"out/{WEIGHTS}"))
