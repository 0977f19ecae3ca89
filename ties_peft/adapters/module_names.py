"""Module names: the names of one module in different versions of transformers.

Transformers 5 renamed the layers of some models, so adapters for the same base may name its modules differently. A checkpoint
keeps the old names. The pairs of names are those of transformers' own conversion table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

VIT = re.compile(r"^(.*?)encoder\.layer\.(\d+)\.(.+)$")
VIT_PARTS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("audio_tower.", "model.audio_tower."),
    ("visual.", "model.visual."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens", "model.language_model.embed_tokens"),
)
# CLIPTextModel, CLIPVisionModel and similar classes (SigLIP, MetaCLIP 2, …) lost these prefixes in transformers 5.6, also as
# the vision tower of another model; CLIPModel and the classes with a projection still have them.
TEXT_TOWER = "text_model."
TOWERS = (TEXT_TOWER, "vision_model.")
TOWER = re.compile(
    rf"^(|(?:.+\.)?vision_tower\.)({'|'.join(map(re.escape, TOWERS))})((?:encoder|embeddings|head)\..+)$"
)
BARE_TOWER = re.compile(r"^(|(?:.+\.)?vision_tower\.)((?:encoder|embeddings|head)\..+)$")


def newer_name(name: str) -> str | None:
    """Return a module's name after the next renaming in transformers; None if it was not renamed."""
    vit = VIT.match(name)
    if vit is not None and vit[3] in VIT_PARTS:
        return f"{vit[1]}layers.{vit[2]}.{VIT_PARTS[vit[3]]}"
    moved = next((new + name[len(old) :] for old, new in PREFIXES if name.startswith(old)), None)
    return moved if moved is not None else next(iter(_bare(name)), None)


def newer_names(name: str) -> Iterator[str]:
    """Yield the names that a module may have in newer releases of transformers, the nearest first."""
    following = newer_name(name)
    while following is not None:
        yield following
        following = newer_name(following)


def older_names(name: str) -> list[str]:
    """Return the names that a module may have in older releases of transformers, the nearest first."""
    found = [old + name[len(new) :] for old, new in PREFIXES if name.startswith(new)]
    vit = re.match(r"^(.*?)layers\.(\d+)\.(.+)$", name)
    if vit is not None:
        found += [f"{vit[1]}encoder.layer.{vit[2]}.{old}" for old, new in VIT_PARTS.items() if new == vit[3]]
    found += _with_tower(name)
    return [*found, *(oldest for one in found for oldest in older_names(one))]


def match_names(layouts: Sequence[Mapping[str, object]]) -> list[dict[str, str]]:
    """Find new names for the modules of each adapter under which they match those of the other adapters.

    Args:
        layouts: for each adapter, a signature of each module by its name; two modules can be the same if theirs are equal.
    Returns: for each adapter, old name → new name; empty if its names stay. An adapter gets newer names only if one of its
        modules then has the name of another adapter's, and all such pairs have equal signatures. No adapter is renamed if
        two adapters would have different new names for the same old one.
    """
    tables = [{name: name for name in layout} for layout in layouts]
    while (found := _next_renamed(layouts, tables)) is not None:
        place, table = found
        tables[place] = table
    kept: dict[str, str] = {}
    apart = any(kept.setdefault(old, new) != new for table in tables for old, new in table.items())
    return [{} if apart else {old: new for old, new in table.items() if old != new} for table in tables]


def _next_renamed(
    layouts: Sequence[Mapping[str, object]], tables: Sequence[Mapping[str, str]]
) -> tuple[int, dict[str, str]] | None:
    """Return the index of the next adapter that matches another one under newer names, and the new name of each module."""
    known = {new: layout[old] for layout, table in zip(layouts, tables, strict=True) for old, new in table.items()}
    for place, (layout, table) in enumerate(zip(layouts, tables, strict=True)):
        for renamed in _newer_tables(table):
            met = [old for old, new in renamed.items() if new != table[old] and new in known]
            if met and all(layout[old] == known[renamed[old]] for old in met):
                return place, renamed
    return None


def _newer_tables(table: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield a table with the names of newer releases instead of its own, one release at a time, while names stay distinct."""
    moved = dict(table)
    while True:
        before, moved = moved, {old: newer_name(name) or name for old, name in moved.items()}
        if moved == before or len(set(moved.values())) < len(moved):
            return
        yield moved


def without_tower_prefix(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return the base model's name for each module that has a tower's prefix which the base's modules lack: old name → new."""
    there = set(known)
    return {name: new for name in names if name not in there for new in _bare(name) if new in there}


def accepted_names(known: Iterable[str], *, exactly: bool) -> dict[str, str]:
    """Return the name to write for each name that a module of a model may have in some release.

    Args:
        known: the names of the model's modules.
        exactly: whether they are the names of the model itself. Those of a checkpoint may be older: then only tower
            prefixes are considered, and a name without one is written as it is.
    Returns: accepted name → name to write, without names that may belong to several modules.
    """
    names = set(known)
    found: dict[str, set[str]] = {}
    for name in names:
        for other in older_names(name) if exactly else _with_tower(name):
            found.setdefault(other, set()).add(name)
        for other in newer_names(name) if exactly else _bare(name):
            found.setdefault(other, set()).add(name if exactly else other)
    single = {other: min(written) for other, written in found.items() if len(written) == 1}
    return single | {name: name for name in names}


def _with_tower(name: str) -> list[str]:
    """Return a module's names with the tower prefixes that it may have had."""
    bare = BARE_TOWER.match(name)
    return [] if bare is None else [f"{bare[1]}{tower}{bare[2]}" for tower in (TOWERS[1:] if bare[1] else TOWERS)]


def _bare(name: str) -> list[str]:
    """Return a module's name without a tower's prefix; empty if it has none."""
    tower = TOWER.match(name)
    return [] if tower is None else [tower[1] + tower[3]]


def tower_prefix(names: Iterable[str]) -> str | None:
    """Return the tower prefix that all names start with; None if they have none, or several."""
    found = {match[2] if (match := TOWER.match(name)) is not None and not match[1] else None for name in names}
    return found.pop() if len(found) == 1 else None
