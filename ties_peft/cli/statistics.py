"""`ties-peft statistics`: gather the statistics that Fisher merging and RegMean need, and write them beside the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..learning import STATISTICS
from ..merging.options import DEVICE
from .base import (
    Adapters,
    Json,
    ModelDevice,
    base_option,
    one_for_each,
    print_json,
    print_text,
    progress_and_warnings,
)


def statistics(
    adapters: Adapters,
    task: Annotated[
        list[Path],
        typer.Option(help="A task file with rows of text. Give it once for all adapters, or once for each."),
    ],
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help=f"The statistics to gather: {' or '.join(STATISTICS)}. Repeatable.",
            show_default="fisher, and gram for LoRA",
        ),
    ] = None,
    base: Annotated[str | None, base_option("the task's or adapters'")] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="The labels for fisher: expected, sampled or given.", show_default="expected; sampled for texts"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The seed of sampled labels.")] = 0,
    device: ModelDevice = DEVICE,
    again: Annotated[bool, typer.Option("--again", help="Gather statistics again that exist already.")] = False,
    as_json: Json = False,
) -> None:
    """Gather the statistics that the methods fisher and regmean need, and write them beside each adapter."""
    from ..adapters.adapter import Adapter
    from ..adapters.statistics import file_name
    from ..evaluation.evaluate import find_base
    from ..evaluation.task import read_task
    from ..learning.gather_statistics import gather_statistics

    given = one_for_each(task, len(adapters), "--task")
    tasks = list(map(read_task, given if isinstance(given, list) else [given] * len(adapters)))
    opened = [Adapter.load(name) for name in adapters]
    made = []
    with progress_and_warnings() as progress:
        base = find_base(opened, tasks, base)
        for adapter, own in zip(opened, tasks, strict=True):
            for one in kind or [k for k in STATISTICS if k != "gram" or adapter.peft_type.has_rank]:
                found = gather_statistics(
                    adapter, own, one, base, device, labels=labels, seed=seed, again=again, progress=progress
                )
                facts = {key: value for key, value in found.metadata.items() if key not in ("adapter", "same")}
                made.append({"adapter": adapter.label, "digest": adapter.digest, "file": file_name(one), **facts})
    if as_json:
        print_json({"statistics": made})
        return
    for facts in made:
        print_text(f"{facts['adapter']}/{facts['file']}: {facts['rows']} rows of {facts['task']} on {facts['base']}")
