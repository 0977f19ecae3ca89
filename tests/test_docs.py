"""The documentation: links lead to files, Python parses, commands and their flags exist."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer
from test_readme import commands

from ties_peft.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "generated" not in page.parts]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def links(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return {link for link in re.findall(r"\]\(([^)\s#]+)", text) if "://" not in link}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_python_parses(page: Path) -> None:
    assert [link for link in sorted(links(page)) if not (page.parent / link).exists()] == []
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(textwrap.dedent(block))


def test_the_links_and_commands_are_found() -> None:
    """The other tests would pass on nothing."""
    assert len(set.union(*map(links, PAGES))) > 20
    assert {"merge", "inspect", "analyze", "convert"} <= {words[1] for words in commands()}


def test_commands_and_flags_exist() -> None:
    wrong = []
    for words in commands():
        name, *rest = (word.strip("[]") for word in words[1:])
        if name.startswith("--"):  # of ties-peft itself
            continue
        known = {flag for p in COMMANDS[name].params for flag in (*p.opts, *p.secondary_opts)}
        wrong += [(name, word) for word in rest if word.startswith("--") and word not in known | {"--help"}]
    assert wrong == []


def test_every_page_stands_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES[1:]} - {"index"}
    assert pages <= set(index)
