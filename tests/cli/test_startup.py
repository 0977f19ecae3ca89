"""What a start costs, and that names which are imported late are the names they say: each in a process of its own."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import typer
from cli.run_command import run

import ties_peft
from ties_peft import cli
from ties_peft.methods import method_classes
from ties_peft.spaces import spaces

SLOW = ("torch", "numpy", "transformers", "peft", "accelerate", "safetensors", "huggingface_hub")
COMMANDS = ("merge", "inspect", "convert", "push", "methods", "evaluate", "distil", "search", "signs", "statistics")
# Arguments, and the exit status that they end with. None of these reads an adapter.
STARTS: list[tuple[list[str], int]] = [
    (["--version"], 0),
    (["--help"], 0),
    *((([command, "--help"]), 0) for command in COMMANDS),
    (["--bogus"], 2),
    (["mergee"], 2),
    (["merge", "--bogus"], 2),
    (["merge", "a", "--seed", "1.5", "--out", "b"], 2),
    (["merge", "a", "b"], 2),  # no --out
    (["merge", "--out", "b"], 2),  # no adapters
    (["inspect"], 2),
    (["convert", "a"], 2),
    (["evaluate", "a"], 2),  # no task
]


def fresh(code: str, **env: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_version_and_usage_errors_import_no_torch() -> None:
    """All in one process: what one of them imported, a later one could not take back."""
    code = f"""
import contextlib, io, json, sys
from ties_peft import cli
seen = []
for arguments, _ in {STARTS!r}:
    sys.argv = ["ties-peft", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    seen.append((arguments, code, sorted(set({SLOW!r}) & set(sys.modules))))
print(json.dumps(seen))
"""
    assert json.loads(fresh(code)) == [[arguments, code, []] for arguments, code in STARTS]


def test_importing_the_package_imports_no_torch() -> None:
    code = f"""
import sys, ties_peft
ties_peft.TiesPeftError, ties_peft.__version__, dir(ties_peft)
print(sorted(set({SLOW!r}) & set(sys.modules)))
"""
    assert fresh(code).strip() == "[]"


MODULES = sorted(
    path.stem for path in Path(ties_peft.__file__).parent.iterdir() if path.suffix == ".py" or path.is_dir()
)
ALSO_MODULES = sorted(set(ties_peft.__all__) & set(MODULES))
ORDERS = {
    "the module first": "import_module('ties_peft.NAME'); found = getattr(ties_peft, 'NAME')",
    "the function first": "found = ties_peft.NAME; import_module('ties_peft.NAME'); assert found is ties_peft.NAME",
    "from": "from ties_peft import NAME as found; import_module('ties_peft.NAME'); assert found is ties_peft.NAME",
    "import as": "import ties_peft.NAME as found",
    "everything": "space = {}; exec('from ties_peft import *', space); found = space['NAME']",
}


def test_a_function_wins_over_the_module_of_its_name() -> None:
    """In whatever order they are asked for; each in a process of its own, so that none helps another."""
    assert ALSO_MODULES == ["methods", "search"]
    cases = list(zip(ORDERS, cycle(ALSO_MODULES), strict=False))
    code = f"""
import json, os, sys, types
from importlib import import_module
import pydantic, rich.table, safetensors.torch, torch, yaml
import ties_peft
kinds = []
for order, name in {cases!r}:
    read, write = os.pipe()
    if os.fork() == 0:
        exec({ORDERS!r}[order].replace("NAME", name))
        os.write(write, type(found).__name__.encode() + b" " + type(sys.modules["ties_peft." + name]).__name__.encode())
        os._exit(0)
    os.close(write)
    kinds.append([order, name, os.read(read, 99).decode()])
    os.wait()
print(json.dumps(kinds))
"""
    assert json.loads(fresh(code)) == [[order, name, "function module"] for order, name in cases]


def test_the_table_of_late_names_is_what_type_checkers_see() -> None:
    tree = ast.parse(Path(ties_peft.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.asname or alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == ties_peft._MODULES
    assert set(seen) <= set(ties_peft.__all__)
    for name, module in seen.items():
        found = getattr(ties_peft, name)
        assert (found.__module__, found.__name__) == (f"ties_peft.{module}", name)


def test_dir_and_unknown_names() -> None:
    assert set(ties_peft.__all__) <= set(dir(ties_peft))
    with pytest.raises(AttributeError, match="'ties_peft' has no attribute 'mrege'"):
        _ = ties_peft.mrege  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="mrege"):
        exec("from ties_peft import mrege")


def test_a_public_name_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a test of a user's program does."""
    before = ties_peft.merge
    monkeypatch.setattr(ties_peft, "merge", len)
    assert ties_peft.merge is len
    monkeypatch.undo()
    assert ties_peft.merge is before


# Completion


# What is typed, and what the shell is offered for the last word: exactly, or among others.
COMPLETED: dict[str, list[str]] = {
    "ties-peft s": ["search", "signs", "statistics"],
    "ties-peft merge a --method ": list(method_classes()),
    "ties-peft merge a --method ti": ["ties"],
    "ties-peft merge a --method dare+ti": ["dare+ties"],
    "ties-peft methods sl": ["slerp"],
    "ties-peft merge a --space ": list(spaces()),
    "ties-peft merge a --heads ": ["error", "drop", "keep=", "average", "merge"],
    "ties-peft merge a --target v": ["vllm"],
    "ties-peft search a --method ti": ["ties"],
    "ties-peft convert a --target v": ["vllm"],
}
OPTIONS = {"ties-peft merge a b --d": {"--density", "--dry-run", "--dtype", "--device"}}


def test_commands_options_and_values_are_completed_without_torch() -> None:
    """All in one process: what one of them imported, a later one could not take back."""
    code = f"""
import contextlib, io, json, os, sys
from ties_peft import cli
sys.argv, offered = ["ties-peft"], {{}}
for words in {[*COMPLETED, *OPTIONS]!r}:
    os.environ.update(COMP_WORDS=words, COMP_CWORD=str(len(words.split(" ")) - 1))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main()
    offered[words] = printed.getvalue().split()
print(json.dumps([offered, sorted(set({SLOW!r}) & set(sys.modules))]))
"""
    offered, late = json.loads(fresh(code, _TIES_PEFT_COMPLETE="complete_bash"))
    assert late == []
    assert {words: offered[words] for words in COMPLETED} == COMPLETED
    for words, some in OPTIONS.items():
        assert some <= set(offered[words])


def test_completion_can_be_installed() -> None:
    code = "import sys; from ties_peft import cli; sys.argv = ['ties-peft', '--show-completion', 'bash']; cli.main()"
    shown = fresh(code, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_TIES_PEFT_COMPLETE=complete_bash" in shown and "ties-peft" in shown


# What the help of merge shows


def test_the_help_of_merge_groups_its_options_and_shows_two_examples_that_parse() -> None:
    text = run("merge", "--help").out
    panels = {"Options": "--out", "How the adapters are combined": "--density", "What is written": "--rank"}
    for title, option in panels.items():
        panel = text.partition(f"─ {title} ─")[2].partition("╰")[0]
        assert option in panel, title
        assert sum(other in panel for other in panels.values()) == 1
    examples = [line.strip() for line in text.splitlines() if line.strip().startswith("ties-peft merge ")]
    assert len(examples) == 2
    command = typer.main.get_command(cli.app).commands["merge"]  # type: ignore[attr-defined]
    for example in examples:
        given = command.make_context("merge", shlex.split(example)[2:]).params
        assert len(given["adapters"]) == 2 and str(given["out"]) == "merged"
