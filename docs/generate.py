"""Write the pages that are made from the code: methods, Python API, command line."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import typer

import ties_peft
from ties_peft.cli import app
from ties_peft.methods import MethodInfo


def write(folder: Path) -> None:
    """Write the pages into a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in (("methods", method_catalogue()), ("api", api()), ("cli", command_line())):
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def method_catalogue() -> str:
    """Return the page of all methods in the registry."""
    head = "# Methods\n\n`ties-peft methods NAME` prints the same. `--set NAME=VALUE` sets a parameter.\n"
    return "\n".join([head, *map(_method, ties_peft.methods())])


def api() -> str:
    """Return the page of the public names, which autodoc fills from the docstrings."""
    return "\n".join(["# Python API\n", *map(_public, ties_peft.__all__)])


def command_line() -> str:
    """Return the page of all commands."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    head = "# Command line reference\n\nExit status: 0 on success, 2 on bad input, 1 on an unforeseen fault.\n"
    return "\n".join([head, *(_command(name, command) for name, command in commands.items())])


def _method(info: MethodInfo) -> str:
    rows = [f"| `{p.name}` | `{p.default}` | {_cell(p.meaning)} |" for p in info.parameters]
    table = ["| parameter | default | meaning |", "|---|---|---|", *rows, ""] if rows else []
    facts = [
        f"- Spaces: {', '.join(info.spaces)}",
        f"- Kinds: {', '.join(info.kinds)}",
        f"- Default scale: {info.default_scale}",
        f"- Source: {_plain(info.source)}",
    ]
    return "\n".join([f"## {info.name}\n", "```text", inspect.cleandoc(info.text), "```\n", *table, *facts, ""])


def _public(name: str) -> str:
    value = getattr(ties_peft, name)
    kind, options = ("autofunction", ()) if inspect.isfunction(value) else ("autoclass", (":members:",))
    if isinstance(value, type) and issubclass(value, BaseException | Warning):
        kind, options = "autoexception", ()
    return "\n".join(
        [f"## {name}\n", "```{eval-rst}", f".. {kind}:: ties_peft.{name}", *(f"   {o}" for o in options), "```\n"]
    )


def _command(name: str, command: Any) -> str:
    arguments = [p.name for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    rows = [f"| `{', '.join([*p.opts, *p.secondary_opts])}` | {_cell(p.help or '')} |" for p in options]
    usage = " ".join(["ties-peft", name, *map(str.upper, arguments), "[OPTIONS]"])
    text = inspect.cleandoc(command.help or "")
    return "\n".join(
        [f"## {name}\n", f"```text\n{usage}\n\n{text}\n```\n", "| option | meaning |", "|---|---|", *rows, ""]
    )


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Return a text on one line in which Markdown sees no markup other than code."""
    return (
        " ".join(text.split())
        .replace("\\[", "[")
        .replace("[", "\\[")
        .replace("*", "\\*")
        .replace("<", "\\<")
        .replace("$", "\\$")
    )
