"""The sample adapters: what they hold, what their cards say, that they merge, what they are worth."""

from __future__ import annotations

import importlib
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import SAMPLES

import ties_peft

TASKS = ("sst2", "trec", "subj", "cr", "ag_news", "banking77")
KINDS = ("lora", "ia3")
ALL = [f"{kind}/{task}" for kind in KINDS for task in TASKS] + [f"multitask/{kind}" for kind in KINDS]
MODULES = {"lora": 36, "ia3": 18}
DATA = SAMPLES.parent.parent / "shared" / "data"


@pytest.fixture
def minilm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """adapters/minilm.py as a module, its memory of the Hub empty."""
    monkeypatch.syspath_prepend(SAMPLES)
    module = importlib.import_module("minilm")
    module.hub_set.cache_clear()
    yield module
    module.hub_set.cache_clear()


def tasks_of(name: str) -> tuple[str, ...]:
    return TASKS if name.startswith("multitask") else (name.split("/")[1],)


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_belongs_to_a_module(name: str) -> None:
    adapter = ties_peft.Adapter.load(SAMPLES / name)
    adapter.check()
    keys = [key for module in adapter.modules for key in adapter.module(module).keys]
    assert sorted(keys) == sorted(adapter.tensors.names)
    assert len(adapter.modules) == MODULES[adapter.peft_type.name]
    assert adapter.base_name == "sentence-transformers/all-MiniLM-L6-v2"
    assert adapter.dtype == torch.float16
    assert adapter.norm() > 1


def test_the_modules_are_those_of_the_base(minilm: Any) -> None:
    base, _ = minilm.load_base()
    linear = {n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("encoder.layer")}
    for kind in KINDS:
        adapter = ties_peft.Adapter.load(SAMPLES / "multitask" / kind)
        assert linear.issuperset(adapter.modules)
        for name in adapter.modules:
            module, weight = adapter.module(name), base.get_submodule(name).weight
            assert module.shape == (tuple(weight.shape) if kind == "lora" else (weight.shape[int(module.on_input)],))
    assert linear == set(ties_peft.Adapter.load(SAMPLES / "lora" / "sst2").modules)


@pytest.mark.parametrize("name", ALL)
def test_cards_state_accuracy_before_and_after(name: str) -> None:
    text = (SAMPLES / name / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "sentence-transformers/all-MiniLM-L6-v2" and front["library_name"] == "peft"
    for task in tasks_of(name):
        before, after = map(float, re.search(rf"\| {task} \| ([\d.]+) \| ([\d.]+) \|", text).groups())  # type: ignore[union-attr]
        assert 0 < before < after <= 100
        assert f"- {task}: " in text  # its source


def test_all_weights_together_are_a_few_megabytes() -> None:
    sizes = [(SAMPLES / name / "adapter_model.safetensors").stat().st_size for name in ALL]
    assert sum(sizes) < 8e6


@pytest.mark.parametrize("kind", KINDS)
def test_the_six_merge_with_the_defaults(kind: str, tmp_path: Path) -> None:
    merged = ties_peft.merge([SAMPLES / kind / task for task in TASKS])
    assert [line.name for line in merged.report.adapters] == list(TASKS)
    assert not merged.report.warnings
    assert len(merged.modules) == MODULES[kind]
    assert 0.5 < merged.report.energy <= 1
    again = ties_peft.Adapter.load(merged.save(tmp_path / "merged"))
    for name in merged.modules:
        assert torch.equal(again.delta(name), merged.delta(name))


class FakeDataset(list[dict[str, Any]]):
    """Stands in for what `datasets.load_dataset` gives: rows by index, and features."""

    def __init__(self, rows: list[dict[str, Any]], **class_names: list[str]) -> None:
        super().__init__(rows)
        self.features = {column: SimpleNamespace(names=names) for column, names in class_names.items()}


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeDataset]:
    """A FAKE `datasets` module: id on the Hub → rows. Nothing here touches the network."""
    shelf: dict[str, FakeDataset] = {}

    def load_dataset(path: str, config: str | None, split: str) -> FakeDataset:
        if path not in shelf:
            raise RuntimeError("no such dataset")
        return shelf[path]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return shelf


def test_fake_hub_label_names_become_our_labels(minilm: Any, fake_hub: dict[str, FakeDataset]) -> None:
    codes = ["DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"]
    fake_hub["SetFit/TREC-QC"] = FakeDataset([{"text": c.lower(), "label_coarse_original": c} for c in codes * 3])
    texts, labels = minilm.read_rows("trec", "test", minilm.HUB)
    assert sorted(labels) == sorted(list(range(6)) * 3)
    assert all(text == codes[label].lower() for text, label in zip(texts, labels, strict=True))
    assert len(minilm.read_rows("trec", "test", minilm.HUB, 5).texts) == 5


def test_fake_hub_class_indices_are_named_by_the_features(minilm: Any, fake_hub: dict[str, FakeDataset]) -> None:
    names = ["Sports", "World", "Sci/Tech", "Business"]  # in another order than ours
    rows = [{"text": name, "label": place} for place, name in enumerate(names)]
    fake_hub["fancyzhx/ag_news"] = FakeDataset(rows, label=names)
    texts, labels = minilm.read_rows("ag_news", "test", minilm.HUB)
    assert dict(zip(texts, labels, strict=True)) == {"World": 0, "Sports": 1, "Business": 2, "Sci/Tech": 3}


def test_fake_hub_names_the_intents_of_banking77(minilm: Any, fake_hub: dict[str, FakeDataset]) -> None:
    intents = ["card_arrival", "Refund_not_showing_up", "age_limit"]
    fake_hub["mteb/banking77"] = FakeDataset([{"text": i, "label": 7, "label_text": i} for i in intents * 2])
    assert minilm.labels_of("banking77", minilm.HUB) == ["Refund not showing up", "age limit", "card arrival"]
    assert minilm.descriptions("banking77", minilm.HUB)[1] == "a customer of a bank asks: age limit"
    texts, labels = minilm.read_rows("banking77", "test", minilm.HUB)
    assert set(zip(texts, labels, strict=True)) == {
        ("Refund_not_showing_up", 0),
        ("age_limit", 1),
        ("card_arrival", 2),
    }


def test_the_hub_table_covers_every_task_with_as_many_names_as_descriptions(minilm: Any) -> None:
    assert set(minilm.HUB_SETS) == {*minilm.TASKS, *minilm.HELD_OUT}
    for task, where in minilm.HUB_SETS.items():
        assert where.names is None or len(where.names) == len(minilm.DESCRIPTIONS[task])


def test_fake_hub_failures_say_what_to_do(
    minilm: Any, fake_hub: dict[str, FakeDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="SetFit/sst2 cannot be read from the Hub"):
        minilm.read_rows("sst2", "test", minilm.HUB)
    with pytest.raises(ValueError, match="for judging"):
        minilm.read_rows("sst2", "train", minilm.HUB)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        minilm.read_rows("cr", "test", minilm.HUB)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="no labelled rows: ../shared/data is not there")
@pytest.mark.parametrize("kind", KINDS)
def test_on_real_rows_own_adapters_and_ties_beat_the_base(kind: str, minilm: Any, tmp_path: Path) -> None:
    demo = importlib.import_module("demo")
    base, tokenizer = minilm.load_base()
    heads = minilm.make_heads(base, tokenizer, TASKS, DATA)
    bench = demo.Bench(base, tokenizer, heads, {task: minilm.read_rows(task, "test", DATA, 300) for task in TASKS})
    before = bench.judge(base)
    for task in TASKS:
        assert bench.judge_folder(SAMPLES / kind / task, task)[task] > before[task] + 5, task
    merged = ties_peft.merge([SAMPLES / kind / task for task in TASKS]).save(tmp_path / "merged")
    after = bench.judge_folder(merged)
    assert math.fsum(after.values()) / 6 > math.fsum(before.values()) / 6 + 5
    together = bench.judge_folder(SAMPLES / "multitask" / kind)
    assert math.fsum(together.values()) > math.fsum(after.values())  # an honest ceiling
    assert bench.judge(base) == before  # taking the adapters off left the base as it was
