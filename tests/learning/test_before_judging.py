"""What is known before a row is judged, what is said of odd rows, and how well a score is known."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from learning.models import bases, linear_shapes, make_model, make_tokenizer, write_lora
from transformers import GPT2Config, GPT2Model
from typer.testing import CliRunner

import ties_peft
from ties_peft import cli
from ties_peft.errors import CompatibilityError, RecipeError
from ties_peft.evaluation.evaluate import evaluate_all
from ties_peft.evaluation.loaded_model import Bench
from ties_peft.evaluation.scorers import Score

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")
DESCRIBED = {"measure": "descriptions", "descriptions": ["w1", "w2"], "name": "described"}
LISTS = {"descriptions": {"descriptions": ["w1", "w2"]}, "choices": {"choices": [" w1", " w2 w3"]}}
ROWS = [{"text": "w1 w2", "label": 0}, {"text": "w3", "label": 1}]


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_a_batch_has_rows(size: Any, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(RecipeError, match=r"batch_size is .*; expected a whole number, 1 or more"):
        ties_peft.evaluate(None, {**DESCRIBED, "rows": ROWS}, base=bases["encoder"], batch_size=size)


def test_all_forms_are_checked_before_the_first_is_judged(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is an encoder's: it fits the first task and not the second."""
    own = write_lora(tmp_path / "a", linear_shapes(make_model("encoder"), "query"), 0)
    monkeypatch.setattr(
        ties_peft.evaluation.scorers.Classification, "score", lambda *_: pytest.fail("a task was judged")
    )
    tasks = [{**DESCRIBED, "rows": ROWS}, {"measure": "head", "rows": ROWS, "name": "headed"}]
    with pytest.raises(CompatibilityError, match="loaded as classifier"):
        evaluate_all([own], tasks, base=bases["classifier"])


def test_scores_of_two_forms_are_in_the_order_of_the_tasks(bases: dict[str, Path]) -> None:
    described, headed = {**DESCRIBED, "rows": ROWS}, {"measure": "head", "rows": ROWS, "name": "headed"}
    other = {**described, "name": "other", "rows": ROWS[:1]}
    (line,) = evaluate_all([None], [described, headed, other], base=bases["classifier"])
    assert [score.task for score in line] == ["described", "headed", "other"]
    alone = [ties_peft.evaluate(None, task, base=bases["classifier"]) for task in (described, headed, other)]
    assert line == alone


@pytest.mark.parametrize(
    ("trained", "task", "parts"),
    [
        (
            "classifier",
            {**DESCRIBED},
            ["BertModel, loaded as encoder", "bert.…", "task_type SEQ_CLS", "head a classifier"],
        ),
        (
            "encoder",
            {"measure": "head"},
            ["BertForSequenceClassification, loaded as classifier", "descriptions loads"],
        ),
    ],
)
def test_a_measure_that_is_not_the_adapters_is_told_from_another_base(
    trained: str, task: dict[str, Any], parts: list[str], tmp_path: Path, bases: dict[str, Path]
) -> None:
    kind = {"task_type": "SEQ_CLS"} if trained == "classifier" else {}
    own = write_lora(tmp_path / "a", linear_shapes(make_model(trained), "query"), 0, **kind)
    with pytest.raises(CompatibilityError) as caught:
        ties_peft.evaluate(own, {**task, "rows": ROWS}, base=bases["classifier"])
    told = str(caught.value)
    assert all(part in told for part in parts), told
    assert "Name the base that it was trained on" not in told


def test_another_base_is_asked_for_by_name(tmp_path: Path, bases: dict[str, Path]) -> None:
    own = write_lora(tmp_path / "a", linear_shapes(make_model("llama"), "q_proj"), 0)
    with pytest.raises(CompatibilityError, match=r"loaded as encoder.*\n.*\n.*\nName the base that it was trained on"):
        ties_peft.evaluate(own, {**DESCRIBED, "rows": ROWS}, base=bases["encoder"])


@pytest.mark.parametrize("blank", ["", " ", "\n\t "])
@pytest.mark.parametrize("form", ["gpt2", "t5"])
@pytest.mark.parametrize("measure", ["choices", "exact_match", "loss"])
def test_a_row_without_a_token_is_refused(measure: str, form: str, blank: str, bases: dict[str, Path]) -> None:
    """The tokenizer frames nothing, so that a blank text has no tokens."""
    rows = [{"text": "w1", "label": 0}, {"text": blank, "label": 1}]
    with pytest.raises(RecipeError, match=r"row 2: .*no tokens"):
        ties_peft.evaluate(None, {"measure": measure, **LISTS.get(measure, {}), "rows": rows}, base=bases[form])


def test_an_encoder_that_sees_nothing_is_refused(tmp_path: Path) -> None:
    """Without a frame the mean over no tokens is not a number."""
    small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": 44}
    bench = Bench(GPT2Model(GPT2Config(**small)), make_tokenizer(False), "tiny", "encoder")
    with pytest.raises(RecipeError, match=r"row 1: .*no tokens"):
        ties_peft.evaluate(None, {**DESCRIBED, "rows": [{"text": " ", "label": 0}]}, bench=bench)


@pytest.mark.parametrize(
    ("form", "measure"),
    [("encoder", "descriptions"), ("classifier", "head"), ("gpt2", "choices"), ("gpt2", "exact_match")],
)
def test_blank_rows_are_counted(form: str, measure: str, bases: dict[str, Path]) -> None:
    rows = [*ROWS, {"text": " ", "label": 0}, {"text": "", "label": 1}]
    task = {"measure": measure, **LISTS.get(measure, {}), "rows": rows, "template": "w9 {text}"}
    score = ties_peft.evaluate(None, task, base=bases[form])
    assert (score.blank, score.rows, score.to_dict()["blank"]) == (2, 4, 2)
    assert ties_peft.evaluate(None, {**task, "rows": ROWS}, base=bases[form]).blank == 0


def test_the_command_tells_of_blank_and_long_rows(tmp_path: Path, bases: dict[str, Path]) -> None:
    rows = [*ROWS, {"text": " ", "label": 0}, {"text": "w1 " * 9, "label": 0}]
    task = {**DESCRIBED, "rows": "rows.jsonl", "base": str(bases["encoder"]), "max_tokens": 6}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "t.yaml").write_text(json.dumps(task), encoding="utf-8")
    done = CliRunner().invoke(
        cli.app, ["evaluate", "--bare", "--task", str(tmp_path / "t.yaml")], catch_exceptions=False
    )
    assert "the texts of 1 of 4 rows are blank" in done.stderr
    assert "1 of 4 rows were cut, because they exceed max_tokens" in done.stderr


def score(right: int, rows: int, adapter: str = "a") -> Score:
    return Score("t", "head", adapter, rows, right / rows, 0.1)


@pytest.mark.parametrize(("right", "rows"), [(0, 1), (1, 1), (300, 300), (0, 300)])
def test_no_score_is_known_without_an_error(right: int, rows: int) -> None:
    found = score(right, rows).error
    assert found is not None
    assert found > 1 / (2 * (rows + 4))
    assert found == pytest.approx(score(rows - right, rows).error)


def test_the_error_is_that_of_two_more_right_and_two_more_wrong() -> None:
    assert score(1, 1).error == pytest.approx(math.sqrt(3 / 5 * 2 / 5 / 5))
    draw = torch.Generator().manual_seed(0)
    seen = [float((torch.rand(400, generator=draw) < 0.8).float().mean()) for _ in range(2000)]
    assert score(320, 400).error == pytest.approx(statistics.stdev(seen), rel=0.05)
    assert Score("t", "loss", None, 3, None, 1.0).error is None


def test_the_legend_speaks_of_every_line() -> None:
    from ties_peft.cli.evaluate import _legend

    told = _legend([[score(300, 300)], [score(150, 300, "b")]])
    assert told.startswith("accuracy in percent; rows: 300; ")
    assert f"{100 * score(300, 300).error:.1f} to 2.9" in told
    assert _legend([[score(150, 300)]]).endswith("2.9")
    assert _legend([[score(1, 1)]]).endswith("21.9")
    losses = [[Score("t", "loss", None, 3, None, 1.0)]]
    assert _legend(losses) == "mean −log p per token; rows: 3"
