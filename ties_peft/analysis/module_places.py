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


def layers_in_order(places: Sequence[Place]) -> list[str]:
    """Return each layer once, by number; what lies outside the layers comes last."""
    return list(dict.fromkeys(place.layer for place in sorted(places, key=lambda place: place.order)))


def short_kinds(places: Sequence[Place]) -> dict[str, str]:
    """Return each kind of module with the shortest end of its path that no other kind has.

    >>> short_kinds(module_places(["h.0.attn.q", "h.0.attn.out", "h.0.mlp.out"]))
    {'attn.q': 'q', 'attn.out': 'attn.out', 'mlp.out': 'mlp.out'}
    """
    paths = {place.kind: place.kind.split(".") for place in places}

    def shortest(path: list[str]) -> str:
        for length in range(1, len(path)):
            if sum(other[-length:] == path[-length:] for other in paths.values()) == 1:
                return ".".join(path[-length:])
        return ".".join(path)

    return {kind: shortest(path) for kind, path in paths.items()}
