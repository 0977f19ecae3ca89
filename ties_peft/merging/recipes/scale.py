"""Scale: λ, as a number or as a formula in N, the number of adapters with a weight other than 0.

    0.4    1/N    1/sqrt(N)    N^-0.25    N^-1/4    N^(-1/4)    0.7*N^-1/4    1.2/sqrt(N)

A formula is factor · N^exponent. It is matched against one pattern and never evaluated as code. A fraction after `^`
is the exponent, with parentheses or without: N^-1/4 is N^(-1/4). `**` may stand for `^`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from ...adapters.config_values import is_number
from ...errors import RecipeError

EXPECTED = "a finite number, or a formula in N, the number of adapters: 1/N, 1/sqrt(N), N^-1/4 or 0.7*N^-1/4"
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_POWER = rf"(?P<parenthesis>\()?(?P<exponent>{_NUMBER})(?:/(?P<divisor>\d+))?(?(parenthesis)\))"
_FORMULA = re.compile(
    rf"(?:(?P<factor>{_NUMBER})(?P<operator>[*/]))?(?:(?P<root>sqrt\(N\))|N(?:\^{_POWER})?)", re.ASCII
)
_AROUND = re.compile(r"\s*([*/^()])\s*", re.ASCII)  # blanks beside an operator; `1 0*N` stays wrong


@dataclass(frozen=True)
class Scale:
    """λ = factor · N^exponent.

    Attributes:
        factor, exponent: finite; the exponent of a number is 0.
        formula: as it was written; None for a number.
    """

    factor: float
    exponent: float = 0.0
    formula: str | None = None

    @classmethod
    def read(cls, value: Any, what: str = "the scale") -> Scale:
        """Return the scale that a number or a formula stands for.

        Raises: RecipeError that lists the accepted forms.
        """
        if is_number(value):
            return cls(float(value))
        found = _parse(value) if isinstance(value, str) else None
        if found is None:
            raise RecipeError(f"{what} is {value!r}; expected {EXPECTED}.")
        return found

    def at(self, adapters: int) -> float:
        """Return λ for this number of adapters.

        >>> Scale.read("0.5*N^-1/4").at(16)
        0.25

        Raises: RecipeError where it is beyond every float.
        """
        try:
            value = self.factor * math.pow(adapters, self.exponent)
        except OverflowError:
            value = math.inf
        if not math.isfinite(value):
            raise RecipeError(
                f"the scale {self.formula!r} is beyond every number for {adapters} adapters. Lower its exponent."
            )
        return value


def is_scale(value: Any) -> bool:
    """Return whether a value is a finite number or a formula in N."""
    return is_number(value) or (isinstance(value, str) and _parse(value) is not None)


def _parse(text: str) -> Scale | None:
    """Return what a formula stands for; None where it is not one."""
    found = _FORMULA.fullmatch(_AROUND.sub(r"\1", text.strip().replace("**", "^")))
    if found is None:
        return None
    divisor = int(found["divisor"] or 1)
    if divisor == 0:
        return None
    factor = float(found["factor"] or 1)
    exponent = 0.5 if found["root"] else float(found["exponent"] or 1) / divisor
    if not (math.isfinite(factor) and math.isfinite(exponent)):
        return None
    return Scale(factor, -exponent if found["operator"] == "/" else exponent, text)
