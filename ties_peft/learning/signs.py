"""Take the signs of TIES from an adapter trained on a few examples, instead of electing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..adapters import writer
from ..adapters.adapter import Adapter, load_adapters
from ..errors import CompatibilityError
from ..evaluation.evaluate import load_bench, make_scorer
from ..evaluation.loaded_model import Bench, check_text_model
from ..evaluation.task import TaskSource, read_task
from ..merging.merge import merge
from ..merging.merged import Merged, versions
from ..merging.plan import Progress
from ..merging.values import check_whole
from .training import check_trainable, train

STEPS_EACH = 20


class Signs(Adapter):
    """An adapter trained on a few examples, with a record of how.

    Attributes:
        recipe: what was asked for, as plain values; it is saved as provenance.
    """

    def __init__(self, made: Adapter, recipe: Mapping[str, Any]) -> None:
        super().__init__(made.config, made.tensors, made.source)
        self.recipe = dict(recipe)

    def files(self) -> dict[str, writer.Content]:
        """Return the config, the weights and the provenance."""
        return {**super().files(), writer.PROVENANCE: writer.json_text({"versions": versions(), "signs": self.recipe})}


def few_shot_signs(
    adapters: Sequence[str | Path | Adapter],
    tasks: Sequence[TaskSource],
    base: str | Path | None = None,
    device: str = "cpu",
    *,
    steps: int | None = None,
    seed: int = 0,
    bench: Bench | None = None,
    progress: Progress | None = None,
) -> Signs:
    """Return an adapter whose signs replace the election: `merge(adapters, method="ties", sign_from=…)`.

    It is the average of the adapters at the largest of their ranks, trained further on a few labelled rows of all tasks
    together. A merge takes its signs, untrimmed, and the magnitudes of the adapters.

    Args:
        adapters: folders, Hub ids or `Adapter`s.
        tasks: with some labelled rows each (32 in the paper).
        base, device, bench: as in `evaluate`.
        steps: of training in all; 20 for each task by default.
        seed: of the rows of each step.
        progress: called as progress(stage, done, of).
    Raises: TiesPeftError, before the model is run.
    Source: Yadav et al., TIES-Merging, NeurIPS 2023 (arXiv 2306.01708), section 7: with the signs of a multitask model
        TIES is almost as good as that model; signs estimated from 32 examples a task give a part of this gain.
    """
    if steps is not None:
        check_whole("steps", steps, 1)
    check_whole("seed", seed, 0)
    opened = load_adapters(adapters)
    for adapter in opened:
        check_text_model(adapter)
    asked = [read_task(task) for task in tasks]
    if not asked:
        raise CompatibilityError("no tasks were given. Give one with a few labelled rows for each adapter.")
    for task in asked:
        check_trainable(task)
    largest = max((adapter.ranks[-1] for adapter in opened), default=1)
    rank = largest if any(adapter.peft_type.has_rank for adapter in opened) else "auto"
    start: Merged = merge(opened, method="average", rank=rank, dtype="float32")
    bench = bench or load_bench(opened, asked, base, device)
    for adapter in opened:
        bench.check(adapter)
    scorers = [make_scorer(bench, task) for task in asked]
    taken = steps or STEPS_EACH * len(scorers)
    recipe = {
        "adapters": [{"adapter": one.label, "digest": one.digest} for one in opened],
        "tasks": [{**task.to_dict(), "digest": task.digest()} for task in asked],
        "base": bench.base,
        "steps": taken,
        "seed": seed,
    }
    return Signs(train(start, scorers, seed, taken, progress=progress), recipe)
