"""JSON files: read configs that anyone may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import one_line


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
