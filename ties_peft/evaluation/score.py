"""The score of one adapter on one task, row by row, and the difference of two scores of the same rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import RecipeError


class Difference(NamedTuple):
    """The difference of two scores of the same rows.

    Attributes:
        mean: by how much the first is better, in the unit of `Score.value`.
        error: the standard error of the mean, from the differences row by row; NaN for a single row.
    """

    mean: float
    error: float


@dataclass(frozen=True)
class Score:
    """The score of one adapter on one task.

    Attributes:
        task, measure: what was asked.
        adapter: the name of the adapter; None for the base model alone.
        rows: the number of rows.
        accuracy: the share of rows that are right, in [0, 1]; None for measure `loss`. For measures of generated text a
            row is right if the text equals the label.
        loss: mean −log p of the right label (of the right tokens for `loss`), in nats; None for generated text.
        right: for each row whether it was right; empty for `loss`.
        cut: the number of rows that were longer than the task's max_tokens or the model allows.
        blank: the number of rows whose text is empty or white space; they are scored like the others.
        losses: for each row −log p of the right label, for `loss` the sum over its tokens; empty for generated text.
        tokens: for each row the number of tokens that `losses` sums over; empty for measures other than `loss`.
        chrf, bleu: of all texts together, from 0 to 100, as sacrebleu computes them; None for measures other than these.
        texts: for each row the generated text; empty where nothing is generated.
        text_scores: for each row its own chrF or BLEU, as the measure says; empty for other measures.
        dtype: the precision of the base model's weights, such as "float32".
        seconds: how long the rows took.
    """

    task: str
    measure: str
    adapter: str | None
    rows: int
    accuracy: float | None
    loss: float | None
    right: tuple[bool, ...] = ()
    cut: int = 0
    blank: int = 0
    losses: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    chrf: float | None = None
    bleu: float | None = None
    texts: tuple[str, ...] = ()
    text_scores: tuple[float, ...] = ()
    dtype: str = ""
    seconds: float = field(default=0.0, compare=False)

    @property
    def value(self) -> float:
        """The number to compare by, larger is better: accuracy, chrF or BLEU in [0, 1]; −loss for measure `loss`."""
        if self.measure in ("chrf", "bleu"):
            return float((self.chrf if self.measure == "chrf" else self.bleu) or 0.0) / 100
        return -self.loss if self.accuracy is None and self.loss is not None else float(self.accuracy or 0.0)

    @property
    def error(self) -> float | None:
        """The standard error of the accuracy, √(p̃(1−p̃)/ñ), from the number of rows alone.

        ñ = n + 4 and p̃ = (k + 2)/ñ for k of n rows right: two more rows count as right and two as wrong, because
        √(p(1−p)/n) would be 0 where all rows, or none, are right.
        Source: Agresti and Coull, The American Statistician 52 (1998), 119-126.
        """
        if self.accuracy is None:
            return None
        count = self.rows + 4
        share = (self.accuracy * self.rows + 2) / count
        return math.sqrt(share * (1 - share) / count)

    @property
    def rows_per_second(self) -> float | None:
        """The number of rows scored per second; None where the time is not known."""
        return self.rows / self.seconds if self.seconds else None

    def difference(self, other: Score) -> Difference:
        """Return by how much this score is better than another one of the same rows, and the paired standard error.

        Each row has a value, and d is the difference of the two values of a row; the mean is that of d, and the error is
        std(d)/√n. The value is 1 or 0 for an accuracy, and the row's own chrF or BLEU in [0, 1]. The loss per token,
        ΣL/ΣT over the rows, is a ratio, so the value is its linear term, −(ΣL/ΣT + (L − T·ΣL/ΣT)/mean(T)), of mean −ΣL/ΣT.

        Args:
            other: the score of another adapter, or of the base.
        Raises: RecipeError where the scores are not of the same task, measure and number of rows and tokens.
        """
        mine, its = ((one.task, one.measure, one.rows, one.tokens) for one in (self, other))
        if mine != its:
            first, second = (f"task {t!r}, {measure}, {rows} rows" for t, measure, rows, _ in (mine, its))
            raise RecipeError(
                f"scores of the same rows are expected; found {first} and {second}"
                f"{'' if mine[:3] != its[:3] else ' with other tokens'}. Evaluate both on one task."
            )
        differences = self._row_values() - other._row_values()
        error = float(differences.std() / math.sqrt(self.rows)) if self.rows > 1 else math.nan
        return Difference(float(differences.mean()), error)

    def _row_values(self) -> Tensor:
        """Return one number a row; their mean is `value`, except for chrF and BLEU."""
        if self.text_scores:
            return torch.tensor(self.text_scores, dtype=torch.float64) / 100
        if self.right:
            return torch.tensor(self.right, dtype=torch.float64)
        losses, tokens = (torch.tensor(values, dtype=torch.float64) for values in (self.losses, self.tokens))
        ratio = losses.sum() / tokens.sum()
        return -(ratio + (losses - tokens * ratio) / tokens.mean())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as values that JSON can hold."""
        return {
            **vars(self),
            "right": [int(right) for right in self.right],
            "rows_per_second": self.rows_per_second,
        }
