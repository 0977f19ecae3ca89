"""`ties-peft analyze`: how adapters interfere, and what each method would keep of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .base import (
    Json,
    complete_method,
    print_json,
    print_messages,
    print_rich,
    print_text,
    print_warnings,
    progress_bar,
)

EPILOG = """[bold]Examples[/]

ties-peft analyze path/a path/b path/c

ties-peft analyze path/a path/b --methods ties,iso_c --rank 16 --out report.html"""


def analyze(
    adapters: Annotated[
        list[str], typer.Argument(help="Folders, files, Hub ids, quoted patterns.", show_default=False)
    ],
    density: Annotated[
        float, typer.Option(help="The share of entries that the trim keeps, for sign conflicts and overlaps.")
    ] = 0.2,
    rank: Annotated[str, typer.Option(help="The rank of the methods' results: a whole number, max or auto.")] = "auto",
    methods: Annotated[
        str | None,
        typer.Option(
            help="The methods to compare, with commas between; none compares none.",
            show_default="the default method and a few others",
            autocompletion=complete_method,
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Count every entry, also where there are thousands of millions.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the base model, for adapters whose task vectors depend on its weights."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The HTML file to write: one page that needs no network.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how adapters interfere, and what each method would keep of them."""
    from ..adapters.sources import expand_patterns
    from ..analysis.analyze import analyze as run
    from ..analysis.page import check_page_file
    from ..merging.options import read_flag

    if out is not None:
        check_page_file(out)
    names, notes = expand_patterns(adapters)
    print_messages("note", notes)
    chosen = (
        None if methods is None else [name.strip() for name in methods.split(",") if name.strip() not in ("", "none")]
    )
    with progress_bar() as tell:
        found = run(
            names, density, read_flag("rank", rank), chosen, exact=True if exact else None, base=base, progress=tell
        )
    print_warnings(found.warnings)
    if out is not None:
        found.to_html(out)
    if as_json:
        print_json(found.to_dict())
        return
    print_rich(found.tables())
    if out is not None:
        print_text(f"\nwritten to {out}; open it in a browser")
