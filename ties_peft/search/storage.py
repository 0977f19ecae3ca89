"""Store: where the trials of a search are kept: an SQLite file, a database by its URL, a journal, or memory.

What is said of a store never holds its password. Optuna opens it; SQLAlchemy, which comes with Optuna, reads URLs.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import Any

from ..errors import RecipeError

POLL_SECONDS = 0.2  # seconds between two looks at what others are doing
ATTEMPTS = 10  # to make a study while others do the same
DIRECTION = "maximize"
JOURNAL = "journal:"
HIDDEN = "hidden"  # in place of a password among a URL's options
Storage = str | Path | None


def open_study(optuna: Any, storage: Storage, name: str, sampler: Any) -> Any:
    """The study in its store, made where it is not there; processes that make it at once get out of each other's way.

    Raises: RecipeError; folders that were made for it are gone again.
    """
    made = _make_folders(storage)
    for attempt in range(ATTEMPTS):
        try:
            return optuna.create_study(
                storage=_open_storage(optuna, storage),
                study_name=name,
                direction=DIRECTION,
                sampler=sampler,
                load_if_exists=True,
            )
        except Exception as error:  # the database's, its driver's and the file system's own
            said = str(error)
            if attempt + 1 < ATTEMPTS and any(word in said for word in ("exist", "UNIQUE", "unique", "locked")):
                time.sleep(POLL_SECONDS * (1 + os.getpid() % 7 / 7))
                continue
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise _storage_error(storage, error) from None
    raise AssertionError


def without_password(storage: Storage) -> str:
    """A storage as messages and results may name it: without a password.

    >>> without_password("postgresql+psycopg2://ann:secret@host/trials")
    'postgresql+psycopg2://ann:***@host/trials'
    """
    text = str(storage)
    if storage is None:
        return "memory"
    if text.startswith(JOURNAL) or "://" not in text:
        return text
    url = _url(text)
    if url is None:
        return re.sub(r"(://[^:]*:).*@", r"\1***@", text)
    secret = {key: HIDDEN for key in url.query if "pass" in key.lower()}
    safe: str = url.update_query_dict(secret).render_as_string(hide_password=True)
    return safe


def storage_path(storage: Storage) -> Path | None:
    """The file that a storage is; None for memory and for a database's server."""
    if storage is None:
        return None
    text = str(storage)
    if text.startswith(JOURNAL):
        return Path(text.removeprefix(JOURNAL))
    if "://" not in text:
        return Path(text)
    url = _url(text)
    if url is None or url.get_backend_name() != "sqlite" or not url.database:
        return None
    return None if url.database.startswith((":memory:", "file:")) else Path(url.database)


def _storage_error(storage: Storage, error: Exception) -> RecipeError:
    """What a user can do about a store that does not open."""
    text, url = str(storage), _url(str(storage))
    first = (str(error).strip().splitlines() or [""])[0].replace(text, without_password(storage))
    if "://" in text and url is None:
        first = "no URL that can be read"  # what was seen of it might be of the password
    elif url is not None and url.password:
        first = first.replace(str(url.password), "***")
    return RecipeError(
        f"the study cannot be kept in '{without_password(storage)}' ({type(error).__name__}: {first}). Name a path for "
        f"SQLite, {JOURNAL}PATH, or a database's URL with a driver that is installed: for PostgreSQL "
        "postgresql+psycopg2://USER:PASSWORD@HOST/NAME, after pip install psycopg2-binary."
    )


def _make_folders(storage: Storage) -> list[Path]:
    """The missing folders around a file, made; the innermost first."""
    file = storage_path(storage)
    if file is None:
        return []
    missing = [folder for folder in file.absolute().parents if not folder.exists()]
    try:
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _storage_error(storage, error) from None
    return missing


def _open_storage(optuna: Any, storage: Storage) -> Any:
    if storage is None:
        return optuna.storages.InMemoryStorage()
    text = str(storage)
    if text.startswith(JOURNAL):
        journal = optuna.storages.journal
        return journal.JournalStorage(journal.JournalFileBackend(text.removeprefix(JOURNAL)))
    url = text if "://" in text else f"sqlite:///{Path(text).absolute()}"
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return optuna.storages.RDBStorage(url, engine_kwargs=waits)


def _url(text: str) -> Any:
    """A database's URL, read; None for what is none."""
    try:
        from sqlalchemy.engine import make_url

        return make_url(text)
    except Exception:  # its own for another form, ValueError for a port that is no number
        return None
