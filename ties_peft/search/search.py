"""Search: find the recipe that scores best on a few examples, without gradients.

    maximise  value(recipe) = objective(merge(recipe)) − penalty · mean |wᵢ|

By default a search tunes N weights from −1.5 to 1.5, with penalty 0.05 and 40 trials, in a merge with the defaults of
`merge`; it can tune any other parameters of a recipe (see `tuning`). LoRAHub is the search with method
`task_arithmetic`, scale 1 and rank `max`, with which each weight multiplies its task vector and no energy is lost.

Source: Huang et al., LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition (arXiv 2307.13269).
LoRAHub sums A's and B's separately, so its merged task vector is (Σ wᵢ·Bᵢ)·(Σ wⱼ·Aⱼ): it has cross terms, is quadratic
in w, loses the sign of a single adapter, and every derivative at the start is 0. Here it is Σ wᵢ·Δᵢ, exactly. LoRAHub
divides the mean loss of a batch by the number of examples, so that the penalty weighs more with large batches; here the
objective is the mean over examples. The penalty is on the mean of |w|, as in LoRAHub's code (its text says sum).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import Adapter, load_adapters
from ..errors import GivenWarnings, RecipeError, unknown
from ..evaluation.loaded_model import Bench
from ..learning import ANSWER_TOKENS
from ..learning.training import train
from ..merging.merge import make_recipe
from ..merging.options import DEVICE, Options, Rank
from ..merging.plan import Progress
from ..merging.values import check_whole
from . import ADAPTERS, CONTROLS, DETAIL, GRID, IMITATE, PENALTY, SETTINGS, TRAINED, WEIGHTS
from .controls import new_adapter, random_adapter, random_settings, simple_recipes
from .found import Control, Found, better_controls
from .imitation import Imitation, refuse_imitation_options
from .objectives import Objectives
from .problem import SearchProblem, Trial, TrialCallback, check_choices
from .trial_plan import TrialPlan
from .tuning import Tuning

if TYPE_CHECKING:
    from .study import Study


def search(
    adapters: Sequence[str | Path | Adapter],
    objective: Any,
    tune: Mapping[str, Any] | None = None,
    budget: int | None = None,
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
    sampler: str | None = None,
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
    """Find the weights, or any other parameters of a recipe, that score best on a few examples.

    Args:
        adapters: folders, Hub ids or `Adapter`s.
        objective: a task with labelled rows (see `evaluate`), whose value is −loss, or the accuracy where there is no
            loss; or a callable objective(adapter) → float, to be maximised; or "imitate": how well the merge predicts, on
            `rows` without labels, what each source adapter predicts there. Its value is −(the mean over adapters of
            KL(adapter ‖ merge)) in nats, at most 0 (see `imitation`).
        tune: the parameters to tune and their values (see `tuning`); by default the weights, from −1.5 to 1.5.
        budget: the number of trials in all, including those that the study holds already; by default 40, with the sampler
            `grid` all combinations.
        method, space, scale, rank, parameters: of the recipe where they are not tuned, as in `merge`. For LoRAHub use
            method="task_arithmetic", scale=1, rank="max".
        densities: as in `merge`.
        penalty: on the mean of |w|, where weights are tuned.
        judge: a task or callable like `objective`, on other rows. It evaluates the result and the controls once, at the
            end, by accuracy where there is one.
        controls: the names of the controls; besides the default ones there is `trained`, a new adapter trained on the
            same rows. `random weights` is named `random settings` in the result where other parameters than weights are tuned.
        storage: a path (SQLite), a database's URL, `journal:PATH`, or None for memory; see `Study`.
        study: the name of the search in the storage. The same search of that name is resumed; another one is refused.
            Tasks are compared by the tokens and labels of their rows, not by their paths; callables are not compared.
        seed: of every random number.
        sampler: `grid`, which tries each combination of choices once, in order; `cobyla`, for ranges; `tpe`; `random`; or
            `auto`, which is `cobyla` where only ranges are tuned, else `tpe`. By default `grid` where only choices are tuned
            and the budget (40 if none is given) allows for all combinations, else `auto`.
        base, device, bench: as in `evaluate`, for tasks.
        allow_disjoint: as in `merge`.
        progress: called as progress(stage, done, of), for the search and for each control that takes as many trials. The
            part of a stage's name after ` · ` changes during the stage: it is the best value so far.
        watch: called after each trial as watch(trial, all complete trials).
        rows, tasks, count, answers, answer_tokens: for "imitate" alone, as in `distil`: what each adapter reads (texts, files,
            a number of random-token rows, or "generated"; by default the tasks' rows) and how its predictions are read.
        state: for "imitate" alone: a folder in which the source adapters' predictions are kept, so that a search that is
            resumed need not run them again. One process uses it at a time.
    Returns: the best recipe, its merge, and the controls.
    Raises: TiesPeftError, before the first trial where that is possible.
    Law: a search that was interrupted and resumed tries what it would have tried without the interruption; processes that
        share a study run each trial once and return the same.
    """
    opened = load_adapters(adapters)
    _check_numbers(budget, penalty, seed, controls)
    more: dict[str, Any] = {"densities": densities, "allow_disjoint": allow_disjoint, "seed": seed}
    recipe = make_recipe(
        opened, parameters=parameters or {}, method=method, space=space, scale=scale, rank=rank, **more
    )
    tuning = Tuning.read(recipe, tune)
    trial_plan = TrialPlan.read(sampler, budget, tuning)
    check_choices(tuning, opened)
    given = GivenWarnings()
    given.give(trial_plan.warnings)
    imitated: dict[str, Any] = {"rows": rows, "tasks": tasks, "count": count, "answers": answers, "state": state}
    imitated["answer_tokens"] = answer_tokens
    if isinstance(objective, str) and objective == IMITATE:
        objective = Imitation(opened, **imitated, seed=seed, base=base, device=device, bench=bench, progress=progress)
        objective.check_judge(judge)
        bench, tuning = objective.bench, replace(tuning, recipe=objective.with_own_heads(recipe))
    else:
        refuse_imitation_options(imitated)
    objectives = Objectives(objective, judge, opened, base, device, bench, TRAINED in controls)
    problem = SearchProblem(opened, tuning, objectives.score, penalty, seed)
    problem.check()
    return _SearchRun(problem, objectives, trial_plan, storage, study, progress).find(controls, watch, given)


def _check_numbers(budget: int | None, penalty: float, seed: int, controls: Sequence[str]) -> None:
    if budget is not None:
        check_whole("the budget", budget, 1)
    check_whole("seed", seed, 0)
    if not isinstance(penalty, (int, float)) or not 0 <= penalty < float("inf"):
        raise RecipeError(f"the penalty is {penalty!r}; expected a number, 0 or more. Give 0 for none.")
    for name in controls:
        if name not in (*CONTROLS, SETTINGS, TRAINED):
            raise RecipeError(unknown("control", str(name), (*CONTROLS, SETTINGS, TRAINED)))


@dataclass(frozen=True)
class _SearchRun:
    """A run of a search and its controls.

    Attributes:
        problem: the problem, whose value is maximised.
        objectives: the objective and the judge.
        trial_plan: the number of trials and the sampler.
        storage, study_name, progress: as in `search`.
    """

    problem: SearchProblem
    objectives: Objectives
    trial_plan: TrialPlan
    storage: str | Path | None
    study_name: str
    progress: Progress | None

    @property
    def budget(self) -> int:
        """The number of trials."""
        return self.trial_plan.budget

    def find(self, controls: Sequence[str], watch: TrialCallback | None, given: GivenWarnings) -> Found:
        """Run the trials and the controls, and return the result.

        Args:
            controls, watch: as in `search`.
            given: the warnings given so far, to which those of the result are added.
        """
        study = self.open_study()
        trials = self.run_trials(study, "search", watch)
        best = _best(trials)
        merged, score = self.problem.merge_setting(best.setting), float(best.facts["score"])
        evaluated = self.evaluate_controls(controls, study)
        given.texts += self.objectives.warnings
        given.give([*merged.report.warnings, *better_controls(score, evaluated)])
        return Found(
            merged,
            score,
            self.objectives.judge(merged),
            tuple(trials),
            evaluated,
            given.texts,
            study.sampler,
            self.trial_plan.combinations,
            self.objectives.measures,
        )

    def open_study(self) -> Study:
        """Open the study.

        Raises: RecipeError where a study of that name is of another search.
        """
        try:
            from .study import Study
        except ModuleNotFoundError as error:
            raise RecipeError(
                f"a search needs the package '{error.name}', which is not installed. Install it: pip install 'ties-peft[search]'."
            ) from None
        problem = self.problem
        identity = problem.identity(self.objectives.identity)
        tuning, sampler = problem.tuning, self.trial_plan.sampler
        starts = tuning.combinations(self.budget) if sampler == GRID else problem.initial_settings()
        return Study(self.storage, self.study_name, tuning.domains, starts, identity, problem.seed, sampler)

    def run_trials(self, study: Study, stage: str, callback: TrialCallback | None = None) -> list[Trial]:
        """Run the remaining trials, and return all."""

        def after_trial(trial: Trial, complete: list[Trial]) -> None:
            self._report_progress(stage, [one.value for one in complete])
            if callback is not None:
                callback(trial, complete)

        self._report_progress(stage, [one.value for one in study.trials()])
        return study.run(self.problem.evaluate, self.budget, after_trial)

    def evaluate_controls(self, names: Sequence[str], study: Study) -> tuple[Control, ...]:
        """Return the controls; those that the study holds for this budget and judge are not evaluated again."""
        judge = self.objectives.judge_id
        evaluated = []
        for name in dict.fromkeys(WEIGHTS if name == SETTINGS else name for name in names):
            budget = f", budget {self.budget}" if name in (WEIGHTS, ADAPTERS) else ""
            key = f"control: {name}{budget}, judge {judge or 'none'}"
            values = None if judge is None else study.load(key)
            if values is None:
                adapter = self._make_control(name, study)
                values = [self.problem.score(adapter), self.objectives.judge(adapter)]
                if judge is not None:
                    study.save(key, values)
            evaluated.append(Control(self._random_name if name == WEIGHTS else name, *values))
        return tuple(evaluated)

    @property
    def _random_name(self) -> str:
        return WEIGHTS if self.problem.tuning.weights_alone else SETTINGS

    def _make_control(self, name: str, study: Study) -> Adapter:
        problem = self.problem
        if name == WEIGHTS:
            return self._best_random_setting(study)
        if name == ADAPTERS:
            return self._search_random_adapters()
        if name == TRAINED:
            scorer = self.objectives.scorer
            assert scorer is not None  # checked by `Objectives`
            return train(new_adapter(problem.adapters[0], problem.seed), [scorer], problem.seed, progress=self.progress)
        merges = [problem.merge(recipe) for recipe in simple_recipes(problem.tuning.recipe)[name]]
        return max(merges, key=problem.score) if len(merges) > 1 else merges[0]

    def _best_random_setting(self, study: Study) -> Adapter:
        """Return the merge of the best random setting; those that the search has tried are not evaluated again."""
        settings = random_settings(self.problem.tuning, self.budget, self.problem.seed)
        known = {repr(sorted(trial.setting.items())): trial.value for trial in study.trials()}
        values: list[float] = []
        self._report_progress(self._random_name, values)
        for setting in settings:
            key = repr(sorted(setting.items()))
            if key not in known:
                known[key] = self.problem.evaluate(setting)[0]
            values.append(known[key])
            self._report_progress(self._random_name, values)
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
