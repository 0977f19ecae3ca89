"""Spellings: one module's names in different versions of transformers.

Transformers 5 renamed the layers of some models, so that adapters for one base may name its modules
differently; a checkpoint keeps the old names. The pairs are facts of transformers' own conversion table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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


def newer(name: str) -> str | None:
    """A module's name in transformers 5, where it may have another; None where not."""
    found = VIT.match(name)
    if found is not None and found[3] in VIT_PARTS:
        return f"{found[1]}layers.{found[2]}.{VIT_PARTS[found[3]]}"
    return next((new + name[len(old) :] for old, new in PREFIXES if name.startswith(old)), None)


def older(name: str) -> list[str]:
    """The names that `newer` turns into this one."""
    found = [old + name[len(new) :] for old, new in PREFIXES if name.startswith(new)]
    vit = re.match(r"^(.*?)layers\.(\d+)\.(.+)$", name)
    if vit is not None:
        found += [f"{vit[1]}encoder.layer.{vit[2]}.{old}" for old, new in VIT_PARTS.items() if new == vit[3]]
    return found


def agree(layouts: Sequence[Mapping[str, object]]) -> list[dict[str, str]]:
    """How to rename each adapter's modules so that they agree with the others'.

    Args:
        layouts: what each adapter knows of a module, by name; equal where two are of one form.
    Returns: for each adapter, old name → new; empty where its names stand. An adapter is renamed only
        where one of its modules then meets another's, and all that meet are of one form.
    """
    renamed: list[dict[str, str]] = []
    for layout in layouts:
        others = [other for other in layouts if other is not layout]
        table = {name: new for name in layout if (new := newer(name)) is not None and new not in layout}
        met = [(name, other[new]) for name, new in table.items() for other in others if new in other]
        fits = bool(met) and all(layout[name] == place for name, place in met)
        taken = any(name in other for name in table for other in others)
        renamed.append(table if fits and not taken and len(set(table.values())) == len(table) else {})
    return renamed
