"""What can go wrong, by who has to mend it.

    TiesPeftError
    ├── AdapterError        a file: missing, damaged, or of a form that cannot be merged
    ├── CompatibilityError  files that are sound but do not fit each other
    ├── RecipeError         what was asked: an unknown name, a wrong number of weights, a folder in the way
    ├── MethodError         a parameter of a method: unknown, or out of its range
    └── ProcessError        the processes of one job: one could not connect, or is gone

Every message says what is wrong, where, what was seen against what was expected, and what to do.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class TiesPeftError(Exception):
    """The base of every error that `ties_peft` raises on purpose."""


class AdapterError(TiesPeftError):
    """One adapter's files are missing, damaged or not of a supported form."""


class CompatibilityError(TiesPeftError):
    """Adapters that are sound one by one do not fit each other."""


class RecipeError(TiesPeftError):
    """Something that was asked for does not exist or cannot be."""


class MethodError(TiesPeftError):
    """A parameter of a method is unknown or out of range."""


class ProcessError(TiesPeftError):
    """One of the processes that work on a merge is gone, or they cannot reach each other."""


class TiesPeftWarning(UserWarning):
    """Something possible but unwise; it also stands in the report."""


def unknown(what: str, name: str, known: Iterable[str], hint: str | None = None) -> str:
    """Return the sentence for an unknown name: a hint or the nearest known name, then all known names.

    Args:
        what: the name should name.
        name: that is unknown.
        known: the names there are.
        hint: a sentence on this very name, in place of the nearest known one.

    >>> unknown("method", "tys", ["average", "ties"])
    "unknown method 'tys': did you mean 'ties'? Known: average, ties."
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    near.sort(key=lambda other: sorted(other) != sorted(str(name)))  # letters out of order, before all else
    guess = f": did you mean '{near[0]}'?" if near else "."
    said = guess if hint is None else f". {hint}"
    return f"unknown {what} '{printable(str(name))}'{said} Known: {', '.join(names) or 'none'}."


def warn_caller(messages: Iterable[str]) -> None:
    """Warn at the line outside this package that called into it, each message once."""
    depth = 1
    while _own(sys._getframe(depth).f_globals.get("__package__")):
        depth += 1
    for message in messages:
        warnings.warn(message, TiesPeftWarning, stacklevel=depth + 1)


def share_hint(value: object, largest: object = 1) -> str:
    """Return the question whether a share was meant as a percentage; nothing where it cannot have been.

    >>> share_hint(20)
    ' Did you mean 0.2?'
    """
    if largest != 1 or isinstance(value, bool) or not isinstance(value, (int, float)) or not 2 <= value <= 100:
        return ""
    return f" Did you mean {value / 100:g}?"


def _own(package: str | None) -> bool:
    """Return whether code of a package is of this one."""
    return package is not None and package.split(".")[0] == __package__


def printable(text: str, limit: int = 200) -> str:
    """`text` safe for a terminal: control characters escaped, cut at `limit` characters.

    >>> printable("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    safe = (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"
