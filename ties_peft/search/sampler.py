"""Sampler: chooses the setting of a trial by the trials in the storage, the seed and the trial's position alone.

`cobyla` (scipy's COBYLA, Powell's trust region with linear models) is for ranges; `tpe` is Optuna's, also for choices.
COBYLA is here because Optuna's own samplers find much less with a few numbers and a small budget. The share of the
distance to the best known value that is left after 40 trials, in the mean of four cheap objectives and four seeds
(`benchmarks/optimisers.py`):

    numbers                    2     6    20    50
    COBYLA                   .02   .09   .48   .48
    two-points DE            .16   .24   .41   .53
    (1+1)-ES                 .17   .21   .69   .62
    Powell                   .00   .20   .58   .65
    Optuna's GPSampler             .31                  (350 ms a trial, where COBYLA takes 14)
    CMA-ES, its best step    .10   .36   .59   .64
    TPE                      .04   .54   .81   .83
    random                   .26   .74   .84   .86

CMA-ES would also need the package `cmaes`, and Optuna's CmaEsSampler keeps a pickle in the storage: to read it runs the
code of whoever wrote it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from scipy.optimize import minimize

from ..errors import RecipeError
from . import AUTO, GRID
from .tuning import Domain, Range, Setting

GRACE = 60  # seconds without a heartbeat after which the process of a trial counts as ended
POLL = 0.2  # seconds between two looks at the storage
SAMPLERS = ("cobyla", "tpe", "random", GRID)


class Sampler(optuna.samplers.BaseSampler):
    """A sampler for Optuna that tries given settings first, then those that COBYLA, TPE or chance chooses.

    Args:
        name: one of `SAMPLERS`; `auto` is `cobyla` where all domains are ranges, else `tpe`.
        domains: the values that each tuned parameter may take.
        starts: the settings to try first, in order; with `grid` all that are tried.
        seed: of every random number.

    Attributes:
        name: of the sampler in use.
        position: the number of trials before the present one that count towards the budget.
    """

    def __init__(self, name: str, domains: Mapping[str, Domain], starts: Sequence[Setting], seed: int) -> None:
        self._ranges = {key: domain for key, domain in domains.items() if isinstance(domain, Range)}
        ranges_alone = len(self._ranges) == len(domains)
        self.name = {AUTO: "cobyla" if ranges_alone else "tpe"}.get(name, name)
        if self.name not in SAMPLERS or (self.name == "cobyla" and not ranges_alone):
            raise RecipeError(
                f"the sampler is {name!r}; expected auto, tpe, random or {GRID}, or cobyla where only ranges are tuned. Leave it out for "
                "the best of these."
            )
        self._starts, self._seed = list(starts), seed
        self.position = 0
        self._given: Setting | None = None

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Set the position of a trial, and its setting if it is one of the first."""
        earlier = study.get_trials(deepcopy=False)[: trial.number]
        self.position = sum(map(is_counted, earlier))
        self._given = self._starts[self.position] if self.position < len(self._starts) else None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """Return the parameters that the sampler of Optuna samples together."""
        if self._given is not None or self.name == "cobyla":
            return {}
        return dict(self._optuna_sampler("").infer_relative_search_space(study, trial))

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        """Return the values of the parameters that are sampled together."""
        return dict(self._optuna_sampler("").sample_relative(study, trial, search_space)) if search_space else {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: Any
    ) -> Any:
        """Return the value of one parameter."""
        if self._given is None and self.name == "cobyla":
            self._given = self._next_point(study, trial.number)
        if self._given is not None:
            return self._given[param_name]
        return self._optuna_sampler(param_name).sample_independent(study, trial, param_name, param_distribution)

    def _optuna_sampler(self, purpose: str) -> optuna.samplers.BaseSampler:
        seed = self._seed_of(purpose)
        return optuna.samplers.TPESampler(seed=seed) if self.name == "tpe" else optuna.samplers.RandomSampler(seed=seed)

    def _seed_of(self, *purpose: str) -> int:
        digest = hashlib.sha256(repr((self._seed, self.position, *purpose)).encode()).digest()
        return int.from_bytes(digest[:4], "little")

    def _next_point(self, study: optuna.Study, number: int) -> dict[str, Any]:
        """Return the first setting that COBYLA asks for and no trial has tried; once it has converged, one near the best.

        COBYLA runs again from the best of the first settings for every trial, and gets its values from the trials that
        are complete. This takes less time than a trial, and no state has to be kept. A setting that another process is
        trying has the worst value so far.
        """
        running = self._running_settings(study, number)  # read first, because a trial may end before the next line
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        values = {self._key(t.params): -float(t.values[0]) for t in done}
        values = dict.fromkeys(map(self._key, running), max(values.values(), default=0.0)) | values
        first = max(done[: len(self._starts)], key=lambda t: t.values[0], default=None)

        def look_up(x: Any) -> float:
            setting = self._setting(x.tolist())
            if self._key(setting) not in values:
                raise _NotTried(setting)
            return values[self._key(setting)]

        try:
            minimize(
                look_up,
                self._point(first.params) if first else [0.0] * len(self._ranges),
                method="COBYLA",
                bounds=[(-1, 1)] * len(self._ranges),
                options={"rhobeg": 1 / 3, "maxiter": 10_000},
                tol=1e-3,
            )
        except _NotTried as error:
            return error.setting
        best = max(done, key=lambda t: t.values[0], default=None)
        center = self._point(best.params) if best else [0.0] * len(self._ranges)
        return self._setting(np.random.default_rng(self._seed_of()).normal(center, 0.1).tolist())

    def _running_settings(self, study: optuna.Study, number: int) -> list[Setting]:
        """Return the settings of the unfinished trials before one.

        A trial gets its number shortly before its setting. This waits for the setting, so that two processes do not try
        the same one.
        """
        while True:
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            settings: list[Setting] = [t.params for t in running if t.number < number and is_counted(t)]
            if all(len(setting) == len(self._ranges) for setting in settings):
                return settings
            time.sleep(POLL / 10)

    def _point(self, setting: Setting) -> list[float]:
        """Return a setting as a point of the cube in which each range goes from −1 to 1."""
        return [2 * own.share_of(setting[name]) - 1 for name, own in self._ranges.items()]

    def _key(self, setting: Setting) -> tuple[float, ...]:
        """Return a key that is the same for settings that differ by rounding alone."""
        return tuple(round(x, 9) for x in self._point(setting))

    def _setting(self, point: Sequence[float]) -> dict[str, Any]:
        clipped = np.clip(point, -1, 1).tolist()
        return {name: own.value_at((x + 1) / 2) for (name, own), x in zip(self._ranges.items(), clipped, strict=True)}


class _NotTried(Exception):
    """COBYLA asks for the value of a setting that no trial has tried."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self.setting = setting


def is_counted(trial: FrozenTrial) -> bool:
    """Return whether a trial counts towards the budget, because it is complete or a process works on it.

    A process that was killed before it chose a setting leaves a running trial without setting and heartbeat, which Optuna
    never marks as failed. Such a trial does not count after `GRACE` seconds.
    """
    if trial.state != TrialState.RUNNING or trial.params or trial.datetime_start is None:
        return trial.state in (TrialState.COMPLETE, TrialState.RUNNING)
    return (datetime.now() - trial.datetime_start).total_seconds() < GRACE
