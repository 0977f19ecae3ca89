"""`ties-peft signs`: an adapter trained on a few examples, whose signs a TIES merge takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .base import print_text, print_warnings_after, progress_bar


def signs(
    adapters: Annotated[list[str], typer.Argument(help="Folders or Hub ids.")],
    task: Annotated[list[Path], typer.Option(help="A task file with a few labelled rows. Repeatable.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Annotated[
        str | None, typer.Option(help="Folder or Hub id of the base model.", show_default="the task's or adapters'")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="The number of training steps, in all.", show_default="20 for each task")
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of the order of the rows.")] = 0,
    device: Annotated[str, typer.Option(help="The device that the model runs on.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that ties-peft wrote.")] = False,
) -> None:
    """Estimate the signs that TIES elects from a few examples."""
    from ..adapters.writer import check_output_folder
    from ..learning.signs import few_shot_signs
    from ..merging.merged import inputs
    from ..merging.recipes.recipe import Recipe

    check_output_folder(out, force, inputs(Recipe(adapters=tuple(adapters))))
    with print_warnings_after(), progress_bar() as tell:
        made = few_shot_signs(adapters, task, base, device, steps=steps, seed=seed, progress=tell)
    made.save(out, force)
    names = " ".join(adapters)
    print_text(
        f"written to {out}; take its signs with\n\n  ties-peft merge {names} --method ties --set sign_from={out} --out FOLDER"
    )
