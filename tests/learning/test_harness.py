"""The hand-over to lm-evaluation-harness: the model it gets is the adapter on its base, and what is amiss is said first."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from learning.models import bases, linear_shapes, make_model, write_lora
from peft import PeftModel
from typer.testing import CliRunner

import ties_peft
from ties_peft import cli
from ties_peft.errors import CompatibilityError, RecipeError
from ties_peft.evaluation.loaded_model import Bench

ROW = [[5, 9, 7, 12]]
NAMES = ("toy_words", "toy_texts")


class Manager:
    """As the harness's TaskManager, of two tasks."""

    def __init__(self, include_path: str | None = None) -> None:
        self.all_tasks = list(NAMES)

    def match_tasks(self, names: list[str]) -> list[str]:
        return [name for name in names if name in NAMES]


class Model:
    """As the harness's HFLM."""

    def __init__(self, **given: Any) -> None:
        self.given = given


def simple_evaluate(model: Model, tasks: list[str], limit: int | None = None, **settings: Any) -> dict[str, Any]:
    """A metric that tells whose model was given: the mean of its logits."""
    if limit == 13:
        raise ValueError("no rows\nhere")
    assert settings["batch_size"] == model.given["batch_size"]
    with torch.no_grad():
        value = float(model.given["pretrained"](input_ids=torch.tensor(ROW)).logits.square().mean())
    told = {"alias": "toy", "mean,none": value, "mean_stderr,none": "N/A", "rows,none": limit or 7}
    return {"results": {name: dict(told) for name in tasks}}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A harness that is installed."""
    names = ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    made = {name: ModuleType(name) for name in names}
    made["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    made["lm_eval.tasks"].TaskManager = Manager  # type: ignore[attr-defined]
    made["lm_eval.models.huggingface"].HFLM = Model  # type: ignore[attr-defined]
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield


@pytest.fixture
def adapter(tmp_path: Path, bases: dict[str, Path]) -> Path:
    shapes = linear_shapes(make_model("gpt2"), "c_attn")
    return write_lora(tmp_path / "a", shapes, 1, base_model_name_or_path=str(bases["gpt2"]), fan_in_fan_out=True)


def mean(model: Any) -> float:
    with torch.no_grad():
        return float(model(input_ids=torch.tensor(ROW)).logits.square().mean())


def test_what_is_judged_is_the_adapter_on_its_base(fake: None, adapter: Path) -> None:
    """The same as PEFT's model gives, and the base stays what it was."""
    base, own = ties_peft.harness([None, adapter], ["toy_words"], base=adapter_base(adapter))
    assert base == {"toy_words": {"mean,none": pytest.approx(mean(make_model("gpt2"))), "rows,none": 7.0}}
    worn = mean(PeftModel.from_pretrained(make_model("gpt2"), adapter).eval())
    assert own["toy_words"]["mean,none"] == pytest.approx(worn, rel=1e-5)
    assert worn != pytest.approx(mean(make_model("gpt2")), rel=1e-3)


def adapter_base(adapter: Path) -> str:
    return str(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])


def test_the_command(fake: None, adapter: Path) -> None:
    words = ["evaluate", str(adapter), "--bare", "--harness", "toy_words,toy_texts", "--limit", "3"]
    done = CliRunner().invoke(cli.app, [*words, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)["harness"]
    assert [line["adapter"] for line in found] == ["base", "a"]
    assert {values["rows,none"] for line in found for values in line["results"].values()} == {3.0}
    shown = CliRunner().invoke(cli.app, words, catch_exceptions=False).stdout
    assert "toy_texts" in shown
    assert f"{found[1]['results']['toy_words']['mean,none']:.4f}" in shown


def test_without_the_extra_it_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(Bench, "load", _never)
    with pytest.raises(RecipeError, match=r"the extra `harness`.*pip install 'ties-peft\[harness\]'"):
        ties_peft.harness([adapter], ["toy_words"])


def test_what_is_amiss_is_said_before_the_model_is_loaded(
    fake: None, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bench, "load", _never)
    for given, words in (
        ({"tasks": ["toy_wrds"]}, "no task 'toy_wrds'.*toy_words"),
        ({"tasks": []}, "at least one"),
        ({"adapters": []}, "nothing to evaluate"),
        ({"include_path": tmp_path / "none"}, "is not a folder"),
    ):
        with pytest.raises(RecipeError, match=words):
            ties_peft.harness(**{"adapters": [adapter], "tasks": ["toy_words"], **given})  # type: ignore[arg-type]
    for words, said in (
        (["--harness", "toy_words", "--task", "x.yaml"], "--task and --harness"),
        (["--task", "x.yaml", "--limit", "3"], "--limit"),
        ([], "--harness TASK"),
    ):
        with pytest.raises(RecipeError, match=said):
            CliRunner().invoke(cli.app, ["evaluate", str(adapter), *words], catch_exceptions=False)


def test_what_stops_the_harness_is_one_message(fake: None, adapter: Path, bases: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"stopped on .*ValueError: no rows\)"):
        ties_peft.harness([adapter], ["toy_words"], limit=13)
    with pytest.raises(RecipeError, match="is loaded as encoder"):
        ties_peft.harness([None], ["toy_words"], bench=Bench.load(bases["encoder"], "encoder"))
    with pytest.raises(CompatibilityError, match="does not fit"):
        ties_peft.harness([adapter], ["toy_words"], base=bases["llama"])


def _never(*_: Any, **__: Any) -> None:
    raise AssertionError("the model was loaded")
