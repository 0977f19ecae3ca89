"""Write one self-contained HTML page that shows an analysis, or the report of a merge.

The figures are drawn in the browser by Observable Plot on D3, whose bundles (209 and 281 KB, ISC licence) stand in `static`
and in the page, so that it opens from the disk without a network. Plotly's smallest bundle with heat maps has over 1 MB,
ECharts as much, Vega-Lite with Vega 0.8 MB and evaluates text as code, and uPlot draws no heat maps. Plot draws SVG that
takes the colours and fonts of the page, which a dark theme, print and screen readers need.

Names from files are data: they stand in one JSON block, whose `<`, `>` and `&` are escaped, and reach the page as text nodes.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RecipeError, printable_lines
from ..merging.measure import LOW_PROJECTION
from ..merging.merged import versions
from ..merging.options import Options
from ..merging.recipes.recipe import Recipe
from .module_places import module_places

STATIC = Path(__file__).parent / "static"
MARK = '<meta name="generator" content="ties-peft">'
RETENTION = (
    {
        "key": "projection",
        "label": "projection",
        "meaning": "The share of the adapter's task vector that the merged one holds: 1 is all of it, 0 nothing. The dashed "
        f"line is {LOW_PROJECTION}: under it the adapters of a sentence encoder had mostly lost half of what they had learnt. On "
        "a language model the figures did not tell what accuracy was kept (benchmarks/prediction.py): measure it.",
    },
    {"key": "cosine", "label": "cosine", "meaning": "The cosine between the adapter's task vector and the merged one."},
    {
        "key": "others",
        "label": "others",
        "meaning": "The norm of what the merge adds that is not this adapter's, divided by the adapter's own norm.",
    },
)
PERCENT, POINTS, DEGREES = "percent", "points", "degrees"
PAIR_FIGURES = (
    (
        "cosine",
        "cosine",
        None,
        1000,
        True,
        "The cosine between the two task vectors: 0 is unrelated, 1 is the same direction.",
    ),
    (
        "sign_conflict",
        "sign conflict",
        PERCENT,
        1000,
        False,
        "Of the entries that both keep, the share whose signs differ.",
    ),
    (
        "excess_conflict",
        "excess sign conflict",
        POINTS,
        1000,
        True,
        "The sign conflict beyond that of Gaussian entries with the same cosine, in points of percent.",
    ),
    (
        "kept_overlap",
        "kept by both",
        PERCENT,
        1000,
        False,
        "Of the entries that either keeps, the share that both keep.",
    ),
    (
        "overlap_in",
        "overlap of inputs",
        None,
        1000,
        False,
        "How much the row spaces overlap, ‖UᵀV‖²/min(r₁, r₂): 1 is the same space, 0 orthogonal.",
    ),
    ("overlap_out", "overlap of outputs", None, 1000, False, "How much the column spaces overlap, as for the inputs."),
    (
        "angle_in",
        "smallest angle of inputs",
        DEGREES,
        10,
        False,
        "The smallest principal angle between the row spaces.",
    ),
    (
        "angle_out",
        "smallest angle of outputs",
        DEGREES,
        10,
        False,
        "The smallest principal angle between the column spaces.",
    ),
    (
        "initial_cosine",
        "cosine of A",
        None,
        1000,
        True,
        "The cosine between the factors A as they are stored; near 1 if training started from the same A.",
    ),
)
ADAPTER_FIGURES = (
    ("norm", "norm", None, 1e6, False, "The Frobenius norm of the task vector."),
    (
        "effective_rank",
        "effective rank",
        None,
        1000,
        False,
        "exp of the entropy of the squared singular values' shares.",
    ),
    (
        "redundancy",
        "in the largest 20 %",
        PERCENT,
        1000,
        False,
        "The share of the squared norm that the largest 20 % of the entries of the adapter hold.",
    ),
)
LEFT_FIGURES = (
    (
        "projection",
        "projection",
        None,
        1000,
        True,
        "The share of the adapter's task vector on the module that the result holds.",
    ),
    (
        "cosine",
        "cosine",
        None,
        1000,
        True,
        "The cosine between the adapter's task vector on the module and the result.",
    ),
)
FigureKind = tuple[str, str, str | None, float, bool, str]


def check_page_file(path: Path) -> None:
    """Refuse a file that a page cannot be written to, or that holds something else. Call it before any work is done.

    Raises: RecipeError.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise RecipeError(f"the report {str(path)!r} {what}. Name an HTML file.")
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


def figure_kinds(kinds: Sequence[FigureKind]) -> list[dict[str, Any]]:
    """Return what the page has to know of some figures."""
    keys = ("key", "label", "format", "factor", "diverging", "meaning")
    return [dict(zip(keys, kind, strict=True)) for kind in kinds]


def module_set(
    title: str,
    what: str,
    series: Sequence[str],
    kinds: Sequence[FigureKind],
    value: Callable[[str, int, int], float | None],
    modules: int,
) -> dict[str, Any]:
    """Return figures of every module for a heat map, as whole numbers, which take the least room.

    Args:
        title, what: of the section, and what its series are.
        series: names, such as the pairs.
        kinds: the figures.
        value: value(key, series, module) returns one of them.
        modules: how many there are.
    """
    figures = []
    for kind in figure_kinds(kinds):
        values = [
            [_rounded(value(kind["key"], number, module), kind["factor"]) for module in range(modules)]
            for number in range(len(series))
        ]
        if any(one is not None for own in values for one in own):
            figures.append({**kind, "values": values})
    return {"title": title, "what": what, "series": list(series), "figures": figures}


def module_rows(modules: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[dict[str, str]]:
    """Return name, shape, layer and kind of each module."""
    places = module_places(modules)
    return [
        {"name": name, "shape": " × ".join(map(str, shape)), "layer": place.layer, "kind": place.kind}
        for name, shape, place in zip(modules, shapes, places, strict=True)
    ]


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


def commands(sources: Sequence[str], methods: Sequence[tuple[str, int | None]]) -> list[dict[str, str]]:
    """Return, for each method and rank, the command and the recipe of the merge."""
    found = []
    for method, rank in methods:
        words = ["ties-peft", "merge", *sources, "--method", method]
        words += ["--rank", str(rank)] if rank is not None else []
        recipe = Recipe(tuple(sources), method=method, rank=Options.rank if rank is None else rank)
        found.append({"method": method, "command": shlex.join([*words, "--out", "merged"]), "recipe": recipe.to_yaml()})
    return found


def curve(method: str, energies: Any) -> dict[str, Any]:
    """Return the share of the energy that each rank keeps, rounded."""
    return {"method": method, "energies": [round(float(share), 4) for share in energies]}


def retention_bars(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rows of the retention of adapters, with the figures they hold."""
    return {"low": LOW_PROJECTION, "figures": list(RETENTION), "rows": list(rows)}


def table_columns(columns: Sequence[tuple[str, str | None]]) -> list[dict[str, Any]]:
    """Return the columns of a table; the first one holds text."""
    return [{"label": label, "format": form, "text": not number} for number, (label, form) in enumerate(columns)]


def _rounded(value: float | None, factor: float) -> int | None:
    """Return a figure times its factor, as a whole number; None where it is undefined."""
    return None if value is None or value != value else round(value * factor)


def _escaped(value: Any) -> Any:
    """Return plain values in which the control characters of every text are escaped."""
    if isinstance(value, str):
        return printable_lines(value)
    if isinstance(value, Mapping):
        return {key: _escaped(own) for key, own in value.items()}
    return [_escaped(own) for own in value] if isinstance(value, (list, tuple)) else value
