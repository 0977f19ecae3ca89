"""Study: the trials of one search, kept by Optuna in a storage that several processes can share and resume.

A trial evaluates one setting of the tuned parameters. Optuna numbers the trials, gives them to the processes and keeps
them. A process that works on a trial records heartbeats. If there is none for `GRACE` seconds, because the process was
killed or its machine failed, the trial is marked as failed, and the next free process tries its setting again
(`optuna.storages.RetryHeartbeatStaleTrialCallback`). This module adds an exact budget: all processes together complete
`budget` trials, never more.

The setting of a trial depends on the trials in the storage, the seed and the trial's position alone, never on the memory
of a process. So an interrupted search continues as if it had not been interrupted. After a kill the setting of the
unfinished trial is tried again up to `GRACE` seconds later, and the settings after it may differ.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import journal
from optuna.storages._heartbeat import BaseHeartbeat  # it has no public name; see `_JournalStorage`
from optuna.trial import TrialState

from ..errors import RecipeError
from .problem import Evaluate, Trial, TrialCallback
from .sampler import GRACE, POLL, Sampler, is_counted
from .storage import JOURNAL, Storage, make_folders, storage_error, without_password
from .tuning import Domain, Setting

HEARTBEAT = 10  # seconds between two heartbeats of a process that works on a trial
ATTEMPTS = 10  # to create the tables of a database while other processes do the same
IDENTITY = "asked"  # the attribute of a study that identifies its search

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Study:
    """The trials of one search.

    Args:
        storage: a path for an SQLite file, whose missing folders are created; the URL of a database as SQLAlchemy
            writes it, with the driver (`postgresql+psycopg2://…`); `journal:PATH` for a file on a network file system,
            where SQLite cannot be shared; None for memory.
        name: of the study in the storage.
        domains: the values that each tuned parameter may take.
        starts: the settings to try first, in order.
        identity: plain values that identify the search.
        seed: of every random number.
        sampler: `cobyla`, `tpe`, `random` or `grid`; `auto` is `cobyla` where all domains are ranges, else `tpe`.

    Attributes:
        sampler: the name of the sampler in use.
    Raises: RecipeError for a storage that cannot be opened, an unknown sampler, and a study of that name whose identity
        differs.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        domains: Mapping[str, Domain],
        starts: Sequence[Setting],
        identity: Mapping[str, Any],
        seed: int = 0,
        sampler: str = "auto",
    ) -> None:
        self._domains = dict(domains)
        self._sampler = Sampler(sampler, self._domains, starts, seed)
        self.sampler = self._sampler.name
        self._study = _open(storage, name, self._sampler)
        self._check_identity({**identity, "sampler": self.sampler}, without_password(storage))

    def run(self, evaluate: Evaluate, budget: int, callback: TrialCallback | None = None) -> list[Trial]:
        """Run trials, together with the other processes of the study, until `budget` are complete.

        Args:
            evaluate: returns (value, facts) of a setting. An exception ends the run; the setting can be tried again.
            budget: the number of trials in all, including those that are complete already.
            callback: called after each trial of this process, with all complete trials.
        Returns: the first `budget` complete trials, by number.
        """
        while len(done := self.trials()) < budget:
            if sum(map(is_counted, self._study.get_trials(deepcopy=False))) >= budget:
                time.sleep(POLL)  # other processes work on the last trials
                with _experimental_allowed():
                    optuna.storages.fail_stale_trials(self._study)
                continue
            trial = self._run_trial(evaluate, budget)
            if trial is not None and callback is not None:
                callback(trial, self.trials())
        return done[:budget]

    def _run_trial(self, evaluate: Evaluate, budget: int) -> Trial | None:
        """Run one trial; return None if other processes run the last trials, or have marked this one as failed."""
        made: list[Trial] = []

        def objective(trial: optuna.Trial) -> float:
            if self._sampler.position >= budget:
                raise _BudgetSpent
            setting = {name: domain.suggest(trial, name) for name, domain in self._domains.items()}
            value, facts = evaluate(setting)
            if not math.isfinite(value):
                raise RecipeError(
                    f"the objective gave {value} for {setting}; expected a finite number. Return one for every adapter, also "
                    "for one that fails."
                )
            made.append(Trial(trial.number, setting, value, facts))
            for key, fact in facts.items():
                trial.set_user_attr(key, fact)
            return value

        try:
            self._study.optimize(objective, n_trials=1, catch=(_BudgetSpent,))
        except ValueError:
            if not made:
                raise
            return None  # Optuna's: another process has marked the trial as failed, and its setting is tried again
        return made[0] if made else None

    def trials(self) -> list[Trial]:
        """Return the complete trials, by number."""
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [Trial(t.number, t.params, float(t.values[0]), t.user_attrs) for t in complete]

    def load(self, key: str) -> Any:
        """Return what `save` stored; None if nothing was."""
        return self._study.user_attrs.get(key)

    def save(self, key: str, value: Any) -> None:
        """Store plain values beside the trials."""
        self._study.set_user_attr(key, value)

    def _check_identity(self, identity: Mapping[str, Any], storage: str) -> None:
        new = json.loads(json.dumps(identity, sort_keys=True, default=str))
        stored = self.load(IDENTITY)
        if stored is None:
            self.save(IDENTITY, json.dumps(new, sort_keys=True))
            return
        old = json.loads(stored)
        different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if different == ["sampler"]:
            own = old.get("sampler")
            raise RecipeError(
                f"the study {self._study.study_name!r} in '{storage}' has the sampler {own}, and {self.sampler} would be used "
                f"now. To continue it, name its sampler (sampler={own!r}, --sampler {own}); else choose another name (study=…, "
                "--study) or storage."
            )
        if different:
            raise RecipeError(
                f"the study {self._study.study_name!r} in '{storage}' is of another search; the two differ in "
                f"{', '.join(different)}. Repeat the same search, or choose another name (study=…, --study) or storage."
            )


class _BudgetSpent(Exception):
    """All trials of the budget are complete or running."""


class _JournalStorage(optuna.storages.JournalStorage, BaseHeartbeat):
    """A journal with heartbeats, which Optuna has for databases only: a trial's attribute holds the time of the last one.

    The clocks of machines that share a journal must differ by less than `GRACE`.

    Optuna records heartbeats and marks trials as failed only in a storage that is a `BaseHeartbeat`, and asks it for those
    trials by `_get_stale_trial_ids`. It has public names for neither, in the versions 4.9 to 5.0.
    """

    def record_heartbeat(self, trial_id: int) -> None:
        """Record that the process of a trial is alive."""
        self.set_trial_system_attr(trial_id, "heartbeat", time.time())

    def get_heartbeat_interval(self) -> int:
        """Return the seconds between two heartbeats."""
        return HEARTBEAT

    def get_heartbeat_stale_trial_callback(self) -> Any:
        """Return the callback for a trial whose process has ended, which queues its setting again."""
        with _experimental_allowed():
            return optuna.storages.RetryHeartbeatStaleTrialCallback()

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
        oldest = time.time() - GRACE
        stale = [t.number for t in running if t.system_attrs.get("heartbeat", math.inf) < oldest]
        return [self.get_trial_id_from_study_id_trial_number(study_id, number) for number in stale]


def _open(storage: Storage, name: str, sampler: Sampler) -> optuna.Study:
    """Open the study, or create it."""
    created = make_folders(storage)
    for attempt in range(ATTEMPTS):
        try:
            return optuna.create_study(
                storage=_backend(storage), study_name=name, direction="maximize", sampler=sampler, load_if_exists=True
            )
        except Exception as error:  # of the database, its driver or the file system
            concurrent = any(text in str(error).lower() for text in ("already exists", "unique", "locked"))
            if attempt + 1 == ATTEMPTS or not concurrent:
                for folder in created:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                raise storage_error(storage, error) from None
        time.sleep(POLL)
    raise AssertionError


def _backend(storage: Storage) -> optuna.storages.BaseStorage:
    if storage is None:
        return optuna.storages.InMemoryStorage()
    text = str(storage)
    if text.startswith(JOURNAL):
        return _JournalStorage(journal.JournalFileBackend(text.removeprefix(JOURNAL)))
    url = text if "://" in text else f"sqlite:///{Path(text).absolute()}"
    with _experimental_allowed():
        return optuna.storages.RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
        )


@contextlib.contextmanager
def _experimental_allowed() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
