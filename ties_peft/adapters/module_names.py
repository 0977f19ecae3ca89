"""Spellings: one module's names in different versions of transformers.

Transformers 5 renamed the layers of some models, so that adapters for one base may name its modules
differently; a checkpoint keeps the old names. The pairs are facts of transformers' own conversion table.
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
# CLIPTextModel, CLIPVisionModel and their like (SigLIP, MetaCLIP 2, …) lost these prefixes in transformers 5.6, also as
# the vision tower of another model; CLIPModel and the classes with a projection have them still.
TOWERS = ("text_model.", "vision_model.")
TOWER = re.compile(
    rf"^(|(?:.+\.)?vision_tower\.)({'|'.join(map(re.escape, TOWERS))})((?:encoder|embeddings|head)\..+)$"
)
BARE_TOWER = re.compile(r"^(|(?:.+\.)?vision_tower\.)((?:encoder|embeddings|head)\..+)$")


def newer_name(name: str) -> str | None:
    """A module's name in the next newer transformers, where it may have another; None where not."""
    vit = VIT.match(name)
    if vit is not None and vit[3] in VIT_PARTS:
        return f"{vit[1]}layers.{vit[2]}.{VIT_PARTS[vit[3]]}"
    moved = next((new + name[len(old) :] for old, new in PREFIXES if name.startswith(old)), None)
    return moved if moved is not None else next(iter(_bare(name)), None)


def newer_names(name: str) -> Iterator[str]:
    """The names that a module may have in newer releases of transformers, the nearest first."""
    following = newer_name(name)
    while following is not None:
        yield following
        following = newer_name(following)


def older_names(name: str) -> list[str]:
    """The names that a module may have in older releases of transformers, the nearest first."""
    found = [old + name[len(new) :] for old, new in PREFIXES if name.startswith(new)]
    vit = re.match(r"^(.*?)layers\.(\d+)\.(.+)$", name)
    if vit is not None:
        found += [f"{vit[1]}encoder.layer.{vit[2]}.{old}" for old, new in VIT_PARTS.items() if new == vit[3]]
    found += _with_tower(name)
    return [*found, *(oldest for one in found for oldest in older_names(one))]


def match_names(layouts: Sequence[Mapping[str, object]]) -> list[dict[str, str]]:
    """How to rename each adapter's modules so that they agree with the others'.

    Args:
        layouts: what each adapter knows of a module, by name; equal where two are of one form.
    Returns: for each adapter, old name → new; empty where its names stand. An adapter is renamed only
        where one of its modules then meets another's, and all that meet are of one form. None is where some would
        keep a name that others lose.
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
    """The next adapter that newer names let meet others, and those names by its own."""
    known = {new: layout[old] for layout, table in zip(layouts, tables, strict=True) for old, new in table.items()}
    for place, (layout, table) in enumerate(zip(layouts, tables, strict=True)):
        for renamed in _newer_tables(table):
            met = [old for old, new in renamed.items() if new != table[old] and new in known]
            if met and all(layout[old] == known[renamed[old]] for old in met):
                return place, renamed
    return None


def _newer_tables(table: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """A table with the names of newer releases in place of its own, one step at a time; no two of them are equal."""
    moved = dict(table)
    while True:
        before, moved = moved, {old: newer_name(name) or name for old, name in moved.items()}
        if moved == before or len(set(moved.values())) < len(moved):
            return
        yield moved


def without_tower_prefix(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The names of modules that lose a tower's prefix in a base whose modules have none: own name → the base's."""
    there = set(known)
    return {name: new for name in names if name not in there for new in _bare(name) if new in there}


def accepted_names(known: Iterable[str], *, exactly: bool) -> dict[str, str]:
    """Every spelling of some modules of a model → the name to write.

    Args:
        known: the names of the modules.
        exactly: whether they are the model's own. Those of a checkpoint may be older, so that a name without a
            tower's prefix stays as it is, and other spellings count for nothing.
    Returns: without the spellings that may be several modules.
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
    """The names with the prefix that a module's may have had."""
    bare = BARE_TOWER.match(name)
    return [] if bare is None else [f"{bare[1]}{tower}{bare[2]}" for tower in (TOWERS[1:] if bare[1] else TOWERS)]


def _bare(name: str) -> list[str]:
    """The name without a tower's prefix, if it has one."""
    tower = TOWER.match(name)
    return [] if tower is None else [tower[1] + tower[3]]


def tower_prefix(names: Iterable[str]) -> str | None:
    """The prefix of a tower that all of some names start with; None where they have none, or several."""
    found = {match[2] if (match := TOWER.match(name)) is not None and not match[1] else None for name in names}
    return found.pop() if len(found) == 1 else None
