"""Name the figures that are drawn, by the page and by `plots`: labels, units and meanings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..merging.measure import LOW_PROJECTION

PERCENT, POINTS, DEGREES, WHOLE = "percent", "points", "degrees", "whole"
UNITS = {PERCENT: "%", POINTS: "percentage points", DEGREES: "degrees"}
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class FigureKind:
    """One figure that is drawn.

    Attributes:
        key: its name in `Analysis.to_dict`.
        label, meaning: what readers are shown.
        format: percent, points, degrees or whole; None for a plain number.
        diverging: whether 0 is the middle of its values: colours then tell the sign.
        reach: a scale of colours goes to this value at least, so that differences of no importance look alike.
        factor: a page stores a module's figure as the whole number nearest to `factor` times it.
    """

    key: str
    label: str
    meaning: str
    format: str | None = None
    diverging: bool = False
    reach: float = 0.0
    factor: float = 1000

    @property
    def shown_factor(self) -> int:
        """What a value is multiplied by to be in the unit that is shown."""
        return 100 if self.format in (PERCENT, POINTS) else 1

    @property
    def axis_label(self) -> str:
        """The label with the unit."""
        return f"{self.label} ({UNITS[self.format]})" if self.format in UNITS else self.label


ADAPTER_FIGURES = (
    FigureKind("norm", "norm", "The Frobenius norm of the task vector.", factor=1e6),
    FigureKind("rank", "rank", "The rank that the adapter stores.", WHOLE, factor=1),
    FigureKind(
        "effective_rank",
        "effective rank",
        "exp of the entropy of pᵢ = σᵢ²/Σσ², with σᵢ the singular values: how many directions matter.",
    ),
    FigureKind(
        "redundancy",
        "in the largest 20 %",
        "The share of the squared norm that the largest 20 % of the entries of the adapter hold.",
        PERCENT,
    ),
)
PAIR_FIGURES = (
    FigureKind(
        "cosine",
        "cosine",
        "The cosine between the two task vectors: 0 is unrelated, 1 is the same direction.",
        diverging=True,
        reach=0.1,
    ),
    FigureKind(
        "sign_conflict",
        "sign conflict",
        "Of the entries that both adapters keep, the share whose signs differ.",
        PERCENT,
    ),
    FigureKind(
        "predicted_conflict",
        "predicted sign conflict",
        "The sign conflict of Gaussian entries with the same cosine.",
        PERCENT,
    ),
    FigureKind(
        "excess_conflict",
        "excess sign conflict",
        "The sign conflict minus the predicted one, in percentage points.",
        POINTS,
        diverging=True,
        reach=0.05,
    ),
    FigureKind(
        "kept_overlap",
        "kept by both",
        "Of the entries that at least one of the two adapters keeps, the share that both keep.",
        PERCENT,
    ),
    FigureKind(
        "overlap_in",
        "overlap of inputs",
        "How much the row spaces overlap, ‖UᵀV‖²/min(r₁, r₂): 1 is the same space, 0 orthogonal spaces.",
    ),
    FigureKind(
        "overlap_out",
        "overlap of outputs",
        "How much the column spaces overlap, ‖UᵀV‖²/min(r₁, r₂): 1 is the same space, 0 orthogonal spaces.",
    ),
    FigureKind(
        "angle_in",
        "smallest angle of inputs",
        "The smallest principal angle between the row spaces.",
        DEGREES,
        factor=10,
    ),
    FigureKind(
        "angle_out",
        "smallest angle of outputs",
        "The smallest principal angle between the column spaces.",
        DEGREES,
        factor=10,
    ),
    FigureKind(
        "initial_cosine",
        "cosine of A",
        "The cosine between the factors A as they are stored; near 1 if training started from the same A.",
        diverging=True,
        reach=0.1,
    ),
)
NO_PREDICTION = (
    f"Under {LOW_PROJECTION} most adapters of a sentence encoder had lost more than half of their gain in accuracy; on a "
    "language model the projection did not predict the accuracy (benchmarks/prediction.py): measure it."
)
RETENTION_FIGURES = (
    FigureKind(
        "projection",
        "projection",
        "⟨τ, τᵢ⟩/‖τᵢ‖², the share of the adapter's task vector τᵢ that the merged one, τ, holds: 1 is all of it, 0 nothing.",
    ),
    FigureKind(
        "cosine",
        "cosine",
        "The cosine between the adapter's task vector and the merged one.",
    ),
    FigureKind(
        "others",
        "others",
        "The norm of what the merge adds that is not this adapter's, divided by the adapter's own norm.",
    ),
)
RESULT_FIGURES = (
    FigureKind("norm", "norm", "The Frobenius norm of the merged task vector, before the rank cuts it.", factor=1e6),
    FigureKind("energy", "energy kept", "The share of its squared norm that the rank keeps.", PERCENT),
    FigureKind(
        "conflict",
        "sign conflict",
        "Of the entries that two or more adapters keep, the share whose signs differ.",
        PERCENT,
    ),
)


@dataclass(frozen=True)
class ModuleFigures:
    """Figures of every module for several series: pairs, adapters, or the results of methods.

    Attributes:
        title: of a section of the page.
        what: one series is.
        series: the names that make up each: of two adapters, of one, or of a method and an adapter.
        joiner: stands between these names.
        kinds: the figures.
        values: (series, modules) by the figure's key; NaN where it is undefined.
    """

    title: str
    what: str
    series: Sequence[tuple[str, ...]]
    joiner: str
    kinds: Sequence[FigureKind]
    values: Mapping[str, Array]

    def selected(self, names: Sequence[str]) -> list[int]:
        """Return the numbers of the series that hold all of these names."""
        return [number for number, series in enumerate(self.series) if set(names) <= set(series)]


def mean_of_known(values: Array) -> Array:
    """Return the mean over the first axis of what is defined; NaN where nothing is."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0.0).sum(0), known.sum(0)
    mean: Array = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return mean
