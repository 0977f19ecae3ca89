"""`ties-peft inspect`: what is in some adapters, and whether they can be merged."""

from __future__ import annotations

from typing import Annotated

import typer

from .base import Json, print_json, print_messages, print_rich


def inspect(
    adapters: Annotated[list[str], typer.Argument(help="Folders or Hub ids.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the base model, for adapters whose task vectors depend on its weights."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is in an adapter, and whether several can be merged."""
    from ..analysis import inspection

    seen = inspection.inspect(adapters, base)
    if as_json:
        print_json(seen.to_dict())
    else:
        print_rich(seen)
    if seen.faults:
        print_messages("error", seen.faults)
        raise typer.Exit(2)
