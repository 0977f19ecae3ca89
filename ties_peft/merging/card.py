"""Card: the README.md of a result, with the front matter that the Hub reads.

A card is made to be shown to others: adapters and bases on this machine stand in it by their names, never by
their paths, and those on the Hub as links.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ..adapters import sources
from ..errors import RecipeError, printable
from .loading import Loading
from .recipes.yaml_document import Document, dump
from .report import Report, describe_extra_tensors, figure

KIND_TAGS = {"LoRA": "lora", "(IA)³": "ia3"}
HERE = "path/to/this/folder"  # in the lines of Python; on the Hub the repository's name stands there
ABSOLUTE = re.compile(r"(?<![\w:/.])(?:/|~/|[A-Za-z]:\\)[^\s'\",;()\[\]]+")
LICENCE = ("license", "license_name", "license_link")
LONGEST = 1 << 20  # bytes of a card that is read; no front matter is longer


def card(report: Report, recipe: Mapping[str, Any], loading: Loading) -> str:
    """Return the text of the card.

    Args:
        report: of the merge.
        recipe: as plain values.
        loading: how the result is put on its base.
    """
    rows = "\n".join(
        f"| {adapter_link(line.name, line.page)} | {line.weight:g} | {', '.join(map(str, line.ranks))} | {line.norm:.4g} | {figure(line.projection)} | {figure(line.cosine)} | {figure(line.others)} | `{line.digest[:12]}` |"
        for line in report.adapters
    )
    kept = (
        f" Its rank, {report.rank}, keeps {report.energy:.1%} of the merged energy." if report.rank is not None else ""
    )
    whole = "".join(f"\n- {text}" for text in describe_extra_tensors(report.riders))
    named = [recipe, [line.base for line in report.adapters]]
    notes = "".join(f"\n- {public_text(warning, named)}" for warning in report.warnings)
    tags = ["merge", "ties_peft", KIND_TAGS.get(report.kind, "peft"), report.method]
    return f"""{front_matter(loading, tags, report.licence)}
# A merge of {len(report.adapters)} {report.kind} adapters

Made by [ties_peft](https://pypi.org/project/ties-peft/) with the method `{report.method}` in space `{report.space}`, scale {report.scale_text}.{kept}

| adapter | weight | rank | norm | projection | cosine | others | digest |
|---|---|---|---|---|---|---|---|
{rows}

Of each adapter's task vector τᵢ, in the merged one τ: projection = ⟨τ, τᵢ⟩/‖τᵢ‖² (1 is all of it, 0 is nothing), cosine = ⟨τ, τᵢ⟩/(‖τ‖·‖τᵢ‖), others = ‖τ − projection·τᵢ‖/‖τᵢ‖.
{f"{chr(10)}Layers that some of them hold whole:{chr(10)}{whole}{chr(10)}" if whole else ""}
{snippet(loading)}

The recipe, which makes the same bytes again from the same inputs:

{_fenced(dump(public(recipe)), "yaml")}
{f"{chr(10)}Noted while merging:{chr(10)}{notes}{chr(10)}" if notes else ""}"""


def front_matter(loading: Loading, tags: Sequence[str], licence: Mapping[str, Any]) -> str:
    """Return what the Hub reads; it takes a base model by its name there alone, and refuses the card otherwise."""
    base = loading.base
    front = {
        **({"base_model": base} if base and sources.is_hub_name(base) else {}),
        "library_name": "peft",
        **licence,
        "tags": list(tags),
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---"


def snippet(loading: Loading) -> str:
    """Return the lines of Python that load the result, as a block of code."""
    base = loading.base
    if base and not sources.is_hub_name(base):
        base = f"path/to/{_name(base)}"
    return _fenced("\n".join(replace(loading, base=base).lines(HERE)), "python")


def adapter_link(name: str, page: str | None) -> str:
    """Return an adapter's name for a cell of a table, with a link to its page on the Hub."""
    text = printable(_last(name) if name.startswith("/") else name).replace("|", "\\|")
    return text if page is None else f"[{text}]({page})"


def public(values: Any) -> Any:
    """Return plain values in which what lies on this machine is called by its name."""
    if isinstance(values, Mapping):
        return {key: public(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [public(value) for value in values]
    return _name(values) if isinstance(values, str) else values


def public_text(text: str, named: Any) -> str:
    """Return a sentence in which the paths among some plain values, and all that are absolute, are replaced by names."""
    for path in sorted({value for value in _texts(named) if _name(value) != value}, key=len, reverse=True):
        text = text.replace(printable(path), _name(path)).replace(path, _name(path))
    return printable(ABSOLUTE.sub(lambda match: _last(match[0]), text))


def shared_licence(adapters: Sequence[tuple[str, Path | None]]) -> tuple[dict[str, Any], str]:
    """Return (the licence in the front matter of all adapters' cards, what became of it in words).

    Args:
        adapters: (how messages name it, where its files lie) of each; None for one in memory.
    """
    found = [(name, _licence(folder)) for name, folder in adapters]
    first = found[0][1]
    if first and all(licence == first for _, licence in found):
        of = "the adapter's card says" if len(found) == 1 else "the cards of all adapters say"
        return dict(first), f"{_worded(first)}, as {of}"
    if not any(licence for _, licence in found):
        return {}, "left out: no adapter's card names one"
    holders: dict[str, list[str]] = {}
    for name, licence in found:
        holders.setdefault(_worded(licence) if licence else "none named", []).append(name)
    listed = "; ".join(f"{', '.join(own[:4])}{', …' * (len(own) > 4)}: {text}" for text, own in holders.items())
    return {}, f"left out, as the adapters' cards differ: {listed}"


def _licence(folder: Path | None) -> dict[str, Any]:
    """The licence in the front matter of an adapter's card; empty where it names none."""
    path = next((path for path in sources.card_paths(folder) if path.is_file()), None) if folder is not None else None
    if path is None or not sources.stays_inside(path):
        return {}
    state = path.stat()
    return _licence_in(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _licence_in(path: Path, size: int, changed: int) -> dict[str, Any]:
    if size > LONGEST:
        return {}
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    end = text.find("\n---", 4)
    if not text.startswith("---\n") or end < 0:
        return {}
    try:
        front = Document(text[4:end], "card", {}).values
    except RecipeError:
        return {}
    given = front if isinstance(front, dict) and _is_licence(front.get("license")) else {}
    return {key: given[key] for key in LICENCE if _is_licence(given.get(key))}


def _is_licence(value: object) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name.isprintable() and 0 < len(name) <= 200 for name in names)


def _worded(licence: Mapping[str, Any]) -> str:
    named = licence["license"]
    text = ", ".join(named) if isinstance(named, list) else str(named)
    more = [str(licence[key]) for key in LICENCE[1:] if key in licence]
    return f"{text} ({', '.join(more)})" if more else text


def _fenced(text: str, language: str) -> str:
    """A block of code that no name in it can close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _name(value: str) -> str:
    """The last part of a path on this machine; anything else as it stands."""
    here = re.match(r"/|~|[A-Za-z]:\\", value) is not None or sources.local_path(value) is not None
    return _last(value) if here else ABSOLUTE.sub(lambda match: _last(match[0]), value)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "folder"


def _texts(values: Any) -> Iterable[str]:
    """All texts in plain values."""
    inner = values.values() if isinstance(values, Mapping) else values if isinstance(values, (list, tuple)) else ()
    return [values] if isinstance(values, str) else [text for value in inner for text in _texts(value)]
