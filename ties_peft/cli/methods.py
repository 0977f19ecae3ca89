"""`ties-peft methods`: list the methods, or explain one."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from ..merging.tables import make_table, make_text
from .base import Json, complete_method, print_json, print_rich, print_text

if TYPE_CHECKING:
    from ..methods import MethodInfo


MAX_WIDTH = 100  # columns of a paragraph
PARAGRAPH_START = re.compile(r"[A-Z][a-z]+: |[-*] ")  # a line that starts a paragraph without a blank line above it


def methods(
    name: Annotated[
        str | None, typer.Argument(help="A method to explain in full.", autocompletion=complete_method)
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
    if name is not None:
        _print_method(chosen[0])
        return
    print_rich(_method_table(chosen))
    print_text(
        "\nties-peft methods NAME explains a method and its parameters. Methods can be combined, one after the other: "
        "dare+ties, pico+ties"
    )


def _method_table(found: list[MethodInfo]) -> Table:
    rows = [(make_text(info.name, "bold"), info.summary, _scale(info), ", ".join(info.kinds)) for info in found]
    return make_table(("method", "what it does", "scale", "for"), rows)


def _print_method(info: MethodInfo) -> None:
    print_rich(make_text(info.name, "bold").append(f"  {info.summary}\n", "not bold"))
    rows = [(parameter.name, repr(parameter.default), parameter.meaning) for parameter in info.parameters]
    rows.append(("scale", _scale(info), "λ, on the merged task vector"))
    print_rich(make_table(("parameter", "default", "meaning"), rows))
    print_text(f"\nspaces: {', '.join(info.spaces)}; for {', '.join(info.kinds)}\n")
    print_text(reflow(info.text.partition("\n")[2], Console().width))


def reflow(text: str, width: int) -> str:
    """Return the text of a docstring with its paragraphs wrapped to a width.

    A block whose first line is indented holds formulas and keeps its lines. Lines that start with a word such as `Law:` or
    `Source:`, or with a bullet, start paragraphs of their own, whose further lines are indented.
    """
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(
        _formulas(block, width) if block[:1].isspace() else _prose(block, min(width, MAX_WIDTH)) for block in blocks
    )


def _formulas(block: str, width: int) -> str:
    """Return the lines of a block of formulas; a line that is too long is wrapped, its second column if it has two."""
    lines = []
    for line in _joined(block.splitlines()):
        column, indent = _second_column(line), len(line) - len(line.lstrip())
        hang = column if 0 < column <= 0.6 * width else indent + 4
        wrapped = textwrap.wrap(line, width, subsequent_indent=" " * hang, replace_whitespace=False)
        lines += [line] if cell_len(line) <= width else wrapped
    return "\n".join(lines)


def _joined(lines: list[str]) -> list[str]:
    """Return lines with those that continue the second column of the line before joined to it."""
    found: list[str] = []
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if found and indent == _second_column(found[-1]):
            found[-1] += f" {line.strip()}"
        else:
            found.append(line)
    return found


def _second_column(line: str) -> int:
    """Return where the second of two columns begins, which three spaces or more divide; 0 if there is none."""
    found = re.match(r"\s*\S.*?\s{3,}(?=\S)", line)
    return found.end() if found else 0


def _prose(block: str, width: int) -> str:
    """Return a block with each of its paragraphs wrapped."""
    found = []
    for paragraph in re.split(rf"\n(?={PARAGRAPH_START.pattern})", block):
        indent = "    " if PARAGRAPH_START.match(paragraph) else ""
        text = " ".join(paragraph.split())
        found.append(textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False))
    return "\n".join(found)


def _scale(info: MethodInfo) -> str:
    """Return the default λ as text: a number, or a formula in the number of adapters, N."""
    return info.default_scale if isinstance(info.default_scale, str) else f"{info.default_scale:g}"


def _method_dict(info: MethodInfo) -> dict[str, Any]:
    return {**info._asdict(), "parameters": [parameter._asdict() for parameter in info.parameters]}
