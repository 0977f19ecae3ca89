"""Read rows of labelled or unlabelled text from JSONL, CSV, plain lines, or a data set on the Hub."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import RecipeError, error_text, one_line

Row = Mapping[str, Any]
PLAIN_TEXT = ".txt"  # one text a line, without a label
FILES = (".jsonl", ".csv", PLAIN_TEXT)
TEXT, PROMPT = "text", "prompt"  # the columns that are read where none is named; the second if there is no first
NAME_COLUMN = "Name the one that holds the text (text: KEY)."  # said of a task's rows
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ClassName(str):
    """A class label of a data set on the Hub: the name of the class, which is the text itself, and its number.

    Attributes:
        number: from 0, in the order of the data set's classes. Where no class has the number, as for the −1 of test
            splits whose labels are not published, the text is the number itself.
        known: whether there is such a class.
    """

    number: int
    known: bool

    def __new__(cls, name: str, number: int, known: bool = True) -> ClassName:
        """Make a label."""
        made = super().__new__(cls, name)
        made.number, made.known = number, known
        return made

    def __getnewargs__(self) -> tuple[str, int, bool]:  # type: ignore[override]
        return str(self), self.number, self.known


def read_rows(
    source: str | Path, split: str = "test", config: str | None = None, limit: int | None = None, text: str = "text"
) -> list[Row]:
    """Read the rows of a file, or of a data set on the Hub.

    Args:
        source: a .jsonl file (an object a line), a .csv file (with a header), a .txt file (a text a line), or the id of
            a data set such as `org/name`, which needs the extra `data`.
        split, config: of a data set on the Hub; not used for a file.
        limit: the number of rows to read; None for all.
        text: the key that the lines of a .txt file get.
    Returns: the rows; class labels of a data set on the Hub are `ClassName`s.
    Raises: RecipeError naming the file and the line.
    """
    path = Path(source)
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".jsonl": _jsonl,
        ".csv": _csv,
        PLAIN_TEXT: lambda file: [{text: line} for line in _lines(file) if line.strip()],
    }
    if path.suffix not in readers:
        return _hub(str(source), split, config, limit)
    try:
        found = readers[path.suffix](path)[:limit]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"rows {str(source)!r} cannot be read: {why}. Check the path and the file.") from None
    if not found:
        raise RecipeError(
            f"rows {str(source)!r}: the file has no rows; expected at least one. Add some, or name another file."
        )
    return found


def is_row_source(text: str) -> bool:
    """Return whether a text looks like the name of a file of rows, or of a data set on the Hub."""
    return Path(text).suffix in FILES or HUB_ID.fullmatch(text) is not None


def text_column(rows: Sequence[Row]) -> str:
    """Return the column that holds the texts, where none is named: `text`, or `prompt` where there is no `text`."""
    return PROMPT if PROMPT in rows[0] and not any(TEXT in row for row in rows) else TEXT


def texts_of(rows: Sequence[Row], field: str, where: str, remedy: str = NAME_COLUMN) -> list[str]:
    """Return the text of every row.

    Args:
        rows: as `read_rows` returns them.
        field: the column.
        where: the rows, as messages name them.
        remedy: a sentence that says how another column is named.
    Raises: RecipeError naming the first row that has none.
    """
    texts = [row.get(field) for row in rows]
    for number, value in enumerate(texts):
        if not isinstance(value, str):
            keys = ", ".join(str(key) for key in rows[number])
            raise RecipeError(
                f"{where}, row {number + 1}: {field!r} is {value!r}; expected a text. The row has the keys {keys}. {remedy}"
            )
    return [str(value) for value in texts]


def _lines(path: Path) -> list[str]:
    """Return the lines of a file; `splitlines` would also split a text at characters such as U+0085."""
    return path.read_text(encoding="utf-8-sig").split("\n")


def _jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_lines(path)):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(
                f"rows {str(path)!r}, line {number + 1}: not JSON ({one_line(error)}). Correct the line."
            ) from None
        if not isinstance(value, dict):
            raise RecipeError(
                f"rows {str(path)!r}, line {number + 1}: a {type(value).__name__}; expected an object such as "
                '{"text": …, "label": …}.'
            )
        rows.append(value)
    return rows


def _csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _hub(source: str, split: str, config: str | None, limit: int | None) -> list[Row]:
    """Return the rows of a data set on the Hub, with class labels by their names."""
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise RecipeError(
            f"rows {source!r}: expected a file that ends in .jsonl, .csv or .txt, or a data set on the Hub, "
            "such as org/name. Name one of these."
        )
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        raise RecipeError(
            f"rows {source!r} are no file, and a data set on the Hub needs the package `datasets`, which is not installed. "
            "Install the extra `data`: pip install 'ties-peft[data]'."
        ) from None
    try:
        found = load_dataset(source, config, split=split)
        named = {key: list(feature.names) for key, feature in found.features.items() if hasattr(feature, "int2str")}
        rows = [dict(row) for row in islice(found, limit)]
    except Exception as error:  # its own errors, the Hub's and the network's
        raise RecipeError(
            f"rows {source!r}, split {split!r}: the Hub gives none ({error_text(error)}). Check the name, the split and the "
            "network."
        ) from None
    for row in rows:
        row.update({key: _class(names, row[key]) for key, names in named.items() if isinstance(row[key], int)})
    return list(rows)


def _class(names: Sequence[str], number: int) -> ClassName:
    known = 0 <= number < len(names)
    return ClassName(names[number] if known else str(number), number, known)
