"""The drawn data of every plot against the numbers it shows; labels, units, names as text."""

from __future__ import annotations

import builtins
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ties_peft
from ties_peft.analysis import plots
from ties_peft.merging.measure import LOW_PROJECTION

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `plots`)")
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]
WIDE = {f"layers.{layer}.{name}": (24, 16) for layer in (0, 1, 10) for name in ("q", "up")}
METHODS = ("average", "task_arithmetic", "ties")


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    """Draw without a window."""
    matplotlib.use("agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def folders(make_lora: Make) -> list[Path]:
    """The third lacks a module; its name would be a formula to matplotlib."""
    few = {name: shape for name, shape in WIDE.items() if name != "layers.10.up"}
    return [
        make_lora("a", seed=1, shapes=WIDE),
        make_lora("b", seed=2, shapes=WIDE, gain=2),
        make_lora("_$c_{$", seed=3, shapes=few),
    ]


@pytest.fixture
def analysis(folders: list[Path]) -> ties_peft.Analysis:
    return ties_peft.analyze(folders, rank=6, methods=METHODS)


def texts(labels: Any) -> list[str]:
    return [label.get_text() for label in labels]


def matrix(ax: Any) -> np.ndarray:
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def drawn(ax: Any) -> None:
    """Draw it as a file would be; matplotlib parses names no sooner."""
    ax.figure.canvas.draw()


def test_norms_are_the_lengths_of_the_bars(analysis: ties_peft.Analysis, folders: list[Path]) -> None:
    for source in (analysis, ties_peft.merge(folders).report):
        ax = plots.plot_norms(source)
        assert [bar.get_width() for bar in ax.patches] == pytest.approx(analysis.adapters["norm"])
        assert texts(ax.get_yticklabels()) == ["a", "b", "_$c_{$"]
        assert ax.get_xlabel() == "Frobenius norm of the task vector"
        drawn(ax)


@pytest.mark.parametrize(
    ("figure", "factor", "unit"),
    [
        ("cosine", 1, "cosine"),
        ("sign_conflict", 100, "(%)"),
        ("excess_conflict", 100, "points)"),
        ("angle_in", 1, "(deg"),
    ],
)
def test_a_matrix_holds_a_figure_of_each_pair_once(
    analysis: ties_peft.Analysis, figure: str, factor: int, unit: str
) -> None:
    ax = plots.plot_pairs(analysis, figure)
    below = np.tril_indices(3, -1)
    assert matrix(ax)[below] == pytest.approx(factor * analysis.pairs[figure][below])
    assert np.isnan(matrix(ax)[np.triu_indices(3)]).all()
    assert unit in ax.images[0].colorbar.ax.get_ylabel()
    assert sorted(float(text.get_text()) for text in ax.texts) == pytest.approx(
        sorted(matrix(ax)[below]), abs=0.0006 if figure == "cosine" else 0.06
    )
    assert texts(ax.get_xticklabels()) == ["a", "b"]
    drawn(ax)


def test_a_report_has_cosines(folders: list[Path], analysis: ties_peft.Analysis) -> None:
    ax = plots.plot_pairs(ties_peft.merge(folders).report)
    assert matrix(ax)[2, 0] == pytest.approx(analysis.pairs["cosine"][2, 0], abs=1e-6)
    with pytest.raises(ties_peft.RecipeError, match="unknown figure 'sign_conflict'"):
        plots.plot_pairs(ties_peft.merge(folders).report, "sign_conflict")


def test_a_figure_that_can_be_negative_has_zero_in_the_middle(analysis: ties_peft.Analysis) -> None:
    low, high = plots.plot_pairs(analysis).images[0].get_clim()
    assert low == -high and analysis.pairs["cosine"].min() < 0
    assert plots.plot_pairs(analysis, "sign_conflict").images[0].get_clim()[0] == 0


def of_module(found: dict[str, Any], name: str) -> dict[str, Any]:
    (module,) = [module for module in found["modules"] if module["name"] == name]
    return module


def test_a_heat_map_has_layers_by_kinds(analysis: ties_peft.Analysis) -> None:
    ax = plots.plot_modules(analysis, "sign_conflict", ("a", "b"))
    assert texts(ax.get_yticklabels()) == ["0", "1", "10"] and texts(ax.get_xticklabels()) == ["q", "up"]
    assert ax.get_ylabel() == "layer" and ax.get_title() == "a, b"
    found = analysis.to_dict()
    for row, layer in enumerate((0, 1, 10)):
        for column, kind in enumerate(("q", "up")):
            (pair,) = [p for p in of_module(found, f"layers.{layer}.{kind}")["pairs"] if (p["a"], p["b"]) == ("a", "b")]
            assert matrix(ax)[row, column] == pytest.approx(100 * pair["sign_conflict"])
    drawn(ax)


def test_a_heat_map_of_several_is_their_mean(analysis: ties_peft.Analysis) -> None:
    """What is undefined for one of them does not count."""
    ax = plots.plot_modules(analysis)
    for row, name in ((0, "layers.0.up"), (2, "layers.10.up")):
        cosines = [pair["cosine"] for pair in of_module(analysis.to_dict(), name)["pairs"]]
        assert len(cosines) == (3 if row == 0 else 1)
        assert matrix(ax)[row, 1] == pytest.approx(np.mean(cosines))


def test_a_heat_map_of_an_adapter_is_blank_where_it_lacks_the_module(analysis: ties_peft.Analysis) -> None:
    ax = plots.plot_modules(analysis, "norm", "_$c_{$")
    assert np.isnan(matrix(ax)[2, 1]) and np.isfinite(matrix(ax)).sum() == 5
    drawn(ax)


def test_a_heat_map_of_what_a_method_leaves(analysis: ties_peft.Analysis) -> None:
    ax = plots.plot_modules(analysis, "cosine", ("ties", "b"))
    own = of_module(analysis.to_dict(), "layers.1.q")["methods"][METHODS.index("ties")]["adapters"][1]
    assert matrix(ax)[1, 0] == pytest.approx(own["cosine"])
    assert matrix(plots.plot_modules(analysis, "projection", ("ties", "b")))[1, 0] == pytest.approx(own["projection"])


@pytest.mark.parametrize(
    ("figure", "of", "words"),
    [
        ("cosin", (), "did you mean 'cosine'"),
        ("cosine", "d", "no cosine of d"),
        ("norm", ("a", "b"), "no norm of a, b"),
    ],
)
def test_what_is_not_known_cannot_be_drawn(
    analysis: ties_peft.Analysis, figure: str, of: str | tuple[str, ...], words: str
) -> None:
    with pytest.raises(ties_peft.RecipeError, match=words):
        plots.plot_modules(analysis, figure, of)


def test_energy_is_a_line_for_each_method(analysis: ties_peft.Analysis, folders: list[Path]) -> None:
    ax = plots.plot_energy(analysis)
    assert [line.get_label() for line in ax.lines] == list(METHODS)
    for line, result in zip(ax.lines, analysis.methods, strict=True):
        assert line.get_ydata() == pytest.approx(100 * result.energies)
        assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert "%" in ax.get_ylabel() and ax.get_xlabel() == "rank"
    merged = ties_peft.merge(folders, "ties", rank=6)
    assert plots.plot_energy(merged).lines[0].get_ydata() == pytest.approx(ax.lines[2].get_ydata())


def test_lines_differ_in_colour_and_in_style(folders: list[Path]) -> None:
    names = ["ties", "average", "iso_c", "tsv", "task_arithmetic", "magnitude_prune", "della", "breadcrumbs"]
    lines = plots.plot_energy(ties_peft.analyze(folders, rank=2, methods=names)).lines
    styles = [(line.get_color(), line.get_linestyle()) for line in lines]
    assert len(set(styles)) == len(names)
    assert all(one[0] != two[0] and one[1] != two[1] for one, two in itertools.pairwise(styles))


def test_nothing_to_draw_is_said(make_ia3: Make, folders: list[Path]) -> None:
    with pytest.raises(ties_peft.RecipeError, match="no energy by rank"):
        plots.plot_energy(ties_peft.merge([make_ia3("x"), make_ia3("y", seed=1)]))
    with pytest.raises(ties_peft.RecipeError, match="compares no methods"):
        plots.plot_retention(ties_peft.analyze(folders, methods=[]))


@pytest.mark.parametrize("figure", ["projection", "cosine", "others"])
def test_retention_has_a_bar_for_each_adapter_and_method(analysis: ties_peft.Analysis, figure: str) -> None:
    ax = plots.plot_retention(analysis, figure)
    assert len(ax.containers) == len(METHODS)
    for bars, result in zip(ax.containers, analysis.methods, strict=True):
        assert [bar.get_width() for bar in bars] == pytest.approx(getattr(result, figure))
        assert bars.get_label() == result.method
    assert figure in ax.get_xlabel()
    marked = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert marked == ([LOW_PROJECTION] if figure == "projection" else [])
    drawn(ax)


def test_a_method_that_chooses_is_named_with_what_it_chose(folders: list[Path]) -> None:
    analysis = ties_peft.analyze(folders, rank=6, methods=["auto"])
    used = analysis.methods[0].used
    sweep = ties_peft.prepare(folders).sweep(methods=["auto"], densities=(), ranks=(2, 6))
    assert used != "auto"
    for ax in (plots.plot_energy(analysis), plots.plot_retention(analysis), plots.plot_sweep(sweep, along="rank")):
        assert f"auto ({used})" in texts(ax.get_legend().get_texts())


def test_retention_of_a_merge(folders: list[Path]) -> None:
    report = ties_peft.merge(folders, "average").report
    ax = plots.plot_retention(report)
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([line.projection for line in report.adapters])


def test_a_sweep_is_a_line_for_each_method_and_rank(folders: list[Path]) -> None:
    sweep = ties_peft.prepare(folders).sweep(methods=("ties", "average"), densities=(0.5, 0.1, 1.0), ranks=(2, 6))
    ax = plots.plot_sweep(sweep)
    assert [line.get_label() for line in ax.lines] == [f"{m}, rank {r}" for m in ("ties", "average") for r in (2, 6)]
    rows = sorted(
        (row for row in sweep.rows if (row.method, row.rank) == ("ties", 6)), key=lambda row: row.density or 0
    )
    line = ax.lines[1]
    assert list(line.get_xdata()) == [0.1, 0.5, 1.0]
    assert line.get_ydata() == pytest.approx([np.mean(list(row.projections.values())) for row in rows])
    band = ax.collections[1].get_paths()[0].vertices[:, 1]
    values = [value for row in rows for value in row.projections.values()]
    assert (band.min(), band.max()) == pytest.approx((min(values), max(values)))
    (level,) = [row for row in sweep.rows if (row.method, row.rank) == ("average", 2)]
    assert set(ax.lines[2].get_ydata()) == {np.mean(list(level.projections.values()))}


def test_a_sweep_along_ranks(folders: list[Path]) -> None:
    sweep = ties_peft.prepare(folders).sweep(methods=("average",), densities=(), ranks=(6, 2, 4))
    ax = plots.plot_sweep(sweep, "energy", along="rank")
    assert list(ax.lines[0].get_xdata()) == [2, 4, 6]
    assert ax.lines[0].get_ydata() == pytest.approx(sorted(100 * row.energy for row in sweep.rows))
    for arguments, words in ((("lenergy",), "did you mean 'energy'"), (("norm", "scale"), "unknown setting 'scale'")):
        with pytest.raises(ties_peft.RecipeError, match=words):
            plots.plot_sweep(sweep, *arguments)


def test_it_draws_on_the_axes_that_it_is_given(analysis: ties_peft.Analysis) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 5)
    functions = (plots.plot_norms, plots.plot_pairs, plots.plot_energy, plots.plot_retention, plots.plot_modules)
    for function, ax in zip(functions, axes, strict=True):
        assert function(analysis, ax=ax) is ax and ax.figure is figure  # type: ignore[operator]
    assert plt.get_fignums() == [figure.number]


def test_without_matplotlib_the_message_says_what_to_install(
    analysis: ties_peft.Analysis, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ties_peft.RecipeError, match=r"ties-peft\[plots\]"):
        plots.plot_norms(analysis)
