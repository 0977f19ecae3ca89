"""Objectives: what a search maximises, and what judges its result. Each is a task on the loaded base model, or a callable.

A task is identified by the tokens and labels of its rows, not by its path. So a search over changed rows is another
one, and machines that have the same rows under different paths can share a search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import RecipeError
from ..evaluation.evaluate import load_bench, make_scorer
from ..evaluation.generation import Generation
from ..evaluation.language_models import Continuation
from ..evaluation.loaded_model import Bench
from ..evaluation.score import Score
from ..evaluation.scorers import Classification, Scorer
from ..evaluation.task import read_task
from ..learning.training import check_trainable
from . import TRAINED
from .imitation import MEASURE, Imitation

FUNCTION = "a function"
RETURNED = "what the given function returns; larger is better"
LOSS = "minus the mean loss on the rows, in nats; larger is better"
SHARE = "share of the rows that are right, from 0 to 1; larger is better"
TEXTS = {"chrf": "chrF, from 0 to 1; larger is better", "bleu": "BLEU, from 0 to 1; larger is better"}


class Objectives:
    """The objective, which a search maximises, and the judge, which measures its result once, as functions of an adapter.

    Args:
        objective, judge: each a task or a callable, such as an `Imitation`; the judge may be None.
        adapters: of the search.
        base, device, bench: as in `evaluate`.
        trained: whether an adapter will be trained on the objective's rows.

    Attributes:
        scorer: the objective on the loaded model; None for a callable.
        identity: plain values that identify the objective; the same for all callables.
    Raises: TiesPeftError, before the base model is loaded where that is possible, for adapters that do not fit the model and
        tasks that cannot be evaluated.
    """

    def __init__(
        self,
        objective: Any,
        judge: Any,
        adapters: Sequence[Adapter],
        base: str | Path | None,
        device: str,
        bench: Bench | None,
        trained: bool = False,
    ) -> None:
        given = [one for one in (objective, judge) if one is not None and not callable(one)]
        tasks = [read_task(one) for one in given]
        if trained:
            if callable(objective):
                raise RecipeError(f"the control '{TRAINED}' needs a task with labels as the objective. Leave it out.")
            check_trainable(tasks[0])
        if tasks and bench is None:
            bench = load_bench(adapters, tasks, base, device)
        scorers = [make_scorer(bench, task) for task in tasks if bench is not None]
        if bench is not None:
            for adapter in adapters:
                bench.check_all(adapter)
        self.scorer: Scorer | None = None if callable(objective) else scorers[0]
        self._objective = objective
        self._judge = judge if judge is None or callable(judge) else scorers[-1]
        if isinstance(objective, Imitation):
            self.identity: dict[str, Any] = objective.identity
        else:
            self.identity = {"objective": FUNCTION} if self.scorer is None else task_identity(self.scorer)

    @property
    def judge_id(self) -> str | None:
        """A digest that identifies the judge; empty without a judge, None for a callable."""
        if self._judge is None:
            return ""
        return _digest(task_identity(self._judge)) if isinstance(self._judge, Scorer) else None

    @property
    def measures(self) -> dict[str, str]:
        """What the columns `score` and, with a judge, `judged` of a result hold, in words."""
        if isinstance(self._objective, Imitation):
            score = MEASURE
        elif self.scorer is None:
            score = RETURNED
        else:
            measure = self.scorer.task.measure
            score = _value_text(measure) if measure in (*TEXTS, "exact_match") else LOSS
        if self._judge is None:
            return {"score": score}
        judged = _value_text(self._judge.task.measure) if isinstance(self._judge, Scorer) else RETURNED
        return {"score": score, "judged": judged}

    @property
    def warnings(self) -> list[str]:
        """The warnings that the objective has given; none of a task or of another callable."""
        return self._objective.warnings.texts if isinstance(self._objective, Imitation) else []

    def score(self, adapter: Adapter) -> float:
        """Return the value of the objective: −loss, or the accuracy where there is no loss."""
        if self.scorer is None:
            return float(self._objective(adapter))
        found = _score(self.scorer, adapter)
        return found.value if found.loss is None else -found.loss

    def judge(self, adapter: Adapter) -> float | None:
        """Return the value that the judge gives to an adapter; None without a judge."""
        if self._judge is None:
            return None
        return _score(self._judge, adapter).value if isinstance(self._judge, Scorer) else float(self._judge(adapter))


def task_identity(scorer: Scorer) -> dict[str, Any]:
    """Return plain values that identify a task on a loaded model, whatever its name and the path of its rows.

    Returns: `base`, the last part of the base model's name; `measure`, with the options that this measure uses;
        `examples`, the SHA-256 of the tokens of each row and of the labels.
    """
    task, bench = scorer.task, scorer.bench
    options: dict[str, Any] = {}
    rows: list[Any] = []
    if isinstance(scorer, Classification):
        rows = [list(ids) for ids in scorer.sequences]
        if task.descriptions is not None:
            described, _ = bench.token_ids(task.descriptions, task.max_tokens)
            options = {"descriptions": described, "temperature": task.temperature}
    elif isinstance(scorer, Continuation):
        rows = [[list(pair.prompt), list(pair.continuation)] for pair in scorer.pairs]
        if task.choices is not None:
            options = {"choices": len(task.choices), "mean": task.mean}
    elif isinstance(scorer, Generation):
        rows = [[list(ids), answer] for ids, answer in zip(scorer.sequences, scorer.answers, strict=True)]
        options = {"new_tokens": task.new_tokens, "stop": task.stop}
    return {
        "base": Path(bench.base).name,
        "measure": {"name": task.measure, **options},
        "examples": _digest([rows, scorer.labels.tolist()]),
    }


def _value_text(measure: str) -> str:
    """Return what `Score.value` is for a measure."""
    return LOSS if measure == "loss" else TEXTS.get(measure, SHARE)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _score(scorer: Scorer, adapter: Adapter) -> Score:
    with scorer.bench.applied(adapter):
        return scorer.score()
