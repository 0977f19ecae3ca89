"""`ties-peft merge`: merge adapters into one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RecipeError
from ..merging.options import COMBINATION, DEVICE, RESULT
from .base import (
    Json,
    complete_from,
    print_json,
    print_messages,
    print_result,
    print_text,
    print_warnings,
    progress_bar,
    takes_merge_options,
)

if TYPE_CHECKING:
    from ..merging.merged import Merged
    from ..merging.pipeline import Pipeline
    from ..merging.plan import Plan
    from ..merging.recipes.recipe import Recipe

EPILOG = """[bold]Examples[/]

ties-peft merge path/a path/b --density 0.3 --out merged

ties-peft merge org/a org/b --method average --weights 1,0.5 --out merged"""
SCOPES = ("adapter", "module")

Density = Annotated[
    str | None,
    typer.Option(
        metavar="FLOAT",
        help="The share of entries that the trim keeps, for all adapters.",
        show_default="0.2",
        rich_help_panel=COMBINATION,
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        help="The entries that the trim ranks together: those of a whole adapter, or those of each module.",
        show_default=SCOPES[0],
        autocompletion=complete_from(SCOPES),
        rich_help_panel=COMBINATION,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="NAME=VALUE: any parameter of the method or the space, the value in YAML. Repeatable.",
        rich_help_panel=COMBINATION,
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        help="The HTML file to write: the report as one page that needs no network.",
        show_default=False,
        rich_help_panel=RESULT,
    ),
]
PartWeights = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PART=WEIGHT",
        help="The weights for a part of an image model, in place of --weights: text_encoder=0.5 for all adapters, "
        "text_encoder=1,0 for each. Repeatable.",
        rich_help_panel=COMBINATION,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a folder that ties-peft wrote.", rich_help_panel=RESULT)]


@takes_merge_options(after="out")
def merge(
    adapters: Annotated[list[str] | None, typer.Argument(help="Folders, files, Hub ids, quoted patterns.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    density: Density = None,
    scope: Scope = None,
    settings: Settings = None,
    weights_for: PartWeights = None,
    device: Annotated[str, typer.Option(help="The device that computes: cpu, cuda, …")] = DEVICE,
    recipe: Annotated[Path | None, typer.Option(help="A YAML recipe; flags override it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan and stop.")] = False,
    report: Report = None,
    force: Force = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Merge adapters into one."""
    if out is None and not dry_run:
        raise RecipeError("no output was named. Say where to write: --out FOLDER.")
    if not adapters and recipe is None:
        raise RecipeError("no adapters were given. Name at least one folder or Hub id.")
    from ..merging.recipes.overrides import overridden, with_part_weights

    asked = overridden(recipe, adapters, options, {"density": density, "scope": scope}, settings)
    asked = with_part_weights(asked, weights_for)
    _run(asked, out, device, report, dry_run, force, as_json)


def _run(
    recipe: Recipe, out: Path | None, device: str, report: Path | None, dry_run: bool, force: bool, as_json: bool
) -> None:
    """Merge as a recipe says, or only check it."""
    from ..adapters.writer import check_output_folder
    from ..merging.merge import merge_recipe, open_recipe
    from ..merging.merged import inputs
    from ..merging.plan import make_plan
    from ..task_vectors.processes import process_group

    asked, patterns = recipe.expanded()
    print_messages("note", patterns)
    if out is not None:
        check_output_folder(out, force, inputs(asked))
    if report is not None:
        from ..analysis.page import check_page_file

        check_page_file(report)
    if dry_run:
        plan = make_plan(asked, open_recipe(asked), device)
        _show_plan(plan, asked, as_json)
        return
    assert out is not None
    with process_group() as processes, progress_bar() if processes.is_main else nullcontext(None) as progress:
        merged = merge_recipe(asked, device=device, progress=progress, processes=processes)
    if processes.is_main:
        merged.save(out, force)
        if report is not None:
            _write_report(merged, out, report)
        print_warnings(merged.report.warnings)
        print_result(merged, out, {"recipe": merged.recipe.to_dict()}, as_json)
        if report is not None and not as_json:
            print_text(f"\nthe report is in {report}; open it in a browser")


def _write_report(merged: Merged, out: Path, report: Path) -> None:
    """Write the report as a page."""
    from ..analysis.merge_page import merge_page
    from ..analysis.page import write_page

    write_page(report, merge_page(merged, out))


def _show_plan(plan: Plan, asked: Recipe, as_json: bool) -> None:
    from ..merging.report import describe_outcomes

    print_warnings(plan.warnings)
    facts = {
        "adapters": [member.name for member in plan.members],
        "kind": plan.title,
        "modules": len(plan.modules),
        "method": plan.method.name,
        **({"chosen": plan.chosen} if plan.chosen else {}),
        "space": plan.space.name,
        "scale": plan.scale,
        "rank": plan.rank,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "bytes": plan.bytes,
        "heads": describe_outcomes(plan.extra_tensors.lines()),
        **({} if plan.pipeline is None else _pipeline_facts(plan.pipeline)),
    }
    if as_json:
        print_json({"dry_run": True, "recipe": asked.to_dict(), "plan": facts})
        return
    facts["bytes"] = f"{plan.bytes:,} of tensors"
    for key, value in facts.items():
        print_text(f"{key:<9} {_shown(value)}")
    print_text("every check passed; nothing was written")


def _pipeline_facts(pipeline: Pipeline) -> dict[str, object]:
    return {"target": pipeline.target, "model": pipeline.architecture or "unknown", "parts": list(pipeline.parts)}


def _shown(value: object) -> object:
    """Return a value of the plan as text."""
    if isinstance(value, list):
        return ("; " if any(": " in text for text in value) else ", ").join(value) or "–"
    return "–" if value is None else value
