"""`ties-peft methods`: what there is, and one in full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .base import Json, complete_method, print_json

if TYPE_CHECKING:
    from ..methods import MethodInfo


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
    console.print(escape(info.text.partition("\n")[2].strip("\n")), highlight=False)


def _scale(info: MethodInfo) -> str:
    """Return the default λ as text: a number, or a formula in N."""
    return info.default_scale if isinstance(info.default_scale, str) else f"{info.default_scale:g}"


def _method_dict(info: MethodInfo) -> dict[str, Any]:
    return {**info._asdict(), "parameters": [parameter._asdict() for parameter in info.parameters]}
