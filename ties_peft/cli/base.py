"""What the commands share: how they show progress, warnings and JSON."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from ..choices import DETAIL, KEEP, POLICIES, method_names
from ..errors import TiesPeftWarning

PERIOD = 3600.0  # seconds over which the speed is taken: one step of a search can take minutes

# Completions of a value, for the shell. They import nothing more, because they run at every press of the tab key.


def among(values: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a completion by a list of values."""
    known = tuple(values)
    return lambda incomplete: [value for value in known if value.startswith(incomplete)]


def complete_method(incomplete: str) -> list[str]:
    """Return the methods that the last stage of a name such as `dare+ti` may become."""
    earlier, plus, last = incomplete.rpartition("+")
    return [f"{earlier}{plus}{name}" for name in method_names() if name.startswith(last)]


def complete_heads(incomplete: str) -> list[str]:
    """Return the policies on whole layers; after `keep=` the user writes an adapter's name."""
    values = (KEEP if value.startswith(KEEP) else value for value in POLICIES)
    return [value for value in values if value.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """Progress bars on standard error, if that is a terminal: one for each stage, whatever follows ` · ` in its name."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=PERIOD) as progress:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            name = stage.partition(DETAIL)[0]
            if name not in tasks:
                tasks[name] = progress.add_task(stage, total=total)
            progress.update(tasks[name], description=stage, completed=done)

        yield tell


@contextmanager
def warnings_shown() -> Iterator[None]:
    """What the work warns of, once each, when it is done."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", TiesPeftWarning)
        yield
    said = (str(one.message) for one in found if issubclass(one.category, TiesPeftWarning))
    show_warnings(list(dict.fromkeys(said)))


def show_warnings(found: list[str]) -> None:
    """A line each on standard error."""
    for warning in found:
        sys.stderr.write(f"warning: {warning}\n")


def show_notes(found: list[str]) -> None:
    """A line each on standard error."""
    for note in found:
        sys.stderr.write(f"note: {note}\n")


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(value, default=str))
