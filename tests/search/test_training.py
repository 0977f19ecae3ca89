"""What is trained on a few examples: the control of a search, and the signs of a TIES merge."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ties_peft
from ties_peft import Adapter, RecipeError
from ties_peft.evaluation.evaluate import make_scorer
from ties_peft.evaluation.task import read_task
from ties_peft.learning.training import train
from ties_peft.search.controls import new_adapter

sys.path.insert(0, str(Path(__file__).parents[1] / "statistics"))
import tiny_models as tiny

Make = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
MODULE = "encoder.layer.1.intermediate.dense"


@pytest.fixture
def folders(make_lora: Make) -> list[Path]:
    return [make_lora(name, seed=seed, shapes=tiny.BERT, gain=0.1) for seed, name in enumerate("ab")]


def test_a_new_adapter_does_nothing_and_a_trained_one_knows_its_rows(folders: list[Path]) -> None:
    bench, task = tiny.encoder(), {**tiny.ENCODER, "rows": tiny.rows()}
    fresh = new_adapter(Adapter.load(folders[0]), 0)
    assert fresh.norm() == 0.0
    scorer = make_scorer(bench, read_task(task))
    trained, again = (train(fresh, [scorer], steps=40, rate=1e-2) for _ in range(2))
    assert trained.digest == again.digest
    before, after = (ties_peft.evaluate(adapter, task, bench=bench) for adapter in (fresh, trained))
    assert before.loss == pytest.approx(ties_peft.evaluate(None, task, bench=bench).loss)
    assert float(after.loss or 9) < 0.5 * float(before.loss or 0)


def test_vectors_are_trained_too(make_ia3: Make) -> None:
    bench, task = tiny.encoder(), {**tiny.ENCODER, "rows": tiny.rows()}
    fresh = new_adapter(Adapter.load(make_ia3("v", vectors=tiny.BERT_VECTORS)), 0)
    assert fresh.norm() == 0.0
    trained = train(fresh, [make_scorer(bench, read_task(task))], steps=40)
    before, after = (ties_peft.evaluate(adapter, task, bench=bench) for adapter in (fresh, trained))
    assert float(after.loss or 9) < float(before.loss or 0)


def test_a_search_by_a_task_with_its_trained_control(folders: list[Path]) -> None:
    bench, task = tiny.encoder(), {**tiny.ENCODER, "rows": tiny.rows()}
    found = ties_peft.search(folders, task, budget=6, bench=bench, judge=task, controls=("base", "trained"))
    base, trained = found.controls
    score = ties_peft.evaluate(None, task, bench=bench)
    assert base.score == pytest.approx(-float(score.loss or 0), abs=1e-5)
    assert base.judged == score.accuracy
    assert trained.score > base.score
    assert found.score >= base.score - 1e-6
    assert found.score == pytest.approx(-float(ties_peft.evaluate(found.adapter, task, bench=bench).loss or 0))


def test_few_shot_signs_are_those_of_the_trained_adapter(folders: list[Path], tmp_path: Path) -> None:
    bench, task = tiny.encoder(), {**tiny.ENCODER, "rows": tiny.rows()}
    signs = ties_peft.few_shot_signs(folders, [task, task], bench=bench)
    assert signs.modules == tuple(sorted(tiny.BERT))
    saved = signs.save(tmp_path / "signs")
    made = json.loads((saved / "provenance.json").read_text(encoding="utf-8"))["signs"]
    assert [one["digest"] for one in made["adapters"]] == [Adapter.load(folder).digest for folder in folders]
    assert (made["steps"], made["seed"], len(made["tasks"])) == (40, 0, 2)
    elected = ties_peft.merge(folders, method="ties", density=1.0, rank="max", sign_from=str(saved))
    voted = ties_peft.merge(folders, method="ties", density=1.0, rank="max")
    wanted = torch.sign(signs.delta(MODULE))
    there = elected.delta(MODULE).abs() > 1e-4
    assert bool((torch.sign(elected.delta(MODULE))[there] == wanted[there]).all())
    assert bool((torch.sign(voted.delta(MODULE))[there] != wanted[there]).any())


def test_signs_start_from_the_average_and_leave_it(folders: list[Path]) -> None:
    bench, task = tiny.encoder(), {**tiny.ENCODER, "rows": tiny.rows()}
    average = ties_peft.merge(folders, method="average", rank=4).delta(MODULE)
    one, many = (ties_peft.few_shot_signs(folders, [task], bench=bench, steps=n).delta(MODULE) for n in (1, 60))
    assert float((one - average).norm()) < float((many - average).norm())
    assert float((one - average).norm()) < 0.1 * float(average.norm())


def test_training_needs_labels(make_lora: Make) -> None:
    folder = make_lora("g", shapes=tiny.GPT2, gain=0.2)
    task = {"measure": "loss", "label": None, "rows": list(tiny.TEXTS[:2])}
    with pytest.raises(RecipeError, match="training needs labels"):
        ties_peft.few_shot_signs([folder], [task], bench=tiny.causal())


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("steps", -3), ("steps", 1.5), ("seed", -1)])
def test_signs_take_whole_numbers_alone(folders: list[Path], name: str, value: float) -> None:
    task = {**tiny.ENCODER, "rows": tiny.rows()}
    with pytest.raises(RecipeError, match=f"{name} is {value}; expected a whole number"):
        ties_peft.few_shot_signs(folders, [task], bench=tiny.encoder(), **{name: value})  # type: ignore[arg-type]
