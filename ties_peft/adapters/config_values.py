"""Config values: read what a config that anyone may have written holds: JSON objects, numbers, and regular expressions.

A pattern such as `(a+)+b` makes Python's `re` backtrack for an exponential time. Patterns without repetition take linear time
and are matched by `re`; the others by `regex`, which has a timeout.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from ..errors import one_line

SECONDS = 1.0  # an ordinary pattern takes less than a millisecond
REPEATS = frozenset("*+{?")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds.

    Raises: ValueError that says what the file is instead, for a sentence "FILE is …".
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"not JSON ({type(error).__name__}: {one_line(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__}; expected an object")
    return found


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and not True or False."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int beyond the range of float
        return False


def matches_end(pattern: str, name: str) -> bool:
    """Return whether a pattern matches the end of a module's path, from the start or a dot on, as in PEFT.

    Law: equals `re.match(rf"(.*\\.)?({pattern})$", name)` whenever that returns in time.
    Raises: ValueError for an invalid pattern, or one that takes too long.
    """
    return _matches("match", pattern, rf"(.*\.)?({pattern})$", name)


def matches_whole(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a module's whole path, as PEFT matches a regex in target_modules.

    Raises: ValueError for an invalid pattern, or one that takes too long.
    """
    return _matches("fullmatch", pattern, pattern, name)


def _matches(how: str, pattern: str, whole: str, name: str) -> bool:
    try:
        if not REPEATS & set(pattern):
            return getattr(re, how)(whole, name) is not None
        import regex

        return getattr(regex, how)(whole, name, timeout=SECONDS) is not None
    except TimeoutError:
        raise ValueError(f"the pattern takes more than {SECONDS:g} s to match") from None
    except Exception as error:  # of re or regex, or RecursionError, OverflowError
        raise ValueError(f"it is not a valid pattern: {error}") from None
