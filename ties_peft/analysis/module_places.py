"""Find the layer and the kind of each module from its path, which are the rows and the columns of a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..merging.recipes.schedule import LAYER, layer_of

OUTSIDE = "–"  # in place of a layer's number


@dataclass(frozen=True)
class Place:
    """Where a module is.

    Attributes:
        layer: the number of its layer, after the path before it where several paths are numbered: `up_blocks.0`.
        kind: its path in that layer.
        order: sorts the layers.
    """

    layer: str
    kind: str
    order: tuple[int, str, int]


def module_places(modules: Sequence[str]) -> list[Place]:
    """Return the place of each module.

    >>> [(place.layer, place.kind) for place in module_places(["h.0.attn.q", "h.10.attn.q", "lm_head"])]
    [('0', 'attn.q'), ('10', 'attn.q'), ('–', 'lm_head')]
    """
    matches = [LAYER.search(module) for module in modules]
    starts = {module[: found.start(1)] for module, found in zip(modules, matches, strict=True) if found}
    places = []
    for module, found in zip(modules, matches, strict=True):
        number = layer_of(module)
        if found is None or number is None:
            places.append(Place(OUTSIDE, module, (1, "", 0)))
            continue
        start = module[: found.start(1)]
        layer = str(number) if len(starts) == 1 else f"{start}{number}"
        places.append(Place(layer, module[found.end(1) + 1 :] or module, (0, start, number)))
    return places
