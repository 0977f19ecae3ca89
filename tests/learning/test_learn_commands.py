"""`ties-peft evaluate` and `ties-peft distil`, run as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from learning.models import bases, linear_shapes, make_model, sentences, write_lora
from typer.testing import CliRunner

import ties_peft
from ties_peft import cli
from ties_peft.errors import TiesPeftError

DESCRIPTIONS = ["w1 w2", "w3 w4", "w5 w6"]


@pytest.fixture
def setting(tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two adapters, a task's file with its rows beside it, and plain texts, in the working folder."""
    monkeypatch.chdir(tmp_path)
    shapes = linear_shapes(make_model("encoder"), "query", "value")
    for seed, name in enumerate("ab"):
        write_lora(tmp_path / name, shapes, seed, base_model_name_or_path=str(bases["encoder"]))
    rows = [{"text": text, "label": place % 3} for place, text in enumerate(sentences(12, 1))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {"measure": "descriptions", "descriptions": DESCRIPTIONS, "rows": "rows.jsonl", "name": "toy"}
    (tmp_path / "toy.yaml").write_text(json.dumps(task), encoding="utf-8")
    (tmp_path / "texts.txt").write_text("\n".join(sentences(30, 2)), encoding="utf-8")
    return tmp_path


def run(*words: str) -> str:
    done = CliRunner().invoke(cli.app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_evaluate_prints_a_line_for_each(setting: Path) -> None:
    found = json.loads(run("evaluate", "a", "b", "--bare", "--task", "toy.yaml", "--json"))["evaluated"]
    assert [line["adapter"] for line in found] == ["base", "a", "b"]
    for line, given in zip(found, (None, "a", "b"), strict=True):
        base = json.loads((setting / "a" / "adapter_config.json").read_text())["base_model_name_or_path"]
        score = ties_peft.evaluate(given, "toy.yaml", base=base)
        assert line["scores"][0]["right"] == [int(right) for right in score.right]
    shown = run("evaluate", "a", "b", "--task", "toy.yaml")
    assert "toy" in shown
    assert f"{100 * found[1]['scores'][0]['accuracy']:.1f}" in shown
    assert "rows: 12" in shown


def test_distil_writes_an_adapter(setting: Path) -> None:
    words = ["--task", "toy.yaml", "--steps", "20", "--out"]
    said = json.loads(
        run("distil", "a", "b", "--rows", "texts.txt", "--rows", "40", *words, "out", "--weights", "1,2", "--json")
    )
    lines = said["report"]["lessons"]
    assert [line["weight"] for line in lines] == [1, 2]
    assert [(line["origin"], line["rows"] + line["held"]) for line in lines] == [
        ("texts.txt", 30),
        ("random tokens and words of the labels", 40),
    ]
    again = ties_peft.distil(["a", "b"], rows=["texts.txt", 40], tasks="toy.yaml", steps=20, weights=[1, 2])
    assert ties_peft.Adapter.load("out").digest == again.digest
    assert "written to out2" in run("distil", "a", "b", *words, "out2")
    card = (setting / "out" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "random tokens" in card


def test_the_help_says_what_is_matched_and_how_plain_text_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "600")
    said = run("distil", "--help")
    assert (
        "With a task (--task) only the tokens of the answers are matched; without one, those of the rows as well."
        in said
    )
    assert "For plain text give a task with label: null" in said


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["evaluate", "a"], "no task was named"),
        (["evaluate", "--task", "toy.yaml"], "no adapter was named"),
        (["evaluate", "a", "--task", "missing.yaml"], "cannot be read"),
        (["distil", "a", "b", "--out", "a"], "is, holds or lies in the input"),
        (["distil", "a", "b", "--out", "o", "--state", "o"], "is, holds or lies in the output 'o'"),
        (["distil", "a", "b", "--out", "o", "--state", "o/state"], "is, holds or lies in the output 'o'"),
        (
            ["distil", "a", "b", "--out", "o", "--task", "toy.yaml", "--rows", "9", "--rows", "9", "--rows", "9"],
            "--rows",
        ),
        (
            ["distil", "a", "b", "--out", "o", "--task", "toy.yaml", "--rows", "some text", "--rows", "other text"],
            "rows 'some text': expected a file that ends in .jsonl, .csv or .txt",
        ),
        (
            ["distil", "a", "b", "--out", "o", "--task", "toy.yaml", "--keep-weight", "-1"],
            "keep_base, which is not given",
        ),
        (
            ["distil", "a", "b", "--out", "o", "--task", "toy.yaml", "--state", "toy.yaml/s"],
            "'toy.yaml/s' cannot be used",
        ),
        (["evaluate", "a", "--task", "rows.jsonl"], "'rows.jsonl' is a file of rows; expected a YAML or JSON file"),
        (["evaluate", "a", "--task", "blank.yaml"], "blank.yaml, line 1: the file is empty"),
        (["evaluate", "a", "--task", "no_rows.yaml"], "rows 'blank.jsonl': the file has no rows"),
        (["search", "a", "b", "--out", "o", "--task", "no_rows.yaml"], "rows 'blank.jsonl': the file has no rows"),
        (["distil", "a", "b", "--out", "o", "--task", "no_rows.yaml"], "rows 'blank.jsonl': the file has no rows"),
        (
            ["search", "a", "other", "--out", "o", "--task", "toy.yaml", "--base", "BASE"],
            "a has 16 × 16, other has 32 × 16",
        ),
        (["search", "other", "--out", "o", "--task", "toy.yaml", "--base", "BASE"], "adapter 'other' (trained on"),
        (["distil", "a", "other", "--out", "o", "--task", "toy.yaml", "--base", "BASE"], "adapter 'other' (trained on"),
        (["signs", "other", "--out", "o", "--task", "toy.yaml", "--base", "BASE"], "adapter 'other' (trained on"),
        (["signs", "a", "b", "--out", "o", "--task", "loss.yaml"], "measure 'loss'; training needs labels"),
        (
            [
                "search",
                "a",
                "b",
                "--out",
                "o",
                "--objective",
                "imitate",
                "--task",
                "toy.yaml",
                "--state",
                "s",
                "--sampler",
                "gird",
            ],
            "the sampler is 'gird'",
        ),
    ],
)
def test_bad_usage_is_one_message(words: list[str], part: str, setting: Path, bases: dict[str, Path]) -> None:
    """And nothing is written."""
    shapes = {"encoder.layer.0.attention.self.query": (32, 16)}
    write_lora(setting / "other", shapes, 0, base_model_name_or_path=str(bases["encoder"]))
    for name in ("blank.yaml", "blank.jsonl"):
        (setting / name).touch()
    (setting / "no_rows.yaml").write_text("descriptions: [w1, w2]\nrows: blank.jsonl", encoding="utf-8")
    (setting / "loss.yaml").write_text("measure: loss\nrows: rows.jsonl", encoding="utf-8")
    before = sorted(setting.rglob("*"))
    with pytest.raises(TiesPeftError) as caught:
        words = [str(bases["encoder"]) if word == "BASE" else word for word in words]
        CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert part in str(caught.value)
    assert sorted(setting.rglob("*")) == before
