"""Search: the recipe that does best on a few examples, found without gradients.

    maximise  value(recipe) = objective(merge(recipe)) − penalty · mean |wᵢ|

By default a search sets N weights from −1.5 to 1.5, with penalty 0.05 and 40 trials, in a merge by the defaults of
`merge`; it can set any other parameters of a recipe (see `tuning`). LoRAHub is the search with method
`task_arithmetic`, scale 1 and rank `max`: then each weight is a factor of its task vector and no energy is lost.

Source: Huang et al., LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition (arXiv
2307.13269). There A's and B's are summed separately, so that the merged task vector is (Σ wᵢ·Bᵢ)·(Σ wⱼ·Aⱼ): it has cross
terms, is quadratic in w, loses the sign of a single adapter, and every derivative at the start is 0. Here it is
Σ wᵢ·Δᵢ, exactly. There the loss of a batch is divided by the number of examples, so that the penalty weighs more with
large batches; here the objective is a mean over examples. The penalty is on the mean of |w|, as in their code (their
text says sum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter, check_is_list
from ..errors import RecipeError, unknown, warn_caller
from ..evaluation.loaded_model import Bench
from ..learning import ANSWER_TOKENS
from ..learning.training import train
from ..merging.merge import make_recipe
from ..merging.merged import Merged
from ..merging.options import DEVICE, Options, Rank
from ..merging.plan import Progress
from ..merging.recipes.recipe import Recipe
from ..merging.values import check_whole
from . import ADAPTERS, BUDGET, CONTROLS, DETAIL, GRID, IMITATE, PENALTY, TRAINED, WEIGHTS
from .controls import new_adapter, random_adapter, random_settings, simple_recipes
from .imitation import ImitationRows, open_imitation
from .objectives import Objectives
from .problem import SearchProblem, Trial, TrialCallback
from .tuning import Tuning

if TYPE_CHECKING:
    from .study import Study


@dataclass(frozen=True)
class Control:
    """The result of a baseline that a search has to beat.

    Attributes:
        name: as in `controls`.
        score: on the examples, without the penalty.
        judged: by the judge, if there is one.
    """

    name: str
    score: float
    judged: float | None = None


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        adapter: the merge by the best recipe.
        recipe: the best recipe, an ordinary one.
        score: its objective on the examples, without the penalty.
        judged: its value by the judge, if there is one.
        trials: all, by number.
        controls: the baselines.
    """

    adapter: Merged
    recipe: Recipe
    score: float
    judged: float | None
    trials: tuple[Trial, ...]
    controls: tuple[Control, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
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
    rows: Any = None,
    tasks: Any = None,
    count: int | None = None,
    answers: str | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    state: str | Path | None = None,
) -> Found:
    """Find the weights, or any other parameters of a recipe, that do best on a few examples.

    Args:
        adapters: folders, Hub ids or `Adapter`s.
        objective: a task with labelled rows (see `evaluate`), whose value is −loss, or the accuracy where there is no
            loss; or a callable objective(adapter) → float, to be maximised; or "imitate": how well the merge predicts, on
            `rows` without labels, what each source adapter predicts there. Its value is −(the mean over adapters of
            KL(adapter ‖ merge)) in nats, at most 0 (see `imitation`).
        tune: what is searched (see `tuning`); by default the weights, from −1.5 to 1.5.
        budget: the number of trials in all, those that the study holds already included.
        method, space, scale, rank, parameters: of the recipe where they are not tuned, as in `merge`. For LoRAHub
            use method="task_arithmetic", scale=1, rank="max".
        densities: as in `merge`.
        penalty: on the mean of |w|, where weights are tuned.
        judge: a task or callable like `objective`, on other rows: it evaluates the result and the controls once, at the
            end; by accuracy where there is one.
        controls: the baselines to evaluate; `trained`, beside the default ones, trains a new LoRA on the same rows.
        storage: a path (SQLite), a database's URL, `journal:PATH`, or None for memory; see `Study`.
        study: the name of the search in the storage. A search of that name is resumed, and refused where it is another
            one. Tasks are compared by the tokens and labels of their rows, not by their paths; callables are not compared.
        seed: of every random number.
        sampler: `auto`, `cobyla`, `tpe`, `random`, or `grid`, which tries each combination of choices once, in order; see
            `Study`.
        base, device, bench: as in `evaluate`, for tasks.
        allow_disjoint: as in `merge`.
        progress: called as progress(stage, done, of), for the search and for each control that takes as many trials;
            what follows ` · ` in a stage's name changes during the stage: the best value so far.
        watch: called after each trial as watch(trial, all complete trials).
        rows, tasks, count, answers, answer_tokens: for "imitate" alone, as in `distil`: what each adapter reads (texts, files,
            a number of random-token rows, or "generated"; by default the tasks' rows) and how its predictions are read.
        state: for "imitate" alone: a folder in which the source adapters' predictions are kept, so that a search that is
            resumed need not run them again. One process uses it at a time.
    Returns: the best recipe, its merge, and the controls.
    Raises: TiesPeftError, before the first trial wherever that is possible.
    Law: an interrupted search that is resumed tries what it would have tried; processes that share a study run each trial
        once and return the same.
    """
    check_is_list(adapters)
    opened = [a if isinstance(a, Adapter) else Adapter.load(a) for a in adapters]
    _check_numbers(budget, penalty, controls)
    more: dict[str, Any] = {"densities": densities, "allow_disjoint": allow_disjoint}
    recipe = make_recipe(
        opened, parameters=parameters or {}, method=method, space=space, scale=scale, rank=rank, **more
    )
    tuning = Tuning.read(recipe, tune)
    budget = min(budget, len(tuning.combinations())) if sampler == GRID else budget
    asked = ImitationRows(rows, tasks, count, answers, answer_tokens, state)
    if isinstance(objective, str) and objective == IMITATE:
        objective = open_imitation(opened, asked, seed, base, device, bench, progress)
        objective.check_judge(judge)
        bench, tuning = objective.bench, replace(tuning, recipe=objective.with_own_heads(recipe))
    else:
        asked.check_unused()
    objectives = Objectives(objective, judge, opened, base, device, bench, TRAINED in controls)
    problem = SearchProblem(opened, tuning, objectives.score, penalty, seed)
    problem.check()
    run = _SearchRun(problem, objectives, budget, storage, study, sampler, progress)
    opened_study = run.open_study()
    trials = run.run_trials(opened_study, "search", watch)
    best = _best(trials)
    merged = problem.merge_setting(best.setting)
    evaluated = run.evaluate_controls(controls, opened_study)
    warn_caller(merged.report.warnings)
    score = float(best.facts["score"])
    return Found(merged, merged.recipe, score, objectives.judge(merged), tuple(trials), evaluated)


def _check_numbers(budget: int, penalty: float, controls: Sequence[str]) -> None:
    check_whole("the budget", budget, 1)
    if not isinstance(penalty, (int, float)) or not 0 <= penalty < float("inf"):
        raise RecipeError(f"the penalty is {penalty!r}; expected a number, 0 or more.")
    for name in controls:
        if name not in (*CONTROLS, TRAINED):
            raise RecipeError(unknown("control", str(name), (*CONTROLS, TRAINED)))


@dataclass(frozen=True)
class _SearchRun:
    """A search, its controls, and where their trials are kept.

    Attributes:
        problem: what is maximised.
        objectives: the objective and the judge.
        budget, storage, study_name, sampler, progress: as in `search`.
    """

    problem: SearchProblem
    objectives: Objectives
    budget: int
    storage: str | Path | None
    study_name: str
    sampler: str
    progress: Progress | None

    def open_study(self) -> Study:
        """Return the study; refused where the one of that name is of another search."""
        try:
            from .study import Study
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"a search needs the package '{error.name}', which is not installed: pip install 'ties-peft[search]'."
            ) from None
        problem = self.problem
        identity = problem.identity(self.objectives.identity)
        starts = problem.tuning.combinations() if self.sampler == GRID else problem.initial_settings()
        return Study(
            self.storage, self.study_name, problem.tuning.domains, starts, identity, problem.seed, self.sampler
        )

    def run_trials(self, study: Study, stage: str, callback: TrialCallback | None = None) -> list[Trial]:
        """Return the trials, those that are complete already included."""

        def after_trial(trial: Trial, complete: list[Trial]) -> None:
            self._report_progress(stage, [one.value for one in complete])
            if callback is not None:
                callback(trial, complete)

        self._report_progress(stage, [one.value for one in study.trials()])
        return study.run(self.problem.evaluate, self.budget, after_trial)

    def evaluate_controls(self, names: Sequence[str], study: Study) -> tuple[Control, ...]:
        """Return the controls; those that the study holds, of this budget and judge, are not evaluated again."""
        judge = self.objectives.judge_id
        evaluated = []
        for name in names:
            budget = f", budget {self.budget}" if name in (WEIGHTS, ADAPTERS) else ""
            key = f"control: {name}{budget}, judge {judge or 'none'}"
            values = None if judge is None else study.load(key)
            if values is None:
                adapter = self._make_control(name)
                values = [self.problem.score(adapter), self.objectives.judge(adapter)]
                if judge is not None:
                    study.save(key, values)
            evaluated.append(Control(name, *values))
        return tuple(evaluated)

    def _make_control(self, name: str) -> Adapter:
        problem = self.problem
        if name == WEIGHTS:
            return self._best_random_setting()
        if name == ADAPTERS:
            return self._search_random_adapters()
        if name == TRAINED:
            scorer = self.objectives.scorer
            assert scorer is not None  # checked by `Objectives`
            return train(new_adapter(problem.adapters[0], problem.seed), [scorer], problem.seed, progress=self.progress)
        merges = [problem.merge(recipe) for recipe in simple_recipes(problem.tuning.recipe)[name]]
        return max(merges, key=problem.score) if len(merges) > 1 else merges[0]

    def _best_random_setting(self) -> Adapter:
        settings = random_settings(self.problem.tuning, self.budget, self.problem.seed)
        values: list[float] = []
        self._report_progress(WEIGHTS, values)
        for setting in settings:
            values.append(self.problem.evaluate(setting)[0])
            self._report_progress(WEIGHTS, values)
        return self.problem.merge_setting(settings[values.index(max(values))])

    def _search_random_adapters(self) -> Adapter:
        problem = self.problem
        adapters = [random_adapter(adapter, problem.seed + place) for place, adapter in enumerate(problem.adapters)]
        recipe = replace(problem.tuning.recipe, adapters=tuple(str(adapter.source) for adapter in adapters))
        tuning = replace(problem.tuning, recipe=recipe)
        other = SearchProblem(adapters, tuning, problem.score, problem.penalty, problem.seed)
        run = replace(self, problem=other, study_name=f"{self.study_name}, {ADAPTERS}")
        return other.merge_setting(_best(run.run_trials(run.open_study(), ADAPTERS)).setting)

    def _report_progress(self, stage: str, values: Sequence[float]) -> None:
        if self.progress is not None:
            best = f"{DETAIL}best so far {max(values):.4f}" if values else ""
            self.progress(stage + best, min(len(values), self.budget), self.budget)


def _best(trials: Sequence[Trial]) -> Trial:
    return max(trials, key=lambda trial: (trial.value, -trial.number))
