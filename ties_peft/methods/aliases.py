"""Aliases: the names of methods and parameters in PEFT, mergekit and papers, and what they are called here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LARGEST = "largest"  # stands for the largest rank of the adapters


@dataclass(frozen=True)
class Meaning:
    """The method, space, rank and parameters that one of PEFT's `combination_type` names stands for.

    Attributes:
        method, space, parameters: as in `ties_peft.merge`.
        rank: of the output if none is given; `largest` stands for the largest rank of the adapters.
    """

    method: str
    space: str = "delta"
    rank: int | str = "auto"
    parameters: Mapping[str, Any] = field(default_factory=dict)


_MODULE = {"scope": "module"}
COMBINATION_TYPES = {
    "cat": Meaning("cat", rank="max"),
    "dare_linear": Meaning("dare", "factors", LARGEST),
    "dare_linear_svd": Meaning("dare", "delta", LARGEST),
    "dare_ties": Meaning("dare_ties", "factors", LARGEST),
    "dare_ties_svd": Meaning("dare_ties", "delta", LARGEST),
    "linear": Meaning("task_arithmetic", rank="max"),
    "magnitude_prune": Meaning("magnitude_prune", "factors", LARGEST, _MODULE),
    "magnitude_prune_svd": Meaning("magnitude_prune", "delta", LARGEST, _MODULE),
    "svd": Meaning("task_arithmetic", rank=LARGEST),
    "ties": Meaning("ties", "factors", LARGEST, _MODULE),
    "ties_svd": Meaning("ties", "delta", LARGEST, _MODULE),
}

# Methods that have another name in mergekit; `merging.recipes.mergekit` says how they differ.
MERGEKIT = {"dare_linear": "dare", "linear": "average", "nuslerp": "slerp"}

# The parameters' names in PEFT, mergekit and papers → the names here.
PARAMETERS = {
    "combination_type": "method",
    "lam": "scale",
    "lambda": "scale",
    "lambda_": "scale",
    "λ": "scale",
    "majority_sign_method": "elect",
    "merge_method": "method",
    "reset_thresh": "density",
    "scaling_coefficient": "scale",
    "svd_rank": "rank",
    "weight": "weights",
}


def other_name(method: str) -> str | None:
    """Return a sentence on what a method of PEFT or mergekit is called here; None if neither has one of this name.

    >>> other_name("dare_linear")
    "PEFT's dare_linear is dare in space factors here, mergekit's is dare."
    """
    meaning, theirs = COMBINATION_TYPES.get(method), MERGEKIT.get(method)
    if meaning is None:
        return None if theirs is None else f"mergekit's {method} is {theirs} here."
    space = "" if meaning.space == "delta" else f" in space {meaning.space}"
    return f"PEFT's {method} is {meaning.method}{space} here" + (f", mergekit's is {theirs}." if theirs else ".")
