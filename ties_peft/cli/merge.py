"""`ties-peft merge`: adapters in, one adapter out."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..adapters.targets import TARGETS
from ..choices import DEVICE, DTYPES, ERROR, METHOD, RANK, SCOPES, SEED, SPACE, space_names
from ..errors import RecipeError
from .base import (
    Json,
    complete_from,
    complete_heads,
    complete_method,
    print_json,
    print_loading,
    print_notes,
    print_rich,
    print_text,
    print_warnings,
    progress_bar,
)

if TYPE_CHECKING:
    from ..merging.merged import Merged
    from ..merging.plan import Plan
    from ..merging.recipes.overrides import Flags
    from ..merging.recipes.recipe import Recipe

EXAMPLES = """[bold]Examples[/]

ties-peft merge path/a path/b --density 0.3 --out merged

ties-peft merge org/a org/b --method average --weights 1,0.5 --out merged"""
HOW, RESULT = "How the adapters are combined", "What is written"

Method = Annotated[
    str | None,
    typer.Option(
        help="See `ties-peft methods`.", show_default=METHOD, autocompletion=complete_method, rich_help_panel=HOW
    ),
]
Space = Annotated[
    str | None,
    typer.Option(
        help=", ".join(space_names()) + ".",
        show_default=SPACE,
        autocompletion=complete_from(space_names()),
        rich_help_panel=HOW,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="One number per adapter: 1,0.5,1; or norm: all of one length.", show_default="1 each", rich_help_panel=HOW
    ),
]
Scale = Annotated[
    str | None,
    typer.Option(
        help="λ, on the merged task vector: a number, or 1/sqrt(N), N^-1/4, 0.7*N^-1/4 with N the number of adapters.",
        show_default="the method's",
        rich_help_panel=HOW,
    ),
]
Density = Annotated[
    str | None,
    typer.Option(
        metavar="FLOAT",
        help="Share of entries that the trim keeps, for all adapters.",
        show_default="0.2",
        rich_help_panel=HOW,
    ),
]
Densities = Annotated[
    str | None,
    typer.Option(
        help="The same, one number per adapter: 0.2,0.9.", show_default="--density for all", rich_help_panel=HOW
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        help="Trim over the whole adapter or each module.",
        show_default="adapter",
        autocompletion=complete_from(SCOPES),
        rich_help_panel=HOW,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="NAME=VALUE, a parameter of the method, in YAML; repeatable.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
Seed = Annotated[int | None, typer.Option(help="Of every random draw.", show_default=str(SEED), rich_help_panel=HOW)]
AllowDisjoint = Annotated[
    bool, typer.Option("--allow-disjoint", help="Merge adapters that share no module.", rich_help_panel=HOW)
]
Rank = Annotated[
    str | None,
    typer.Option(
        help="A whole number, max or auto.",
        show_default=RANK,
        autocompletion=complete_from(("auto", "max")),
        rich_help_panel=RESULT,
    ),
]
RestoreNorm = Annotated[
    bool,
    typer.Option(
        "--restore-norm",
        help="Bring a result that the rank truncates back to the norm it had.",
        rich_help_panel=RESULT,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, float16 or bfloat16.",
        show_default="the inputs'",
        autocompletion=complete_from(DTYPES),
        rich_help_panel=RESULT,
    ),
]
Heads = Annotated[
    str | None,
    typer.Option(
        help="Whole layers that differ (heads, embeddings, biases): error, drop, keep=NAME, average or merge.",
        show_default=ERROR,
        autocompletion=complete_heads,
        rich_help_panel=RESULT,
    ),
]
BaseName = Annotated[
    str | None,
    typer.Option(help="The base model's name to write.", show_default="the inputs'", rich_help_panel=RESULT),
]
Target = Annotated[
    str | None,
    typer.Option(
        help=f"The loader it is for: {', '.join(TARGETS)}.",
        show_default="peft",
        autocompletion=complete_from(TARGETS),
        rich_help_panel=RESULT,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a folder that ties-peft wrote.", rich_help_panel=RESULT)]
Base = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of the base's weights, where adapters need them.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("merge", epilog=EXAMPLES)(merge)


def merge(
    adapters: Annotated[
        list[str] | None, typer.Argument(help="Folders, files, Hub ids, quoted patterns.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default=False)] = None,
    method: Method = None,
    space: Space = None,
    weights: Weights = None,
    scale: Scale = None,
    density: Density = None,
    densities: Densities = None,
    scope: Scope = None,
    settings: Settings = None,
    rank: Rank = None,
    restore_norm: RestoreNorm = False,
    seed: Seed = None,
    device: Annotated[str, typer.Option(help="Where the arithmetic is done.")] = DEVICE,
    dtype: Dtype = None,
    recipe: Annotated[Path | None, typer.Option(help="A YAML recipe; flags override it.", show_default=False)] = None,
    base: Base = None,
    base_name: BaseName = None,
    target: Target = None,
    allow_disjoint: AllowDisjoint = False,
    heads: Heads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and stop before the work.")] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Merge adapters into one."""
    if out is None and not dry_run:
        raise RecipeError("no output was named. Say where to write: --out FOLDER.")
    if not adapters and recipe is None:
        raise RecipeError("no adapters were given. Name at least one folder or Hub id.")
    from ..merging.recipes.overrides import Flags

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
        base,
        base_name,
        target,
        allow_disjoint,
        heads,
        densities,
    )
    _run(flags, out, device, dry_run, force, as_json)


def _run(flags: Flags, out: Path | None, device: str, dry_run: bool, force: bool, as_json: bool) -> None:
    """Merge as the flags say, or only check."""
    from ..adapters.writer import check_output_folder
    from ..merging.merge import merge_recipe, open_adapters
    from ..merging.merged import inputs
    from ..merging.plan import make_plan
    from ..task_vectors.processes import process_group

    asked, patterns = flags.asked().expanded()
    print_notes(patterns)
    if out is not None:
        check_output_folder(out, force, inputs(asked))
    if dry_run:
        plan = make_plan(asked, open_adapters(asked), device)
        _show_plan(plan, asked, as_json)
        return
    assert out is not None
    with process_group() as processes, progress_bar() if processes.is_main else nullcontext(None) as tell:
        merged = merge_recipe(asked, device=device, progress=tell, processes=processes)
    if processes.is_main:
        merged.save(out, force)
        _show_merged(merged, out, as_json)


def _show_plan(plan: Plan, asked: Recipe, as_json: bool) -> None:
    from ..merging.report import rider_texts

    print_warnings(plan.warnings)
    facts = {
        "adapters": [member.name for member in plan.members],
        "kind": plan.title,
        "modules": len(plan.modules),
        "method": plan.method.name,
        "space": plan.space.name,
        "scale": plan.scale,
        "rank": plan.rank,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "heads": rider_texts(plan.heads.lines()),
    }
    if as_json:
        print_json({"dry_run": True, "recipe": asked.to_dict(), "plan": facts})
        return
    for key, value in facts.items():
        print_text(f"{key:<9} {_shown(value)}")
    print_text("every check passed; nothing was written")


def _shown(value: object) -> object:
    if isinstance(value, list):
        return ("; " if any(": " in text for text in value) else ", ").join(value) or "–"
    return "–" if value is None else value


def _show_merged(merged: Merged, out: Path, as_json: bool) -> None:
    print_warnings(merged.report.warnings)
    if as_json:
        print_json({"out": str(out), "recipe": merged.recipe.to_dict(), "report": merged.report.to_dict()})
        return
    print_rich(merged.report.tables())
    print_loading(merged.loading, out)
