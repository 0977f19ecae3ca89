"""The sample adapters of the causal language model: what they hold, what their cards say, and that they merge."""

from __future__ import annotations

import json
import re

import pytest
from conftest import SAMPLES

import ties_peft
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
