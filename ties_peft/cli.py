"""The command line: parses, calls, prints.

Exit status: 0 on success; 2 on bad input or usage, with one message on standard error; 1 on an
unforeseen fault. With `--json` standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__, inspection
from .adapter import Adapter
from .errors import RecipeError, TiesPeftError, TiesPeftWarning, printable
from .flags import Flags
from .merge import merge_recipe
from .merged import Merged, inputs
from .methods import MethodInfo, find_method, methods
from .plan import Plan, make_plan
from .recipe import Recipe
from .spaces import spaces
from .writer import check_target

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Merge many PEFT adapters into one adapter that PeftModel loads.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Weights = Annotated[
    str | None, typer.Option(help="One number per adapter: 1,0.5,1; or norm: all of one length.", show_default="1 each")
]
Scale = Annotated[float | None, typer.Option(help="λ, on the merged task vector.", show_default="the method's")]
Scope = Annotated[str | None, typer.Option(help="Trim over the whole adapter or each module.", show_default="adapter")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE, a parameter of the method, in YAML; repeatable.", show_default=False),
]
RestoreNorm = Annotated[
    bool, typer.Option("--restore-norm", help="Bring a result that the rank truncates back to the norm it had.")
]
BaseName = Annotated[str | None, typer.Option(help="The base model's name to write.", show_default="the inputs'")]
AllowDisjoint = Annotated[bool, typer.Option("--allow-disjoint", help="Merge adapters that share no module.")]


def main() -> None:
    """Run the command line; every TiesPeftError becomes one message and exit status 2."""
    warnings.simplefilter("ignore", TiesPeftWarning)  # the report's warnings are printed once, below
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console that lacks a letter shows `?` instead
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


@app.command("merge")
def merge_command(
    adapters: Annotated[list[str] | None, typer.Argument(help="Folders or Hub ids.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="See `ties-peft methods`.", show_default="ties")] = None,
    space: Annotated[str | None, typer.Option(help=", ".join(spaces()) + ".", show_default="delta")] = None,
    weights: Weights = None,
    scale: Scale = None,
    density: Annotated[float | None, typer.Option(help="Share of entries the trim keeps.", show_default="0.2")] = None,
    scope: Scope = None,
    settings: Settings = None,
    rank: Annotated[str | None, typer.Option(help="A whole number, max or auto.", show_default="auto")] = None,
    restore_norm: RestoreNorm = False,
    seed: Annotated[int | None, typer.Option(help="Of every random draw.", show_default="0")] = None,
    device: Annotated[str, typer.Option(help="Where the arithmetic is done.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="the inputs'")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML recipe; flags override it.", show_default=False)] = None,
    base_name: BaseName = None,
    allow_disjoint: AllowDisjoint = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and stop before the work.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that ties-peft wrote.")] = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into one."""
    flags = Flags(
        recipe,
        adapters,
        method,
        space,
        weights,
        scale,
        density,
        scope,
        settings,
        rank,
        restore_norm,
        seed,
        dtype,
        base_name,
        allow_disjoint,
    )
    asked = flags.asked()
    _check_out(out, asked, force, dry_run)
    if dry_run:
        plan = make_plan(asked, [Adapter.load(name) for name in asked.adapters], device)
        _show_plan(plan, asked, as_json)
        return
    with _bar() as tell:
        merged = merge_recipe(asked, device=device, progress=tell)
    assert out is not None
    merged.save(out, force)
    _show_merged(merged, out, as_json)


@app.command("inspect")
def inspect_command(
    adapters: Annotated[list[str], typer.Argument(help="Folders or Hub ids.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show what is in an adapter, and whether several can be merged."""
    seen = inspection.inspect(adapters)
    if as_json:
        _print_json(seen.to_dict())
    else:
        Console().print(seen)
    if seen.faults:
        sys.stderr.write("".join(f"error: {fault}\n" for fault in seen.faults))
        raise typer.Exit(2)


@app.command("methods")
def methods_command(
    name: Annotated[str | None, typer.Argument(help="One method, in full.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or explain one."""
    if name is not None:
        find_method(name)
    chosen = [info for info in methods() if name in (None, info.name)]
    if as_json:
        _print_json({"methods": [_method_dict(info) for info in chosen]})
        return
    console = Console()
    if name is not None:
        _print_method(console, chosen[0])
        return
    console.print(_method_table(chosen))
    console.print("\nties-peft methods NAME explains one, with its parameters; two in a row: dare+ties, pico+ties")


def _check_out(out: Path | None, asked: Recipe, force: bool, dry_run: bool) -> None:
    if out is not None:
        check_target(out, force, inputs(asked))
    elif not dry_run:
        raise RecipeError("no output was named. Say where to write: --out FOLDER.")


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on standard error, if that is a terminal."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield tell


def _show_plan(plan: Plan, asked: Recipe, as_json: bool) -> None:
    _warn(plan.warnings)
    facts = {
        "adapters": [member.name for member in plan.members],
        "kind": plan.kind.title,
        "modules": len(plan.modules),
        "method": plan.method.name,
        "space": plan.space.name,
        "scale": plan.scale,
        "rank": plan.rank,
        "dtype": str(plan.dtype).removeprefix("torch."),
    }
    if as_json:
        _print_json({"dry_run": True, "recipe": asked.to_dict(), "plan": facts})
        return
    for key, value in facts.items():
        typer.echo(f"{key:<9} {', '.join(value) if isinstance(value, list) else value if value is not None else '–'}")
    typer.echo("every check passed; nothing was written")


def _show_merged(merged: Merged, out: Path, as_json: bool) -> None:
    _warn(merged.report.warnings)
    if as_json:
        _print_json({"out": str(out), "recipe": merged.recipe.to_dict(), "report": merged.report.to_dict()})
        return
    console = Console()
    console.print(merged.report.tables())
    console.print(f"\nwritten to {escape(str(out))}; load it with\n", highlight=False, soft_wrap=True)
    _print_loading(console, merged.base, out, merged.config.get("task_type"))


def _print_loading(console: Console, base: str | None, out: Path, task: object) -> None:
    """The lines of Python that load the result."""
    loader = {
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "SEQ_CLS": "AutoModelForSequenceClassification",
    }.get(str(task), "AutoModel")
    name = printable(base or "your/base-model")
    lines = (
        f"from transformers import {loader}; from peft import PeftModel",
        f"base = {loader}.from_pretrained({name!r})",
        f"model = PeftModel.from_pretrained(base, {str(out)!r})",
    )
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def _method_table(found: list[MethodInfo]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("method", "what it does", "scale", "for"):
        table.add_column(heading)
    for info in found:
        table.add_row(f"[bold]{info.name}[/]", escape(info.summary), f"{info.default_scale:g}", ", ".join(info.kinds))
    return table


def _print_method(console: Console, info: MethodInfo) -> None:
    console.print(f"[bold]{info.name}[/]  {escape(info.summary)}\n", highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("parameter", "default", "meaning"):
        table.add_column(heading)
    for parameter in info.parameters:
        table.add_row(parameter.name, escape(repr(parameter.default)), escape(parameter.meaning))
    table.add_row("scale", f"{info.default_scale:g}", "λ, on the merged task vector")
    console.print(table)
    console.print(f"\nspaces: {', '.join(info.spaces)}; for {', '.join(info.kinds)}\n", highlight=False)
    console.print(escape(info.text.partition("\n")[2].strip("\n")), highlight=False)


def _method_dict(info: MethodInfo) -> dict[str, Any]:
    return {**info._asdict(), "parameters": [parameter._asdict() for parameter in info.parameters]}


def _warn(found: list[str]) -> None:
    for warning in found:
        sys.stderr.write(f"warning: {warning}\n")


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, default=str))
