"""Print tables and reports. All text passes through here, so that control characters in names reach no terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ..errors import RecipeError, printable


def make_table(
    columns: Sequence[str | Column], rows: Iterable[Sequence[str | Text]], title: str | None = None, **options: Any
) -> Table:
    """Return a table without borders.

    Args:
        columns: headings, or columns with a format.
        rows: the cells of each row, as plain text or as text with a style.
        title: printed above, to the left.
        **options: of rich's Table.
    """
    made = [Column(make_text(one)) if isinstance(one, str) else one for one in columns]
    table = Table(*made, **{"title": title, "title_justify": "left", "box": None, "pad_edge": False, **options})
    for row in rows:
        table.add_row(*(make_text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def make_facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of names and what they stand for, without headings."""
    return make_table([Column(), Column(overflow="fold")], rows, show_header=False)


def method_title(asked: str, used: str) -> str:
    """Return the method that was asked for, and in brackets the one that it chose.

    >>> method_title("auto", "dual")
    'auto (dual)'
    """
    return asked if asked == used else f"{asked} ({used})"


def number_column(heading: str) -> Column:
    """Return a column of numbers, aligned to the right."""
    return Column(make_text(heading), justify="right", no_wrap=True)


def make_text(text: str, style: str = "") -> Text:
    """Return text that is printed as it stands, without markup; control characters are escaped."""
    return Text(printable(text), style)


def make_data_frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return rows as a pandas DataFrame. Raises: RecipeError without pandas."""
    try:
        import pandas
    except ImportError as error:
        raise RecipeError(
            "to_pandas needs the package 'pandas', which is not installed: pip install pandas."
        ) from error
    return pandas.DataFrame(rows)


class Printed:
    """A report that prints as its tables, with its warnings below.

    Attributes:
        WIDTH: columns of text, where it is not printed on a console.
        warnings: printed below the tables.
    """

    WIDTH: ClassVar[int] = 100
    warnings: list[str]

    def tables(self) -> RenderableType:
        """Return the report without its warnings."""
        raise NotImplementedError

    def __rich__(self) -> RenderableType:
        return Group(self.tables(), *(make_text(f"! {warning}", "yellow") for warning in self.warnings))

    def __str__(self) -> str:
        file = io.StringIO()
        Console(file=file, width=self.WIDTH, color_system=None, force_jupyter=False, force_terminal=False).print(self)
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines())

    def _repr_html_(self) -> str:
        """Return the tables as HTML, for a notebook's cell; names are escaped."""
        console = Console(record=True, width=self.WIDTH, file=io.StringIO(), force_jupyter=False, force_terminal=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format='<pre style="line-height: 1.3">{code}</pre>')

    def __repr__(self) -> str:
        return str(self)  # the last line of a notebook's cell shows the tables, not the fields
