"""One study and several processes: each trial once, none lost, whoever is killed; SQLite, a journal, PostgreSQL."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from worker import LORAHUB, NegativeDistance

import ties_peft
from ties_peft.search import sampler
from ties_peft.search.study import Study
from ties_peft.search.tuning import Range

Make = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
HERE = Path(__file__).parent
BUDGET = 12


@pytest.fixture
def folders(make_lora: Make) -> list[str]:
    return [str(make_lora(name, seed=seed)) for seed, name in enumerate("abc")]


def find_postgres(program: str) -> str | None:
    """Debian keeps the server's programs out of the way."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{program}"))
    return str(found[-1]) if found else shutil.which(program)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server of our own, in a temporary folder on a free port."""
    initdb, server = find_postgres("initdb"), find_postgres("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed here: apt-get install postgresql, or make test-postgres")
    pytest.importorskip("psycopg2")
    as_user: list[str] = []
    folder = tmp_path_factory.mktemp("postgres")
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres")
        for parent in folder.parents:
            if parent.is_relative_to(tempfile.gettempdir()) and parent != Path(tempfile.gettempdir()):
                parent.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/"}
    subprocess.run([*as_user, initdb, "-D", folder / "data", "-U", "tester", "-A", "trust"], check=True, **quiet)
    command = [*as_user, server, "-D", folder / "data", "-p", str(port), "-k", str(folder), "-h", "127.0.0.1", "-F"]
    running = subprocess.Popen(command, **quiet)
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        time.sleep(0.5)
        yield f"postgresql+psycopg2://tester@127.0.0.1:{port}/postgres"
    finally:
        process = int((folder / "data" / "postmaster.pid").read_text(encoding="utf-8").split()[0])
        os.kill(process, signal.SIGINT)
        running.wait(60)


def slowly(storage: str) -> Any:
    return pytest.param(storage, marks=pytest.mark.slow)


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        url: str = request.getfixturevalue("postgres")
        name = f"d{time.monotonic_ns()}"
        import psycopg2

        link = psycopg2.connect(url.replace("+psycopg2", ""))
        link.autocommit = True
        link.cursor().execute(f"create database {name}")
        link.close()
        return url.rpartition("/")[0] + f"/{name}"
    return {"sqlite": str(tmp_path / "study.db"), "journal": f"journal:{tmp_path / 'study.log'}"}[request.param]


def start(
    storage: str, log: Path, folders: list[str], seconds: float = 0.0, together: int = 1
) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "worker.py"), storage, str(BUDGET), str(seconds), str(log), *folders]
    env = {**os.environ, "TOGETHER": str(together)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> list[Any]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return list(json.loads(out))


@pytest.mark.parametrize("storage", ["journal", slowly("sqlite"), "postgres"], indirect=True)
def test_two_processes_share_the_trials(storage: str, folders: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    first, second = (start(storage, log, folders, 0.15, together=2) for _ in range(2))
    trials, again = result(first), result(second)
    assert trials == again
    assert len(trials) == BUDGET
    lines = log.read_text(encoding="utf-8").splitlines()
    assert len(lines) == BUDGET  # each done once
    assert len({line.split(" ", 1)[1] for line in lines}) == BUDGET  # no setting twice
    assert {line.split(" ", 1)[0] for line in lines} == {str(first.pid), str(second.pid)}


def interrupt(process: subprocess.Popen[str], by: signal.Signals, log: Path, after: int = 5) -> list[str]:
    """Interrupt a process once it has begun some trials; return the settings that it has begun."""
    deadline = time.monotonic() + 300
    while len(settings(log)) < after:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(by)
    process.communicate()
    return settings(log)


def settings(log: Path) -> list[str]:
    """The settings that all processes have begun, in order."""
    return [line.split(" ", 1)[1] for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


@pytest.mark.parametrize("storage", ["sqlite", slowly("journal"), "postgres"], indirect=True)
def test_a_killed_process_loses_nothing(storage: str, folders: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    begun = interrupt(start(storage, log, folders, 0.3), signal.SIGKILL, log)
    trials = result(start(storage, log, folders))
    assert [number for number, _, _ in trials] == sorted({number for number, _, _ in trials})
    assert len(trials) == BUDGET
    tried = settings(log)
    assert len(tried) == BUDGET + 1  # the trial that was running is run again, and no other
    assert tried.count(begun[-1]) == 2
    assert len({*tried}) == BUDGET


def test_an_interrupted_search_continues_as_if_it_had_not_been_interrupted(folders: list[str], tmp_path: Path) -> None:
    log, storage = tmp_path / "log", str(tmp_path / "study.db")
    begun = interrupt(start(storage, log, folders, 0.3), signal.SIGINT, log)
    trials = result(start(storage, log, folders))
    assert settings(log)[len(begun)] == begun[-1]
    undisturbed = ties_peft.search(folders, NegativeDistance(folders), budget=BUDGET, controls=(), **LORAHUB)
    assert [(s, v) for _, s, v in trials] == [(dict(t.setting), t.value) for t in undisturbed.trials]


def test_a_trial_that_others_took_for_lost_is_run_again(tmp_path: Path) -> None:
    """A process that slept finds its trial failed."""
    url = f"sqlite:///{tmp_path / 's.db'}"
    seen: list[Any] = []

    def evaluate(setting: Any) -> Any:
        seen.append(setting)
        if len(seen) == 2:
            other = optuna.load_study(study_name="s", storage=url)
            other.tell(other.trials[-1].number, state=optuna.trial.TrialState.FAIL)
        return setting["scale"], {"score": 0.0}

    done = Study(url, "s", {"scale": Range(0.0, 1.0)}, [{"scale": 0.25}], {}).run(evaluate, 3)
    assert [trial.number for trial in done] == [0, 2, 3]
    assert seen[1] == seen[2]


def test_a_trial_whose_process_was_killed_before_it_had_a_setting_blocks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path / "s.db", "s", {"scale": Range(0.0, 1.0)}, [{"scale": 0.25}], {})
    optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 's.db'}").ask()
    monkeypatch.setattr(sampler, "GRACE", 0)
    done = study.run(lambda setting: (setting["scale"], {}), 3)
    assert len(done) == 3
    assert done[0].setting == {"scale": 0.25}


def test_a_trial_whose_objective_fails_is_free_again(tmp_path: Path) -> None:
    domains = {"scale": Range(0.0, 1.0)}

    def made() -> Study:
        return Study(tmp_path / "s.db", "s", domains, [{"scale": 0.25}], {})

    def fail(setting: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made().run(fail, 3)
    done = made().run(lambda setting: (-((setting["scale"] - 0.9) ** 2), {}), 3)
    assert len(done) == 3


def test_a_smaller_budget_is_met_by_what_is_there(tmp_path: Path) -> None:
    domains = {"scale": Range(0.0, 1.0)}
    study = Study(tmp_path / "s.db", "s", domains, [{"scale": 0.25}], {})
    many = study.run(lambda setting: (setting["scale"], {}), 5)
    assert study.run(lambda setting: pytest.fail("a trial was made"), 3) == many[:3]
