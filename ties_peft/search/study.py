"""Study: the trials of one search, in a store that any number of processes share and any later one finds again.

A trial is a setting of domains and what it was worth. Trials are numbered by the store, which gives no number
twice; so each is done once, and a budget is met exactly: a number beyond it, counted without trials that were
lost, is given back unused. A trial is lost when its process is gone (told by its id on the same machine, by its
age on another), and is then asked for again, by whoever is first to say so.

What is tried next depends on the trials that are there and on the seed and number alone, never on the memory of
a process. So a search that was stopped goes on as if it had not been. Nothing that is read from the store is
executed. Optuna keeps the store; it and scipy are imported only here.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from .sampler import Trial, make_sampler
from .storage import POLL_SECONDS, Storage, open_study, without_password
from .tuning import Choice, Domain, Range

PATIENCE = 3600.0  # seconds after which a trial of another machine is lost
INSTANT = 30.0  # seconds, at the most, from a trial's number to its setting
ASKED = "asked"  # the study's attribute that holds what was asked for


Evaluate = Callable[[Mapping[str, Any]], tuple[float, Mapping[str, Any]]]  # (value, facts) of a setting
TrialCallback = Callable[[Trial, list[Trial]], None]


class Study:
    """The trials of one search.

    Args:
        storage: a path for an SQLite file, whose missing folders are made; any database's URL as SQLAlchemy
            writes it, with the driver where its own choice is not installed (`postgresql+psycopg2://…`);
            `journal:PATH` for a journal that network file systems can share; or None for memory.
        name: of the study in it.
        domains: what is set.
        initial_settings: the settings that are tried first, in order.
        asked: everything that makes the search what it is; a study of that name with another is refused.
        seed: of every draw.
        sampler: `cobyla`, `tpe` or `random`; `auto` for the first where all domains are ranges, else the second.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        domains: Mapping[str, Domain],
        initial_settings: Sequence[Mapping[str, Any]],
        asked: Mapping[str, Any],
        seed: int = 0,
        sampler: str = "auto",
    ) -> None:
        optuna = _optuna()
        ranges = all(isinstance(domain, Range) for domain in domains.values())
        chosen = {"auto": "cobyla" if ranges else "tpe"}.get(sampler, sampler)
        if chosen not in ("cobyla", "tpe", "random") or (chosen == "cobyla" and not ranges):
            raise RecipeError(
                f"the sampler is {sampler!r}; expected auto, tpe, random, or, where only ranges are tuned, cobyla."
            )
        self.domains: Mapping[str, Domain] = dict(domains)
        self.initial_settings: Sequence[Mapping[str, Any]] = [dict(start) for start in initial_settings]
        self.seed = seed
        self._complete = optuna.trial.TrialState.COMPLETE
        self._running = optuna.trial.TrialState.RUNNING
        self._failed = optuna.trial.TrialState.FAIL
        self._waiting = optuna.trial.TrialState.WAITING
        sampling = make_sampler(optuna, chosen, self)
        self._place = without_password(storage)
        self._study = open_study(optuna, storage, name, sampling)
        self._claim(json.dumps({**asked, "sampler": chosen}, sort_keys=True, default=str))

    def run(self, evaluate: Evaluate, budget: int, watch: TrialCallback | None = None) -> list[Trial]:
        """Do trials, with whoever else does, until `budget` of them are done.

        Args:
            evaluate: gives the value of a setting; what it raises ends the run, and the trial is free again.
            budget: how many in all, those that are done already counted.
            watch: called after each trial done here, with all that are done.
        Returns: the first `budget` trials, by number.
        """
        while len(self.trials()) < budget:
            trial = self._ask(budget)
            if trial is None:
                time.sleep(POLL_SECONDS)
                continue
            setting = {name: _suggested(trial, name, domain) for name, domain in self.domains.items()}
            try:
                value, facts = evaluate(setting)
                if not math.isfinite(value):
                    raise RecipeError(f"the objective gave {value} for {setting}; expected a finite number.")
            except BaseException:
                self._study.tell(trial, state=self._failed, skip_if_finished=True)
                raise
            for key, fact in facts.items():
                trial.set_user_attr(key, fact)
            self._study.tell(trial, value, skip_if_finished=True)
            if watch is not None:
                watch(Trial(trial.number, setting, value, facts), self.trials())
        return self.trials()[:budget]

    def trials(self) -> list[Trial]:
        """Those that are done, by number."""
        found = self._study.get_trials(deepcopy=False, states=(self._complete,))
        return sorted((Trial(t.number, t.params, float(t.value), t.user_attrs) for t in found), key=lambda t: t.number)

    def fact(self, key: str) -> Any:
        """What `keep` kept; None if nothing was."""
        return self._study.user_attrs.get(key)

    def keep(self, key: str, value: Any) -> None:
        """Keep plain values beside the trials."""
        self._study.set_user_attr(key, value)

    def _claim(self, asked: str) -> None:
        there = self._study.user_attrs.get(ASKED)
        if there is None:
            self._study.set_user_attr(ASKED, asked)
        elif there != asked:
            seen, new = json.loads(there), json.loads(asked)
            odd = sorted(key for key in seen.keys() | new.keys() if seen.get(key) != new.get(key))
            raise RecipeError(
                f"the study {self._study.study_name!r} in '{self._place}' is of another search: it differs in "
                f"{', '.join(odd)}. Ask for the same again, or take another name (study) or storage."
            )

    def _ask(self, budget: int) -> Any:
        """A trial to do here; None while others are doing all that are left."""
        self._free_lost()
        open_now = self._study.get_trials(deepcopy=False, states=(self._complete, self._running))
        if len(open_now) >= budget:
            return None
        trial = self._study.ask()
        trial.set_user_attr("worker", _worker())
        before = [t for t in self._study.get_trials(deepcopy=False) if t.number < trial.number]
        if sum(t.state in (self._complete, self._running) for t in before) >= budget:
            self._study.tell(trial, state=self._failed)  # another process was quicker
            return None
        return trial

    def _free_lost(self) -> None:
        """Give up trials whose process is gone, and ask for the same settings again."""
        for trial in self._study.get_trials(deepcopy=False, states=(self._running,)):
            if not _lost(trial.user_attrs.get("worker"), trial.datetime_start):
                continue
            try:
                self._study.tell(trial.number, state=self._failed)
            except Exception:  # another process has said so already, or it ended after all
                continue
            setting = dict(trial.params) or self.start(trial.number)
            if setting:
                self._study.enqueue_trial(setting)

    def under_way(self, number: int) -> list[Mapping[str, Any]]:
        """The settings of the trials before `number` that are not done.

        A trial gets its number an instant before its setting; that instant is waited for, so that processes
        that ask at the same time do not try the same.
        """
        deadline = time.monotonic() + INSTANT
        while True:
            found = self._study.get_trials(deepcopy=False, states=(self._running,))
            before = [dict(trial.params) for trial in found if trial.number < number]
            if all(len(setting) == len(self.domains) for setting in before) or time.monotonic() > deadline:
                return [setting for setting in before if len(setting) == len(self.domains)]
            time.sleep(POLL_SECONDS / 10)

    def start(self, number: int) -> dict[str, Any]:
        """The setting with which a trial of this number starts the search; empty for later ones."""
        return dict(self.initial_settings[number]) if number < len(self.initial_settings) else {}


def _optuna() -> Any:
    try:
        import optuna
        import scipy  # noqa: F401
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"a search needs the package '{error.name}', which is not installed: pip install 'ties-peft[search]'."
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _suggested(trial: Any, name: str, domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return trial.suggest_categorical(name, list(domain.values))
    if domain.whole:
        return trial.suggest_int(name, int(domain.low), int(domain.high), log=domain.log)
    return trial.suggest_float(name, float(domain.low), float(domain.high), log=domain.log)


def _worker() -> str:
    """This process, told apart from a later one with its id."""
    return f"{socket.gethostname()} {os.getpid()} {_born(os.getpid())}"


def _born(process: int) -> str:
    """When a process began, in the system's own count; empty where the system does not say."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _lost(worker: Any, started: datetime.datetime | None) -> bool:
    """Whether the process that does a trial is gone."""
    age = math.inf if started is None else (datetime.datetime.now() - started).total_seconds()
    if not isinstance(worker, str):  # it has not said its name yet
        return age > 2 * INSTANT
    host, process, born = [*worker.split(" "), "", ""][:3]
    if host != socket.gethostname() or not process.isdigit():
        return age > PATIENCE
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return _born(int(process)) != born
