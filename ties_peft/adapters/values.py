"""Tell numbers from other values of a config, a recipe or a call."""

from __future__ import annotations

import math
from typing import Any


def is_number(value: Any) -> bool:
    """Return whether a value is a finite int or float (a bool is not a number)."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False
