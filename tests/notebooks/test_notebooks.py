"""Every notebook runs from top to bottom, is easy to read, and stores nothing of the machine that ran it."""

from __future__ import annotations

import re
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

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(output: Any) -> str:
    """The text of one output, whatever its form."""
    if output.output_type == "stream":
        return str(output.text)
    return "\n".join(str(part) for part in output.get("data", {}).values())


def clean(notebook: Any) -> None:
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        assert output.output_type != "error"
        estimate = said(output).startswith("distil: ")  # of time and memory, printed before a long run
        assert output.get("name") != "stderr" or estimate, said(output)
        assert not ABSOLUTE.search(said(output)), said(output)


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize(
    "path", [NOTEBOOKS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in NOTEBOOKS[1:])], ids=lambda path: path.stem
)
def test_it_runs(path: Path) -> None:
    notebook = read(path)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    clean(notebook)


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
