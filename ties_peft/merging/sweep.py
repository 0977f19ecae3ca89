"""Try a prepared merge with several methods, densities and ranks, and compare what the reports say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from rich.console import RenderableType

from ..methods import find_method
from .merged import Merged
from .options import Rank
from .report import figure
from .tables import Printed, make_data_frame, make_table, method_title, number_column

Settings = tuple[str, float | None, Rank]


@dataclass(frozen=True)
class SweepRow:
    """One merge of a sweep.

    Attributes:
        method, density, rank: as asked; density is None for a method that has none.
        used: the method that merged, which differs from `method` where that chooses another.
        written_rank: of the result; None for (IA)³.
        energy: share of the merged squared norm that the rank keeps, in [0, 1].
        norm: Frobenius norm of the merged task vector.
        projections: for each adapter ⟨τ, τᵢ⟩/‖τᵢ‖², by its name; None where a norm is 0.
    """

    method: str
    density: float | None
    rank: Rank
    used: str
    written_rank: int | None
    energy: float
    norm: float
    projections: dict[str, float | None]

    @property
    def title(self) -> str:
        """The method, and in brackets the one that it chose."""
        return method_title(self.method, self.used)


@dataclass(frozen=True, repr=False)
class Sweep(Printed):
    """The rows of a sweep, in the order of the methods, then densities, then ranks; prints as a table.

    Attributes:
        rows: one a merge.
        warnings: none; those of a merge stand in its own report.
    """

    rows: list[SweepRow]
    warnings: list[str] = field(default_factory=list)

    def tables(self) -> RenderableType:
        """Return a table with a row for each merge."""
        adapters = list(self.rows[0].projections) if self.rows else []
        return make_table(
            ["method", *map(number_column, ("density", "rank", "energy", "norm", *adapters))],
            [
                (
                    row.title,
                    "–" if row.density is None else f"{row.density:g}",
                    "–" if row.written_rank is None else str(row.written_rank),
                    f"{row.energy:.1%}",
                    f"{row.norm:.3g}",
                    *(figure(row.projections[name]) for name in adapters),
                )
                for row in self.rows
            ],
            title="energy that the rank keeps, norm of the result, projection of each adapter",
        )

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the rows as plain values."""
        return [asdict(row) for row in self.rows]

    def flat_rows(self) -> list[dict[str, Any]]:
        """Return the rows with one value a key: `projection of NAME` for each adapter."""
        return [
            {key: value for key, value in row.items() if key != "projections"}
            | {f"projection of {name}": value for name, value in row["projections"].items()}
            for row in self.to_dict()
        ]

    def to_pandas(self) -> Any:
        """Return a DataFrame, a column for each figure and for each adapter's projection.

        Raises: RecipeError without pandas.
        """
        return make_data_frame(self.flat_rows())


def sweep(
    merge: Callable[..., Merged], methods: Sequence[str], densities: Sequence[float | None], ranks: Sequence[Rank]
) -> Sweep:
    """Merge once for each setting; see `Prepared.sweep`."""
    rows = []
    for method, density, rank in _settings(methods, densities, ranks):
        merged = merge(method, rank=rank, **({} if density is None else {"density": density}))
        report = merged.report
        kept = {line.name: line.projection for line in report.adapters}
        rows.append(SweepRow(method, density, rank, report.method, report.rank, report.energy, report.norm, kept))
    return Sweep(rows)


def _settings(methods: Sequence[str], densities: Sequence[float | None], ranks: Sequence[Rank]) -> Iterator[Settings]:
    """Yield each setting once; densities only for a method that has one and does not choose another method."""
    for method in methods:
        last = find_method(method.split("+")[-1].strip())
        has_density = "density" in last.model_fields and not last.chooses()
        yield from product([method], densities if has_density else [None], ranks)
