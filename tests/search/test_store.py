"""Where trials are kept: no password is without_password, folders are made, and a store in the output's way is refused."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import ties_peft
from ties_peft import RecipeError
from ties_peft.adapters.writer import check_outside_output
from ties_peft.search.storage import storage_path, without_password
from ties_peft.search.study import Study
from ties_peft.search.tuning import Range

SECRET = "s3cr3t-of-ann"


def study(storage: str | Path) -> Study:
    return Study(storage, "s", {"scale": Range(0.0, 1.0)}, [{"scale": 0.25}], {})


@pytest.mark.parametrize(
    "url",
    [
        f"nosuch://ann:{SECRET}@host/trials",
        f"postgresql+psycopg2://ann:{SECRET}@127.0.0.1:1/trials",
        f"postgresql+psycopg2://127.0.0.1:1/trials?user=ann&password={SECRET}",
        f"postgresql+psycopg2://ann:{SECRET}@host:port/trials",
        f"nosuch+://ann:{SECRET}@@host:/trials",
    ],
)
def test_no_password_is_shown(url: str) -> None:
    assert SECRET not in without_password(url)
    assert "://" in without_password(url)
    with pytest.raises(RecipeError, match="the study cannot be kept in") as refused:
        study(url)
    assert SECRET not in str(refused.value)
    assert "host" in str(refused.value) or "127.0.0.1" in str(refused.value)
    assert "postgresql+psycopg2://USER:PASSWORD@HOST/NAME" in str(refused.value)
    assert str(refused.value).count("\n") == 0


def test_what_holds_no_password_is_shown_as_it_is(tmp_path: Path) -> None:
    for storage in (tmp_path / "s.db", "s.db", f"journal:{tmp_path}/log", "sqlite:///s.db", "mysql+pymysql://host/x"):
        assert without_password(storage) == str(storage)
    assert without_password(None) == "memory"


def test_files() -> None:
    assert [storage_path(s) for s in ("a/s.db", "journal:a/log", "sqlite:///a/s.db", "sqlite:////a/s.db")] == [
        Path("a/s.db"),
        Path("a/log"),
        Path("a/s.db"),
        Path("/a/s.db"),
    ]
    assert [storage_path(s) for s in (None, "sqlite://", "sqlite:///:memory:", "postgresql://h/a")] == [None] * 4


@pytest.mark.parametrize("form", ["{}", "journal:{}", "sqlite:///{}"])
def test_missing_folders_are_made(tmp_path: Path, form: str) -> None:
    place = tmp_path / "not" / "there" / "s.db"
    assert len(study(form.format(place)).run(lambda setting: (1.0, {}), 1)) == 1
    assert place.is_file()


def test_folders_of_a_store_that_does_not_open_are_gone_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError("the disk is full")

    monkeypatch.setattr(optuna.storages, "RDBStorage", fail)
    with pytest.raises(RecipeError, match="the disk is full"):
        study(tmp_path / "not" / "there" / "s.db")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="the study cannot be kept in"):
        study(tmp_path / "file" / "s.db")


@pytest.mark.parametrize("place", ["out", "out/s.db", "sub/../out/s.db", "journal:out/log", "sqlite:///out/s.db"])
def test_a_store_in_the_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"the storage '.*out.*is, holds or lies in the output 'out'"):
        check_outside_output(Path("out"), storage_path(place), "the storage")
    with pytest.raises(RecipeError, match=r"the storage 's\.db' is, holds or lies in the output 's\.db/out'"):
        check_outside_output(Path("s.db/out"), storage_path("s.db"), "the storage")
    for apart in (None, "out.study.db", "output/s.db", "postgresql://host/out", "sqlite://"):
        check_outside_output(Path("out"), storage_path(apart), "the storage")


def test_a_journal_needs_a_name_of_optuna_that_is_private() -> None:
    """Once this fails, Optuna has a public name, or journals with heartbeats, which `study` is to use instead."""
    import optuna

    from ties_peft.search.study import BaseHeartbeat

    for module in (optuna, optuna.storages, optuna.storages.journal):
        assert BaseHeartbeat not in [getattr(module, name) for name in dir(module) if not name.startswith("_")]
    assert issubclass(optuna.storages.RDBStorage, BaseHeartbeat)
    assert not issubclass(optuna.storages.JournalStorage, BaseHeartbeat)
    assert [name for name in BaseHeartbeat.__abstractmethods__ if name[0] == "_"] == ["_get_stale_trial_ids"]


def test_no_other_private_name_of_optuna_is_used() -> None:
    for module in ("study", "sampler"):
        text = (Path(ties_peft.__file__).parent / "search" / f"{module}.py").read_text(encoding="utf-8")
        tree = list(ast.walk(ast.parse(text)))
        modules = {one.module for one in tree if isinstance(one, ast.ImportFrom) and "._" in str(one.module)}
        assert modules <= {"optuna.storages._heartbeat"}
        own = {one.name for one in tree if isinstance(one, (ast.FunctionDef, ast.ClassDef))}
        own |= {one.attr for one in tree if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store)}
        assert {one.attr for one in tree if isinstance(one, ast.Attribute) and one.attr[0] == "_"} <= own
