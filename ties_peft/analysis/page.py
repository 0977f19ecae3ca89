"""Write one self-contained HTML page that shows an analysis, or the report of a merge.

The figures are drawn in the browser by Observable Plot on D3, whose bundles (209 and 281 KB, ISC licence) stand in `static`
and in the page, so that it opens from the disk without a network. Plotly's smallest bundle with heat maps has over 1 MB,
ECharts as much, Vega-Lite with Vega 0.8 MB and evaluates text as code, and uPlot draws no heat maps. Plot draws SVG that
takes the colours and fonts of the page, which a dark theme, print and screen readers need.

Names from files are data: they stand in one JSON block, whose `<`, `>` and `&` are escaped, and reach the page as text nodes.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RecipeError, printable_lines
from ..merging.measure import LOW_PROJECTION
from ..merging.merged import versions
from ..merging.options import Options
from ..merging.recipes.recipe import Recipe
from .figure_kinds import NO_PREDICTION, RETENTION_FIGURES, Array, FigureKind, ModuleFigures
from .module_places import layers_in_order, module_places, short_kinds

STATIC = Path(__file__).parent / "static"
MARK = '<meta name="generator" content="ties-peft">'


def check_page_file(path: Path) -> None:
    """Refuse a file that a page cannot be written to, or that holds something else. Call it before any work is done.

    Raises: RecipeError.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = (
            "is a folder. Name an HTML file" if path.is_dir() else "lies in a folder that does not exist. Make it first"
        )
        raise RecipeError(f"the report {str(path)!r} {what}.")
    if path.exists():
        with path.open("rb") as file:
            if MARK.encode() not in file.read(2000):
                raise RecipeError(f"the report {str(path)!r} exists and is no page of ties-peft. Name another file.")


def write_page(path: Path, page: str) -> None:
    """Write a page. Raises: RecipeError where it cannot be written."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"the report {str(path)!r} cannot be written: {error.strerror}.") from None


def adapter_table(columns: Sequence[tuple[str, str | None]], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return the table of the adapters.

    Args:
        columns: the label and the format of each; the first one holds names.
        rows: the cells of each adapter.
    """
    heads = [{"label": label, "format": form, "text": not number} for number, (label, form) in enumerate(columns)]
    return {"columns": heads, "rows": [list(map(_plain, row)) for row in rows]}


def pair_figures(kinds: Sequence[FigureKind], matrices: Mapping[str, Array]) -> dict[str, Any]:
    """Return the figures of all pairs (i, j), i < j, that are defined for at least one pair.

    Args:
        kinds: the figures.
        matrices: (N, N) by the figure's key.
    """
    known = [kind for kind in kinds if np.isfinite(np.triu(matrices[kind.key], 1)).any()]
    values = {
        kind.key: [
            [i, j, _plain(round(float(matrices[kind.key][i, j]), 4))]
            for i, j in combinations(range(len(matrices[kind.key])), 2)
        ]
        for kind in known
    }
    return {"figures": list(map(asdict, known)), "values": values}


def module_figures(figures: ModuleFigures) -> dict[str, Any]:
    """Return figures of every module for a heat map, as whole numbers, which take the least room."""
    known = [kind for kind in figures.kinds if np.isfinite(figures.values[kind.key]).any()]
    return {
        "title": figures.title,
        "what": figures.what,
        "series": [figures.joiner.join(names) for names in figures.series],
        "figures": [{**asdict(kind), "values": _whole(figures.values[kind.key] * kind.factor)} for kind in known],
    }


def module_places_shown(modules: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return where each module stands in the heat maps: the layers and kinds in order, and the rows of the modules."""
    places = module_places(modules)
    rows = [
        {"name": name, "shape": " × ".join(map(str, shape)), "layer": place.layer, "kind": place.kind}
        for name, shape, place in zip(modules, shapes, places, strict=True)
    ]
    return {"layers": layers_in_order(places), "kinds": short_kinds(places), "modules": rows}


def retention_bars(results: Mapping[str, Sequence[Sequence[float | None]]]) -> dict[str, Any]:
    """Return what each method leaves of each adapter.

    Args:
        results: for each method the values of `RETENTION_FIGURES`, a row for each adapter.
    """
    kinds = list(map(asdict, RETENTION_FIGURES))
    kinds[0]["meaning"] += f" The dashed line is at {LOW_PROJECTION}. {NO_PREDICTION}"
    rows = [
        {"method": method, "adapter": i, **dict(zip((kind.key for kind in RETENTION_FIGURES), values, strict=True))}
        for method, adapters in results.items()
        for i, values in enumerate(adapters)
    ]
    return {"low": LOW_PROJECTION, "figures": kinds, "rows": rows}


def energy_curves(results: Mapping[str, Array]) -> list[dict[str, Any]]:
    """Return the share of the energy that each rank keeps, for each method whose result has a rank."""
    return [
        {"method": method, "energies": [round(float(share), 4) for share in energies]}
        for method, energies in results.items()
        if len(energies)
    ]


def commands(sources: Sequence[str], methods: Sequence[tuple[str, int | None]]) -> list[dict[str, str]]:
    """Return, for each method and rank, the command and the recipe of the merge."""
    found = []
    for method, rank in methods:
        words = ["ties-peft", "merge", *sources, "--method", method]
        words += ["--rank", str(rank)] if rank is not None else []
        recipe = Recipe(tuple(sources), method=method, rank=Options.rank if rank is None else rank)
        found.append({"method": method, "command": shlex.join([*words, "--out", "merged"]), "recipe": recipe.to_yaml()})
    return found


def make_page(title: str, data: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        title: its heading.
        data: what the script `page.js` shows.
    """
    page = (STATIC / "page.html").read_text(encoding="utf-8")
    text = json.dumps(_escaped(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    parts = {"title": title, "version": versions()["ties_peft"], "data": text}
    for name, file in (("css", "page.css"), ("d3", "d3.min.js"), ("plot", "plot.min.js"), ("js", "page.js")):
        parts[name] = (STATIC / file).read_text(encoding="utf-8")
    head, *rest = page.split("{{")
    return head + "".join(parts[name] + after for name, after in (part.split("}}", 1) for part in rest))


def _plain(value: Any) -> Any:
    """Return a number that is not finite as None, and anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole(values: Array) -> list[list[int | None]]:
    """Return the nearest whole numbers; None where a value is undefined."""
    return [[round(value) if math.isfinite(value) else None for value in row] for row in values.tolist()]


def _escaped(value: Any) -> Any:
    """Return plain values in which the control characters of every text are escaped."""
    if isinstance(value, str):
        return printable_lines(value)
    if isinstance(value, Mapping):
        return {key: _escaped(own) for key, own in value.items()}
    return [_escaped(own) for own in value] if isinstance(value, (list, tuple)) else value
