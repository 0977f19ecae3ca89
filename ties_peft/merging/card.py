"""Make the model card of a result: the README.md, with the front matter that the Hub reads.

A card is published. Adapters and bases on this machine are therefore called by their names, never by their paths, and
those on the Hub are linked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..adapters import sources
from ..errors import RecipeError, printable, some
from .loading import Loading
from .recipes.yaml_document import Document, dump
from .report import Report, describe_outcomes, figure

TYPE_TAGS = {"LoRA": "lora", "(IA)³": "ia3"}
PLACEHOLDER_FOLDER = "path/to/this/folder"  # in the lines of Python; `push` writes the repository's name there
ABSOLUTE = re.compile(r"(?<![\w:/.])(?:/|~/|[A-Za-z]:\\)[^\s'\",;()\[\]]+")
LICENCE = ("license", "license_name", "license_link")
LARGEST_CARD = 1 << 20  # bytes; a larger file is not read for its licence
PROJECT = "`ties_peft`"
FIGURES = (
    "Here τᵢ is the task vector of an adapter and τ the merged one: projection = ⟨τ, τᵢ⟩/‖τᵢ‖² (1: all of τᵢ is in the "
    "result, 0: nothing), cosine = ⟨τ, τᵢ⟩/(‖τ‖·‖τᵢ‖), others = ‖τ − projection·τᵢ‖/‖τᵢ‖."
)


def merge_card(
    report: Report,
    recipe: Mapping[str, Any],
    loading: Loading,
    trainings: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> str:
    """Return the card of a merge.

    Args:
        report: of the merge.
        recipe: as plain values.
        loading: how the result is loaded on its base.
        trainings: what the files of LoRAs of image models say of their training, by input.
    """
    energy = "" if report.rank is None else f" Its rank, {report.rank}, keeps {report.energy:.1%} of the merged energy."
    rows = [
        (
            adapter_link(line.name, line.page),
            f"{line.weight:g}",
            ", ".join(map(str, line.ranks)),
            f"{line.norm:.4g}",
            figure(line.projection),
            figure(line.cosine),
            figure(line.others),
            f"`{line.digest[:12]}`",
        )
        for line in report.adapters
    ]
    paths = [recipe, [line.base for line in report.adapters]]
    return model_card(
        loading,
        ["merge", "ties_peft", TYPE_TAGS.get(report.kind, "peft"), report.method],
        report.licence,
        [
            f"# A merge of {len(report.adapters)} {report.kind} adapters",
            f"Made by {PROJECT} with the method `{report.method}` in space `{report.space}`, scale {report.scale_text}.{energy}",
            markdown_table(("adapter", "weight", "rank", "norm", "projection", "cosine", "others", "digest"), rows),
            FIGURES,
            markdown_list("Layers that an adapter stores as a whole:", describe_outcomes(report.riders)),
            "Load it:",
            loading_block(loading),
            "The recipe; with the same inputs it gives the same bytes again. An adapter that was on the machine of the merge is called by "
            "the name of its folder there; the digests above tell whether yours is the same:",
            code_block(dump(public(recipe)), "yaml"),
            markdown_list("What the files of the inputs say of their training:", list(_trainings(trainings, paths))),
            markdown_list("Warnings of the merge:", [public_text(warning, paths) for warning in report.warnings]),
        ],
    )


def _trainings(trainings: Mapping[str, Mapping[str, str]], paths: Any) -> Iterator[str]:
    """Yield a line for each input; its texts are not ours, so they are written as code."""
    for name, facts in trainings.items():
        texts = (f"{what}: {code_span(public_text(text, paths))}" for what, text in facts.items())
        yield f"{adapter_link(_public_name(name), None)}: {', '.join(texts)}"


def code_span(text: str) -> str:
    """Return a text as code within a line, which no text in it can end."""
    fence = _fence(text, 1)
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def model_card(loading: Loading, tags: Sequence[str], licence: Mapping[str, Any], sections: Sequence[str]) -> str:
    """Return a card: the front matter, then the sections that are not empty.

    The Hub refuses a card whose base model is not the name of a repository, so any other base is left out.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base = loading.base if loading.base and sources.is_hub_name(loading.base) else None
    library = "diffusers" if loading.library == "diffusers" and loading.name == "DiffusionPipeline" else "peft"
    data = ModelCardData(base_model=base, library_name=library, tags=list(tags), **licence)
    body = "\n\n".join(section for section in sections if section)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; its cells hold no line breaks and no bare `|`."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown_list(heading: str, items: Sequence[str]) -> str:
    """Return a heading and a list, an item a line; nothing if there are no items."""
    return "\n".join((heading, "", *(f"- {printable(item)}" for item in items))) if items else ""


def loading_block(loading: Loading) -> str:
    """Return the lines of Python that load the result, as a block of code."""
    base = loading.base
    if base and not sources.is_hub_name(base):
        base = f"path/to/{_public_name(base)}"
    return code_block("\n".join(replace(loading, base=base).lines(PLACEHOLDER_FOLDER)), "python")


def code_block(text: str, language: str) -> str:
    """Return a block of code that no text in it can close."""
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text.strip()}\n{fence}"


def _fence(text: str, least: int) -> str:
    """Return a row of backticks that is longer than any in a text, and at least `least` long."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def adapter_link(name: str, page: str | None) -> str:
    """Return an adapter's name for a cell of a table, linked to its page on the Hub if it has one."""
    text = printable(_last_part(name) if name.startswith("/") else name).replace("|", "\\|")
    return text if page is None else f"[{text}]({page})"


def public(values: Any) -> Any:
    """Return plain values in which every path on this machine is replaced by its last part."""
    if isinstance(values, Mapping):
        return {key: public(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [public(value) for value in values]
    return _public_name(values) if isinstance(values, str) else values


def public_text(text: str, values: Any) -> str:
    """Return a sentence without paths: neither those among some plain values nor absolute ones."""
    for path in sorted({value for value in _strings(values) if _public_name(value) != value}, key=len, reverse=True):
        text = text.replace(printable(path), _public_name(path)).replace(path, _public_name(path))
    return printable(ABSOLUTE.sub(lambda match: _last_part(match[0]), text))


def shared_licence(adapters: Sequence[tuple[str, Path | None]]) -> tuple[dict[str, Any], str]:
    """Return the licence for the front matter, if the cards of all adapters agree on it, and a note on why or why not.

    Args:
        adapters: (name, folder) of each; folder None for one in memory.
    """
    found = [(name, _licence(folder)) for name, folder in adapters]
    first = found[0][1]
    if first and all(licence == first for _, licence in found):
        of = "the adapter's card says" if len(found) == 1 else "the cards of all adapters say"
        return dict(first), f"{_licence_text(first)}, as {of}"
    if not any(licence for _, licence in found):
        return {}, "left out: no adapter's card names one"
    holders: dict[str, list[str]] = {}
    for name, licence in found:
        holders.setdefault(_licence_text(licence) if licence else "none named", []).append(name)
    listed = "; ".join(f"{some(own)}: {text}" for text, own in holders.items())
    return {}, f"left out, as the adapters' cards differ: {listed}"


def _licence(folder: Path | None) -> dict[str, Any]:
    """Return the licence in the front matter of an adapter's card; empty if it names none."""
    path = next((path for path in sources.card_paths(folder) if path.is_file()), None) if folder is not None else None
    if path is None or not sources.stays_inside(path):
        return {}
    state = path.stat()
    return _licence_in(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _licence_in(path: Path, size: int, changed: int) -> dict[str, Any]:
    if size > LARGEST_CARD:
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


def _licence_text(licence: Mapping[str, Any]) -> str:
    named = licence["license"]
    text = ", ".join(named) if isinstance(named, list) else str(named)
    more = [str(licence[key]) for key in LICENCE[1:] if key in licence]
    return f"{text} ({', '.join(more)})" if more else text


def _public_name(value: str) -> str:
    """Return the last part of a path on this machine; other text without absolute paths."""
    local = re.match(r"/|~|[A-Za-z]:\\", value) is not None or sources.local_path(value) is not None
    return _last_part(value) if local else ABSOLUTE.sub(lambda match: _last_part(match[0]), value)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "folder"


def _strings(values: Any) -> Iterable[str]:
    """Return all strings in plain values."""
    inner = values.values() if isinstance(values, Mapping) else values if isinstance(values, (list, tuple)) else ()
    return [values] if isinstance(values, str) else [text for value in inner for text in _strings(value)]
