"""The result of `analyze`: figures of adapters, pairs, modules, depths and methods that print and convert."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ..merging.tables import Printed, make_data_frame, make_facts, make_table, make_text, number_column
from . import page
from .advice import WARNING, Advice, Facts, advise
from .figure_kinds import ADAPTER_FIGURES, PAIR_FIGURES, RETENTION_FIGURES, ModuleFigures
from .figures import Measured
from .method_figures import MethodResult
from .module_places import Place, layers_in_order

SHOWN_PAIRS = 15  # in the printed table; --json and the page have all


@dataclass(frozen=True, repr=False)
class Analysis(Printed):
    """How some adapters interfere, and what merges of them keep of each.

    `to_dict` and `to_pandas` give the figures, and `to_html` writes a page that shows them.

    Attributes:
        names: of the adapters, short and unique.
        sources: the adapters as they were given.
        kind: the PEFT types.
        density: of the trim behind `sign_conflict` and `kept_overlap`.
        counted: the share of the rows whose entries were counted; under 1 these two and `redundancy` are estimates.
        modules: the modules' names, sorted.
        shapes: of their task vectors.
        places: the layer and the kind of each module.
        measured: the figures of every module.
        methods: what each method leaves of each adapter.
        causal_lm: whether the adapters are those of a causal language model.
        warnings: of the check before a merge, and what was left out here.
        seconds: that the analysis took.
    """

    names: list[str]
    sources: list[str]
    kind: str
    density: float
    counted: float
    modules: list[str]
    shapes: list[tuple[int, ...]]
    places: list[Place]
    measured: Measured
    methods: list[MethodResult]
    causal_lm: bool = False
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @cached_property
    def everywhere(self) -> list[int]:
        """The numbers of all modules."""
        return list(range(len(self.modules)))

    @cached_property
    def adapters(self) -> dict[str, np.ndarray]:
        """The figures of the whole adapters, (N,) each."""
        return self.measured.of_adapters(self.everywhere)

    @cached_property
    def pairs(self) -> dict[str, np.ndarray]:
        """The figures of all pairs over all modules, (N, N) each."""
        return self.measured.of_pairs(self.everywhere)

    @cached_property
    def pair_numbers(self) -> list[tuple[int, int]]:
        """The numbers (i, j), i < j, of all pairs of adapters."""
        return list(combinations(range(len(self.names)), 2))

    @cached_property
    def module_figures(self) -> list[ModuleFigures]:
        """The figures of every module: of pairs, of adapters, and of what the methods leave of these."""
        names, has = self.names, self.measured.has.T
        first, second = np.triu_indices(len(names), 1)
        of_pairs = [self.measured.of_pairs([number]) for number in self.everywhere]
        of_adapters = [self.measured.of_adapters([number]) for number in self.everywhere]
        pairs = {k.key: np.array([module[k.key][first, second] for module in of_pairs]).T for k in PAIR_FIGURES}
        adapters = {k.key: np.array([module[k.key] for module in of_adapters]).T for k in ADAPTER_FIGURES}
        none = np.zeros((0, len(self.modules)))
        left = {
            "projection": np.concatenate([none, *(result.module_projections.T for result in self.methods)]),
            "cosine": np.concatenate([none, *(result.module_cosines.T for result in self.methods)]),
        }
        return [
            ModuleFigures(
                "Modules by layer: pairs of adapters",
                "Pair",
                [(names[i], names[j]) for i, j in self.pair_numbers],
                " and ",
                PAIR_FIGURES,
                pairs,
            ),
            ModuleFigures(
                "Modules by layer: adapters",
                "Adapter",
                [(name,) for name in names],
                "",
                ADAPTER_FIGURES,
                {key: np.where(has, values, np.nan) for key, values in adapters.items()},
            ),
            ModuleFigures(
                "Modules by layer: what is left of each adapter",
                "Method and adapter",
                [(result.method, name) for result in self.methods for name in names],
                ": ",
                RETENTION_FIGURES[:2],
                left,
            ),
        ]

    @cached_property
    def advice(self) -> list[Advice]:
        """Sentences, each with its figure and the option that acts on it."""
        shared = int(self.measured.has.all(1).sum())
        return advise(
            Facts(
                self.names,
                self.adapters,
                self.pairs,
                self.density,
                shared,
                len(self.modules),
                self.methods,
                self.causal_lm,
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values; None for one that is undefined."""
        return {
            "kind": self.kind,
            "density": self.density,
            "counted": self.counted,
            "adapters": [
                {"name": name, "source": source, **line}
                for name, source, line in zip(
                    self.names, self.sources, self._adapter_lines(self.everywhere), strict=True
                )
            ],
            "pairs": self._pair_lines(self.everywhere),
            "modules": [self._module(number) for number in self.everywhere],
            "depths": [
                {
                    "layer": layer,
                    "modules": len(at),
                    "adapters": self._named(self._adapter_lines(at)),
                    "pairs": self._pair_lines(at),
                }
                for layer, at in self.depths()
            ],
            "methods": [self._method(result) for result in self.methods],
            "advice": [advice.to_dict() for advice in self.advice],
            "warnings": self.warnings,
        }

    def to_pandas(self) -> dict[str, Any]:
        """Return the tables `adapters`, `pairs`, `modules` (a row for a pair on a module) and `methods` as DataFrames.

        Raises: RecipeError without pandas.
        """
        values = self.to_dict()
        methods = [
            {"method": m["name"], "energy": m["energy"], **line} for m in values["methods"] for line in m["adapters"]
        ]
        modules = [
            {"module": module["name"], "layer": module["layer"], **line}
            for module in values["modules"]
            for line in module["pairs"]
        ]
        tables = {"adapters": values["adapters"], "pairs": values["pairs"], "modules": modules, "methods": methods}
        return {name: make_data_frame(rows) for name, rows in tables.items()}

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page with the figures, which needs no network.

        Raises: RecipeError where the file cannot be written, or holds something else.
        """
        written = Path(path)
        page.check_page_file(written)
        page.write_page(written, page.make_page("An analysis of adapters", self._page_data()))
        return written

    def depths(self) -> Iterator[tuple[str, list[int]]]:
        """Yield each layer with the numbers of its modules, in order; modules outside the layers come last."""
        for layer in layers_in_order(self.places):
            yield layer, [number for number, place in enumerate(self.places) if place.layer == layer]

    def _adapter_lines(self, at: Sequence[int]) -> list[dict[str, Any]]:
        figures = self.measured.of_adapters(at)
        return [
            {kind.key: _plain(figures[kind.key][i]) for kind in ADAPTER_FIGURES} | {"rank": int(figures["rank"][i])}
            for i in range(len(self.names))
        ]

    def _named(self, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [{"name": name, **line} for name, line in zip(self.names, lines, strict=True)]

    def _pair_lines(self, at: Sequence[int]) -> list[dict[str, Any]]:
        figures = self.measured.of_pairs(at)
        together = self.measured.has[at].sum(0) > 0
        return [
            {"a": self.names[i], "b": self.names[j]} | {k.key: _plain(figures[k.key][i, j]) for k in PAIR_FIGURES}
            for i, j in self.pair_numbers
            if together[i] and together[j]
        ]

    def _module(self, number: int) -> dict[str, Any]:
        has = self.measured.has[number]
        lines = self._named(self._adapter_lines([number]))
        return {
            "name": self.modules[number],
            "shape": list(self.shapes[number]),
            "layer": self.places[number].layer,
            "kind": self.places[number].kind,
            "adapters": [line for line, there in zip(lines, has, strict=True) if there],
            "pairs": self._pair_lines([number]),
            "methods": [
                {
                    "name": result.method,
                    "norm": float(result.norms[number]),
                    "adapters": [
                        {
                            "name": name,
                            "projection": _plain(result.module_projections[number, i]),
                            "cosine": _plain(result.module_cosines[number, i]),
                        }
                        for i, name in enumerate(self.names)
                        if has[i]
                    ],
                }
                for result in self.methods
            ],
        }

    def _method(self, result: MethodResult) -> dict[str, Any]:
        return {
            "name": result.method,
            "chosen": result.used,
            "space": result.space,
            "scale": result.scale,
            "rank": result.rank,
            "energy": result.energy,
            "energy_by_rank": [float(share) for share in result.energies],
            "adapters": [
                {"name": name, "projection": p, "cosine": c, "others": o}
                for name, p, c, o in zip(self.names, result.projection, result.cosine, result.others, strict=True)
            ],
        }

    # the page

    def _page_data(self) -> dict[str, Any]:
        """Return what the page shows."""
        lines = [[self.adapters[kind.key][i] for kind in ADAPTER_FIGURES] for i in range(len(self.names))]
        retention = {
            result.title: list(zip(result.projection, result.cosine, result.others, strict=True))
            for result in self.methods
        }
        return {
            "names": self.names,
            "facts": [
                f"{len(self.names)} {self.kind} adapters with {len(self.modules)} modules. What an adapter keeps is the "
                f"{self.density:.0%} of its entries of largest magnitude, counted on {self._counted()}."
            ],
            "advice": [
                *(advice.to_dict() for advice in self.advice),
                *({"text": text, "option": None, "severity": WARNING} for text in self.warnings),
            ],
            "adapters": page.adapter_table(
                [("adapter", None), *((kind.label, kind.format) for kind in ADAPTER_FIGURES)],
                [[name, *line] for name, line in zip(self.names, lines, strict=True)],
            ),
            "pairs": page.pair_figures(PAIR_FIGURES, self.pairs),
            "places": page.module_places_shown(self.modules, self.shapes),
            "modules": list(map(page.module_figures, self.module_figures)),
            "retention": page.retention_bars(retention),
            "curves": page.energy_curves({result.title: result.energies for result in self.methods}),
            "commands": page.commands(self.sources, [(result.method, result.rank) for result in self.methods]),
        }

    # printing

    def tables(self) -> RenderableType:
        """Return the adapters, the pairs, the methods and the advice as tables."""
        parts: list[RenderableType] = [self._adapter_table(), Text(), *self._pair_tables()]
        parts += [self._method_table(), Text()] if self.methods else []
        parts.append(make_facts(self._notes()))
        for advice in self.advice:
            option = f" [{advice.option}]" if advice.option else ""
            parts.append(make_text(f"• {advice.text}{option}", "yellow" if advice.severity == WARNING else ""))
        return Group(*parts)

    def _adapter_table(self) -> Table:
        figures = self.adapters
        rows = [
            (
                str(i + 1),
                name,
                f"{figures['norm'][i]:.3g}",
                f"{figures['rank'][i]:.0f}",
                _shown(figures["effective_rank"][i], ".1f"),
                _shown(figures["redundancy"][i], ".0%"),
            )
            for i, name in enumerate(self.names)
        ]
        columns = [Column("", no_wrap=True), Column("adapter", overflow="fold")]
        columns += [number_column(heading) for heading in ("norm", "rank", "effective rank", "in largest 20 %")]
        return make_table(columns, rows, title=f"{len(self.names)} {self.kind} adapters, {len(self.modules)} modules")

    def _pair_tables(self) -> list[RenderableType]:
        pairs = sorted(self.pair_numbers, key=lambda pair: -np.nan_to_num(self.pairs["cosine"][pair]))
        shown = pairs[:SHOWN_PAIRS]
        formats = {
            "cosine": ".3f",
            "sign_conflict": ".1%",
            "predicted_conflict": ".1%",
            "kept_overlap": ".1%",
            "overlap_in": ".2f",
            "overlap_out": ".2f",
        }
        headings = ("cosine", "sign conflict", "predicted", "kept by both", "overlap in", "out")
        rows = [
            (f"{i + 1} and {j + 1}", *(_shown(self.pairs[key][i, j], form) for key, form in formats.items()))
            for i, j in shown
        ]
        if not rows:
            return []
        more = f", the {len(shown)} with the largest cosines" if len(shown) < len(pairs) else ""
        title = f"{len(pairs)} pair{'s' * (len(pairs) != 1)}{more}"
        columns = [Column("", no_wrap=True), *(number_column(heading) for heading in headings)]
        return [make_table(columns, rows, title=title), Text()]

    def _method_table(self) -> Table:
        numbers = [str(i + 1) for i in range(len(self.names))] if len(self.names) <= 8 else []
        columns = [Column("method", no_wrap=True), *map(number_column, ("rank", "energy", "least", "mean", *numbers))]
        rows = []
        for result in self.methods:
            known = [value for value in result.projection if value is not None]
            each = ["–" if value is None else f"{value:.2f}" for value in result.projection] if numbers else []
            rows.append(
                (
                    result.title,
                    "–" if result.rank is None else str(result.rank),
                    f"{result.energy:.1%}",
                    f"{min(known, default=0):.2f}",
                    f"{sum(known) / max(1, len(known)):.2f}",
                    *each,
                )
            )
        return make_table(columns, rows, title="projection: the share of each adapter that the merged one holds")

    def _counted(self) -> str:
        return "all entries" if self.counted >= 1 else f"{self.counted:.2%} of the rows of each module, an estimate"

    def _notes(self) -> list[tuple[str, str]]:
        return [
            (
                "sign conflict",
                f"of the entries that both keep at density {self.density:g}, counted on {self._counted()}",
            ),
            ("predicted", "the sign conflict of Gaussian entries with the same cosine"),
            ("projection", "does not predict accuracy on a language model (benchmarks/prediction.py): measure that"),
            ("overlap", "of the row spaces (in) and of the column spaces (out): 1 is the same space, 0 orthogonal"),
        ]


def _plain(value: float) -> float | None:
    """Return a figure as a plain number; None where it is undefined."""
    return float(value) if math.isfinite(value) else None


def _shown(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"
