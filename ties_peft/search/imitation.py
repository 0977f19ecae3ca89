"""Imitation: an objective without labels, how well a merge predicts what each source adapter predicts on its own rows.

    score(merge) = −(1/N)·Σᵢ KL(adapter i ‖ merge on the rows of adapter i), in nats: at most 0, and 0 for the same predictions

Rows, predictions and their divergence are those of `distil` (see `learning.teachers` and `learning.token_teachers`), but all
rows count. The score is negative so that larger is better, as with −loss, the score of a labelled search. A search compares
settings by it, in trials, controls and `Found`; a penalty on weights is subtracted as from any score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import RecipeError, unknown
from ..evaluation.loaded_model import Bench
from ..learning import ANSWER_TOKENS, ANSWERS, GENERATED
from ..learning.checkpoint import Checkpoint
from ..learning.module_outputs import run_teachers, write_rows
from ..learning.teacher_specs import AnswerOptions, TeacherSpec, make_teachers, open_bench, read_teacher_specs
from ..merging.merged import versions
from ..merging.plan import Progress
from ..merging.recipes.recipe import Recipe
from ..merging.values import check_whole
from . import IMITATE

ROWS = f"a list of texts, a file, a number of random-token rows, or '{GENERATED}'"


@dataclass(frozen=True)
class ImitationRows:
    """The rows on which source adapters are to be imitated, as a user gives them.

    Attributes:
        rows, tasks, count, answers, answer_tokens: as in `distil`, but rows are random tokens only where their number is given.
        state: as in `Imitation`.
    """

    rows: Any = None
    tasks: Any = None
    count: int | None = None
    answers: str | None = None
    answer_tokens: int = ANSWER_TOKENS
    state: str | Path | None = None

    def check(self) -> None:
        """Refuse an unknown kind of answers and numbers below 1.

        Raises: RecipeError.
        """
        if self.answers is not None and self.answers not in ANSWERS:
            raise RecipeError(unknown("kind of answers", str(self.answers), ANSWERS))
        check_whole("answer_tokens", self.answer_tokens, 1)
        if self.count is not None:
            check_whole("count", self.count, 1)

    def check_unused(self) -> None:
        """Refuse all of it, where the objective is another.

        Raises: RecipeError naming what is given.
        """
        nothing = ImitationRows()
        names = [name for name, value in vars(self).items() if value is not getattr(nothing, name)]
        if names:
            raise RecipeError(
                f"{', '.join(names)}: only a search with objective '{IMITATE}' takes them. Leave them out, or search by "
                "imitation; an objective with labels is a task with rows of its own."
            )


class Imitation:
    """Score adapters, without labels, by how well they predict what the source adapters predict.

    The source adapters run once, when the first score is asked for.

    Args:
        specs: the source adapters, their tasks and their rows.
        bench: the base model.
        how: how answers to prompts come about.
        state: a folder in which written rows and predictions are kept; None for memory alone.
        progress: called as progress(stage, done, of) while the source adapters run.

    Attributes:
        bench: the base model.
        identity: what tells the objective from others, in plain values.
    Raises: RecipeError where there are too few rows, or the state is of other work.
    """

    def __init__(
        self,
        specs: Sequence[TeacherSpec],
        bench: Bench,
        how: AnswerOptions,
        state: str | Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.bench = bench
        self._teachers = make_teachers(specs, bench, how)
        self._progress = progress or (lambda stage, done, of: None)
        self._has_run = False
        digests = [teacher.digest for teacher in self._teachers]
        self.identity: dict[str, Any] = {
            "base": Path(bench.base).name,
            "measure": {"name": IMITATE},
            "examples": digests,
        }
        precision = str(next(iter(bench.model.parameters())).dtype)
        facts = [digests, bench.base, precision, bench.device.type, versions()]
        self._checkpoint = Checkpoint(state, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())

    def __call__(self, adapter: Adapter) -> float:
        """Return the score of an adapter: minus the mean of `divergences`."""
        found = self.divergences(adapter)
        return -sum(found) / len(found)

    def divergences(self, adapter: Adapter) -> list[float]:
        """Return KL(source adapter ‖ adapter) for each source adapter, in nats, the mean over all of its rows."""
        if not self._has_run:
            write_rows(self._teachers, self._checkpoint, self._progress)
            run_teachers(self._teachers, self._checkpoint, self._progress)
            self._has_run = True
        with self.bench.applied(adapter):
            return [teacher.measure(range(len(teacher.sequences)))[0] for teacher in self._teachers]

    def check_judge(self, judge: Any) -> None:
        """Refuse a task as the judge where its head is in the adapters' files alone, because the result has no head.

        Raises: CompatibilityError.
        """
        if self.bench.form == "classifier" and judge is not None and not callable(judge):
            self.bench.check_complete(None)

    def with_own_heads(self, recipe: Recipe) -> Recipe:
        """Return a recipe that drops the heads of classifiers, because each adapter is imitated with its own."""
        return replace(recipe, heads="drop") if self.bench.form == "classifier" else recipe


def open_imitation(
    adapters: Sequence[Adapter],
    asked: ImitationRows,
    seed: int = 0,
    base: str | Path | None = None,
    device: str = "cpu",
    bench: Bench | None = None,
    progress: Progress | None = None,
) -> Imitation:
    """Return the objective, after everything that `distil` checks about rows, tasks and the base; no adapter is run yet.

    Args:
        adapters: to imitate.
        asked: the rows.
        seed, base, device, bench: as in `distil`.
        progress: as in `Imitation`.
    Raises: RecipeError or CompatibilityError.
    """
    asked.check()
    specs = read_teacher_specs(adapters, asked.rows, asked.tasks, asked.count, asked.answers)
    without = [spec.name for spec in specs if spec.rows.texts is None]
    if asked.rows is None and without:
        raise RecipeError(
            f"objective '{IMITATE}': there are no rows on which {', '.join(without)} could predict. Give rows ({ROWS}), or "
            "tasks that have rows."
        )
    loaded = open_bench(specs, base, device, bench)
    return Imitation(specs, loaded, AnswerOptions(asked.answers, asked.answer_tokens, seed), asked.state, progress)
