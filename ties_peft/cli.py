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
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from . import __version__, inspection
from .adapter import Adapter
from .errors import RecipeError, TiesPeftError, TiesPeftWarning, printable
from .merge import merge_recipe
from .merged import Merged, inputs
from .methods import MethodInfo, find_method, methods
from .plan import Plan, make_plan
from .recipe import Rank, Recipe
from .writer import check_target

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Merge many PEFT adapters into one adapter that PeftModel loads.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


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
    space: Annotated[str | None, typer.Option(help="delta or factors.", show_default="delta")] = None,
    weights: Annotated[str | None, typer.Option(help="One number per adapter: 1,0.5,1.", show_default="1 each")] = None,
    scale: Annotated[
        float | None, typer.Option(help="λ, on the merged task vector.", show_default="the method's")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries the trim keeps.", show_default="0.2")] = None,
    scope: Annotated[
        str | None, typer.Option(help="Trim over the whole adapter or each module.", show_default="adapter")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE, a parameter of the method; repeatable.", show_default=False),
    ] = None,
    rank: Annotated[str | None, typer.Option(help="A whole number, max or auto.", show_default="auto")] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random draw.", show_default="0")] = None,
    device: Annotated[str, typer.Option(help="Where the arithmetic is done.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.", show_default="the inputs'")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML recipe; flags override it.", show_default=False)] = None,
    base_name: Annotated[
        str | None, typer.Option(help="The base model's name to write.", show_default="the inputs'")
    ] = None,
    allow_disjoint: Annotated[
        bool, typer.Option("--allow-disjoint", help="Merge adapters that share no module.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and stop before the work.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that ties-peft wrote.")] = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into one."""
    asked = Recipe.from_file(recipe) if recipe else Recipe(adapters=())
    given: dict[str, Any] = {
        "adapters": tuple(adapters) if adapters else None,
        "weights": _weights(weights),
        "method": method,
        "space": space,
        "scale": scale,
        "rank": _rank(rank),
        "seed": seed,
        "dtype": dtype,
        "base_model": base_name,
        "allow_disjoint": allow_disjoint or None,
    }
    if adapters:
        asked = replace(asked, weights=None)  # those of the recipe were meant for its own adapters
    asked = replace(asked, **{key: value for key, value in given.items() if value is not None})
    asked = replace(asked, parameters={**_kept_parameters(asked, method), **_parameters(density, scope, settings)})
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
    for info in chosen:
        _print_method(console, info, whole=name is not None)


def _check_out(out: Path | None, asked: Recipe, force: bool, dry_run: bool) -> None:
    if out is not None:
        check_target(out, force, inputs(asked))
    elif not dry_run:
        raise RecipeError("no output was named. Say where to write: --out FOLDER.")


def _weights(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(
            f"--weights is '{printable(text)}'; expected numbers with commas between, such as 1,0.5,1."
        ) from None


def _rank(text: str | None) -> Rank | None:
    if text is None or text in ("max", "auto"):
        return text
    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"--rank is '{printable(text)}'; expected a whole number, max or auto.") from None


def _kept_parameters(asked: Recipe, method: str | None) -> dict[str, Any]:
    """A recipe's parameters, less those that a method named on the command line does not have."""
    if method is None:
        return dict(asked.parameters)
    known = find_method(method).model_fields
    return {key: value for key, value in asked.parameters.items() if key in known}


def _parameters(density: float | None, scope: str | None, settings: list[str] | None) -> dict[str, Any]:
    found = {key: value for key, value in (("density", density), ("scope", scope)) if value is not None}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set is '{printable(setting)}'; expected NAME=VALUE, such as --set elect=count.")
        try:
            found[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            found[key] = value
    return found


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


def _print_method(console: Console, info: MethodInfo, whole: bool) -> None:
    console.print(f"[bold]{info.name}[/]  {escape(info.summary)}", highlight=False)
    for parameter in info.parameters:
        console.print(
            f"    {parameter.name} = {parameter.default!r}  [dim]{escape(parameter.meaning)}[/]", highlight=False
        )
    console.print(
        f"    scale = {info.default_scale:g}; spaces: {', '.join(info.spaces)}; [dim]{escape(info.source)}[/]",
        highlight=False,
    )
    if whole:
        console.print("\n" + escape(info.text.partition("\n")[2].strip("\n")), highlight=False)


def _method_dict(info: MethodInfo) -> dict[str, Any]:
    return {**info._asdict(), "parameters": [parameter._asdict() for parameter in info.parameters]}


def _warn(found: list[str]) -> None:
    for warning in found:
        sys.stderr.write(f"warning: {warning}\n")


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, default=str))
