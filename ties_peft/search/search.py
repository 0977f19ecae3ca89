"""Search: the recipe that does best on a few examples, found without gradients.

    maximise  evaluate(recipe) = objective(merge(recipe)) − penalty · mean |wᵢ|

By default N weights from −1.5 to 1.5 are searched, with penalty 0.05 and 40 trials, in a merge by the defaults of
`merge`; any other numbers and choices of a recipe are tuned alike (see `tuning`). LoRAHub is the same with method
`task_arithmetic`, scale 1 and rank `max`, so that each weight is a factor of its task vector and nothing is lost.

Source: Huang et al., LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition (arXiv
2307.13269). There the sum is of A's and of B's, so that what acts is (Σ wᵢ·Bᵢ)·(Σ wⱼ·Aⱼ): with cross terms,
quadratic in w, the sign of a lone adapter lost and every slope 0 at the start. Here it is Σ wᵢ·Δᵢ, exactly. There
the loss of a batch is divided by the number of examples, so that the penalty weighs more with large batches; here
the objective is a mean over examples. The penalty is on the mean of |w|, as in their code (their text says sum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter, check_is_list
from ..errors import RecipeError, unknown, warn_caller
from ..evaluation.loaded_model import Bench
from ..learning.training import train
from ..merging.merge import make_recipe
from ..merging.merged import Merged
from ..merging.options import DEVICE, Options, Rank
from ..merging.plan import Progress
from ..merging.recipes.recipe import Recipe
from . import ADAPTERS, BUDGET, CONTROLS, DETAIL, PENALTY, TRAINED, WEIGHTS
from .controls import new_adapter, random_adapter, random_settings, simple_recipes
from .objectives import Objectives
from .problem import SearchProblem
from .sampler import Trial
from .study import Study, TrialCallback
from .tuning import Tuning


@dataclass(frozen=True)
class Control:
    """What a search is held against.

    Attributes:
        name: as in `controls`.
        score: on the examples, without penalty.
        judged: by the judge, if there is one.
    """

    name: str
    score: float
    judged: float | None = None


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        adapter: the merge of the best recipe.
        recipe: the best recipe, an ordinary one.
        score: its objective on the examples, without penalty.
        judged: its value by the judge, if there is one.
        trials: all, by number.
        controls: what it has to beat.
    """

    adapter: Merged
    recipe: Recipe
    score: float
    judged: float | None
    trials: tuple[Trial, ...]
    controls: tuple[Control, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "score": self.score,
            "judged": self.judged,
            "trials": [
                {"number": t.number, "setting": dict(t.setting), **t.facts, "value": t.value} for t in self.trials
            ],
            "controls": [vars(control) for control in self.controls],
            "recipe": self.recipe.to_dict(),
        }

    def __str__(self) -> str:
        rows = [("found", self.score, self.judged), *((c.name, c.score, c.judged) for c in self.controls)]
        width = max(len(name) for name, _, _ in rows)
        judged = any(value is not None for _, _, value in rows)
        head = f"{'':<{width}}  examples{'    judged' if judged else ''}"
        lines = [f"{n:<{width}}  {s:8.4f}{'' if v is None else f'  {v:8.4f}'}" for n, s, v in rows]
        return "\n".join([head, *lines])


def search(
    adapters: Sequence[str | Path | Adapter],
    objective: Any,
    tune: Mapping[str, Any] | None = None,
    budget: int = BUDGET,
    *,
    method: str = Options.method,
    space: str = Options.space,
    scale: float | str | None = None,
    rank: Rank = Options.rank,
    parameters: Mapping[str, Any] | None = None,
    densities: Sequence[Any] | None = None,
    penalty: float = PENALTY,
    judge: Any = None,
    controls: Sequence[str] = CONTROLS,
    storage: str | Path | None = None,
    study: str = "search",
    seed: int = Options.seed,
    sampler: str = "auto",
    base: str | Path | None = None,
    device: str = DEVICE,
    bench: Bench | None = None,
    allow_disjoint: bool = False,
    progress: Progress | None = None,
    watch: TrialCallback | None = None,
) -> Found:
    """Find the weights, or any numbers and choices of a recipe, that do best on a few examples.

    Args:
        adapters: folders, Hub ids or `Adapter`s.
        objective: a task with labelled rows (see `evaluate`): then −loss, or the accuracy where there is no
            loss; or any callable objective(adapter) → float, the larger the better.
        tune: what is searched (see `tuning`); the weights, from −1.5 to 1.5, if nothing is said.
        budget: trials in all; those that a study holds already are counted.
        method, space, scale, rank, parameters: of the recipe where they are not tuned, as in `merge`. For LoRAHub
            say method="task_arithmetic", scale=1, rank="max".
        densities: as in `merge`.
        penalty: on the mean of |w|, where weights are searched.
        judge: a task or callable like `objective`, of other rows: what was found and the controls are
            judged by it once, at the end; an accuracy where there is one.
        controls: which are made; `trained` besides the default ones where a new LoRA shall be trained on
            the same rows.
        storage: a path (SQLite), a database's URL, `journal:PATH`, or None for memory; see `Study`.
        study: the name of the search in the storage; a search of that name goes on, and is refused where what
            was asked for differs: the rows' tokens and labels count, not where they lie; functions are trusted.
        seed: of every draw.
        sampler: `auto`, `cobyla`, `tpe` or `random`; see `Study`.
        base, device, bench: as in `evaluate`, for tasks.
        allow_disjoint: as in `merge`.
        progress: called as progress(stage, done, of), for the search and for each control that costs as much;
            what follows ` · ` in a stage's name changes while it lasts: the best so far.
        watch: called after each trial as watch(trial, all trials).
    Returns: the best recipe, its merge, and the controls.
    Raises: TiesPeftError, before the first trial wherever it can be known by then.
    Law: stopped and taken up again it tries what it would have tried; processes that share a study do each
        trial once and return the same.
    """
    check_is_list(adapters)
    opened = [a if isinstance(a, Adapter) else Adapter.load(a) for a in adapters]
    _check_numbers(budget, penalty, controls)
    recipe = make_recipe(
        opened,
        method=method,
        space=space,
        scale=scale,
        rank=rank,
        parameters=parameters or {},
        densities=densities,
        allow_disjoint=allow_disjoint,
    )
    tuning = Tuning.read(recipe, tune)
    objectives = Objectives(objective, judge, opened, base, device, bench, TRAINED in controls)
    problem = SearchProblem(opened, tuning, objectives.score, penalty, seed)
    problem.check()
    ask = _SearchRun(budget, storage, study, sampler, progress)
    shared = ask.open(problem, objectives.asked)
    trials = ask.run(shared, problem, "search", watch)
    best = _best(trials)
    merged = problem.merge(tuning.to_recipe(best.setting))
    held = _evaluate_controls(problem, objectives, controls, ask, shared)
    score = float(best.facts["score"])
    warn_caller(merged.report.warnings)
    return Found(merged, merged.recipe, score, objectives.judge(merged), tuple(trials), tuple(held))


def _check_numbers(budget: int, penalty: float, controls: Sequence[str]) -> None:
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise RecipeError(f"the budget is {budget!r}; expected a whole number of trials, from 1 up.")
    if not isinstance(penalty, (int, float)) or not 0 <= penalty < float("inf"):
        raise RecipeError(f"the penalty is {penalty!r}; expected a number, 0 or more.")
    for name in controls:
        if name not in (*CONTROLS, TRAINED):
            raise RecipeError(unknown("control", str(name), (*CONTROLS, TRAINED)))


@dataclass(frozen=True)
class _SearchRun:
    """How many trials, where they are kept, and who is told of them."""

    budget: int
    storage: str | Path | None
    study: str
    sampler: str
    progress: Progress | None

    def open(self, problem: SearchProblem, objective: Mapping[str, Any]) -> Study:
        """The study of a problem; refused where one of that name is of another."""
        asked = problem.asked(objective)
        return Study(
            self.storage,
            self.study,
            problem.tuning.domains,
            problem.initial_settings(),
            asked,
            problem.seed,
            self.sampler,
        )

    def run(self, study: Study, problem: SearchProblem, stage: str, watch: TrialCallback | None = None) -> list[Trial]:
        """The trials, those that are done already among them."""

        def tell(trial: Trial, done: list[Trial]) -> None:
            self.say(stage, [one.value for one in done])
            if watch is not None:
                watch(trial, done)

        self.say(stage, [one.value for one in study.trials()])
        return study.run(problem.evaluate, self.budget, tell)

    def say(self, stage: str, values: Sequence[float]) -> None:
        """How far it is, and the best value so far."""
        if self.progress is not None:
            best = f"{DETAIL}best so far {max(values):.4f}" if values else ""
            self.progress(stage + best, min(len(values), self.budget), self.budget)


def _evaluate_controls(
    problem: SearchProblem, objectives: Objectives, names: Sequence[str], ask: _SearchRun, shared: Study
) -> list[Control]:
    """The controls, in their order; those that the study keeps, of this budget and this judge, are not made again."""
    made = []
    for name in names:
        budget = f", budget {ask.budget}" if name in (WEIGHTS, ADAPTERS) else ""
        place = f"control: {name}{budget}, judge {objectives.judge_id or 'none'}"
        kept = None if objectives.judge_id is None else shared.fact(place)
        if kept is None:
            adapter = _control(problem, objectives, name, ask)
            kept = [problem.score(adapter), objectives.judge(adapter)]
            if objectives.judge_id is not None:
                shared.keep(place, kept)
        made.append(Control(name, *kept))
    return made


def _control(problem: SearchProblem, objectives: Objectives, name: str, ask: _SearchRun) -> Adapter:
    if name == WEIGHTS:
        return _best_random_setting(problem, ask)
    if name == ADAPTERS:
        return _search_random(problem, objectives, ask)
    if name == TRAINED:
        assert objectives.scorer is not None  # as `Objectives` saw to
        return train(
            new_adapter(problem.adapters[0], problem.seed), [objectives.scorer], problem.seed, progress=ask.progress
        )
    found = [problem.merge(recipe) for recipe in simple_recipes(problem.tuning.recipe)[name]]
    return max(found, key=problem.score) if len(found) > 1 else found[0]


def _best_random_setting(problem: SearchProblem, ask: _SearchRun) -> Adapter:
    settings = random_settings(problem.tuning, ask.budget, problem.seed)
    values: list[float] = []
    ask.say(WEIGHTS, values)
    for setting in settings:
        values.append(problem.evaluate(setting)[0])
        ask.say(WEIGHTS, values)
    best = settings[values.index(max(values))]
    return problem.merge(problem.tuning.to_recipe(best))


def _search_random(problem: SearchProblem, objectives: Objectives, ask: _SearchRun) -> Adapter:
    random_ones = [random_adapter(adapter, problem.seed + place) for place, adapter in enumerate(problem.adapters)]
    recipe = replace(problem.tuning.recipe, adapters=tuple(str(one.source) for one in random_ones))
    other = SearchProblem(
        random_ones, replace(problem.tuning, recipe=recipe), problem.score, problem.penalty, problem.seed
    )
    asked = replace(ask, study=f"{ask.study}, {ADAPTERS}")
    trials = asked.run(asked.open(other, objectives.asked), other, ADAPTERS)
    return other.merge(other.tuning.to_recipe(_best(trials).setting))


def _best(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=lambda trial: (trial.value, -trial.number))
