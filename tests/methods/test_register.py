"""A method of one's own in the process at hand, without a package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field

import ties_peft
from ties_peft.methods import Method, TaskVectors, method_classes, register


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setattr(sys.modules["ties_peft.methods"], "_REGISTERED", {})
    yield
    method_classes.cache_clear()


def make(**changes: Any) -> type[Method]:
    class Level(Method):
        """A share of the sum."""

        name: ClassVar[str] = "level"
        source: ClassVar[str] = "a test"
        share: float = Field(0.5, gt=0, le=1, description="of the sum")

        def merge(self, task_vectors: TaskVectors) -> Any:
            return task_vectors.sum(self.share)

        def linear(self, adapters: int) -> bool:
            return True

    for name, value in changes.items():
        setattr(Level, name, value)
    return Level


def test_it_merges_by_its_name_with_its_parameters(make_lora: Callable[..., Path]) -> None:
    adapters = [make_lora("a"), make_lora("b", seed=1)]
    cls = make()
    assert register(cls) is cls
    merged = ties_peft.merge(adapters, "level", share=0.25, rank="max")
    opened = [ties_peft.Adapter.load(folder) for folder in adapters]
    for name in merged.modules:
        expected = 0.25 * sum(adapter.delta(name).double() for adapter in opened)
        torch.testing.assert_close(merged.delta(name).double(), expected, rtol=1e-5, atol=1e-5)
    assert merged.recipe.method == "level"


def test_it_is_found_refused_and_composed_as_any_other(make_lora: Callable[..., Path]) -> None:
    register(make())
    assert "level" in {info.name for info in ties_peft.methods()}
    with pytest.raises(ties_peft.MethodError, match=r"method 'level', parameter 'share' is 2"):
        ties_peft.merge([make_lora("a")], "level", share=2)
    assert (
        ties_peft.merge([make_lora("a"), make_lora("b", seed=1)], "dare+level", density=0.5).recipe.method
        == "dare+level"
    )


def test_a_name_registered_anew_replaces_the_class(make_lora: Callable[..., Path]) -> None:
    register(make())
    register(make(default_scale=2.0))
    assert method_classes()["level"].default_scale == 2.0


def test_it_is_gone_from_a_process_that_did_not_register_it(make_lora: Callable[..., Path]) -> None:
    with pytest.raises(ties_peft.RecipeError, match=r"unknown method|method 'level'"):
        ties_peft.merge([make_lora("a")], "level")


class Nothing:
    """No method."""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Nothing, "is not a method; expected a subclass"),
        ("ties", "is not a method; expected a subclass"),
        (Method, "lacks name and merge"),
        (make(name="ties"), "the name 'ties' is that of another method"),
        (make(name="dare+mine"), "has the name 'dare+mine'; expected letters"),
        (make(__doc__=""), "lacks a docstring"),
    ],
)
def test_what_cannot_be_a_method_is_refused(given: Any, said: str) -> None:
    known = dict(method_classes())
    with pytest.raises(ties_peft.MethodError, match=said.replace("+", r"\+")):
        register(given)
    assert method_classes() == known
