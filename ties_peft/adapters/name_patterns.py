"""Patterns: the regular expressions in a stranger's config, matched in bounded time.

A pattern such as `(a+)+b` makes Python's own matcher backtrack for longer than anybody waits. Patterns
that repeat nothing take time in proportion to the name and go through `re`; the others go through
`regex`, which stops when its time is up.
"""

from __future__ import annotations

import re

SECONDS = 1.0  # more than any honest pattern needs by a factor of thousands
REPEATS = frozenset("*+{?")


def matches_end(pattern: str, name: str) -> bool:
    """Whether a pattern fits the end of a module's path, from a dot or the start on, as PEFT asks it.

    Law: equals `re.match(rf"(.*\\.)?({pattern})$", name)` wherever that returns.
    Raises: ValueError for what is no pattern, or takes too long.
    """
    whole = rf"(.*\.)?({pattern})$"
    try:
        if not REPEATS & set(pattern):
            return re.match(whole, name) is not None
        return _bounded(whole, name)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no pattern: {error}") from None


def matches_whole(pattern: str, name: str) -> bool:
    """Whether a pattern fits a module's whole path, as PEFT asks of a regex in target_modules.

    Raises: ValueError for what is no pattern, or takes too long.
    """
    try:
        return _bounded(rf"(?:{pattern})\Z", name) if REPEATS & set(pattern) else bool(re.fullmatch(pattern, name))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no pattern: {error}") from None


def _bounded(pattern: str, name: str) -> bool:
    import regex

    try:
        return regex.match(pattern, name, timeout=SECONDS) is not None
    except TimeoutError:
        raise ValueError(f"the pattern takes more than {SECONDS:g} s to match") from None
    except regex.error as error:
        raise ValueError(f"it is no pattern: {error}") from None
