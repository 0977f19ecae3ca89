"""The command line: parses, calls, prints. Each command is a function in a file of its name in this folder.

A command imports the modules that do its work when it runs, so that help, completion and usage errors need no torch.
Exit status: 0 on success; 2 on bad input or usage, with one message on standard error; 1 on an unforeseen fault. With
`--json` standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import sys
import warnings
from typing import Annotated

import typer

from .. import __version__
from ..errors import TiesPeftError, TiesPeftWarning

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Merge many PEFT adapters into one adapter that PeftModel loads.",
)
FIRST = ("merge", "inspect", "analyze", "convert", "push", "methods", "evaluate", "distil", "search")  # in the help


def main() -> None:
    """Run the command line; every TiesPeftError becomes one message and exit status 2."""
    warnings.simplefilter("ignore", TiesPeftWarning)  # the commands print warnings themselves, each once
    if not sys.stderr.isatty():  # the Hub's client reads this when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # `?` is shown for a character that the console cannot show
            stream.reconfigure(errors="replace")
    try:
        app()
    except TiesPeftError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(f"ties-peft {__version__}")
        raise typer.Exit


def _register() -> None:
    names = [entry.name for entry in pkgutil.iter_modules(__path__) if entry.name != "base"]
    for name in [*FIRST, *sorted(set(names) - set(FIRST))]:
        module = importlib.import_module(f"{__name__}.{name}")
        app.command(name, epilog=getattr(module, "EPILOG", None))(getattr(module, name))


_register()
