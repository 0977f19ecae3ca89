"""What the report of a distillation says of its rows and its figures, and of what it warns."""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from learning.models import bases, linear_shapes, make_model, sentences, write_lora
from rich.console import Console

import ties_peft
from ties_peft.evaluation.loaded_model import Bench
from ties_peft.learning import distil_warnings, teacher_specs, written_rows
from ties_peft.learning.distilled import Distilled, TeacherResult
from ties_peft.learning.token_teachers import TOP_K
from ties_peft.learning.written_rows import EXAMPLE_LENGTH, RowWriter, Written

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")
PROMPTS = {"measure": "loss", "label": "answer", "template": "w9 {text} w8"}
CHOICES = {"measure": "choices", "choices": [" w1", " w2"], "template": "w9 {text} w8"}


@pytest.fixture
def loras(tmp_path: Path) -> list[Path]:
    shapes = linear_shapes(make_model("llama"), "q_proj", "down_proj")
    return [write_lora(tmp_path / f"l{seed}", shapes, seed, task_type="CAUSAL_LM") for seed in range(2)]


def distil(adapters: list[Path], bases: dict[str, Path], **given: Any) -> Distilled:
    return ties_peft.distil(adapters, base=bases["llama"], **{"steps": 1, "answer_tokens": 2, **given})


def warned(made: Distilled, part: str) -> list[str]:
    return [text for text in made.report.warnings if part in text]


def test_random_tokens_that_nobody_asked_for_are_warned_of(
    bases: dict[str, Path], loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a causal model. A number of rows, and texts, are what was asked for."""
    monkeypatch.setattr(teacher_specs, "RANDOM_ROWS", 10)
    with pytest.warns(ties_peft.TiesPeftWarning, match="no rows were given for l0, l1, so 10 rows of random tokens"):
        (text,) = warned(distil(loras, bases), "random tokens")
    assert "--rows FILE" in text and "real prompts" in text
    for rows in (10, sentences(10, 0)):
        assert not warned(distil(loras, bases, rows=rows), "random tokens")


@pytest.mark.parametrize(
    ("given", "text", "stages"),
    [
        ({}, "no rows were given", set()),
        ({"rows": "generated", "count": 5}, "few of the generated rows", {"writing"}),
    ],
)
def test_a_warning_is_given_before_the_work_that_it_could_spare(
    bases: dict[str, Path],
    loras: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    text: str,
    stages: set[str],
) -> None:
    """As an error it stops the work; by then only the stages named here have begun."""
    monkeypatch.setattr(distil_warnings, "FEW_DISTINCT", 2.0)
    begun: set[str] = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", text, ties_peft.TiesPeftWarning)
        with pytest.raises(ties_peft.TiesPeftWarning, match=text):
            distil(loras, bases, **given, progress=lambda stage, done, of: begun.add(stage))
    assert begun == stages


def test_each_warning_is_given_once(bases: dict[str, Path], loras: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distil_warnings, "FEW_DISTINCT", 2.0)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", ties_peft.TiesPeftWarning)
        made = distil(loras, bases, rows=[10, "generated"], count=5)
    given = [str(one.message) for one in found if one.category is ties_peft.TiesPeftWarning]
    assert given == made.report.warnings and len(given) == len(set(given)) >= 1


def test_adapters_that_write_free_text_although_they_have_a_task_are_named(
    bases: dict[str, Path], loras: list[Path]
) -> None:
    """A task says where a prompt ends by the text behind the slot; plain text, `label: null`, needs none."""
    given: dict[str, Any] = {"rows": "generated", "count": 5}
    bare, plain = {"measure": "loss", "label": "answer"}, {"measure": "loss", "label": None}
    (text,) = warned(distil(loras, bases, **given, tasks=[bare, PROMPTS]), "do not say how a prompt ends")
    assert "the tasks of l0 do" in text and "prompt_format" in text
    assert not warned(distil(loras, bases, **given, tasks=plain), "do not say how a prompt ends")


def test_weights_are_in_the_report_where_they_differ(bases: dict[str, Path], loras: list[Path]) -> None:
    rows = [sentences(10, 0), sentences(10, 1)]
    assert "weights" not in str(distil(loras, bases, rows=rows))
    made = distil(loras, bases, rows=rows, weights=[1, 4])
    after = [line.divergence[1] for line in made.report.lessons]
    assert f"mean KL by weight  {made.report.divergence[0]:.4f}" in str(made.report)
    assert made.report.divergence[1] == pytest.approx((after[0] + 4 * after[1]) / 5)
    assert "1, 4" in str(made.report)


def test_adapters_that_end_worse_than_they_started_are_named(bases: dict[str, Path], loras: list[Path]) -> None:
    """Here because nearly all weight is on the other one."""
    rows, start = [sentences(20, 0), sentences(20, 1)], {"method": "average"}
    made = distil(loras, bases, rows=rows, start=start, weights=[1000, 1], answers="none", steps=40)
    first, second = made.report.lessons
    assert second.divergence[1] > second.divergence[0] and not first.worse
    assert made.report.to_dict()["worse"] == ["l1"]
    assert json.loads(made.files()["provenance.json"])["report"]["worse"] == ["l1"]
    change = f"KL {second.divergence[0]:.3f} → {second.divergence[1]:.3f}"
    (text,) = warned(made, "imitates these worse")
    assert f"l1 ({change}" in text and "l0" not in text
    assert f"l1: {change}" in str(made.report)


@pytest.mark.parametrize(
    ("divergence", "agreement", "worse"),
    [
        ((0.2, 0.1), (0.330, 0.257), ["agrees 33.0% → 25.7%"]),
        ((0.1, 0.2), (0.5, 0.5), ["KL 0.100 → 0.200"]),
        ((0.1, 0.2), (0.5, 0.4), ["KL 0.100 → 0.200", "agrees 50.0% → 40.0%"]),
        ((0.1, 0.10001), (0.5, 0.49999), []),
    ],
)
def test_worse_is_what_can_be_seen_in_print(
    divergence: tuple[float, float], agreement: tuple[float, float], worse: list[str]
) -> None:
    assert TeacherResult("a", "x", "LoRA", "rows", 4, 1, divergence, agreement).worse == worse


def test_distinct_and_empty_rows_are_counted(bases: dict[str, Path]) -> None:
    """In a template by the prompts, whose answers do not count; without one by what is written."""
    bench = Bench.load(bases["llama"], "language")
    w = {name: bench.tokenizer.convert_tokens_to_ids(name) for name in ("w1", "w2", "w3", "w8", "w9")}
    prompts = [["w9", "w8"], ["w9", "w8"], ["w9", "w1", "w8"], ["w9", "w1", "w8"], ["w9", "w2", "w8"]]
    rows = [[w[name] for name in [*prompt, f"w{1 + place % 3}"]] for place, prompt in enumerate(prompts)]
    written = Written(rows, [len(prompt) for prompt in prompts])
    found = RowWriter(5, 3, ((w["w8"],),), (), 0).count(bench, [w["w9"]], written)
    assert (found.rows, found.distinct, found.empty) == (5, 2, 2)
    assert found.examples == ("w9 w8 w1", "w9 w8 w2", "w9 w1 w8 w3")
    padding = bench.tokenizer.pad_token_id
    free = Written([[w["w9"], padding], [w["w9"], *[w["w1"]] * 100], [w["w9"], w["w1"], padding]], [1] * 3)
    found = RowWriter(5, 3, (), (), 0).count(bench, [w["w9"]], free)
    assert (found.distinct, found.empty, len(found.examples[1])) == (2, 1, EXAMPLE_LENGTH)


def test_an_adapter_that_writes_no_prompts_is_warned_of(
    bases: dict[str, Path], loras: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"rows": "generated", "count": 10, "tasks": {**PROMPTS, "rows": sentences(10, 0)}}
    good = distil(loras, bases, **given)
    assert all(line.written is not None and line.written.distinct > 5 for line in good.report.lessons)
    assert not warned(good, "generated rows")
    asked: list[int] = []

    def sample(bench: Bench, prompts: Any, *_: Any) -> list[list[int]]:
        asked.append(len(prompts))
        ends = [bench.tokenizer.pad_token_id]  # of slots; answers have a token of their own
        return [ends if len(asked) % 2 else [20] for _ in prompts]

    monkeypatch.setattr(written_rows, "sample", sample)
    monkeypatch.setattr(written_rows, "end_tokens", lambda bench: {bench.tokenizer.pad_token_id})
    made = distil(loras, bases, **given)
    (text,) = warned(made, "few of the generated rows")
    assert "l0 (0 of 10 are distinct, 10 are empty), l1 (0 of 10 are distinct, 10 are empty)" in text
    written = made.report.to_dict()["lessons"][0]["written"]
    assert (written["rows"], written["distinct"], written["empty"]) == (10, 0, 10)
    assert written["examples"] == ("w9 w8 w16",) * 3
    shown = str(made.report)
    assert "l0 wrote" in shown and "10 rows: 0 distinct, 10 empty" in shown and shown.count("“w9 w8 w16”") == 6


@pytest.mark.parametrize(
    ("given", "matched", "said"),
    [
        ({"rows": sentences(10, 0)}, "rows and answers", "the answers that the adapters wrote"),
        ({"rows": sentences(10, 0), "answers": "none"}, "rows", "the whole text of the rows"),
        ({"rows": 10}, "rows", "the whole text of the rows"),
        ({"rows": "generated", "count": 10}, "rows", "the whole text of the rows"),
        ({"rows": sentences(10, 0), "tasks": PROMPTS}, "answers", "the tokens of the answers"),
        ({"rows": sentences(10, 0), "tasks": {**PROMPTS, "label": None}}, "rows", "the whole text of the rows"),
        ({"rows": sentences(10, 0), "tasks": CHOICES}, "answers and choices", "the choices among each other"),
        ({"rows": "generated", "count": 10, "tasks": PROMPTS}, "answers", "the tokens of the answers"),
    ],
)
def test_the_report_says_what_was_matched(
    given: dict[str, Any], matched: str, said: str, bases: dict[str, Path], loras: list[Path]
) -> None:
    made = distil(loras, bases, **given)
    assert [line.matched for line in made.report.lessons] == [matched] * 2
    assert said in next(line for line in str(made.report).splitlines() if line.startswith("matched"))


def test_a_task_with_a_column_alone_is_enough_for_prompts(
    bases: dict[str, Path], loras: list[Path], tmp_path: Path
) -> None:
    rows = [{"prompt": text} for text in sentences(10, 0)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "task.yaml").write_text("rows: prompts.jsonl\ntext: prompt\n", encoding="utf-8")
    made = distil(loras, bases, tasks=tmp_path / "task.yaml")
    assert [line.matched for line in made.report.lessons] == ["answers"] * 2


def test_the_figures_have_a_legend_and_the_rows_are_named_in_full(
    bases: dict[str, Path], loras: list[Path], tmp_path: Path
) -> None:
    """Within 80 columns. Each adapter's rows are named, and once where all have the same."""
    place = tmp_path / "a-folder-with-a-long-name" / "prompts-of-the-first-adapter.jsonl"
    place.parent.mkdir()
    place.write_text("\n".join(json.dumps({"prompt": text}) for text in sentences(10, 0)), encoding="utf-8")
    made = distil(loras, bases, rows=[place, sentences(10, 1)])
    shown = io.StringIO()
    Console(file=shown, width=80).print(made.report)
    lines = shown.getvalue().splitlines()
    for name in ("held ", "start, result ", "KL ", "agrees "):
        assert sum(line.startswith(name) for line in lines) == 1
    whole = "".join(shown.getvalue().split())
    assert f"l0:{place},columnprompt" in whole and "l1:textsgiven" in whole
    assert "rows from      texts given" in str(distil(loras, bases, rows=sentences(10, 1)).report)


def test_what_was_compared_is_said_where_some_tokens_count_as_one(bases: dict[str, Path], loras: list[Path]) -> None:
    """Of a small vocabulary all tokens are compared one by one."""
    report = distil(loras, bases, rows=sentences(10, 0)).report
    assert "compared" not in str(report)
    lessons = [replace(line, kept_probability=0.97) for line in report.lessons]
    shown = " ".join(str(replace(report, lessons=lessons)).split())
    assert f"of each prediction the {TOP_K} likeliest tokens one by one, with 97.00% of the probability; the" in shown
