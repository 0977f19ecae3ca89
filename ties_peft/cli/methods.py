"""`ties-peft methods`: what there is, and one in full."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .base import Json, complete_method, print_json

if TYPE_CHECKING:
    from ..methods import MethodInfo


MAX_WIDTH = 100  # columns of text that are good to read
PARAGRAPH_START = re.compile(r"[A-Z][a-z]+: |[-*] ")  # a line that starts a paragraph without a blank line above it


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("methods")(methods)


def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method, in full.", show_default=False, autocompletion=complete_method)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or explain one."""
    from ..methods import find_method
    from ..methods import methods as all_methods

    if name is not None:
        find_method(name)
    chosen = [info for info in all_methods() if name in (None, info.name)]
    if as_json:
        print_json({"methods": [_method_dict(info) for info in chosen]})
        return
    console = Console()
    if name is not None:
        _print_method(console, chosen[0])
        return
    console.print(_method_table(chosen))
    console.print("\nties-peft methods NAME explains one, with its parameters; two in a row: dare+ties, pico+ties")


def _method_table(found: list[MethodInfo]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("method", "what it does", "scale", "for"):
        table.add_column(heading)
    for info in found:
        table.add_row(f"[bold]{info.name}[/]", escape(info.summary), _scale(info), ", ".join(info.kinds))
    return table


def _print_method(console: Console, info: MethodInfo) -> None:
    console.print(f"[bold]{info.name}[/]  {escape(info.summary)}\n", highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("parameter", "default", "meaning"):
        table.add_column(heading)
    for parameter in info.parameters:
        table.add_row(parameter.name, escape(repr(parameter.default)), escape(parameter.meaning))
    table.add_row("scale", _scale(info), "λ, on the merged task vector")
    console.print(table)
    console.print(f"\nspaces: {', '.join(info.spaces)}; for {', '.join(info.kinds)}\n", highlight=False)
    text = reflow(info.text.partition("\n")[2], console.width)
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def reflow(text: str, width: int) -> str:
    """Return the text of a docstring with its paragraphs broken anew for a width.

    A block that starts with an indented line is formulas, which keep their lines. `Law:` and `Source:` start paragraphs of
    their own, whose further lines are indented.
    """
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(
        _formulas(block, width) if block[:1].isspace() else _prose(block, min(width, MAX_WIDTH)) for block in blocks
    )


def _formulas(block: str, width: int) -> str:
    """Return the lines as they are; those that are too long are drawn together and broken, and go on further to the right."""
    lines = []
    for line in block.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        if len(line) > width:
            line = indent + re.sub(r" {4,}", "   ", line.lstrip())
        lines += textwrap.wrap(line, width, subsequent_indent=f"{indent}    ", replace_whitespace=False) or [""]
    return "\n".join(lines)


def _prose(block: str, width: int) -> str:
    found: list[str] = []
    for line in block.splitlines():
        if found and not PARAGRAPH_START.match(line):
            found[-1] += f" {line.strip()}"
        else:
            found.append(line)
    return "\n".join(
        textwrap.fill(
            one, width, subsequent_indent="    " if PARAGRAPH_START.match(one) else "", break_on_hyphens=False
        )
        for one in found
    )


def _scale(info: MethodInfo) -> str:
    """Return the default λ as text: a number, or a formula in N."""
    return info.default_scale if isinstance(info.default_scale, str) else f"{info.default_scale:g}"


def _method_dict(info: MethodInfo) -> dict[str, Any]:
    return {**info._asdict(), "parameters": [parameter._asdict() for parameter in info.parameters]}
