"""A search that is taken up again: what it shows is of what is asked for now, and changed examples are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPES, lora_config, lora_tensors, write_adapter
from worker import NegativeDistance

import ties_peft
from ties_peft import Adapter, CompatibilityError, RecipeError

sys.path.insert(0, str(Path(__file__).parents[1] / "statistics"))
import tiny_models as tiny

Make = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
DRAWN = ("random weights", "random adapters")
CHOICES = {"measure": "choices", "choices": [" cat", " dog", " rain"]}


@pytest.fixture
def folders(make_lora: Make) -> list[str]:
    return [str(make_lora(name, seed=seed)) for seed, name in enumerate("abc")]


@pytest.fixture
def encoder_adapters(make_lora: Make) -> list[str]:
    """LoRAs of the tiny encoder."""
    return [str(make_lora(name, seed=seed, shapes=tiny.BERT, gain=0.1)) for seed, name in enumerate("ab")]


def control_values(found: ties_peft.Found) -> dict[str, tuple[float, float | None]]:
    return {control.name: (control.score, control.judged) for control in found.controls}


def test_controls_are_of_the_budget_that_is_asked_for(folders: list[str], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"controls": DRAWN, "penalty": 0.0}
    few, many = (
        control_values(
            ties_peft.search(folders, NegativeDistance(folders), budget=b, storage=tmp_path / "s.db", **asked)
        )
        for b in (3, 20)
    )
    assert few == control_values(ties_peft.search(folders, NegativeDistance(folders), budget=3, **asked))
    assert many == control_values(ties_peft.search(folders, NegativeDistance(folders), budget=20, **asked))
    assert many["random weights"] > few["random weights"]


def test_controls_are_judged_by_the_judge_that_is_asked_for(encoder_adapters: list[str], tmp_path: Path) -> None:
    bench = tiny.encoder()
    task = {**tiny.ENCODER, "rows": tiny.rows()}
    odd = {**task, "rows": [{**row, "label": 2 - row["label"]} for row in tiny.rows()[:4]]}
    names = ("base", "mean", "best single")
    for judge in (None, task, odd, None):
        kept = ties_peft.search(
            encoder_adapters, task, budget=2, judge=judge, storage=tmp_path / "s.db", bench=bench, controls=names
        )
        fresh = ties_peft.search(encoder_adapters, task, budget=2, judge=judge, bench=bench, controls=names)
        assert control_values(kept) == control_values(fresh)
        assert all((control.judged is None) == (judge is None) for control in kept.controls)


def test_a_function_that_judges_is_asked_each_time(folders: list[str], tmp_path: Path) -> None:
    for number in (1.0, 2.0):
        found = ties_peft.search(
            folders,
            NegativeDistance(folders),
            budget=2,
            judge=lambda adapter, number=number: number,
            storage=tmp_path / "s.db",
            controls=("base", "mean"),
        )
        assert [control.judged for control in found.controls] == [number, number]


def write(folder: Path, rows: list[dict[str, Any]], **change: Any) -> Path:
    """A task file with its rows beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = folder / "task.yaml"
    task.write_text(json.dumps({**tiny.ENCODER, "rows": "rows.jsonl", **change}), encoding="utf-8")
    return task


def test_changed_examples_are_refused_and_moved_ones_are_not(encoder_adapters: list[str], tmp_path: Path) -> None:
    bench, rows = tiny.encoder(), tiny.rows()

    def run_search(task: Any) -> ties_peft.Found:
        return ties_peft.search(encoder_adapters, task, budget=2, storage=tmp_path / "s.db", bench=bench, controls=())

    first = run_search(write(tmp_path / "here", rows))
    assert run_search(write(tmp_path / "there", rows, name="other")).trials == first.trials
    assert run_search({**tiny.ENCODER, "rows": rows}).trials == first.trials
    reworded = [{**rows[0], "text": "the cat sang"}, *rows[1:]]
    relabelled = [{**rows[0], "label": 2}, *rows[1:]]
    for other in (reworded, relabelled, rows[:-1]):
        for task in (write(tmp_path / "here", other), {**tiny.ENCODER, "rows": other}):
            with pytest.raises(RecipeError, match=r"the study 'search' in '.*s\.db' is of another search") as refused:
                run_search(task)
            assert "the two differ in examples." in str(refused.value)
    with pytest.raises(RecipeError, match="the two differ in measure"):
        run_search({**tiny.ENCODER, "rows": rows, "temperature": 3.0})
    with pytest.raises(RecipeError, match="the two differ in measure"):
        run_search({**tiny.ENCODER, "rows": rows, "descriptions": ["about cats", "about many birds", "about rain"]})


def test_the_base_counts_by_its_name_not_its_folder(encoder_adapters: list[str], tmp_path: Path) -> None:
    task = {**tiny.ENCODER, "rows": tiny.rows()}

    def run_search(name: str) -> ties_peft.Found:
        bench = tiny.encoder()
        bench.base = name
        return ties_peft.search(encoder_adapters, task, budget=2, storage=tmp_path / "s.db", bench=bench, controls=())

    assert run_search("/one/bert").trials == run_search("/two/bert").trials
    with pytest.raises(RecipeError, match="the two differ in base"):
        run_search("/one/roberta")


@pytest.mark.parametrize(
    ("measure", "change"),
    [
        (CHOICES, {"mean": True}),
        ({"measure": "exact_match"}, {"new_tokens": 3}),
        ({"measure": "loss"}, {"max_tokens": 2}),
    ],
)
def test_language_tasks_are_told_apart_too(
    make_lora: Make, tmp_path: Path, measure: dict[str, Any], change: dict[str, Any]
) -> None:
    folder = make_lora("g", shapes=tiny.GPT2, gain=0.2)
    bench = tiny.causal()
    bench.tokenizer.decode = lambda ids, **_: " ".join(map(str, ids.tolist()))
    rows = [{"text": text, "label": label} for text, label in zip(tiny.TEXTS, (0, 1, 2, 0, 1, 2), strict=True)]

    def run_search(task: dict[str, Any]) -> ties_peft.Found:
        return ties_peft.search([folder], task, budget=1, storage=tmp_path / "s.db", bench=bench, controls=())

    first = run_search({**measure, "rows": rows})
    assert run_search({**measure, "rows": rows, "name": "other"}).trials == first.trials
    with pytest.raises(RecipeError, match="the two differ in"):
        run_search({**measure, "rows": rows, **change})
    with pytest.raises(RecipeError, match="the two differ in examples"):
        run_search({**measure, "rows": rows[:-1]})


@pytest.mark.parametrize("measure", [CHOICES, {"measure": "exact_match"}, {"measure": "loss"}])
def test_what_cannot_be_trained_on_is_refused_before_a_model_is_loaded(
    make_lora: Make, tmp_path: Path, measure: dict[str, Any]
) -> None:
    folder = make_lora("g", shapes=tiny.GPT2)
    task = {**measure, "rows": tiny.rows(), "base": str(tmp_path / "nowhere")}
    with pytest.raises(RecipeError, match="training needs labels, so expected measure descriptions or head"):
        ties_peft.search([folder], task, controls=("trained",))


def test_a_function_cannot_be_trained_on(folders: list[str]) -> None:
    def never(adapter: Adapter) -> float:
        pytest.fail("a trial was made")

    with pytest.raises(RecipeError, match="the control 'trained' needs a task with labels"):
        ties_peft.search(folders, never, controls=("trained",))


def test_heads_that_differ_are_said_in_words_that_a_search_understands(tmp_path: Path) -> None:
    folders = []
    for seed, name in enumerate("ab"):
        head = {"base_model.model.score.weight": torch.full((2, 12), float(seed))}
        config = lora_config(SHAPES, 4, 8, task_type="SEQ_CLS", modules_to_save=["score"])
        folders.append(write_adapter(tmp_path / name, config, lora_tensors(SHAPES, 4, seed) | head))
    with pytest.raises(CompatibilityError, match="a search cannot merge these") as refused:
        ties_peft.search(folders, lambda adapter: 0.0, budget=2)
    assert "keep=" not in str(refused.value)
    copies = [
        ties_peft.merge([folder], method="task_arithmetic", rank="max", heads="drop").save(folder.parent / f"{name}2")
        for folder, name in zip(folders, "ab", strict=True)
    ]
    assert len(ties_peft.search(copies, lambda adapter: 0.0, budget=2, controls=()).trials) == 2
