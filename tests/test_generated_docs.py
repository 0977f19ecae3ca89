"""The generated pages: complete, and their figures are the stored ones."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import ties_peft
from ties_peft.cli import app

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))
import catalogue  # noqa: E402
import docstrings  # noqa: E402
import generate  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PAGE = catalogue.page()
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}


def stored(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def figure(value: float) -> str:
    return f"{value:.1f}".replace("-", "−")


def test_the_catalogue_has_every_method_with_its_advice_and_parameters() -> None:
    known = {info.name: info for info in ties_peft.methods()}
    assert list(SECTIONS) == list(known)
    assert set(catalogue.ADVICE) == set(known)
    for name, info in known.items():
        text = SECTIONS[name]
        assert re.search(r"^\*\*Use it\*\* \S", text, re.MULTILINE), name
        assert re.search(r"^\*\*Do not use it\*\* \S", text, re.MULTILINE), name
        assert "**Source:**" in text, name
        for parameter in info.parameters:
            default = "none" if parameter.default is None else f"`{parameter.default}`"
            assert f"| `{parameter.name}` | {default} |" in text, (name, parameter.name)


def test_ranges_are_those_that_the_parameters_accept() -> None:
    """By hand, for a few."""
    assert "| `density` | `0.2` | \\> 0 and ≤ 1 |" in SECTIONS["ties"]
    assert "| `elect` | `mass` | mass, count, none |" in SECTIONS["ties"]
    assert "| `flatten` | none | ≥ 0 and ≤ 1 or none |" in SECTIONS["dual"]


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_figures_of_the_encoder_are_the_stored_ones(kind: str) -> None:
    """Those of methods with their defaults at rank Σrᵢ, which is that of the average."""
    rows = stored("methods")[kind]
    total = next(row["rank"] for row in rows if row["method"] == "average")
    column = list(catalogue.WORLDS).index(kind)
    checked = 0
    for row in rows:
        if row["method"] in SECTIONS and row["space"] == "delta" and row["rank"] == total:
            assert overview(row["method"])[column] == figure(row["normalised"]), row["method"]
            checked += 1
    assert checked > 15


def test_figures_of_the_language_model_are_the_stored_ones() -> None:
    rows = stored("language_model")["test"]["six"]
    for row in rows:
        if row["method"] in SECTIONS and row["space"] == "delta":
            assert overview(row["method"])[2:] == [figure(row["six"]), figure(row["worst"])], row["method"]


def overview(name: str) -> list[str]:
    """The figures of a method in the table at the top."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| [`{name}`]"))
    return line.strip("| ").split(" | ")[2:]


def test_what_auto_stands_for_has_its_figures() -> None:
    assert overview("dual")[0] == overview("auto")[0]
    assert overview("rms_sum")[1] == overview("auto")[1]
    assert overview("dual")[2:] == overview("auto")[2:]


def test_a_method_without_figures_is_said_not_to_be_measured() -> None:
    labels = [row["method"] for kind in ("lora", "ia3") for row in stored("methods")[kind]]
    labels += [row["method"] for row in stored("language_model")["test"]["six"]]
    labels += [row["way"] for kind in ("lora", "ia3") for row in stored("choose")[kind]]
    first = {re.split(r"[ ,+]", label)[0] for label in labels}
    for name, text in SECTIONS.items():
        measured = name in first or name in ("dual", "rms_sum")
        assert ("Not measured." in text) == (not measured), name
    assert "Not measured." in PAGE


def test_every_public_name_and_its_members_are_documented() -> None:
    page = generate.api()
    for name in ties_peft.__all__:
        value = getattr(ties_peft, name)
        assert f":: ties_peft.{name}\n" in page
        assert (inspect.getdoc(value) or "").strip(), name
        if isinstance(value, type) and value.__module__.startswith("ties_peft"):
            for member, own in vars(value).items():
                documented = getattr(getattr(own, "func", getattr(own, "fget", own)), "__doc__", None)
                is_code = inspect.isroutine(own) or isinstance(own, property) or hasattr(own, "func")
                assert member.startswith("_") or not is_code or documented, f"{name}.{member}"


def test_every_option_of_every_command_is_on_its_page() -> None:
    page = generate.command_line()
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        section = re.split(r"^## ", page.split(f"## {name}\n", 1)[1], flags=re.MULTILINE)[0]
        for option in command.params:
            flags = option.opts if option.param_type_name == "option" else [option.name.upper()]
            assert all(f"{flag}`" in section or f"{flag}," in section for flag in flags), (name, flags)


def test_the_figure_of_auto_shows_the_stored_figures() -> None:
    shown = re.findall(r">(\d+)</text>", (ROOT / "docs" / "images" / "auto.svg").read_text(encoding="utf-8"))
    tables = [stored("methods")["lora"], stored("methods")["ia3"], stored("language_model")["test"]["six"]]
    for name in ("auto", "average", "ties"):
        for table, column in zip(tables, ("normalised", "normalised", "six"), strict=True):
            row = next(row for row in table if row["method"] == name)
            assert f"{row[column]:.0f}" in shown, name


def test_each_concept_has_its_figure() -> None:
    pytest.importorskip("matplotlib")
    figures = importlib.import_module("concept_figures")
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    drawn = [name for name in ("spaces", "methods", "rank", "retention", "auto") if callable(getattr(figures, name))]
    assert sorted(re.findall(r"\(images/(\w+)\.svg\)", page)) == sorted(drawn)


def test_a_docstring_becomes_markdown_and_restructured_text() -> None:
    text = """Add a*b and `c|d`.

    A paragraph
    goes on:

        x = Σ y
            z

    Args:
        first, second: what
            it is.
        **others: more.
    Law: one
        line.
    """
    blocks = docstrings.read(inspect.cleandoc(text))
    assert docstrings.markdown(blocks) == (
        "Add a\\*b and `c|d`.\n\nA paragraph goes on:\n\n```text\nx = Σ y\n    z\n```\n\n**Arguments:**\n\n"
        "- `first, second`: what it is.\n- `**others`: more.\n\n**Laws:** one line.\n"
    )
    rest = "\n".join(docstrings.restructured(blocks))
    assert "Add a\\*b and ``c|d``." in rest
    assert ".. code-block:: text\n\n   x = Σ y\n       z\n" in rest
    assert "- ``first, second``: what it is.\n- ``**others``: more." in rest
