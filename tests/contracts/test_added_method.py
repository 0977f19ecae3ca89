"""A method from another package: one file and an entry point, and it is there wherever a method is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.run_command import run

import ties_peft
from ties_peft.methods import method_classes

TESTS = Path(__file__).parent.parent
Maker = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")

METHOD = '''
"""Clipping."""

from typing import ClassVar

from pydantic import Field
from ties_peft.task_vectors.delta import Dense
from ties_peft.methods import Method


class Clip(Method):
    """Sum the task vectors and clip what goes too far: τ = max(−limit, min(limit, Σ wᵢ·τᵢ)).

    Law: no entry exceeds the limit; with a large one it is the plain sum of the adapters.
    Source: a test of 2026.
    """

    name: ClassVar[str] = "clip"
    source: ClassVar[str] = "a test"
    entrywise: ClassVar[bool] = True

    limit: float = Field(0.5, gt=0, description="the largest magnitude that stays")

    def merge(self, task_vectors):
        return sum(task_vectors).clamp_(-self.limit, self.limit)

    def finish(self, merged, task_vectors):
        return Dense(merged.dense().clamp(-self.limit, self.limit))
'''

USE = '''
import io, json, sys
from contextlib import redirect_stdout
import torch
import ties_peft
from contracts.cells import OFFERED
from ties_peft import cli
from ties_peft.merging.merge import merge_recipe

a, b, out = sys.argv[1:]


def run(*arguments):
    """What the command line prints, and its exit status."""
    sys.argv, printed = ["ties-peft", *arguments], io.StringIO()
    with redirect_stdout(printed):
        try:
            cli.main()
            return printed.getvalue(), 0
        except SystemExit as stop:
            return printed.getvalue(), stop.code or 0


def largest(merged):
    return max(float(merged.delta(name).abs().max()) for name in merged.modules)


def same(first, second):
    return all(torch.equal(first.delta(n), second.delta(n)) for n in first.modules)


def refusal(**asked):
    try:
        ties_peft.merge([a, b], **asked)
    except ties_peft.MethodError as error:
        return str(error)


by_name = ties_peft.merge([a, b], method="clip", limit=0.25, rank="max")
text = "merge_method: clip\\nadapters: [{adapter: %s}, {adapter: %s}]\\nparameters: {limit: 0.25, rank: max}\\n" % (a, b)
printed, status = run("merge", a, b, "--method", "clip", "--set", "limit=0.25", "--rank", "max", "--out", out)
written = ties_peft.Adapter.load(out)
again = merge_recipe(ties_peft.Recipe.from_yaml(text))
facts = {
    "largest": largest(by_name),
    "listed": "clip" in [info.name for info in ties_peft.methods()],
    "cells": sorted("-".join(cell[1:]) for cell in OFFERED if cell.method == "clip"),
    "help": run("methods", "clip"),
    "json": json.loads(run("methods", "clip", "--json")[0])["methods"][0]["parameters"],
    "table": [line.split()[0] for line in run("methods")[0].splitlines() if line].count("clip"),
    "status": status,
    "same by the command line": same(by_name, written),
    "same by a recipe": same(by_name, again),
    "recipe": ties_peft.Recipe.from_file(out + "/recipe.yaml").method,
    "after ties": largest(ties_peft.merge([a, b], method="ties+clip", limit=0.125, density=1.0, rank="max")),
    "after dare": largest(ties_peft.merge([a, b], method="dare+clip", limit=0.125, density=0.5, rank="max")),
    "out of range": refusal(method="clip", limit=-1.0),
    "misspelt": refusal(method="clip", limits=1.0),
}
print(json.dumps(facts))
'''


def install(at: Path, text: str = METHOD, target: str = "shiny_methods:Clip") -> Path:
    """A package as pip would leave it: one file, and metadata with the entry point."""
    info = at / "shiny_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (at / "shiny_methods.py").write_text(text, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shiny-methods\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[ties_peft.methods]\nshiny = {target}\n", encoding="utf-8")
    return at


def python(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with that package installed, in a process of its own."""
    path = os.pathsep.join(map(str, (site, Path(ties_peft.__file__).parent.parent, TESTS)))
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120", "PYTHONWARNINGS": "ignore"},
    )


def test_it_is_known_by_name_everywhere(tmp_path: Path, make_lora: Maker) -> None:
    folders = [str(make_lora(name, seed=seed)) for seed, name in enumerate("ab")]
    done = python(install(tmp_path / "site"), "-c", USE, *folders, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["largest"] == pytest.approx(0.25, rel=1e-3)
    assert facts["listed"] and facts["table"] == 1
    assert facts["cells"] == ["core-lora", "delta-ia3", "delta-lora", "knots-lora"]
    text, status = facts["help"]
    assert status == 0 and "Sum the task vectors and clip" in text and "the largest magnitude that stays" in text
    assert facts["json"] == [{"name": "limit", "default": 0.5, "meaning": "the largest magnitude that stays"}]
    assert (facts["status"], facts["recipe"]) == (0, "clip")
    assert facts["same by the command line"] and facts["same by a recipe"]
    assert facts["after ties"] == pytest.approx(0.125, rel=1e-3) == facts["after dare"]
    assert facts["out of range"].startswith("method 'clip', parameter 'limit' is -1.0: input should be greater than 0")
    assert facts["misspelt"] == "method 'clip': unknown parameter 'limits': did you mean 'limit'? Known: limit."


def test_an_entry_point_may_name_a_registered_class(tmp_path: Path) -> None:
    """As the guide to own methods writes it: `@register` above the class, and an entry point beside it."""
    text = METHOD.replace("import Method\n", "import Method, register\n").replace("class Clip", "@register\nclass Clip")
    site = install(tmp_path / "site", text)
    for arguments in (
        ["-m", "ties_peft", "methods", "clip"],
        ["-c", "import shiny_methods, ties_peft; ties_peft.methods()"],
    ):
        done = python(site, *arguments)
        assert done.returncode == 0, done.stderr


def test_another_class_of_the_name_of_a_registered_one_is_refused(tmp_path: Path) -> None:
    text = METHOD + "\n\nclass Other(Clip):\n    'Another one.'\n"
    use = "import shiny_methods; from ties_peft.methods import *; register(shiny_methods.Clip); method_classes()"
    done = python(install(tmp_path / "site", text, "shiny_methods:Other"), "-c", use)
    assert "two methods have the name 'clip': shiny_methods.Clip and shiny_methods:Other." in done.stderr


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        (METHOD, "shiny_methods:Clop", "shiny = shiny_methods:Clop of group ties_peft.methods cannot be loaded"),
        ("raise OSError('no')", "shiny_methods:Clip", "cannot be loaded (OSError: no)"),
        ("Clip = 3", "shiny_methods:Clip", "is 3; expected a subclass of ties_peft.methods.Method"),
        (
            METHOD.replace('"clip"', '"ties"'),
            "shiny_methods:Clip",
            "two methods have the name 'ties': ties_peft.methods.ties.Ties and shiny_methods:Clip.",
        ),
    ],
)
def test_one_that_cannot_be_had_is_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, target: str, message: str
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", text, target))
    method_classes.cache_clear()
    try:
        done = run("methods")
    finally:
        monkeypatch.undo()
        sys.modules.pop("shiny_methods", None)
        method_classes.cache_clear()
    assert (done.code, done.out) == (2, "")
    assert message in " ".join(done.err.split())


@pytest.mark.slow
def test_the_battery_covers_it(tmp_path: Path) -> None:
    battery = str(TESTS / "contracts" / "test_battery.py")
    options = ["-q", "-p", "no:cacheprovider", "-k", "clip", "-m", "slow or not slow"]
    done = python(install(tmp_path / "site"), "-m", "pytest", battery, *options)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(".") > 60, "tests of its cells"
