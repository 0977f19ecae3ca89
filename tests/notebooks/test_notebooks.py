"""Every notebook runs from top to bottom, is easy to read, and stores nothing of the machine that ran it."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_LINES = 12
MAX_BYTES = 200_000
ABSOLUTE = re.compile(r"(?<![\w.:/~-])/(?:[\w.+-]+/)+[\w.+-]*|\b[A-Z]:\\\w")

# Numbers that decide how long a notebook runs, as they are set in a cell of its own, and what they are in these tests.
BUDGETS = {"5-merge-language-model-loras": {"ROWS": 2, "PROMPTS": 5, "STEPS": 1}}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(output: Any) -> str:
    """The text of one output, whatever its form; a picture has none."""
    if output.output_type == "stream":
        return str(output.text)
    parts = sorted(output.get("data", {}).items())  # a file has its forms in this order, a kernel in any
    return "\n".join(str(part) for form, part in parts if not form.startswith("image/"))


def clean(notebook: Any) -> None:
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        assert output.output_type != "error"
        estimate = said(output).startswith("distil: ")  # of time and memory, printed before a long run
        assert output.get("name") != "stderr" or estimate, said(output)
        assert not ABSOLUTE.search(said(output)), said(output)


def words(notebook: Any) -> list[str]:
    """The words of all outputs without figures, and without the time that a merge took."""
    text = "\n".join(said(output) for cell in code_cells(notebook) for output in cell.outputs)
    return re.findall(r"[^\W\d_]+", re.sub(r"(?m)^time .*", "", text))


def lower_budget(notebook: Any, name: str, value: int) -> None:
    """Replace a number where it is set."""
    setting = re.compile(rf"^{name} = \d+", re.MULTILINE)
    (cell,) = (cell for cell in code_cells(notebook) if setting.search(cell.source))
    cell.source = setting.sub(f"{name} = {value}", cell.source)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@each
def test_it_has_a_plot_with_labelled_axes_and_needs_nothing_outside_the_repository(path: Path) -> None:
    notebook = read(path)
    assert any("image/png" in output.get("data", {}) for cell in code_cells(notebook) for output in cell.outputs)
    source = "\n".join(cell.source for cell in code_cells(notebook))
    assert re.search(r"[xy]label", source) and "title" in source
    assert "../.." not in source


@pytest.mark.parametrize(
    "path",
    [NOTEBOOKS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in NOTEBOOKS[1:])],
    ids=lambda path: path.stem,
)
def test_it_runs(path: Path) -> None:
    notebook = read(path)
    for name, value in BUDGETS.get(path.stem, {}).items():
        lower_budget(notebook, name, value)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    clean(notebook)
    if path.stem not in BUDGETS:  # the stored outputs are still those that it prints, but for a few words
        assert SequenceMatcher(a=words(read(path)), b=words(notebook), autojunk=False).ratio() > 0.95


@each
def test_its_cells_are_short_and_its_words_many(path: Path) -> None:
    notebook = read(path)
    for cell in code_cells(notebook):
        assert sum(bool(line.strip()) for line in cell.source.splitlines()) <= MAX_LINES, cell.source
        assert not ABSOLUTE.search(cell.source), cell.source
    words = sum(len(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert words > sum(len(cell.source.split()) for cell in code_cells(notebook))


@each
def test_its_stored_outputs_are_whole_small_and_clean(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    notebook = read(path)
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    clean(notebook)
