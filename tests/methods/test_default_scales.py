"""Default scales: that they are what was measured to be good, where they hold, and what the published ones are warned of."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipes.by_hand import same_tensors

import ties_peft
from ties_peft.methods import method_classes

MEASURED = Path(__file__).parents[2] / "benchmarks/results/scales.json"
DEFAULTS = {"tsv": "1/sqrt(N)", "boosting": "0.7/sqrt(N)"}
FINISHING = [name for name, cls in method_classes().items() if cls.finishes() and not cls.prepares()]
Make = Callable[..., Path]


@pytest.fixture
def four(make_lora: Make) -> list[Path]:
    return [make_lora(name, seed=seed) for seed, name in enumerate("abcd")]


def merge_quietly(adapters: Sequence[Any], *asked: Any, **more: Any) -> ties_peft.Merged:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ties_peft.TiesPeftWarning)
        return ties_peft.merge(adapters, *asked, **more)


def published(merged: ties_peft.Merged) -> list[str]:
    return [text for text in merged.report.warnings if "is the published scale" in text]


@pytest.mark.parametrize(("method", "factor"), [("tsv", 1.0), ("boosting", 0.7)])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_default_makes_up_for_the_number_of_adapters(
    four: list[Path], method: str, factor: float, count: int
) -> None:
    default, one = (merge_quietly(four[:count], method, rank="max", **asked) for asked in ({}, {"scale": 1.0}))
    assert default.report.scale == pytest.approx(factor / np.sqrt(count))
    assert default.recipe.scale is None
    for name in one.modules:
        np.testing.assert_allclose(default.delta(name), factor / np.sqrt(count) * one.delta(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row", [0, 1, 2], ids=["tsv", "boosting", "ties+boosting"])
def test_the_default_is_good_by_the_measurement_that_is_stored(row: int) -> None:
    """Ahead of the published one by more than a point, and at most a point under the best of them."""
    method = ["tsv", "boosting", "ties+boosting"][row]
    rows = {one["scale"]: one for one in json.loads(MEASURED.read_text())["scales"] if one["method"] == method}
    last = method_classes()[method.split("+")[-1]]
    default, published = rows[str(last.default_scale)], rows[str(last.published_scale)]
    assert default["mean"] > published["mean"] + 1
    assert default["difference"] > default["error"] > 0
    assert default["mean"] > max(one["mean"] for one in rows.values()) - 1


@pytest.mark.parametrize("method", DEFAULTS)
def test_the_published_scale_is_warned_of_once_with_the_default(four: list[Path], method: str) -> None:
    with pytest.warns(ties_peft.TiesPeftWarning, match="is the published scale") as found:
        merged = ties_peft.merge(four, method, scale=1)
    (text,) = published(merged)
    assert sum(str(one.message) == text for one in found) == 1
    assert f"'{method}'" in text and DEFAULTS[method] in text and "leave the scale out" in text


@pytest.mark.parametrize("scale", [None, 0.9, "N^-1/4", -1.0])
@pytest.mark.parametrize("method", DEFAULTS)
def test_no_other_scale_is(four: list[Path], method: str, scale: Any) -> None:
    assert published(merge_quietly(four, method, scale=scale)) == []


def test_nor_is_it_where_it_does_no_harm(four: list[Path]) -> None:
    assert published(merge_quietly(four[:1], "tsv", scale=1)) == []
    assert published(merge_quietly(four[:2], "tsv", scale=1, weights=[1, 0])) == []
    assert published(merge_quietly(four, "pico+tsv", scale=1)) == [], "pico brings the result to its own norm"
    assert published(merge_quietly(four, "ties", scale=1)) == []


@pytest.mark.parametrize("method", FINISHING)
def test_a_method_after_the_sum_is_that_method_by_default(four: list[Path], method: str) -> None:
    """The default λ is that of the stage that changes the result last."""
    alone, after = merge_quietly(four, method), merge_quietly(four, f"task_arithmetic+{method}")
    assert alone.report.scale == after.report.scale
    for name in alone.modules:
        np.testing.assert_allclose(after.delta(name), alone.delta(name), rtol=1e-3, atol=1e-4)


def test_boosting_after_ties_has_the_default_of_boosting(four: list[Path]) -> None:
    merged = merge_quietly(four, "ties+boosting", "core")
    assert merged.report.scale == pytest.approx(0.35)
    assert same_tensors(merged, merge_quietly(four, "ties+boosting", "core", scale="0.7/sqrt(N)"))
    assert len(published(merge_quietly(four, "ties+boosting", "core", scale=1))) == 1


def test_a_default_that_cannot_be_read_is_said(four: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_classes()["tsv"], "default_scale", "1/M")
    with pytest.raises(ties_peft.RecipeError, match="the default scale of method 'tsv' is '1/M'; expected"):
        ties_peft.merge(four, "tsv")
