"""Tables and texts fit the width at hand, whatever the names, and lose nothing by it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
from cli.run_command import run
from rich.cells import cell_len

import ties_peft
from ties_peft.methods import Method, TaskVectors, method_classes, register

Make = Callable[..., Path]
LONG = "{}-lora-of-a-very-long-name-r16-alpha32-checkpoint-{}000-of-the-second-run"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def many(make_lora: Make, count: int) -> list[str]:
    """Adapters whose names are long, with one twin: the first again, and the first negated would be cosine −1."""
    names = [make_lora(LONG.format(chr(97 + i), i), seed=i).name for i in range(count - 1)]
    return [*names, make_lora(LONG.format("twin", 9), seed=0, gain=2).name]


def merged(make_lora: Make, count: int, width: int) -> tuple[list[str], Any]:
    """(the lines of a merge's output, its report)."""
    names = many(make_lora, count)
    outcome = run("merge", *names, "--out", "out", env={"COLUMNS": str(width)})
    assert outcome.code == 0, outcome
    return outcome.out.splitlines(), ties_peft.merge(names).report


def two(value: float) -> str:
    """With two decimals and no negative zero."""
    return f"{value:.2f}".replace("-0.00", "0.00")


@pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")
@pytest.mark.parametrize("count", [3, 6, 8, 12])
@pytest.mark.parametrize("width", [80, 120])
def test_every_cosine_stands_in_its_row_and_column(make_lora: Make, count: int, width: int) -> None:
    lines, report = merged(make_lora, count, width)
    start = next(number for number, line in enumerate(lines) if line.startswith("cosine"))
    heading, *rows = lines[start : start + count]
    assert heading.split()[-(count - 1) :] == [str(number + 1) for number in range(count - 1)]
    for place, row in enumerate(rows, start=1):
        cells = row.split()
        assert cells[0] == str(place + 1)
        assert cells[-place:] == [two(value) for value in report.cosines[place][:place]]
    assert lines[start + count].strip() == ""
    ends = [match.end() for match in re.finditer(r"\S+", heading)][-(count - 1) :]
    assert all(
        row[end - 5 : end].strip() == two(report.cosines[-1][i]) for i, end in enumerate(ends) for row in [rows[-1]]
    )


@pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")
@pytest.mark.parametrize("count", [1, 2, 8, 12])
def test_no_line_of_a_table_is_wider_than_the_terminal(make_lora: Make, count: int) -> None:
    lines, report = merged(make_lora, count, 80)
    tables = lines[: next(number for number, line in enumerate(lines) if line.startswith("written to"))]
    assert max(cell_len(line.rstrip()) for line in tables) <= 80
    start = next(number for number, line in enumerate(lines) if line.split()[:1] == ["1"])
    text = "".join("".join(line.split()) for line in tables[start:])
    for line in report.adapters:  # however a name is broken, its number stands before it and its figures stay whole
        assert line.name[:20] in text
        assert any(f"{line.norm:.3g}" in row.split() for row in tables)


@pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")
def test_more_pairs_than_fit_are_listed_from_both_ends(make_lora: Make) -> None:
    count = 18
    lines, report = merged(make_lora, count, 80)
    start = next(number for number, line in enumerate(lines) if line.startswith("cosine"))
    assert f"{count * (count - 1) // 2} pairs" in lines[start] and "--json" in lines[start]
    listed = [
        (line.split()[0], *re.findall(r"\b(\d+)\b", line.split(maxsplit=1)[1])[:1])
        for line in lines[start + 1 : start + 11]
    ]
    values = sorted((report.cosines[i][j] for i in range(count) for j in range(i)), reverse=True)
    assert [value for value, _ in listed] == [two(value) for value in values[:5] + values[-5:]]
    assert listed[0][0] == "1.00" and {"1", str(count)} <= set(re.findall(r"\b\d+\b", lines[start + 1]))
    assert max(cell_len(line.rstrip()) for line in lines[start : start + 11]) <= 80


def test_two_adapters_have_one_cosine(make_lora: Make) -> None:
    names = [make_lora("a").name, make_lora("b", seed=1).name]
    report = ties_peft.merge(names).report
    row = next(line for line in str(report).splitlines() if line.startswith("cosine"))
    assert row.split()[1] == two(report.cosines[0][1])  # type: ignore[index]


def test_many_ranks_are_a_range(make_lora: Make) -> None:
    ranks = {"layers.0.q": 2, "layers.0.up": 3, "layers.1.q": 5}
    one = ties_peft.merge([make_lora("a", rank_pattern=ranks).name], density=1.0).report
    assert "2, 3, 5" in str(one)
    shapes = {f"layers.{i}.q": (12, 10) for i in range(5)}
    more = {f"layers.{i}.q": i + 1 for i in range(5)}
    assert "1–5" in str(ties_peft.merge([make_lora("b", shapes=shapes, rank_pattern=more).name], density=1.0).report)


# The text of a method


class Layout(Method):
    """Say one thing in a summary.

        x = first  +  second
        yy = a formula that is longer than forty columns and so has to be broken somewhere

    One two three four five six seven eight nine ten
    eleven twelve thirteen
    fourteen.

    Law: one two three four five six seven eight
        nine ten eleven twelve.
    Source: one two three four five six seven.
    """

    name: ClassVar[str] = "layout"
    source: ClassVar[str] = "nobody"

    def merge(self, tasks: TaskVectors) -> Any:
        """Give the sum."""
        return tasks.sum()


EXPECTED = """\
    x = first  +  second
    yy = a formula that is longer than
        forty columns and so has to be
        broken somewhere

One two three four five six seven eight
nine ten eleven twelve thirteen
fourteen.

Law: one two three four five six seven
    eight nine ten eleven twelve.
Source: one two three four five six
    seven.
"""


def test_the_text_of_a_method_is_laid_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["ties_peft.methods"], "_REGISTERED", {})
    register(Layout)
    try:
        out = run("methods", "layout", env={"COLUMNS": "40"}).out
    finally:
        method_classes.cache_clear()
    assert out.endswith(EXPECTED), out


@pytest.mark.parametrize(("width", "place"), [(60, 0), (80, 1), (200, 2)])
def test_texts_fit_and_keep_every_word(width: int, place: int) -> None:
    """Each method at one of the widths."""
    for info in ties_peft.methods()[place::3]:
        out = run("methods", info.name, env={"COLUMNS": str(width)}).out
        assert max(cell_len(line.rstrip()) for line in out.splitlines()) <= min(width, 200)
        text = info.text.partition("\n")[2]
        assert out.split()[-len(text.split()) :] == text.split(), info.name
        for line in text.splitlines():  # formulas that fit stand as they were written
            if line.startswith("    ") and "  " in line.strip() and cell_len(line) <= width:
                assert line in out.splitlines()
