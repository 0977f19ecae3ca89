"""Rows of a data set on the Hub: class labels have names and numbers, and some are kept back. No network is used."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from learning.models import bases

import ties_peft
from ties_peft.errors import RecipeError
from ties_peft.evaluation.rows import ClassName, read_rows
from ties_peft.evaluation.task import read_task

TEXTS = ["w1 w2", "w3", "w4 w5 w6", "w7"]
TWO = {"measure": "descriptions", "descriptions": ["w1", "w2"], "rows": "org/set"}
Publish = Callable[..., None]


class Stub:
    """A data set as `datasets` gives it, as far as it is read here."""

    def __init__(self, labels: list[int | None], names: list[str]) -> None:
        self.features = {"text": object(), "label": _Class(names)}
        self._rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=False)]

    def __iter__(self) -> Any:
        return iter(copy.deepcopy(self._rows))


class _Class:
    def __init__(self, names: list[str]) -> None:
        self.names, self.num_classes = names, len(names)

    def int2str(self, number: int) -> str:
        if not 0 <= number < len(self.names):
            raise ValueError(f"Invalid integer class label {number}")
        return self.names[number]


def _real(folder: Path, labels: list[int | None], names: list[str]) -> Any:
    import datasets

    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    made = datasets.Dataset.from_dict({"text": TEXTS[: len(labels)], "label": labels}, features=kinds)
    made.save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


@pytest.fixture(params=["stub", "datasets"])
def publish(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Put a data set where `load_dataset` finds it as org/set: by the library itself, or by a stand-in for it."""
    real = request.param == "datasets"
    if real and importlib.util.find_spec("datasets") is None:
        pytest.skip("the extra data is not installed")

    def put(labels: list[int | None], names: tuple[str, ...] = ("neg", "pos")) -> None:
        found = _real(tmp_path / "set", labels, list(names)) if real else Stub(labels, list(names))
        asked: dict[str, Any] = {}

        def load_dataset(name: str, config: str | None = None, split: str | None = None) -> Any:
            asked.update(name=name, config=config, split=split)
            if split != "test":
                raise ValueError(f"Unknown split {split!r}.\nShould be one of ['test'].")
            return found

        module: Any = __import__("datasets") if real else ModuleType("datasets")
        monkeypatch.setitem(sys.modules, "datasets", module)
        monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)

    return put


def answers(**more: Any) -> list[int]:
    task = read_task({**TWO, **more})
    return task.label_numbers(task.read())


def test_rows_have_names_and_numbers(publish: Publish) -> None:
    publish([0, 1, 1, None])
    found = read_rows("org/set", limit=3)
    assert found == [{"text": t, "label": name} for t, name in zip(TEXTS, ("neg", "pos", "pos"), strict=False)]
    assert [row["label"].number for row in found] == [0, 1, 1]
    assert read_rows("org/set")[3]["label"] is None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_class_name_stays_one(again: Callable[[ClassName], ClassName]) -> None:
    made = again(ClassName("pos", 1))
    assert (made, made.number, made.known, type(made)) == ("pos", 1, True, ClassName)


def test_a_split_that_is_not_there(publish: Publish) -> None:
    publish([0])
    with pytest.raises(RecipeError, match=r"split 'nope': the Hub gives none \(ValueError: Unknown split 'nope'\.\)"):
        read_rows("org/set", split="nope")


@pytest.mark.parametrize("more", [{}, {"labels": ["neg", "pos"]}])
def test_labels_that_are_kept_back(more: dict[str, Any], publish: Publish, bases: dict[str, Path]) -> None:
    publish([-1, -1])
    with pytest.raises(RecipeError) as caught:
        ties_peft.evaluate(None, {**TWO, **more}, base=bases["encoder"])
    for part in ("rows 'org/set', row 1: the label is -1; expected a number from 0 to 1", "split: validation"):
        assert part in str(caught.value)


@pytest.mark.parametrize("measure", ["exact_match", "loss"])
def test_a_label_that_is_kept_back_is_not_written(measure: str, publish: Publish, bases: dict[str, Path]) -> None:
    publish([1, -1])
    with pytest.raises(RecipeError, match=r"row 2: the label is -1; expected a class of the data set"):
        ties_peft.evaluate(None, {"measure": measure, "rows": "org/set"}, base=bases["gpt2"])


def test_texts_alone_need_no_labels(publish: Publish) -> None:
    publish([-1, -1])
    assert read_task(TWO).texts() == TEXTS[:2]
    assert read_task({"measure": "loss", "label": None, "rows": "org/set"}).target_texts(read_rows("org/set")) == [
        "",
        "",
    ]


def test_a_number_written_in_a_file_is_a_text_to_write() -> None:
    task = read_task({"measure": "exact_match", "rows": [{"text": "2 - 3 =", "label": -1}]})
    assert task.target_texts(task.read()) == ["-1"]


@pytest.mark.parametrize(
    ("names", "more", "expected"),
    [
        (("neg", "pos"), {}, [0, 1, 1]),  # the set's order is that of the descriptions
        (("neg", "pos"), {"labels": ["pos", "neg"]}, [1, 0, 0]),  # the task's names decide
        (("5", "1"), {}, [0, 1, 1]),  # a name that looks like another number is a name
        (("0", "1"), {"labels": ["neg", "pos"]}, [0, 1, 1]),  # one that is its number names nothing
        (("w2", "w1"), {}, [1, 0, 0]),  # names that are the descriptions themselves
    ],
)
def test_a_class_is_its_name_and_without_labels_its_number(
    names: tuple[str, ...], more: dict[str, Any], expected: list[int], publish: Publish
) -> None:
    publish([0, 1, 1], names)
    assert answers(**more) == expected


def test_names_that_the_task_does_not_have(publish: Publish) -> None:
    publish([0, 1])
    with pytest.raises(
        RecipeError, match=r"row 1: the label is 'neg'; expected a number from 0 to 1, or one of bad, good"
    ):
        answers(labels=["bad", "good"])


def test_more_classes_than_descriptions(publish: Publish) -> None:
    publish([0, 2], ("a", "b", "c"))
    with pytest.raises(RecipeError, match=r"row 2: the label is 'c'; expected a number from 0 to 1"):
        answers()


@pytest.mark.parametrize(
    ("head", "labels", "expected"),
    [
        (("LABEL_0", "LABEL_1"), None, [0, 1]),  # a head that names no classes has the set's numbers
        (("pos", "neg"), None, [1, 0]),  # one that does has its own order
        (("NEGATIVE", "POSITIVE"), None, None),  # whose order may be any
        (("NEGATIVE", "POSITIVE"), ["neg", "pos"], [0, 1]),
    ],
)
def test_the_classes_of_a_head(
    head: tuple[str, ...], labels: list[str] | None, expected: list[int] | None, publish: Publish
) -> None:
    publish([0, 1])
    task = read_task({"measure": "head", "rows": "org/set", **({"labels": labels} if labels else {})})
    if expected is None:
        with pytest.raises(RecipeError, match=r"the label is 'neg'; expected .* one of NEGATIVE, POSITIVE"):
            task.label_numbers(task.read(), head)
    else:
        assert task.label_numbers(task.read(), head) == expected
