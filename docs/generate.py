"""Write the pages that are made from the code: methods, Python API, command line."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import catalogue
import docstrings
import typer

import ties_peft
from ties_peft.cli import app

KINDS = {"autofunction": "Functions", "autoclass": "Classes", "autoexception": "Errors and warnings"}


def write(folder: Path) -> None:
    """Write the pages into a folder."""
    folder.mkdir(exist_ok=True)
    for name, text in (("methods", catalogue.page()), ("api", api()), ("cli", command_line())):
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def api() -> str:
    """Return the page of the public names, which autodoc fills from the docstrings."""
    parts = ["# Python API\n", "All names are in the package itself: `import ties_peft`.\n"]
    for kind, title in KINDS.items():
        parts += [f"## {title}\n", *(_public(name, kind) for name in ties_peft.__all__ if _kind(name) == kind)]
    return "\n".join(parts)


def command_line() -> str:
    """Return the page of all commands."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parts = ["# Command line reference\n", "Exit status: 0 on success, 2 on bad input, 1 on an unforeseen fault.\n"]
    return "\n".join([*parts, *(_command(name, command) for name, command in commands.items())])


def _kind(name: str) -> str:
    value = getattr(ties_peft, name)
    if isinstance(value, type):
        return "autoexception" if issubclass(value, BaseException) else "autoclass"
    return "autofunction"


def _public(name: str, kind: str) -> str:
    options = ("   :members:",) if kind == "autoclass" else ()
    return "\n".join([f"### {name}\n", "```{eval-rst}", f".. {kind}:: ties_peft.{name}", *options, "```\n"])


def _command(name: str, command: Any) -> str:
    arguments = [_argument(p) for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["ties-peft", name, *arguments, "[OPTIONS]"])
    parts = [f"## {name}\n", docstrings.markdown(docstrings.read(command.help or "")), f"```text\n{usage}\n```\n"]
    panels: dict[str, list[str]] = defaultdict(list)
    for option in command.params:
        panels[getattr(option, "rich_help_panel", None) or ""].append(_option(option))
    for panel, rows in sorted(panels.items()):
        parts += [f"{panel}:\n"] if panel else []
        parts += ["| option | default | meaning |", "|---|---|---|", *rows, ""]
    examples = [line for line in (command.epilog or "").splitlines() if line.startswith("ties-peft")]
    return "\n".join([*parts, *(["```text", *examples, "```\n"] if examples else [])])


def _argument(argument: Any) -> str:
    name = str(argument.metavar or argument.name.upper()) + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _option(option: Any) -> str:
    """Return a row of the table of options; arguments have their name in capitals."""
    shown = option.show_default if isinstance(option.show_default, str) else option.default
    default = "" if shown in (None, False) or callable(shown) or option.show_default is False else str(shown)
    names = option.name.upper() if option.param_type_name == "argument" else ", ".join(_flags(option))
    help_text = re.sub(r"\\(?=\[)", "", inspect.cleandoc(option.help or ""))
    return f"| `{names}` | {docstrings.markdown_text(default)} | {docstrings.markdown_text(help_text)} |"


def _flags(option: Any) -> list[str]:
    return [*option.opts, *option.secondary_opts]
