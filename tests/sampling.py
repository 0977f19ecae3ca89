"""Few of many combinations for `make test`; the others are marked slow, and run by `make test-slow`."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import pytest


def covering(cases: Iterable[Any], levels: Callable[[Any], Iterable[Hashable]], seed: str = "") -> list[Any]:
    """Mark all cases as slow but for some that have every level of every factor among them.

    `levels(case)` are the levels of a case: a method and a space, say, or for pairs of factors the pairs of levels.
    The cases are tried in an order drawn by the seed, so that tests of unlike names take unlike cases.
    """
    listed = list(cases)
    order = list(range(len(listed)))
    random.Random(seed).shuffle(order)
    chosen, seen = set[int](), set[Hashable]()
    for number in order:
        wanted = set(enumerate(levels(listed[number])))
        if not wanted <= seen:
            chosen.add(number)
            seen |= wanted
    return [case if n in chosen else _slow(case) for n, case in enumerate(listed)]


def some(cases: Iterable[Any], count: int, seed: str = "") -> list[Any]:
    """Mark all cases as slow but for `count` of them, drawn by the seed."""
    listed = list(cases)
    chosen = set(random.Random(seed).sample(range(len(listed)), min(count, len(listed))))
    return [case if n in chosen else _slow(case) for n, case in enumerate(listed)]


def _slow(case: Any) -> Any:
    if hasattr(case, "marks"):  # a pytest.param
        return pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow], id=case.id)
    return (
        pytest.param(*case, marks=pytest.mark.slow)
        if type(case) is tuple
        else pytest.param(case, marks=pytest.mark.slow)
    )


def of_pairs(case: Iterable[Hashable]) -> list[Hashable]:
    """Return the pairs of levels of a case, for a set of cases in which every pair is tried."""
    parts = list(case)
    return [(a, b) for i, a in enumerate(parts) for b in parts[:i]]
