"""Show the report of a merge as a page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from ..merging.merged import Merged
from ..merging.report import Report
from . import page
from .advice import WARNING
from .figure_kinds import PAIR_FIGURES, PERCENT, RESULT_FIGURES, RETENTION_FIGURES, WHOLE, ModuleFigures
from .method_figures import whole_energies


def merge_page(merged: Merged, out: Path) -> str:
    """Return the page of a merge.

    Args:
        merged: the result.
        out: the folder that it is written to.
    """
    report = merged.report
    rank = "" if report.rank is None else f", rank {report.rank} keeps {report.energy:.1%} of the energy"
    fact = (
        f"{len(report.adapters)} {report.kind} adapters merged by {report.method} in space {report.space}, scale "
        f"{report.scale_text}{rank}, written as {report.dtype}."
    )
    again = f"ties-peft merge --recipe {shlex.quote(str(out / 'recipe.yaml'))} --out merged"
    cosines = np.array(report.cosines or np.zeros((0, 0)))
    retention = [[getattr(line, kind.key) for kind in RETENTION_FIGURES] for line in report.adapters]
    return page.make_page(
        "A merge of adapters",
        {
            "names": [line.name for line in report.adapters],
            "facts": [fact, *report.remarks],
            "advice": [{"text": text, "option": None, "severity": WARNING} for text in report.warnings],
            "adapters": _adapter_table(report),
            "pairs": page.pair_figures(PAIR_FIGURES[:1], {"cosine": cosines}),
            "places": page.module_places_shown(
                [line.name for line in report.modules], [line.shape for line in report.modules]
            ),
            "modules": [page.module_figures(_module_figures(report))],
            "retention": page.retention_bars({report.method: retention}),
            "curves": page.energy_curves({report.method: whole_energies(merged)}),
            "commands": [{"method": report.method, "command": again, "recipe": merged.recipe.to_yaml()}],
        },
    )


def _adapter_table(report: Report) -> dict[str, Any]:
    """Return the table of the adapters; the last column is empty where nothing is trimmed."""
    rows: list[list[Any]] = []
    for line in report.adapters:
        kept = line.kept / line.entries if line.entries and line.kept < line.entries else None
        ranks = ", ".join(map(str, line.ranks))
        rows.append([line.name, line.weight, line.modules, ranks, line.norm, kept])
    columns = [("adapter", None), ("weight", None), ("modules", WHOLE), ("rank", None), ("norm", None)]
    return page.adapter_table([*columns, ("trim keeps", PERCENT)], rows)


def _module_figures(report: Report) -> ModuleFigures:
    """Return norm, energy and sign conflict of each module."""
    values = {
        kind.key: np.array([[getattr(line, kind.key) for line in report.modules]], float) for kind in RESULT_FIGURES
    }
    return ModuleFigures("Modules by layer", "", [("the result",)], "", RESULT_FIGURES, values)
