"""Read docstrings as blocks, and write the blocks as Markdown or as reStructuredText."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

LISTS = ("Args", "Attributes")
FIELDS = (*LISTS, "Returns", "Raises", "Law", "Source", "When to use")
TITLES = {"Args": "Arguments", "Law": "Laws"}  # where the heading on a page is another one
FIELD = re.compile(rf"({'|'.join(FIELDS)}):\s*(.*)")
ITEM = re.compile(r" {4}(\S[^:]*): (.*)|- (.*)")


class Block(NamedTuple):
    """A part of a docstring: a paragraph, a text to keep as it stands, or a field such as `Args` with its items."""

    kind: str  # paragraph, literal, field
    title: str
    text: str
    items: tuple[tuple[str, str], ...] = ()


def read(text: str) -> list[Block]:
    """Return the blocks of a docstring.

    A part that begins with an indented line or with `>>>` is kept as it stands. `Args:`, `Law:` and the like begin a field,
    whose further lines are indented.
    """
    parts = re.split(rf"\n\s*\n|\n(?=(?:{'|'.join(FIELDS)}):)", inspect.cleandoc(text))
    return [_block(part) for part in parts if part.strip()]


def _block(part: str) -> Block:
    found = FIELD.match(part)
    if found and found[1] in LISTS:
        return Block("field", found[1], "", _items(part.splitlines()[1:]))
    if found:
        return Block("field", found[1], _joined(part[found.start(2) :]))
    if part[:1].isspace() or part.startswith(">>>"):
        return Block("literal", "", inspect.cleandoc("\n" + part))
    lines = part.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith("- ")), len(lines))
    return Block("paragraph", "", _joined("\n".join(lines[:first])), _items(lines[first:]))


def _items(lines: list[str]) -> tuple[tuple[str, str], ...]:
    """Return the names of a list and their texts; the name of an item after a dash is empty."""
    items: list[tuple[str, str]] = []
    for line in lines:
        found = ITEM.fullmatch(line)
        if found:
            items.append((found[1] or "", (found[2] or found[3] or "").strip()))
        elif items:
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}")
    return tuple(items)


def _joined(text: str) -> str:
    return " ".join(text.split())


def markdown(blocks: list[Block]) -> str:
    """Return blocks as Markdown."""
    found = []
    for block in blocks:
        if block.kind == "literal":
            found.append(f"```text\n{block.text}\n```")
            continue
        title = f"**{TITLES.get(block.title, block.title)}:** " if block.title else ""
        found.append(f"{title}{markdown_text(block.text)}".strip())
        found += ["\n".join(f"- {f'`{name}`: ' if name else ''}{markdown_text(text)}" for name, text in block.items)]
    return "\n\n".join(part for part in found if part) + "\n"


def restructured(blocks: list[Block]) -> list[str]:
    """Return blocks as lines of reStructuredText."""
    lines: list[str] = []
    for block in blocks:
        if block.kind == "literal":
            language = "python" if block.text.startswith(">>>") else "text"
            lines += [f".. code-block:: {language}", "", *(f"   {line}" for line in block.text.splitlines()), ""]
            continue
        title = f"**{TITLES.get(block.title, block.title)}:** " if block.title else ""
        lines += [f"{title}{restructured_text(block.text)}".strip(), ""]
        for name, text in block.items:
            lines += [f"- {f'``{name}``: ' if name else ''}{restructured_text(text)}"]
        lines += [""]
    return lines


def markdown_text(text: str) -> str:
    """Return a text in which Markdown sees no markup other than code."""
    return _outside_code(" ".join(text.split()), lambda part: re.sub(r"([\\\[\]*<>$_|])", r"\\\1", part), "`")


def restructured_text(text: str) -> str:
    """Return a text in which reStructuredText sees no markup other than code."""
    return _outside_code(text, lambda part: re.sub(r"([\\*|_`])", r"\\\1", part), "``")


def _outside_code(text: str, escape: Callable[[str], str], quote: str) -> str:
    """Return a text with everything escaped that is not between backticks."""
    parts = re.split(r"(`[^`]+`)", text)
    shown = [f"{quote}{part[1:-1]}{quote}" if n % 2 else escape(part) for n, part in enumerate(parts)]
    for n in range(1, len(shown) if quote == "``" else 0, 2):  # the markup must not touch a letter
        before = "\\ " if shown[n - 1][-1:].isalnum() else ""
        shown[n] = before + shown[n] + ("\\ " if shown[n + 1][:1].isalnum() else "")
    return "".join(shown)
