"""A sweep of prepared merges, and reports as a notebook shows them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

import ties_peft

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]


def test_a_sweep_is_the_reports_of_its_merges(make_lora: Make) -> None:
    adapters = [make_lora(name, seed=seed) for seed, name in enumerate("ab")]
    plan = ties_peft.prepare(adapters, space="core")
    found = plan.sweep(["ties", "average", "auto"], [0.2, 0.7], [4, "max"])
    asked = [(row.method, row.density, row.rank) for row in found.rows]
    assert asked == [
        *(("ties", density, rank) for density in (0.2, 0.7) for rank in (4, "max")),
        ("average", None, 4),
        ("average", None, "max"),
        ("auto", None, 4),
        ("auto", None, "max"),
    ]
    for row in found.rows:
        density = {} if row.density is None else {"density": row.density}
        report = ties_peft.merge(adapters, row.method, "core", rank=row.rank, **density).report
        assert (row.used, row.written_rank) == (report.method, report.rank)
        assert (row.energy, row.norm) == pytest.approx((report.energy, report.norm), rel=1e-6)
        kept = {line.name: line.projection for line in report.adapters}
        assert row.projections == pytest.approx(kept, rel=1e-4)
    assert found.to_dict()[0]["method"] == "ties" and "auto (dual)" in str(found)


def test_a_sweep_becomes_a_data_frame_or_says_what_it_needs(make_lora: Make) -> None:
    found = ties_peft.prepare([make_lora("a"), make_lora("norm", seed=1)]).sweep(["average"])
    (row,) = found.flat_rows()
    figures = ["method", "density", "rank", "used", "written_rank", "energy", "norm"]
    assert list(row) == [*figures, "projection of a", "projection of norm"]
    assert row["projection of norm"] == found.rows[0].projections["norm"] != row["norm"]
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(ties_peft.RecipeError, match="pip install pandas"):
            found.to_pandas()
    else:
        frame = found.to_pandas()
        assert list(frame.columns) == list(row) and len(frame) == 1


def test_a_notebook_shows_a_report_with_names_escaped(make_lora: Make) -> None:
    merged = ties_peft.merge([make_lora("<script>x"), make_lora("b&c", seed=1)])
    shown = merged.report._repr_html_()
    assert shown.startswith("<pre") and "<script" not in shown
    assert "&lt;script&gt;x" in shown and "b&amp;c" in shown and "projection" in shown
