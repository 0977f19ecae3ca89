"""Search: the recipe that does best on a few examples, found without gradients.

    maximise  worth(recipe) = objective(merge(recipe)) − penalty · mean |wᵢ|

Out of the box it is LoRAHub's: N weights from −1.5 to 1.5, from 0 on, penalty 0.05, 40 trials; any other
numbers and choices of a recipe are tuned alike (see `tuning`).

Source: Huang et al., LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition (arXiv
2307.13269). There the sum is of A's and of B's, so that what acts is (Σ wᵢ·Bᵢ)·(Σ wⱼ·Aⱼ): with cross terms,
quadratic in w, the sign of a lone adapter lost and every slope 0 at the start. Here it is Σ wᵢ·Δᵢ, exactly. There
the loss of a batch is divided by the number of examples, so that the penalty weighs more with large batches; here
the objective is a mean over examples. The penalty is on the mean of |w|, as in their code (their text says sum).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .bench import Bench
from .controls import (
    ADAPTERS,
    CONTROLS,
    TRAINED,
    WEIGHTS,
    new_adapter,
    random_adapter,
    random_settings,
    simple_recipes,
)
from .errors import RecipeError, printable, unknown
from .evaluate import find_base, make_exam
from .exam import Exam, form_for
from .merge import Progress
from .merged import Merged
from .prepare import Prepared, prepare
from .recipe import Rank, Recipe
from .sampling import Trial
from .study import Study
from .task import read_task
from .training import train
from .tuning import Tuning, named

BUDGET, PENALTY = 40, 0.05
Objective = Callable[[Adapter], float]


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
    method: str = "task_arithmetic",
    space: str = "delta",
    scale: float | None = None,
    rank: Rank = "max",
    parameters: Mapping[str, Any] | None = None,
    penalty: float = PENALTY,
    judge: Any = None,
    controls: Sequence[str] = CONTROLS,
    storage: str | Path | None = None,
    study: str = "search",
    seed: int = 0,
    sampler: str = "auto",
    base: str | Path | None = None,
    device: str = "cpu",
    bench: Bench | None = None,
    allow_disjoint: bool = False,
    progress: Progress | None = None,
    watch: Callable[[Trial, list[Trial]], None] | None = None,
) -> Found:
    """Find the weights, or any numbers and choices of a recipe, that do best on a few examples.

    Args:
        adapters: folders, Hub ids or `Adapter`s.
        objective: a task with labelled rows (see `evaluate`): then −loss, or the accuracy where there is no
            loss; or any callable objective(adapter) → float, the larger the better.
        tune: what is searched (see `tuning`); the weights, from −1.5 to 1.5, if nothing is said.
        budget: trials in all; those that a study holds already are counted.
        method, space, scale, rank, parameters: of the recipe where they are not tuned. scale is 1 for
            task_arithmetic, so that the weights are what they seem; rank `max` loses nothing.
        penalty: on the mean of |w|, where weights are searched.
        judge: a task or callable like `objective`, of other rows: what was found and the controls are
            judged by it once, at the end; an accuracy where there is one.
        controls: which are made; `trained` besides the default ones where a new LoRA shall be trained on
            the same rows.
        storage: a path (SQLite), a database's URL, `journal:PATH`, or None for memory.
        study: the name of the search in the storage; a search of that name goes on.
        seed: of every draw.
        sampler: `auto`, `cobyla`, `tpe` or `random`; see `Study`.
        base, device, bench: as in `evaluate`, for tasks.
        allow_disjoint: as in `merge`.
        progress: called as progress(stage, done, of).
        watch: called after each trial as watch(trial, all trials).
    Returns: the best recipe, its merge, and the controls.
    Raises: TiesPeftError, before the first trial wherever it can be known by then.
    Law: stopped and taken up again it tries what it would have tried; processes that share a study do each
        trial once and return the same.
    """
    opened = [a if isinstance(a, Adapter) else Adapter.load(a) for a in adapters]
    _check_numbers(budget, penalty, controls)
    scale = 1.0 if scale is None and method == "task_arithmetic" else scale
    recipe = Recipe(
        adapters=tuple(a.source or "in memory" for a in opened),
        method=method,
        space=space,
        scale=scale,
        rank=rank if any(a.kind.has_rank for a in opened) else "auto",
        parameters=dict(parameters or {}),
        allow_disjoint=allow_disjoint,
    )
    tuning = Tuning.read(recipe, tune)
    judges = _Judges(objective, judge, opened, base, device, bench)
    hunt = _Hunt(opened, tuning, judges.score, penalty, seed)
    hunt.check()
    shared = Study(storage, study, tuning.knobs, hunt.starts(), hunt.asked(judges.name), seed, sampler)
    trials = shared.run(hunt.worth, budget, _telling(progress, budget, watch))
    best = max(trials, key=lambda trial: (trial.value, -trial.number))
    merged = hunt.merge(tuning.to_recipe(best.setting))
    held = _held_against(
        hunt, judges, controls, budget, storage, f"{study}, random adapters", sampler, shared, progress
    )
    return Found(
        adapter=merged,
        recipe=merged.recipe,
        score=float(best.facts["score"]),
        judged=judges.judge(merged),
        trials=tuple(trials),
        controls=tuple(held),
    )


def _check_numbers(budget: int, penalty: float, controls: Sequence[str]) -> None:
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 1:
        raise RecipeError(f"the budget is {printable(repr(budget))}; expected a whole number of trials, from 1 up.")
    if not isinstance(penalty, (int, float)) or not 0 <= penalty < float("inf"):
        raise RecipeError(f"the penalty is {printable(repr(penalty))}; expected a number, 0 or more.")
    for name in controls:
        if name not in (*CONTROLS, TRAINED):
            raise RecipeError(unknown("control", str(name), (*CONTROLS, TRAINED)))


class _Hunt:
    """Adapters, and what a setting of the knobs is worth on them."""

    def __init__(
        self, adapters: Sequence[Adapter], tuning: Tuning, score: Objective, penalty: float, seed: int
    ) -> None:
        self.adapters, self.tuning, self.score = list(adapters), tuning, score
        self.penalty, self.seed = penalty, seed
        self._prepared: dict[str, Prepared] = {}

    def check(self) -> None:
        """Merge the first start, so that what cannot be merged is refused before any model is run."""
        self.merge(self.tuning.to_recipe(self.starts()[-1]))

    def starts(self) -> list[dict[str, Any]]:
        """Nothing and the mean for LoRAHub's weights; else the recipe as it is, as far as it lies in the ranges."""
        settings: list[dict[str, Any]] = [self.tuning.middle()]
        if not self.tuning.weighs or self.tuning.recipe.method != "task_arithmetic":
            return settings
        share = 1 / len(self.adapters)
        return [self.tuning.middle(weight) for weight in (0.0, share)]

    def asked(self, objective: str) -> dict[str, Any]:
        """What makes it this search and no other."""
        recipe = {k: v for k, v in self.tuning.recipe.to_dict().items() if k != "adapters"}
        return {
            "adapters": [adapter.digest for adapter in self.adapters],
            "recipe": recipe,
            "tuned": {name: repr(knob) for name, knob in self.tuning.knobs.items()},
            "objective": objective,
            "penalty": self.penalty,
            "seed": self.seed,
        }

    def merge(self, recipe: Recipe) -> Merged:
        """By the plan of its space, whose bases are made once."""
        own = {name: value for name, value in recipe.parameters.items() if name in named(recipe.space)}
        key = repr((recipe.space, own))
        if key not in self._prepared:
            self._prepared[key] = prepare(self.adapters, recipe.space, allow_disjoint=recipe.allow_disjoint, **own)
        rest = {name: value for name, value in recipe.parameters.items() if name not in own}
        return self._prepared[key].merge(
            recipe.method, recipe.weights, recipe.scale, recipe.rank, recipe.seed, recipe.dtype, **rest
        )

    def worth(self, setting: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """(score less the penalty, {score})."""
        score = float(self.score(self.merge(self.tuning.to_recipe(setting))))
        weights = [abs(value) for name, value in setting.items() if name.startswith("weights.")]
        return score - self.penalty * (sum(weights) / len(weights) if weights else 0.0), {"score": score}


class _Judges:
    """The objective and the judge as callables, tasks on one loaded base."""

    def __init__(
        self,
        objective: Any,
        judge: Any,
        adapters: Sequence[Adapter],
        base: str | Path | None,
        device: str,
        bench: Bench | None,
    ) -> None:
        given = [one for one in (objective, judge) if one is not None and not callable(one)]
        tasks = [read_task(one) for one in given]
        if tasks and bench is None:
            if len({form_for(task) for task in tasks}) > 1:
                raise RecipeError("the objective and the judge need models of two forms. Choose one measure for both.")
            chosen = find_base(adapters, tasks, base)
            for task in tasks:
                task.check_rows()
            bench = Bench.load(chosen, form_for(tasks[0]), device)
        exams = [make_exam(bench, task) for task in tasks if bench is not None]
        if bench is not None:
            for adapter in adapters:
                bench.check(adapter)
        self.exam: Exam | None = None if callable(objective) else exams[0]
        self.name = "a function" if callable(objective) else repr(tasks[0].to_dict())
        self.score: Objective = objective if callable(objective) else lambda adapter: _loss(exams[0], adapter)
        self._judge = judge if judge is None or callable(judge) else lambda adapter: _value(exams[-1], adapter)

    def judge(self, adapter: Adapter) -> float | None:
        """What the judge says; None without one."""
        return None if self._judge is None else float(self._judge(adapter))


def _loss(exam: Exam, adapter: Adapter) -> float:
    with exam.bench.wear(adapter):
        score = exam.score()
    return score.value if score.loss is None else -score.loss


def _value(exam: Exam, adapter: Adapter) -> float:
    with exam.bench.wear(adapter):
        return exam.score().value


def _telling(
    progress: Progress | None, budget: int, watch: Callable[[Trial, list[Trial]], None] | None
) -> Callable[[Trial, list[Trial]], None]:
    def tell(trial: Trial, done: list[Trial]) -> None:
        if progress is not None:
            best = max(one.value for one in done)
            progress(f"search, best {best:.4f}", min(len(done), budget), budget)
        if watch is not None:
            watch(trial, done)

    return tell


def _held_against(
    hunt: _Hunt,
    judges: _Judges,
    names: Sequence[str],
    budget: int,
    storage: str | Path | None,
    study: str,
    sampler: str,
    shared: Study,
    progress: Progress | None,
) -> list[Control]:
    """The controls, in their order; those that the study keeps are not made again."""
    kept: dict[str, Any] = dict(shared.fact("controls") or {})
    simple = simple_recipes(hunt.tuning.recipe)
    made = []
    for name in names:
        if name not in kept:
            if name in simple:
                adapter = _best(hunt, [hunt.merge(recipe) for recipe in simple[name]])
            elif name == WEIGHTS:
                adapter = _best_setting(hunt, budget)
            elif name == ADAPTERS:
                adapter = _search_random(hunt, judges, budget, storage, study, sampler)
            elif name == TRAINED:
                if judges.exam is None:
                    raise RecipeError("the control 'trained' needs a task with labels, not a function.")
                adapter = train(new_adapter(hunt.adapters[0], hunt.seed), [judges.exam], hunt.seed, progress=progress)
            kept[name] = [hunt.score(adapter), judges.judge(adapter)]
            shared.keep("controls", kept)
        made.append(Control(name, *kept[name]))
    return made


def _best(hunt: _Hunt, adapters: Sequence[Adapter]) -> Adapter:
    return max(adapters, key=hunt.score) if len(adapters) > 1 else adapters[0]


def _best_setting(hunt: _Hunt, budget: int) -> Adapter:
    settings = random_settings(hunt.tuning, budget, hunt.seed)
    best = max(settings, key=lambda setting: hunt.worth(setting)[0])
    return hunt.merge(hunt.tuning.to_recipe(best))


def _search_random(
    hunt: _Hunt, judges: _Judges, budget: int, storage: str | Path | None, study: str, sampler: str
) -> Adapter:
    strangers = [random_adapter(adapter, hunt.seed + place) for place, adapter in enumerate(hunt.adapters)]
    recipe = replace(hunt.tuning.recipe, adapters=tuple(str(one.source) for one in strangers))
    other = _Hunt(strangers, replace(hunt.tuning, recipe=recipe), hunt.score, hunt.penalty, hunt.seed)
    asked = other.asked(judges.name)
    trials = Study(storage, study, hunt.tuning.knobs, other.starts(), asked, hunt.seed, sampler).run(
        other.worth, budget
    )
    best = max(trials, key=lambda trial: (trial.value, -trial.number))
    return other.merge(other.tuning.to_recipe(best.setting))
