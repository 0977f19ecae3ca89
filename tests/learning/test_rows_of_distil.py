"""What `distil` takes as rows: one form for every adapter, one for each, and what could be either is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from learning.models import linear_shapes, make_model, write_lora

import ties_peft
from ties_peft.errors import TiesPeftError
from ties_peft.learning.teacher_specs import read_teacher_specs

TASK = {"measure": "descriptions", "descriptions": ["w1 w2", "w3 w4", "w5 w6"]}
TEXTS = [f"w{number} w{number + 1}" for number in range(12)]


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    shapes = linear_shapes(make_model("encoder"), "query")
    return [write_lora(tmp_path / f"a{seed}", shapes, seed) for seed in range(2)]


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "form", ["texts", "tuple", "one list", "a list for each", "mapping", "path", "file", "files", "one file"]
)
def test_forms_of_rows_that_mean_the_same(form: str, alone: bool, loras: list[Path], tmp_path: Path) -> None:
    """Twelve texts, in every spelling, for one adapter and for two."""
    given = loras[:1] if alone else loras
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    forms: dict[str, Any] = {
        "texts": TEXTS,
        "tuple": tuple(TEXTS),
        "one list": [TEXTS],
        "a list for each": [TEXTS] * len(given),
        "mapping": dict.fromkeys(given, TEXTS),
        "path": file,
        "file": str(file),
        "one file": [str(file)],
        "files": [str(file)] * len(given),
    }
    assert [spec.rows.texts for spec in read_teacher_specs(given, forms[form], TASK)] == [tuple(TEXTS)] * len(given)


def test_forms_of_rows_that_differ_from_adapter_to_adapter(loras: list[Path], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    first, second = read_teacher_specs(loras, [TEXTS[:6], str(tmp_path / "texts.txt")], TASK)
    assert (first.rows.texts, second.rows.texts) == (tuple(TEXTS[:6]), tuple(TEXTS))
    first, second = read_teacher_specs(loras, [70, tmp_path / "texts.txt"], [TASK])
    assert (first.rows.texts, first.rows.count, second.rows.texts) == (None, 70, tuple(TEXTS))
    assert [spec.rows.count for spec in read_teacher_specs(loras, [70], TASK)] == [70, 70]


def test_a_text_that_ends_like_a_file_is_a_text_among_texts(loras: list[Path]) -> None:
    texts = [*TEXTS, "the list is in notes.txt", "either/or"]
    assert [spec.rows.texts for spec in read_teacher_specs(loras, texts, TASK)] == [tuple(texts)] * 2


@pytest.mark.parametrize("texts", [["some text", "other text"], ["some text", "notes.txt"]])
def test_as_many_texts_as_adapters_are_refused(texts: list[str], loras: list[Path]) -> None:
    """They could be read by every adapter, or one by each: the message has both spellings, and both are understood."""
    with pytest.raises(TiesPeftError) as caught:
        read_teacher_specs(loras, texts, TASK)
    spellings = {f"rows=[{texts!r}]": [texts], f"rows={[[text] for text in texts]!r}": [[text] for text in texts]}
    assert all(spelling in str(caught.value) for spelling in spellings)
    for given, expected in zip(spellings.values(), ([texts, texts], [texts[:1], texts[1:]]), strict=True):
        assert [list(spec.rows.texts or ()) for spec in read_teacher_specs(loras, given, TASK)] == expected


@pytest.mark.parametrize("rows", ["org/set", ["org/set", "org/other"], {"a0": "org/set", "a1": "org/other"}])
def test_data_sets_on_the_hub_are_rows(rows: Any, loras: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def read_rows(source: str, **_: Any) -> list[dict[str, str]]:
        asked.append(source)
        return [{"text": text} for text in TEXTS]

    monkeypatch.setattr("ties_peft.learning.teacher_specs.read_rows", read_rows)
    assert [spec.rows.texts for spec in read_teacher_specs(loras, rows, TASK)] == [tuple(TEXTS)] * 2
    assert asked == (["org/set"] * 2 if isinstance(rows, str) else ["org/set", "org/other"])


@pytest.mark.parametrize(
    ("keys", "column"), [(["prompt"], "prompt"), (["prompt", "text"], "text"), (["text", "label"], "text")]
)
def test_prompts_are_read_where_there_is_no_text(
    keys: list[str], column: str, loras: list[Path], tmp_path: Path
) -> None:
    """Without a task, and with one that names no column; the report says which column it was."""
    rows = [{key: f"{key}: {text}" for key in keys} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for task in (None, TASK):
        first, _ = read_teacher_specs(loras, tmp_path / "rows.jsonl", task)
        assert first.rows.texts == tuple(f"{column}: {text}" for text in TEXTS)
        assert first.rows.origin == f"{tmp_path / 'rows.jsonl'}, column {column}"
    second, _ = read_teacher_specs(loras, tmp_path / "rows.jsonl", {**TASK, "text": keys[-1]})
    assert second.rows.origin.endswith(f"column {keys[-1]}")


def test_a_column_that_is_not_found_can_be_named_in_the_way_that_the_message_says(
    loras: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"question": text}) for text in TEXTS), encoding="utf-8")
    with pytest.raises(
        TiesPeftError, match=r"keys question\. Rename .* to 'text' or 'prompt', or give a task .* text: KEY"
    ):
        read_teacher_specs(loras, path)
    assert read_teacher_specs(loras, path, {**TASK, "text": "question"})[0].rows.texts == tuple(TEXTS)
    with pytest.raises(TiesPeftError, match=r"keys question\. Name the one that holds the text \(text: KEY\)"):
        read_teacher_specs(loras, path, TASK)


@pytest.mark.parametrize("form", ["alone", "one of a list", "a list", "mapping"])
def test_tasks_for_all_or_for_each_without_a_measure(form: str, loras: list[Path]) -> None:
    """A task given as a mapping is told from a mapping of adapters by its keys."""
    task = {"descriptions": TASK["descriptions"]}
    forms = {
        "alone": task,
        "one of a list": [task],
        "a list": [task, task],
        "mapping": {"a0": task, "a1": task},
    }
    specs = read_teacher_specs(loras, 50, forms[form])
    assert [spec.task.measure for spec in specs if spec.task] == ["descriptions"] * 2


@pytest.mark.parametrize(("task_type", "measure"), [("CAUSAL_LM", "loss"), ("SEQ_CLS", "head")])
def test_a_task_for_distil_alone_needs_no_measure(task_type: str, measure: str, tmp_path: Path) -> None:
    """The adapter's task type says how it predicts; a task that is judged needs a measure."""
    own = write_lora(tmp_path / "a", linear_shapes(make_model("llama"), "q_proj"), 0, task_type=task_type)
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS), encoding="utf-8")
    (tmp_path / "task.yaml").write_text("rows: prompts.jsonl\ntext: prompt\n", encoding="utf-8")
    (spec,) = read_teacher_specs([own], tasks=tmp_path / "task.yaml")
    assert spec.task is not None
    assert (spec.task.measure, spec.rows.texts) == (measure, tuple(TEXTS))
    (spec,) = read_teacher_specs([own], tasks={"rows": TEXTS, "stop": None})
    assert spec.task is not None and spec.task.measure == "exact_match"  # the only one with such a key
    with pytest.raises(TiesPeftError, match=r"task\.yaml: no measure is named; .* A task for distil needs none"):
        ties_peft.evaluate(own, tmp_path / "task.yaml")


def test_a_task_without_a_measure_is_refused_where_the_adapter_does_not_say_how_it_predicts(loras: list[Path]) -> None:
    with pytest.raises(TiesPeftError, match="no measure is named"):
        read_teacher_specs(loras, tasks={"rows": TEXTS})


def test_a_wrong_key_among_adapters_and_in_a_task(loras: list[Path]) -> None:
    with pytest.raises(TiesPeftError, match="unknown adapter 'a3'"):
        read_teacher_specs(loras, 50, {"a0": TASK, "a3": TASK})
    with pytest.raises(TiesPeftError, match="did you mean 'descriptions'"):
        read_teacher_specs(loras, 50, {"descriptons": ["a", "b"], "name": "x"})
