"""Imitation: the objective of a search without labels. It scores how closely a merge predicts what its adapters predict.

Every source adapter has rows of its own, on which it predicts once. A merge predicts on the same rows, and its score is

    score(merge) = −(1/N)·Σᵢ KL(adapter i ‖ merge, on the rows of adapter i)     in nats

which is 0 where all predictions are equal, and negative elsewhere, so that a larger score is a better one. The rows, the
predictions and their divergence are those of `distil` (see `learning.teachers` and `learning.token_teachers`), except that
no rows are held out. Where weights are tuned, the search subtracts its penalty from this score as from any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import GivenWarnings, RecipeError
from ..evaluation.loaded_model import Bench
from ..learning import ANSWER_TOKENS, GENERATED
from ..learning.checkpoint import Checkpoint
from ..learning.distil_warnings import request_warnings, row_warnings
from ..learning.module_outputs import run_teachers, write_rows
from ..learning.teacher_specs import AnswerOptions, make_teachers, open_bench, read_teacher_specs
from ..merging.merged import versions
from ..merging.plan import Progress
from ..merging.recipes.recipe import Recipe
from . import IMITATE

MEASURE = "minus mean KL from the adapters' predictions, in nats; larger is better"
ROWS = f"a list of texts, a file, a number of random-token rows, or '{GENERATED}'"


class Imitation:
    """Score adapters, without labels, by how closely they predict what the source adapters predict.

    The source adapters run once, when the first score is asked for.

    Args:
        adapters: the source adapters.
        rows, tasks, count, answers, answer_tokens: as in `distil`, but rows of random tokens are used only where their
            number is given.
        state: a folder in which the rows that adapters write and the predictions are kept; None for memory alone.
        seed, base, device, bench: as in `distil`.
        progress: called as progress(stage, done, of) while the source adapters run.

    Attributes:
        bench: the base model.
        identity: plain values that identify the objective.
        warnings: of what was asked for and, once the source adapters have run, of the rows that they wrote.
    Raises: RecipeError or CompatibilityError for whatever `distil` refuses, for an adapter without rows, and for a state of
        other work. No adapter has run by then.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        rows: Any = None,
        tasks: Any = None,
        count: int | None = None,
        answers: str | None = None,
        answer_tokens: int = ANSWER_TOKENS,
        state: str | Path | None = None,
        *,
        seed: int = 0,
        base: str | Path | None = None,
        device: str = "cpu",
        bench: Bench | None = None,
        progress: Progress | None = None,
    ) -> None:
        answering = AnswerOptions(answers, answer_tokens, seed)
        specs = read_teacher_specs(adapters, rows, tasks, count, answers)
        without = [spec.name for spec in specs if spec.rows.texts is None]
        if rows is None and without:
            raise RecipeError(
                f"objective '{IMITATE}': there are no rows on which {', '.join(without)} could predict. Give them "
                f"(rows= or --rows: {ROWS}), or tasks that have rows (tasks= or --task)."
            )
        self.bench = open_bench(specs, base, device, bench)
        self._teachers = make_teachers(specs, self.bench, answering)
        self._progress = progress or (lambda stage, done, of: None)
        self._has_run = False
        self.warnings = GivenWarnings()
        self.warnings.give(request_warnings(specs, self._teachers))
        digests = [teacher.digest for teacher in self._teachers]
        self.identity: dict[str, Any] = {
            "base": Path(self.bench.base).name,
            "measure": {"name": IMITATE},
            "examples": digests,
        }
        precision = str(next(iter(self.bench.model.parameters())).dtype)
        self._checkpoint = Checkpoint(state, [digests, self.bench.base, precision, self.bench.device.type, versions()])

    def __call__(self, adapter: Adapter) -> float:
        """Return the score of an adapter: minus the mean of `divergences`."""
        found = self.divergences(adapter)
        return -sum(found) / len(found)

    def divergences(self, adapter: Adapter) -> list[float]:
        """Return KL(source adapter ‖ adapter) in nats for each source adapter, the mean over all of its rows."""
        if not self._has_run:
            write_rows(self._teachers, self._checkpoint, self._progress)
            self.warnings.give(row_warnings(self._teachers))
            run_teachers(self._teachers, self._checkpoint, self._progress)
            self._has_run = True
        with self.bench.applied(adapter):
            return [teacher.measure(range(len(teacher.sequences)))[0] for teacher in self._teachers]

    def check_judge(self, judge: Any) -> None:
        """Refuse a task as the judge of classifiers whose base has no head, because the result of the search has none either.

        Raises: CompatibilityError.
        """
        if self.bench.form == "classifier" and judge is not None and not callable(judge):
            self.bench.check_complete(None)

    def with_own_heads(self, recipe: Recipe) -> Recipe:
        """Return the recipe that drops the heads of classifiers, because each adapter is imitated with its own head."""
        return replace(recipe, heads="drop") if self.bench.form == "classifier" else recipe


def refuse_imitation_options(given: Mapping[str, Any]) -> None:
    """Refuse the options of `Imitation` in a search with another objective.

    Args:
        given: their values by name; None, or the default number of answer tokens, for those that were not given.
    Raises: RecipeError naming those that were given.
    """
    names = [name for name, value in given.items() if value is not (ANSWER_TOKENS if name == "answer_tokens" else None)]
    if names:
        raise RecipeError(
            f"{', '.join(names)}: only a search with objective '{IMITATE}' takes them. Leave them out, or search by imitation. "
            "A search by labels reads the rows of its task."
        )
