"""Draw the figures of an analysis, of a merge's report or of a sweep with matplotlib (the extra `plots`).

    from ties_peft.analysis import plots
    plots.plot_modules(ties_peft.analyze(folders), "sign_conflict")

Each function draws one figure on the axes `ax`, or on new ones, and returns these matplotlib Axes, so that a title, a size
or a file format is chosen by matplotlib's own means. The numbers are those of `Analysis`, `Report`, `Merged` and `Sweep`.
Readers with colour blindness can tell the colours apart, and lines differ in style as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RecipeError, printable, unknown
from ..merging.measure import LOW_PROJECTION
from ..merging.merged import Merged
from ..merging.report import Report
from ..merging.sweep import Sweep, SweepRow
from .analysis import Analysis
from .figure_kinds import (
    PAIR_FIGURES,
    RETENTION_FIGURES,
    Array,
    FigureKind,
    ModuleFigures,
    mean_of_known,
)
from .method_figures import whole_energies
from .module_places import layers_in_order, short_kinds

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")  # of Okabe and Ito
LINES = ("-", "--", "-.", ":")
WRITTEN_VALUES = 10  # adapters up to which the matrix of pairs has its numbers in it


def plot_norms(source: Analysis | Report, ax: Axes | None = None) -> Axes:
    """Draw the Frobenius norm of each adapter's task vector as a bar."""
    names = _adapter_names(source)
    norms = source.adapters["norm"] if isinstance(source, Analysis) else [line.norm for line in source.adapters]
    ax = _axes(ax, 6, 1 + 0.3 * len(names))
    ax.barh(range(len(names)), norms, color=COLOURS[0])
    _name_rows(ax, names)
    ax.set_xlabel("Frobenius norm of the task vector")
    return ax


def plot_pairs(source: Analysis | Report, figure: str = "cosine", ax: Axes | None = None) -> Axes:
    """Draw one figure of every pair of adapters as a matrix.

    Args:
        source: an analysis, or a merge's report, which has cosines only.
        figure: such as `cosine`, `sign_conflict` or `overlap_in`; see `Analysis.to_dict`.
        ax: to draw on; by default new axes.
    Raises: RecipeError if the figure is unknown.
    """
    names = _adapter_names(source)
    matrices = source.pairs if isinstance(source, Analysis) else {"cosine": np.array(source.cosines or [])}
    kind = _find_kind(figure, [kind for kind in PAIR_FIGURES if kind.key in matrices])
    values = np.full((len(names), len(names)), np.nan)
    below = np.tril_indices(len(names), -1)
    values[below] = matrices[figure][below] * kind.shown_factor
    ax = _axes(ax, 2.5 + 0.55 * len(names), 1.5 + 0.5 * len(names))
    image = _draw_matrix(ax, values, kind)
    ax.set_xticks(range(len(names) - 1), list(map(printable, names[:-1])), rotation=40, ha="right", parse_math=False)
    _name_rows(ax, names, inverted=False)
    ax.set_xlim(-0.5, len(names) - 1.5)
    ax.set_ylim(len(names) - 0.5, 0.5)
    if len(names) <= WRITTEN_VALUES:
        for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
            value = float(values[row, column])
            text = format(value, ".3f" if kind.format is None else ".1f")
            ax.text(float(column), float(row), text, ha="center", va="center", color=_ink(image, value), fontsize=8)
    return ax


def plot_modules(
    analysis: Analysis, figure: str = "cosine", of: str | Sequence[str] = (), ax: Axes | None = None
) -> Axes:
    """Draw one figure of every module as a heat map: layers from top to bottom, kinds of module from left to right.

    Args:
        analysis: has the figures.
        figure: of pairs (`cosine`, `sign_conflict`, …), of adapters (`norm`, `effective_rank`, …), or of what the methods leave
            (`projection`, and `cosine` with a method in `of`).
        of: the name of an adapter, of both adapters of a pair, or of a method and an adapter. The mean is drawn over all
            pairs, adapters and methods that have these names; by default over all.
        ax: to draw on; by default new axes.
    Raises: RecipeError if nothing has this figure and these names.
    """
    names = [of] if isinstance(of, str) else list(of)
    kind, values = _module_values(analysis.module_figures, figure, names)
    layers, kinds = layers_in_order(analysis.places), short_kinds(analysis.places)
    table = np.full((len(layers), len(kinds)), np.nan)
    for place, value in zip(analysis.places, values, strict=True):
        table[layers.index(place.layer), list(kinds).index(place.kind)] = value * kind.shown_factor
    ax = _axes(ax, 3 + 0.5 * len(kinds), 2 + min(10, 0.3 * len(layers)))
    _draw_matrix(ax, table, kind)
    labels = list(map(printable, kinds.values()))
    ax.set_xticks(range(len(kinds)), labels, rotation=40, ha="right", parse_math=False)
    _name_rows(ax, layers, inverted=False, most=32)
    ax.set_ylabel("layer")
    ax.set_title(printable(", ".join(names)) if names else "mean over all", fontsize="medium", parse_math=False)
    return ax


def plot_energy(source: Analysis | Merged, ax: Axes | None = None) -> Axes:
    """Draw the share of the merged energy that each rank keeps, a line for each method.

    Raises: RecipeError if no result has a rank, as with (IA)³.
    """
    if isinstance(source, Analysis):
        curves = {result.title: result.energies for result in source.methods if len(result.energies)}
    else:
        energies = whole_energies(source)
        curves = {source.report.method: energies} if len(energies) else {}
    if not curves:
        raise RecipeError("there is no energy by rank: no method was compared whose result has a rank.")
    ax = _axes(ax, 6, 3.5)
    for (method, energies), style in zip(curves.items(), _line_styles(), strict=False):
        ax.plot(range(1, len(energies) + 1), 100 * energies, label=method, **style)
    ax.set_xlabel("rank")
    ax.set_ylabel("energy kept (% of the squared norm)")
    ax.set_ylim(0, 103)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def plot_retention(source: Analysis | Report, figure: str = "projection", ax: Axes | None = None) -> Axes:
    """Draw what is left of each adapter as bars, one for each method.

    Args:
        source: an analysis with the results of methods, or a merge's report.
        figure: `projection`, `cosine` or `others`.
        ax: to draw on; by default new axes.
    Raises: RecipeError if the figure is unknown or no method was compared.
    """
    kind = _find_kind(figure, RETENTION_FIGURES)
    names = _adapter_names(source)
    if isinstance(source, Analysis):
        results = {result.title: getattr(result, figure) for result in source.methods}
    else:
        results = {source.method: [getattr(line, figure) for line in source.adapters]}
    if not results:
        raise RecipeError(
            "the analysis compares no methods, so nothing is known of what they leave. Name some methods."
        )
    ax = _axes(ax, 6.5, 1.2 + len(names) * (0.15 + 0.17 * len(results)))
    height = 0.85 / len(results)
    for number, ((method, values), colour) in enumerate(zip(results.items(), cycle(COLOURS), strict=False)):
        middles = np.arange(len(names)) + (number - (len(results) - 1) / 2) * height
        ax.barh(middles, np.array(values, float), height, color=colour, label=method)
    if figure == "projection":
        ax.axvline(LOW_PROJECTION, color="0.4", linestyle="--", label=f"{LOW_PROJECTION}, under which a report warns")
    ax.axvline(0, color="0.2", linewidth=0.8)
    _name_rows(ax, names)
    ax.set_xlabel(_retention_label(kind))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_sweep(sweep: Sweep, figure: str = "projection", along: str = "density", ax: Axes | None = None) -> Axes:
    """Draw a figure of the merges of a sweep against density or rank, a line for each method and other setting.

    Args:
        sweep: made by `Prepared.sweep`.
        figure: `projection` (the mean over the adapters, with a band from the least to the largest), `energy` or `norm`.
        along: `density`, or `rank`, the rank that was written. A method without it is a horizontal line.
        ax: to draw on; by default new axes.
    Raises: RecipeError if the figure or the setting is unknown.
    """
    labels = {"projection": "projection", "energy": "energy kept (%)", "norm": "norm of the result"}
    if figure not in labels:
        raise RecipeError(unknown("figure", figure, labels))
    if along not in ("density", "rank"):
        raise RecipeError(unknown("setting", along, ("density", "rank")))
    ax = _axes(ax, 7.5, 3.5)
    for (label, rows), style in zip(_sweep_lines(sweep, along).items(), _line_styles(), strict=False):
        x = [row.density if along == "density" else row.written_rank for row in rows]
        middle, low, high = np.array([_sweep_values(row, figure) for row in rows]).T
        if None in x:
            ax.axhline(middle[0], label=label, color=style["color"], linestyle=style["linestyle"])
            continue
        order = np.argsort(np.array(x, float))
        ax.plot(np.array(x, float)[order], middle[order], label=label, marker="o", **style)
        if figure == "projection":
            ax.fill_between(np.array(x, float)[order], low[order], high[order], color=style["color"], alpha=0.15)
    ax.set_xlabel("density: the share of the entries that the trim keeps" if along == "density" else "rank")
    ax.set_ylabel("projection: mean, least and largest" if figure == "projection" else labels[figure])
    ax.grid(alpha=0.3)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return the axes, or new ones of a size in inches. Raises: RecipeError without matplotlib."""
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise RecipeError(
            "plots need the package 'matplotlib', which is not installed: pip install 'ties-peft[plots]'."
        ) from error
    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def _adapter_names(source: Analysis | Report) -> list[str]:
    return source.names if isinstance(source, Analysis) else [line.name for line in source.adapters]


def _find_kind(key: str, kinds: Sequence[FigureKind]) -> FigureKind:
    found = [kind for kind in kinds if kind.key == key]
    if not found:
        raise RecipeError(unknown("figure", key, [kind.key for kind in kinds]))
    return found[0]


def _module_values(sets: Sequence[ModuleFigures], figure: str, names: Sequence[str]) -> tuple[FigureKind, Array]:
    """Return a figure with its value on every module: the mean over the series that have all the names."""
    known = [(kind, own) for own in sets for kind in own.kinds if kind.key == figure]
    if not known:
        raise RecipeError(unknown("figure", figure, {kind.key for own in sets for kind in own.kinds}))
    for kind, own in known:
        selected = own.selected(names)
        if selected:
            return kind, mean_of_known(own.values[figure][selected])
    heads = {name for _, own in known for series in own.series for name in series}
    raise RecipeError(
        f"no {figure} of {', '.join(names) or 'anything'} is known. Name an adapter, a pair, or a method and an adapter, "
        f"of {', '.join(sorted(heads)) or 'an analysis that compares methods'}."
    )


def _draw_matrix(ax: Axes, values: Array, kind: FigureKind) -> Any:
    """Draw a matrix of colours with their scale; where a figure can be negative, 0 is in the middle of it."""
    known = values[np.isfinite(values)]
    reach = kind.reach * kind.shown_factor
    most = max(reach, float(np.abs(known).max())) if known.size else 1.0
    low = -most if kind.diverging else min(0.0, float(known.min())) if known.size else 0.0
    image = ax.imshow(values, cmap="RdBu_r" if kind.diverging else "viridis", vmin=low, vmax=most, aspect="auto")
    ax.figure.colorbar(image, ax=ax, label=kind.axis_label)
    return image


def _ink(image: Any, value: float) -> str:
    """Return black or white, whichever has the larger contrast (WCAG 2) to the colour of a value."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in image.cmap(image.norm(value))[:3]]
    return "black" if float(np.dot(linear, (0.2126, 0.7152, 0.0722))) > 0.179 else "white"


def _name_rows(ax: Axes, names: Sequence[str], inverted: bool = True, most: int = 64) -> None:
    """Name the rows, the first one on top; of more than `most` only every second, third, …."""
    step = -(-len(names) // most)
    ax.set_yticks(range(0, len(names), step), [printable(name) for name in names[::step]], parse_math=False)
    if inverted:
        ax.set_ylim(len(names) - 0.5, -0.5)


def _line_styles() -> Iterator[dict[str, Any]]:
    """Yield colours and line styles: neither alone has to tell two lines apart, and 28 pairs differ."""
    for colour, line in zip(cycle(COLOURS), cycle(LINES), strict=False):
        yield {"color": colour, "linestyle": line}


def _retention_label(kind: FigureKind) -> str:
    formulas = {
        "projection": "⟨τ, τᵢ⟩/‖τᵢ‖², the share of the adapter in the result",
        "cosine": "between the adapter and the result",
        "others": "norm of what is not the adapter's, relative to its own",
    }
    return f"{kind.label}: {formulas[kind.key]}"


def _sweep_lines(sweep: Sweep, along: str) -> Mapping[str, list[SweepRow]]:
    """Return the rows of each line, by the method and, where it varies, the other setting."""
    name = "rank" if along == "density" else "density"
    varies = len({getattr(row, name) for row in sweep.rows} - {None}) > 1
    lines: dict[str, list[SweepRow]] = {}
    for row in sweep.rows:
        setting = getattr(row, name)
        label = f"{row.title}, {name} {setting}" if varies and setting is not None else row.title
        lines.setdefault(label, []).append(row)
    return lines


def _sweep_values(row: SweepRow, figure: str) -> tuple[float, float, float]:
    """Return the mean, the least and the largest of a figure of one merge; the projections alone are several."""
    if figure != "projection":
        value = 100 * row.energy if figure == "energy" else row.norm
        return value, value, value
    known = [value for value in row.projections.values() if value is not None]
    return (float(np.mean(known)), min(known), max(known)) if known else (np.nan, np.nan, np.nan)
