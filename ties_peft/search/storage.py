"""Storage: an SQLite file, a database by its URL, a journal file or memory, in which the trials of a search are kept.

Messages and results name a storage without its password. SQLAlchemy, which comes with Optuna, parses the URLs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import RecipeError, error_text

JOURNAL = "journal:"
HIDDEN = "hidden"  # shown in place of a password in the query of a URL
Storage = str | Path | None


def without_password(storage: Storage) -> str:
    """Return the name of a storage for messages and results, without a password.

    >>> without_password("postgresql+psycopg2://ann:secret@host/trials")
    'postgresql+psycopg2://ann:***@host/trials'
    """
    text = str(storage)
    if storage is None:
        return "memory"
    if text.startswith(JOURNAL) or "://" not in text:
        return text
    url = _parse_url(text)
    if url is None:
        return re.sub(r"(://[^:]*:).*@", r"\1***@", text)
    hidden = {key: HIDDEN for key in url.query if "pass" in key.lower()}
    safe: str = url.update_query_dict(hidden).render_as_string(hide_password=True)
    return safe


def storage_path(storage: Storage) -> Path | None:
    """Return the path of the file that holds the trials; None for memory and for a database server."""
    if storage is None:
        return None
    text = str(storage)
    if text.startswith(JOURNAL):
        return Path(text.removeprefix(JOURNAL))
    if "://" not in text:
        return Path(text)
    url = _parse_url(text)
    if url is None or url.get_backend_name() != "sqlite" or not url.database:
        return None
    return None if url.database.startswith((":memory:", "file:")) else Path(url.database)


def storage_error(storage: Storage, error: Exception) -> RecipeError:
    """Return the error for a storage that cannot be opened; it shows no password."""
    text, url = str(storage), _parse_url(str(storage))
    cause = error_text(error).replace(text, without_password(storage))
    if "://" in text and url is None:
        cause = f"{type(error).__name__}: not a URL"  # the driver's text may show parts of the password
    elif url is not None and url.password:
        cause = cause.replace(str(url.password), "***")
    return RecipeError(
        f"the study cannot be kept in '{without_password(storage)}' ({cause}). Name a path for SQLite, {JOURNAL}PATH, or a "
        "database's URL with a driver that is installed: for PostgreSQL postgresql+psycopg2://USER:PASSWORD@HOST/NAME, after "
        "pip install psycopg2-binary."
    )


def make_folders(storage: Storage) -> list[Path]:
    """Create the missing parent folders of a storage's file, and return them, the innermost first.

    Raises: RecipeError where that is not possible.
    """
    file = storage_path(storage)
    if file is None:
        return []
    missing = [folder for folder in file.absolute().parents if not folder.exists()]
    try:
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error(storage, error) from None
    return missing


def _parse_url(text: str) -> Any:
    """Return a database's URL, parsed; None for a text that is not a URL."""
    try:
        from sqlalchemy.engine import make_url

        return make_url(text)
    except Exception:  # SQLAlchemy's ArgumentError for another form, ValueError for a port that is not a number
        return None
