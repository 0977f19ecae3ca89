"""Wrong input ends with one clear message before the model is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from learning.models import bases, linear_shapes, make_model, sentences, write_lora

import ties_peft
from ties_peft.errors import TiesPeftError
from ties_peft.evaluation.rows import read_rows
from ties_peft.evaluation.task import read_task

DESCRIBED = {"measure": "descriptions", "descriptions": ["w1", "w2"]}


def said(given: Any) -> str:
    with pytest.raises(TiesPeftError) as caught:
        read_task(given)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("measure: descriptions\ndescriptons: [a, b]", ["line 2", "'descriptons'", "did you mean 'descriptions'?"]),
        ("measure: acuracy", ["line 1", "unknown measure 'acuracy'", "exact_match"]),
        ("rows: a.jsonl", ["no measure is named", "head, exact_match, loss"]),
        ("label: null\nrows: a.txt", ["no measure is named", "head, exact_match, loss"]),
        (
            "choices: [a, b]\ndescriptions: [c, d]",
            ["no measure is named", "choices (choices)", "descriptions (descriptions)"],
        ),
        ("choices: [a, b]\nstop: null", ["no measure is named", "choices (choices)", "stop (exact_match)"]),
        ("temperature: 3\nmean: true", ["no measure is named", "temperature (descriptions)", "mean (choices)"]),
        ("temperature: 3", ["measure 'descriptions' needs descriptions"]),
        ("mean: true\nlabels: [a, b]", ["measure 'choices' needs choices"]),
        ("choices: [a, b]\nlabels: [x, y, z]", ["line 2", "3 labels for 2 choices"]),
        ("measure: choices\nrows: a.jsonl", ["needs choices", "Add choices"]),
        ("measure: head\nlimit: 0", ["line 2", "limit is 0", "from 1 up"]),
        ("measure: descriptions\ndescriptions: [a]", ["line 2", "two or more"]),
        ("measure: descriptions\ndescriptions: [a, a]", ["line 2", "different"]),
        ("measure: choices\nchoices: [a, b]\nlabels: [x, y, z]", ["line 3", "3 labels for 2 choices"]),
        ("measure: head\nchoices: [a, b]", ["line 2", "choices has no meaning for measure 'head'"]),
        ("measure: loss\nprompt_format: no slot", ["line 2", "{text}"]),
        ("measure: head\ntemplate: no slot", ["line 2", "{text}"]),
        ("measure: head\nmeasure: head", ["line 2", "twice"]),
        ("- a", ["expected keys with values"]),
    ],
)
def test_a_task_file_is_read_strictly(text: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(text, encoding="utf-8")
    message = said(path)
    assert all(part in message for part in ["t.yaml", *parts]), message


def test_rows_without_a_row_are_refused() -> None:
    message = said({"measure": "head", "rows": []})
    assert "rows" in message and "empty" in message


@pytest.mark.parametrize(
    ("values", "measure"),
    [
        ({"choices": ["a", "b"]}, "choices"),
        ({"choices": ["a", "b"], "mean": True, "labels": ["x", "y"], "template": "{text}:"}, "choices"),
        ({"descriptions": ["a", "b"]}, "descriptions"),
        ({"descriptions": ["a", "b"], "temperature": 5, "labels": ["x", "y"]}, "descriptions"),
        ({"labels": ["x", "y"]}, "head"),
        ({"new_tokens": 4}, "exact_match"),
        ({"stop": None, "label": "answer"}, "exact_match"),
    ],
)
def test_a_measure_that_can_be_only_one_need_not_be_said(values: dict[str, Any], measure: str, tmp_path: Path) -> None:
    """In a file and as a mapping; the same task as where it is said."""
    (tmp_path / "t.yaml").write_text(json.dumps(values), encoding="utf-8")
    assert read_task(tmp_path / "t.yaml").measure == measure
    assert read_task(values) == read_task({**values, "measure": measure})


def test_yaml_json_and_a_dict_are_the_same_task(tmp_path: Path) -> None:
    values = {**DESCRIBED, "name": "x", "limit": 3, "rows": "r.jsonl"}
    for name, text in (("a.json", json.dumps(values)), ("a.yaml", json.dumps(values))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        read = read_task(tmp_path / name)
        assert read.rows == str(tmp_path / "r.jsonl")  # beside its file
        assert read.descriptions == ("w1", "w2")
    assert read_task(values).rows == "r.jsonl"
    assert read_task(read) is read


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "w1"}, ["row 2", "no label 'label'", "keys text"]),
        ({"text": "w1", "label": 2}, ["row 2", "the label is 2", "0 to 1"]),
        ({"text": "w1", "label": -1}, ["row 2", "the label is -1"]),
        ({"text": "w1", "label": True}, ["row 2", "True"]),
        ({"text": "w1", "label": "neither"}, ["row 2", "'neither'", "w1, w2"]),
        ({"txt": "w1", "label": 1}, ["row 2", "'text' is None", "txt, label"]),
    ],
)
def test_rows_without_labels_or_out_of_range(row: dict[str, Any], parts: list[str], bases: dict[str, Path]) -> None:
    task = {**DESCRIBED, "rows": [{"text": "w1", "label": "w2"}, row]}
    with pytest.raises(TiesPeftError) as caught:
        ties_peft.evaluate(None, task, base=bases["encoder"])
    assert all(part in str(caught.value) for part in parts), caught.value


def test_files_of_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u0085two", "label": 1}\n\n{"text": "b", "label": 0}\n', "utf-8")
    (tmp_path / "a.csv").write_text('text,label\n"one, two",1\nb,0\n', encoding="utf-8")
    (tmp_path / "a.txt").write_text("one two\n\nb\n", encoding="utf-8")
    assert read_rows(tmp_path / "a.jsonl") == [{"text": "one\u0085two", "label": 1}, {"text": "b", "label": 0}]
    assert read_rows(tmp_path / "a.csv") == [{"text": "one, two", "label": "1"}, {"text": "b", "label": "0"}]
    assert read_rows(tmp_path / "a.txt", limit=1) == [{"text": "one two"}]
    labels = read_task({**DESCRIBED, "rows": str(tmp_path / "a.csv")})
    assert labels.label_numbers(labels.read()) == [1, 0]


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', ["a.jsonl", "line 2", "not JSON"]),
        ("a.jsonl", "[1]", ["line 1", "a list", "object"]),
        ("a.jsonl", "", ["no rows"]),
        ("a.parquet", "", [".jsonl, .csv or .txt"]),
    ],
)
def test_damaged_rows(name: str, text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(TiesPeftError) as caught:
        read_rows(tmp_path / name)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"text": "w1"}], "there is no label"),
        ([{"text": "w1", "label": 2}], "the label is 2; expected a number from 0"),
    ],
)
def test_labels_are_looked_at_before_a_model_is_loaded(
    rows: list[Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever reads them: evaluate, search and the few-shot signs."""
    shapes = linear_shapes(make_model("encoder"), "query")
    adapters = [write_lora(tmp_path / name, shapes, seed) for seed, name in enumerate("ab")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {**DESCRIBED, "rows": str(tmp_path / "rows.jsonl"), "base": "some/base"}
    monkeypatch.setattr(ties_peft.Bench, "load", lambda *_: pytest.fail("a model was loaded"))
    for use in (
        lambda: ties_peft.evaluate(adapters[0], task),
        lambda: ties_peft.search(adapters, task),
        lambda: ties_peft.few_shot_signs(adapters, [task, task]),
    ):
        with pytest.raises(TiesPeftError, match=told) as caught:
            use()
        assert "rows.jsonl', row 1" in str(caught.value)


def test_an_adapter_for_another_base_is_refused_before_the_model_is_run(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_lora(tmp_path / "o", {"encoder.layer.0.attention.self.query": (32, 16), "h.7.mlp": (4, 4)}, 0)
    task = {**DESCRIBED, "rows": [{"text": "w1", "label": 0}]}
    monkeypatch.setattr(type(make_model("encoder")), "forward", lambda *_, **__: pytest.fail("the model was run"))
    with pytest.raises(ties_peft.CompatibilityError) as caught:
        ties_peft.evaluate(other, task, base=bases["encoder"])
    for part in (
        "32 × 16 for a weight of 16 × 16",
        "h.7.mlp: the model has no such layer",
        "Of its 2 modules",
        "2 do not fit",
    ):
        assert part in str(caught.value)


def test_a_measure_that_the_model_cannot_sit(bases: dict[str, Path]) -> None:
    bench = ties_peft.Bench.load(bases["encoder"], "encoder")
    with pytest.raises(TiesPeftError, match="measure 'head' needs a classifier model"):
        ties_peft.evaluate(None, {"measure": "head", "rows": ["w1"]}, bench=bench)


def test_a_head_of_another_size(bases: dict[str, Path]) -> None:
    task = {"measure": "head", "labels": ["a", "b"], "rows": [{"text": "w1", "label": 0}]}
    with pytest.raises(TiesPeftError, match=r"has 2 labels and the head of .* 3"):
        ties_peft.evaluate(None, task, base=bases["classifier"])


def test_no_base_or_none_that_loads(tmp_path: Path) -> None:
    with pytest.raises(TiesPeftError, match="one base model is needed, but none is named"):
        ties_peft.evaluate(None, {**DESCRIBED, "rows": ["w1"]})
    task = {**DESCRIBED, "rows": [{"text": "w1", "label": 0}]}
    with pytest.raises(TiesPeftError, match=f"^base model '{tmp_path}' cannot be loaded as AutoModel"):
        ties_peft.evaluate(None, task, base=tmp_path)
    (tmp_path / "trained").mkdir()
    with pytest.raises(
        TiesPeftError, match=r"^base model '.*/trianed': there is no such folder\. Did you mean '.*/trained'"
    ):
        ties_peft.evaluate(None, task, base=tmp_path / "trianed")
    with pytest.raises(
        TiesPeftError, match=r"^base model 'nosuch': there is no such folder here, and it cannot be loaded"
    ):
        ties_peft.evaluate(None, task, base="nosuch")
