"""Show the report of a merge as a page."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..merging.merged import Merged
from ..merging.report import Report
from .method_figures import whole_energies
from .page import (
    PAIR_FIGURES,
    PERCENT,
    RETENTION,
    curve,
    figure_kinds,
    make_page,
    module_rows,
    module_set,
    retention_bars,
    table_columns,
)

RESULT_FIGURES = (
    ("norm", "norm", None, 1e6, False, "The Frobenius norm of the merged task vector, before the rank cuts it."),
    ("energy", "energy kept", PERCENT, 1000, False, "The share of its squared norm that the rank keeps."),
    (
        "conflict",
        "sign conflict",
        PERCENT,
        1000,
        False,
        "Of the entries that two or more keep, the share whose signs differ.",
    ),
)


def merge_page(merged: Merged, out: Path) -> str:
    """Return the page of a merge.

    Args:
        merged: the result.
        out: the folder that it is written to.
    """
    report = merged.report
    cosines = report.cosines or []
    pairs = [[i, j, round(cosines[j][i], 4)] for j in range(len(cosines)) for i in range(j)]
    rank = "" if report.rank is None else f", rank {report.rank} keeps {report.energy:.1%} of the energy"
    fact = (
        f"{len(report.adapters)} {report.kind} adapters merged by {report.method} in space {report.space}, scale "
        f"{report.scale_text}{rank}, written as {report.dtype}."
    )
    again = f"ties-peft merge --recipe {shlex.quote(str(out / 'recipe.yaml'))} --out merged"
    data = {
        "names": [line.name for line in report.adapters],
        "facts": [fact],
        "advice": [{"text": text, "option": None, "severity": "warning"} for text in report.warnings],
        "adapters": _adapter_table(report),
        "pairs": {"figures": figure_kinds(PAIR_FIGURES[:1]) if pairs else [], "values": {"cosine": pairs}},
        "places": module_rows([line.name for line in report.modules], [line.shape for line in report.modules]),
        "modules": [_module_figures(report)],
        "retention": retention_bars(
            [
                {
                    "method": report.method,
                    "adapter": i,
                    **{kind["key"]: getattr(line, kind["key"]) for kind in RETENTION},
                }
                for i, line in enumerate(report.adapters)
            ]
        ),
        "curves": _curves(merged),
        "commands": [{"method": report.method, "command": again, "recipe": merged.recipe.to_yaml()}],
    }
    return make_page("A merge of adapters", data)


def _adapter_table(report: Report) -> dict[str, Any]:
    """Return the table of the adapters; the last column is empty where nothing is trimmed."""
    columns: list[tuple[str, str | None]] = [("adapter", None), ("weight", None), ("modules", "whole")]
    columns += [("rank", None), ("norm", None), ("trim keeps", PERCENT)]
    rows: list[list[Any]] = []
    for line in report.adapters:
        kept = line.kept / line.entries if line.entries and line.kept < line.entries else None
        ranks = ", ".join(map(str, line.ranks))
        rows.append([line.name, line.weight, line.modules, ranks, line.norm, kept])
    return {"columns": table_columns(columns), "rows": rows}


def _module_figures(report: Report) -> dict[str, Any]:
    """Return norm, energy and sign conflict of each module."""
    return module_set(
        "Modules by layer",
        "",
        ["the result"],
        RESULT_FIGURES,
        lambda key, _, module: getattr(report.modules[module], key),
        len(report.modules),
    )


def _curves(merged: Merged) -> list[dict[str, Any]]:
    """Return the share of the energy of a merge that each rank keeps."""
    energies = whole_energies(merged)
    return [curve(merged.report.method, energies)] if len(energies) else []
