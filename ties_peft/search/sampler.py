"""Sampling: which setting a study tries next, from what is there, the seed and the trial's number alone.

COBYLA, Powell's trust region with linear models, where all domains are ranges; TPE, Parzen estimators of good and
bad trials, where there are choices. The share of the way to the best known value that is left after 40 trials,
the mean over four cheap objectives and four seeds (`benchmarks/optimisers.py`):

    numbers                    2     6    20    50
    COBYLA                   .02   .09   .48   .48
    two-points DE            .16   .24   .41   .53
    (1+1)-ES                 .17   .21   .69   .62
    Powell                   .00   .20   .58   .65
    CMA-ES, its best step    .10   .36   .59   .64
    TPE                      .04   .54   .81   .83
    random                   .26   .74   .84   .86

Neither keeps anything in the store but the trials themselves (Optuna's CMA-ES keeps a pickle there, which whoever
opens the store would execute).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .tuning import Domain, Range


@dataclass(frozen=True)
class Trial:
    """A setting that was tried.

    Attributes:
        number: its own in the study.
        setting: by domain.
        value: what the search makes large.
        facts: what else is known of it, such as the score without a penalty.
    """

    number: int
    setting: Mapping[str, Any]
    value: float
    facts: Mapping[str, Any]


class History(Protocol):
    """What sampling asks of a study."""

    domains: Mapping[str, Domain]
    initial_settings: Sequence[Mapping[str, Any]]
    seed: int

    def start(self, number: int) -> dict[str, Any]:
        """The setting with which a trial of this number starts the search; empty for later ones."""

    def trials(self) -> list[Trial]:
        """Those that are done, by number."""

    def under_way(self, number: int) -> list[Mapping[str, Any]]:
        """The settings of the trials before `number` that are not done."""


def make_sampler(optuna: Any, name: str, study: History) -> Any:
    """An Optuna sampler that begins with the initial_settings and has no memory but the store: `cobyla`, `tpe` or `random`."""

    class Sampler(optuna.samplers.BaseSampler):  # type: ignore[misc]
        def infer_relative_search_space(self, of: Any, trial: Any) -> dict[str, Any]:
            if study.start(trial.number):
                return {}
            if name == "cobyla":
                return {domain: _distribution(optuna, own) for domain, own in study.domains.items()}
            return dict(self.inner(trial).infer_relative_search_space(of, trial))

        def sample_relative(self, of: Any, trial: Any, space: dict[str, Any]) -> dict[str, Any]:
            if not space:
                return {}
            if name == "cobyla":
                return _next_point(study, trial.number)
            return dict(self.inner(trial).sample_relative(of, trial, space))

        def sample_independent(self, of: Any, trial: Any, domain: str, distribution: Any) -> Any:
            given = study.start(trial.number)
            if domain in given:
                return given[domain]
            return self.inner(trial, domain).sample_independent(of, trial, domain, distribution)

        def inner(self, trial: Any, domain: str = "") -> Any:
            """Seeded by the trial's number, so that what it draws does not depend on who draws."""
            seed = _seed(study.seed, trial.number, domain)
            if name == "random":
                return optuna.samplers.RandomSampler(seed=seed)
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=10)

    return Sampler()


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "little")


def _distribution(optuna: Any, domain: Domain) -> Any:
    assert isinstance(domain, Range)
    if domain.whole:
        return optuna.distributions.IntDistribution(int(domain.low), int(domain.high), log=domain.log)
    return optuna.distributions.FloatDistribution(float(domain.low), float(domain.high), log=domain.log)


class _Unknown(Exception):
    """COBYLA asks for a point that nobody has tried."""


def _next_point(study: History, number: int) -> dict[str, Any]:
    """The first point that COBYLA wants and nobody has tried; a draw near the best where it wants no more.

    It is run anew from the best start on what is known, which costs less than a trial, and needs no memory.
    While other processes have trials under way, what they will bring is not waited for: their points are taken
    for as bad as the worst.
    """
    import numpy as np
    from scipy.optimize import minimize

    domains = {name: domain for name, domain in study.domains.items() if isinstance(domain, Range)}
    open_now = study.under_way(number)
    done = study.trials()
    known = {_key(_place(domains, t.setting)): -t.value for t in done}
    worst = max(known.values(), default=0.0)
    for setting in open_now:
        known.setdefault(_key(_place(domains, setting)), worst)
    first = max(done[: len(study.initial_settings)], key=lambda t: t.value, default=None)
    begin = np.array(_place(domains, first.setting) if first else [0.0] * len(domains))
    asked: list[Any] = []

    def look(x: Any) -> float:
        point = np.clip(x, -1, 1)
        found = known.get(_key(_place(domains, _setting(domains, point))))
        if found is None:
            asked.append(point)
            raise _Unknown
        return found

    try:
        minimize(
            look,
            begin,
            method="COBYLA",
            bounds=[(-1, 1)] * len(domains),
            options={"rhobeg": 1 / 3, "maxiter": 10_000},
            tol=1e-3,
        )
    except _Unknown:
        return _setting(domains, asked[0])
    if not done:  # all that there is are trials under way
        return {
            name: domain.value_at(float(np.random.default_rng(_seed(study.seed, number)).random()))
            for name, domain in domains.items()
        }
    best = max(done, key=lambda t: t.value)
    drawn = np.random.default_rng(_seed(study.seed, number)).normal(_place(domains, best.setting), 0.1)
    return _setting(domains, np.clip(drawn, -1, 1).tolist())


def _place(domains: Mapping[str, Range], setting: Mapping[str, Any]) -> list[float]:
    """A setting as a point, every range from −1 to 1."""
    return [
        2 * (_bend(k, setting[n]) - _bend(k, k.low)) / (_bend(k, k.high) - _bend(k, k.low)) - 1
        for n, k in domains.items()
    ]


def _setting(domains: Mapping[str, Range], point: Sequence[float]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for (name, domain), x in zip(domains.items(), point, strict=True):
        low, high = _bend(domain, domain.low), _bend(domain, domain.high)
        value = low + (float(x) + 1) / 2 * (high - low)
        value = math.exp(value) if domain.log else value
        made[name] = min(max(round(value) if domain.whole else value, domain.low), domain.high)
    return made


def _bend(domain: Range, value: float) -> float:
    return math.log(value) if domain.log else float(value)


def _key(point: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(x, 9) for x in point)
