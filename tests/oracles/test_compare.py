"""The language-model world of benchmarks/compare.py, against loops over single rows and arithmetic written out here."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SAMPLES
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import ties_peft

TASKS = ("ag_news", "trec", "subj", "snips_json", "wikisql", "disfl_qa")
VOCABULARY = 40


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(SAMPLES)
    monkeypatch.syspath_prepend(SAMPLES.parent / "benchmarks")
    return importlib.import_module


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def adapter_on(model: Any, folder: Path, layers: list[str]) -> Any:
    """A LoRA with a strong effect, on the model and in a folder."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=12, target_modules=layers)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder)
    return adapted


@torch.no_grad()
def one_by_one(model: Any, examples: Any, choices: list[int] | None) -> tuple[list[bool], list[float]]:
    """Each row alone: whether its label is the most probable choice, and −log p."""
    right, losses = [], []
    for prompt, completion, label in examples:
        if choices:
            last = model(torch.tensor([prompt])).logits[0, -1].double()
            among = [float(last[choice]) for choice in choices]
            losses.append(math.log(sum(map(math.exp, among))) - among[label])
            right.append(max(range(len(choices)), key=among.__getitem__) == label)
        else:
            logits = model(torch.tensor([prompt + completion])).logits[0].double()
            steps = [logits[len(prompt) - 1 + step].log_softmax(-1)[token] for step, token in enumerate(completion)]
            losses.append(-float(sum(steps)))
    return right, losses


def test_scores_are_those_of_single_rows_with_peft(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    causal = load("causal")
    monkeypatch.setitem(causal.BATCH_TOKENS, "cpu", 40)  # several batches
    monkeypatch.setattr(causal, "LOGIT_ROWS", 7)
    draw = np.random.default_rng(1)

    def example(length: int, completion: int, label: int = 0) -> Any:
        prompt, rest = (draw.integers(0, VOCABULARY, size).tolist() for size in (length, completion))
        return causal.smollm2.Example(prompt, rest, label)

    choices = [3, 17, 25]
    classified = [example(int(draw.integers(1, 15)), 1, int(draw.integers(0, 3))) for _ in range(12)]
    written = [example(int(draw.integers(1, 9)), int(draw.integers(1, 8))) for _ in range(9)]
    rows = {("test", "c"): causal.Rows(classified, choices), ("test", "g"): causal.Rows(written, None)}
    judge = causal.CausalJudge(tiny(), rows)
    layers = {"first": ["q_proj", "down_proj"], "second": ["v_proj"]}  # the second must not keep what the first changed
    for name, chosen in layers.items():
        model = adapter_on(tiny(), tmp_path / name, chosen)
        found = judge.score(causal.factors_of(ties_peft.Adapter.load(tmp_path / name)), list(rows))
        right, losses = one_by_one(model, classified, choices)
        assert found["test", "c"].right.tolist() == right
        np.testing.assert_allclose(found["test", "c"].losses, losses, atol=1e-4)
        np.testing.assert_allclose(found["test", "g"].losses, one_by_one(model, written, None)[1], atol=1e-4)
    bare = judge.score({}, [("test", "g")])["test", "g"].losses
    np.testing.assert_allclose(bare, one_by_one(tiny(), written, None)[1], atol=1e-4)


def figures(draw: Any, rows: int) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Made-up results of the base, the own adapters, two merges: one classification task and one generation task."""

    def made(chance: float, loss: float) -> dict[str, Any]:
        right = "".join("1" if draw.random() < chance else "0" for _ in range(rows))
        return {"ag_news": {"right": right}, "wikisql": {"losses": (loss + draw.random(rows)).tolist()}}

    return made(0.5, 9.0), made(0.95, 1.0), made(0.8, 4.0), made(0.7, 5.0)


def test_shares_and_paired_errors(load: Any) -> None:
    draw = np.random.default_rng(2)
    base, own, a, b = figures(draw, 200)
    tokens = draw.integers(1, 30, 200)
    shares = load("language_model").Shares(base, own, {"wikisql": tokens.tolist()})
    tasks = ("ag_news", "wikisql")

    def mean_share(found: dict[str, Any], labelled: Any, generated: Any) -> float:
        right = np.array(list(found["ag_news"]["right"])) == "1"
        of_own = np.mean(np.array(list(own["ag_news"]["right"])) == "1")
        per_token = {
            name: np.sum(np.array(one["wikisql"]["losses"])[generated]) / np.sum(tokens[generated])
            for name, one in (("base", base), ("own", own), ("found", found))
        }
        gap = (everything["base"] - everything["own"]) if everything else per_token["base"] - per_token["own"]
        return 50 * np.mean(right[labelled]) / of_own + 50 * (per_token["base"] - per_token["found"]) / gap

    everything: dict[str, float] = {}
    every = np.arange(200)
    assert np.mean(list(shares.shares(a, tasks).values())) == pytest.approx(mean_share(a, every, every))
    difference, error = shares.difference([(a, b)], [tasks])
    assert difference == pytest.approx(mean_share(a, every, every) - mean_share(b, every, every))
    for name, one in (("base", base), ("own", own)):  # what shares are relative to counts as known
        everything[name] = np.sum(one["wikisql"]["losses"]) / np.sum(tokens)
    drawn = []
    for _ in range(2000):
        sample = draw.integers(0, 200, 200), draw.integers(0, 200, 200)
        drawn.append(mean_share(a, *sample) - mean_share(b, *sample))
    assert error == pytest.approx(np.std(drawn), rel=0.08)


def test_the_same_set_twice_is_no_more_evidence(load: Any) -> None:
    draw = np.random.default_rng(3)
    base, own, a, b = figures(draw, 50)
    shares = load("language_model").Shares(base, own, {"wikisql": [4] * 50})
    once = shares.difference([(a, b)], [("ag_news", "wikisql")])
    twice = shares.difference([(a, b)] * 2, [("ag_news", "wikisql")] * 2)
    assert twice == pytest.approx(once)
    assert shares.base_shares(("wikisql",))["wikisql"] == 0
    assert shares.shares(own, ("ag_news", "wikisql")) == pytest.approx({"ag_news": 100, "wikisql": 100})


def test_every_task_is_in_about_as_many_subsets(load: Any) -> None:
    found = load("language_model").subsets()
    assert {size: len(set(sets)) for size, sets in found.items()} == {2: 5, 4: 5}
    for size, sets in found.items():
        assert {len(set(tasks)) for tasks in sets} == {size}
        counts = [sum(task in tasks for tasks in sets) for task in TASKS]
        assert max(counts) - min(counts) <= 1
    assert found == load("language_model").subsets()


@pytest.mark.parametrize("combination, weight, asked", [("linear", 0.5, {}), ("ties", 1.0, {"density": 0.2})])
def test_combinations_of_peft(load: Any, tmp_path: Path, combination: str, weight: float, asked: Any) -> None:
    names = ("x", "y")
    for name, alpha in (("x", 6), ("y", 9)):
        adapter_on(tiny(), tmp_path / name, ["q_proj", "up_proj"])
        config = LoraConfig.from_pretrained(tmp_path / name)
        config.lora_alpha = alpha
        config.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny(), tmp_path / "x", adapter_name="x")
    model.load_adapter(tmp_path / "y", "y")
    model.add_weighted_adapter(list(names), [weight] * 2, "merged", combination_type=combination, **asked)
    found = load("peft_formulas").merge_as_peft([tmp_path / name for name in names], f"peft_{combination}")
    for name in found.modules:
        expected = model.get_submodule(f"base_model.model.{name}").get_delta_weight("merged")
        torch.testing.assert_close(found.delta(name), expected, rtol=1e-5, atol=1e-6)


def test_zeros_fill_up_smaller_ranks(load: Any) -> None:
    padded = load("peft_formulas").padded(torch.ones(2, 3), 4)
    assert padded.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
