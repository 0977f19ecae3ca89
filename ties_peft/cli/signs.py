"""`ties-peft signs`: train an adapter on a few examples, whose signs a TIES merge takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..merging.options import DEVICE
from .base import (
    AdaptersOrPatterns,
    Force,
    ModelDevice,
    Out,
    base_option,
    check_output,
    print_messages,
    print_text,
    progress_and_warnings,
)


def signs(
    adapters: AdaptersOrPatterns,
    task: Annotated[list[Path], typer.Option(help="A task file with a few labelled rows. Repeatable.")],
    out: Out,
    base: Annotated[str | None, base_option("the task's or adapters'")] = None,
    steps: Annotated[
        int | None, typer.Option(help="The number of training steps, in all.", show_default="20 for each task")
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of the rows of each step.")] = 0,
    device: ModelDevice = DEVICE,
    force: Force = False,
) -> None:
    """Estimate the signs that TIES elects from a few examples."""
    from ..adapters.sources import expand_patterns
    from ..learning.signs import few_shot_signs

    adapters, notes = expand_patterns(adapters)
    print_messages("note", notes)
    check_output(out, force, adapters)
    with progress_and_warnings() as progress:
        made = few_shot_signs(adapters, task, base, device, steps=steps, seed=seed, progress=progress)
    made.save(out, force)
    command = f"ties-peft merge {' '.join(adapters)} --method ties --set sign_from={out} --out FOLDER"
    print_text(f"written to {out}; merge with its signs by\n\n  {command}")
