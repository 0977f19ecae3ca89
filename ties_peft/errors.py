"""The exceptions, by who can fix the problem.

    TiesPeftError
    ├── AdapterError        a file: missing, damaged or of an unsupported form
    ├── CompatibilityError  adapters that are valid but do not fit each other
    ├── RecipeError         what was asked for: an unknown name, a wrong number of weights, a folder that exists
    ├── MethodError         a parameter of a method: unknown or out of range
    └── ProcessError        the processes of one job: one could not connect or ended

Every message says what is wrong, where, what was seen and what was expected, and what to do.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Iterable, Sequence

WORD, LINE = 500, 4000  # characters of a word and of a line in a message; longer ones are cut in the middle
QUOTED = 300  # characters of another library's message


class TiesPeftError(Exception):
    """The base of every error that `ties_peft` raises on purpose.

    Control characters in the message are escaped, so that a name from a file cannot control the terminal.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(map(_shorten, printable_lines(str(message)).split("\n"))))


class AdapterError(TiesPeftError):
    """One adapter's files are missing, damaged or not of a supported form."""


class CompatibilityError(TiesPeftError):
    """Adapters that are valid one by one do not fit each other."""


class RecipeError(TiesPeftError):
    """Something that was asked for does not exist or is impossible."""


class MethodError(TiesPeftError):
    """A parameter of a method is unknown or out of range."""


class ProcessError(TiesPeftError):
    """One of the processes of a job ended, or they cannot connect to each other."""


class TiesPeftWarning(UserWarning):
    """Something possible but unwise; the report states it too. Control characters are escaped, as in an error."""

    def __init__(self, message: str = "") -> None:
        super().__init__(printable_lines(message))


def unknown(what: str, name: str, known: Iterable[str], hint: str | None = None) -> str:
    """Return the message for an unknown name: a hint or the most similar known name, then all known names.

    Args:
        what: the kind of thing, such as "method".
        name: the unknown name.
        known: all known names.
        hint: a sentence about this name, in place of the most similar known one.

    >>> unknown("method", "tys", ["average", "ties"])
    "unknown method 'tys': did you mean 'ties'? Known: average, ties."
    """
    names = sorted(known)
    near = nearest(str(name), names)
    guess = f": did you mean '{near}'?" if near else "."
    advice = guess if hint is None else f". {hint}"
    return f"unknown {what} {str(name)!r}{advice} Known: {', '.join(names) or 'none'}."


def nearest(name: str, known: Iterable[str], least: float = 0.4) -> str | None:
    """Return the most similar known name; None if none is similar.

    Args:
        name: the unknown name.
        known: all known names.
        least: the similarity, from 0 to 1, that it must have.

    >>> nearest("fisrt", ["first", "last"])
    'first'
    """
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=least)
    near.sort(key=lambda other: sorted(other) != sorted(name))  # first a name of the same letters in another order
    return near[0] if near else None


def warn_caller(messages: Iterable[str]) -> None:
    """Issue warnings that point to the line of the user's code that called this package."""
    depth = 1
    while (sys._getframe(depth).f_globals.get("__package__") or "").split(".")[0] == __package__:
        depth += 1
    for message in messages:
        warnings.warn(message, TiesPeftWarning, stacklevel=depth + 1)


class GivenWarnings:
    """Warnings that are issued as soon as each is known, and kept for a report.

    Attributes:
        texts: those issued so far.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []

    def give(self, texts: Iterable[str]) -> None:
        """Issue warnings, and keep them."""
        found = list(texts)
        warn_caller(found)
        self.texts += found


def share_hint(value: object, largest: object = 1) -> str:
    """Return a question whether a share was meant as a percentage; empty if it cannot have been.

    >>> share_hint(20)
    ' Did you mean 0.2?'
    """
    if largest != 1 or isinstance(value, bool) or not isinstance(value, (int, float)) or not 2 <= value <= 100:
        return ""
    return f" Did you mean {value / 100:g}?"


def printable(text: str) -> str:
    """Return a text in one line in which control characters are escaped.

    Call it where a text is printed or written to a card; errors and warnings escape their messages themselves.

    >>> printable("a\\x1b[31m")
    'a\\\\x1b[31m'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Return a text in which all control characters but the ends of lines are escaped."""
    return "\n".join(map(printable, text.split("\n")))


def some(items: Iterable[object], most: int = 4) -> str:
    """Return the first items with commas between them, and … if there are more.

    >>> some("abc", 2)
    'a, b, …'
    """
    texts = [str(item) for item in items]
    return ", ".join(texts[:most]) + (", …" if len(texts) > most else "")


def first_rows(rows: Sequence[str], most: int = 8) -> str:
    """Return the first rows of a table in a message, and a line with the number of the others."""
    return "\n".join([*rows[:most], *([f"  … and {len(rows) - most} more"] if len(rows) > most else [])])


def one_line(error: object) -> str:
    """Return another library's message for use in one of ours: in one line, cut at `QUOTED` characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 1]}…"


def error_text(error: Exception) -> str:
    """Return the type and the first line of another library's error, for use in one of ours."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _shorten(line: str) -> str:
    """Return one line of a message with overlong words, and the line itself, cut in the middle."""
    words = re.sub(rf"\S{{{WORD + 1},}}", lambda found: _cut(found[0], WORD), line)
    return _cut(words, LINE)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"
