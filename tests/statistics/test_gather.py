"""What is gathered from a model: against float64 models whose weights ask for their own gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from torch import Tensor

import ties_peft
from ties_peft import Adapter, CompatibilityError, MethodError, RecipeError, TiesPeftError, gather_statistics

Make = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")


@pytest.fixture
def lora(make_lora: Make) -> Path:
    return make_lora("a", shapes=tiny.BERT, gain=0.2)


def near(found: Tensor, expected: Tensor, share: float = 1e-4) -> None:
    assert found.shape == expected.shape
    difference = float((found.double() - expected).norm() / expected.norm())
    assert difference <= share, difference


def logits(model: Any, bench: ties_peft.Bench, text: str) -> Tensor:
    """20 · cosine with the descriptions as the bare base embeds them, in float64."""

    def embed(one: Any, words: str) -> Tensor:
        ids = torch.tensor(tiny.Words()([words])["input_ids"])
        mean = one(input_ids=ids).last_hidden_state.mean(1)
        return mean / mean.norm(dim=-1, keepdim=True)

    base = bench.model.double()
    heads = torch.cat([embed(base, words) for words in tiny.DESCRIPTIONS]).detach()
    bench.model.float()
    return 20 * embed(model, text) @ heads.T


def oracle(adapter: Adapter, bench: ties_peft.Bench, expected: bool) -> dict[str, Tensor]:
    """The mean over rows of (∂ log p / ∂ weight)², by autograd on the weights themselves."""
    model = tiny.double(bench, adapter)
    sums = {name: torch.zeros(*adapter.module(name).shape, dtype=torch.float64) for name in adapter.modules}
    for text, label in zip(tiny.TEXTS, tiny.LABELS, strict=True):
        for answer in range(3) if expected else [label]:
            log_p = logits(model, bench, text).log_softmax(-1)[0, answer]
            weights = [model.get_submodule(name).weight for name in adapter.modules]
            for name, slope in zip(adapter.modules, torch.autograd.grad(log_p, weights), strict=True):
                sums[name] += (float(log_p.detach().exp()) if expected else 1.0) * slope**2 / len(tiny.TEXTS)
    return sums


@pytest.mark.parametrize("labels", ["expected", "given"])
def test_fisher_is_its_definition(lora: Path, labels: str) -> None:
    bench = tiny.encoder()
    task = {**tiny.ENCODER, "rows": tiny.rows(labelled=labels == "given")}
    found = gather_statistics(lora, task, "fisher", bench=bench, labels=labels)
    for name, expected in oracle(Adapter.load(lora), bench, labels == "expected").items():
        near(found.of_module(name).whole(), expected)  # type: ignore[union-attr]


def test_fisher_of_vectors_is_that_of_peft(make_ia3: Make) -> None:
    """PEFT's own parameters, in float64, asked for their gradients."""
    from peft import PeftModel

    bench = tiny.encoder()
    folder = make_ia3("v", vectors=tiny.BERT_VECTORS)
    found = gather_statistics(folder, {**tiny.ENCODER, "rows": tiny.rows(False)}, "fisher", bench=bench)
    model = PeftModel.from_pretrained(copy.deepcopy(bench.model), folder, is_trainable=True).double().eval()
    parameters = {
        n.split("base_model.model.")[1].split(".ia3_l")[0]: p for n, p in model.named_parameters() if "ia3_l" in n
    }
    sums = {name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in parameters.items()}
    for text in tiny.TEXTS:
        for answer in range(3):
            log_p = logits(model, bench, text).log_softmax(-1)[0, answer]
            for (name, _), slope in zip(
                parameters.items(), torch.autograd.grad(log_p, list(parameters.values())), strict=True
            ):
                sums[name] += float(log_p.detach().exp()) * slope.flatten() ** 2 / len(tiny.TEXTS)
    assert sorted(sums) == sorted(tiny.BERT_VECTORS)
    for name, expected in sums.items():
        near(found.of_module(name).whole(), expected)  # type: ignore[union-attr]


def test_gram_is_the_second_moment_of_the_inputs(lora: Path) -> None:
    """Of real tokens alone, though here the rows are run as one padded batch."""
    bench = tiny.encoder()
    found = gather_statistics(lora, {**tiny.ENCODER, "rows": tiny.rows(False)}, bench=bench)
    model = tiny.double(bench, Adapter.load(lora))
    batch = bench.pad_batch(tiny.Words()(tiny.TEXTS)["input_ids"])
    seen: dict[str, Tensor] = {}
    for name in tiny.BERT:
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, n=name: seen.update({n: given[0]}))
    model(**batch)
    for name, inputs in seen.items():
        x = inputs[batch["attention_mask"].bool()]
        near(found.of_module(name).whole(), x.T @ x / len(x))  # type: ignore[union-attr]
    assert found.metadata["same"] == {"encoder.layer.0.attention.self.query": "encoder.layer.0.attention.self.key"}


@pytest.mark.parametrize("measure", ["loss", "choices"])
def test_language_models(make_lora: Make, measure: str) -> None:
    """GPT-2, whose layers hold their weights turned: texts as they are, and choices at their probabilities."""
    bench = tiny.causal()
    folder = make_lora("g", shapes=tiny.GPT2, gain=0.2, fan_in_fan_out=True)
    choices = ["cat", "dog bird"]
    if measure == "loss":
        task: dict[str, Any] = {"measure": "loss", "label": None, "rows": [t for t in tiny.TEXTS if " " in t]}
    else:
        task = {"measure": "choices", "choices": choices, "template": "{text} is ", "rows": tiny.rows(False)}
    found = gather_statistics(folder, task, "fisher", bench=bench, labels="given" if measure == "loss" else None)
    adapter = Adapter.load(folder)
    model = tiny.double(bench, adapter)
    weights = [model.get_submodule(name).weight for name in adapter.modules]

    def log_p(text: str, target: str) -> Tensor:
        ids = torch.tensor(tiny.Words()([text + target])["input_ids"])
        before = max(1, len(text.split()))
        steps = model(input_ids=ids).logits[0, before - 1 : -1].log_softmax(-1)
        return steps.gather(1, ids[0, before:].unsqueeze(1)).sum()

    sums = dict.fromkeys(adapter.modules, 0)
    texts = [str(t["text"]) if isinstance(t, dict) else t for t in task["rows"]]
    for text in texts:
        if measure == "loss":
            terms = [(1.0, log_p("", text))]
        else:
            both = torch.stack([log_p(f"{text} is ", choice) for choice in choices]).log_softmax(-1)
            terms = [(float(one.detach().exp()), one) for one in both]
        for weight, one in terms:
            for name, slope in zip(adapter.modules, torch.autograd.grad(one, weights, retain_graph=True), strict=True):
                sums[name] = sums[name] + weight * slope.T**2 / len(texts)
    for name, expected in sums.items():
        near(found.of_module(name).whole(), expected)  # type: ignore[union-attr, arg-type]


def test_sampled_labels_have_a_seed_and_tend_to_the_expected_ones(lora: Path) -> None:
    bench = tiny.encoder()
    many = {**tiny.ENCODER, "rows": tiny.rows(False) * 60}

    def gathered(labels: str, seed: int = 0) -> Tensor:
        made = gather_statistics(lora, many, "fisher", bench=bench, labels=labels, seed=seed, save=False, again=True)
        return made.of_module("encoder.layer.1.intermediate.dense").whole()  # type: ignore[union-attr]

    expected, first, again, other = (
        gathered("expected"),
        gathered("sampled"),
        gathered("sampled"),
        gathered("sampled", 1),
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float((first - expected).norm() / expected.norm()) < 0.3
    near((first + other) / 2, expected.double(), 0.25)


def test_once_gathered_they_are_used_again_and_a_merge_finds_them(lora: Path, make_lora: Make) -> None:
    bench, task = tiny.encoder(), {**tiny.ENCODER, "rows": tiny.rows(False)}
    other = make_lora("b", seed=1, shapes=tiny.BERT, gain=0.2)
    ran: list[int] = []
    for folder in (lora, other):
        for kind in ("fisher", "gram"):
            gather_statistics(folder, task, kind, bench=bench, progress=lambda _, done, of: ran.append(done))
    assert len(ran) == 4 * len(tiny.TEXTS)
    gather_statistics(lora, task, bench=bench, progress=lambda _, done, of: ran.append(done))
    assert len(ran) == 4 * len(tiny.TEXTS)
    assert {p.name for p in lora.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "fisher.safetensors",
        "gram.safetensors",
    }
    for method in ("fisher", "regmean"):
        assert ties_peft.merge([lora, other], method=method).modules == tuple(sorted(tiny.BERT))


def test_the_model_is_left_as_it_was(lora: Path) -> None:
    bench = tiny.encoder()
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    gather_statistics(lora, {**tiny.ENCODER, "rows": tiny.rows(False)}, "fisher", bench=bench)
    assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())
    assert not any(module._forward_hooks for module in bench.model.modules())
    assert all(parameter.grad is None for parameter in bench.model.parameters())


def test_regmean_answers_as_the_adapters_do_more_nearly_than_the_average(lora: Path, make_lora: Make) -> None:
    """On each adapter's own inputs: what RegMean is for."""
    bench = tiny.encoder()
    other = make_lora("b", seed=1, shapes=tiny.BERT, gain=0.2)
    grams = [
        gather_statistics(folder, {**tiny.ENCODER, "rows": rows}, bench=bench).of_module(name).whole().double()  # type: ignore[union-attr]
        for folder, rows in ((lora, tiny.rows()[:3]), (other, tiny.rows()[3:]))
        for name in ["encoder.layer.1.intermediate.dense"]
    ]
    deltas = [Adapter.load(folder).delta("encoder.layer.1.intermediate.dense").double() for folder in (lora, other)]

    def miss(merged: ties_peft.Adapter) -> float:
        tau = merged.delta("encoder.layer.1.intermediate.dense").double()
        return sum(float(((tau - d) @ g * (tau - d)).sum()) for d, g in zip(deltas, grams, strict=True))

    plain = miss(ties_peft.merge([lora, other], method="average", rank="max"))
    assert miss(ties_peft.merge([lora, other], method="regmean", rank="max", off_diagonal=1.0)) < 0.5 * plain
    assert miss(ties_peft.merge([lora, other], method="regmean", rank="max")) < plain


FAULTS: list[tuple[dict[str, Any], dict[str, Any], type[TiesPeftError], str]] = [
    ({}, {"kind": "fish"}, RecipeError, "unknown kind of statistics 'fish': did you mean 'fisher'"),
    ({}, {"kind": "fisher", "labels": "drawn"}, RecipeError, "unknown kind of labels 'drawn'"),
    (
        {"rows": [{"text": "a b"}]},
        {"kind": "fisher", "labels": "given"},
        RecipeError,
        "row 1: there is no label 'label'",
    ),
    ({"measure": "exact_match", "descriptions": None}, {}, RecipeError, "gives no probabilities"),
    (
        {"measure": "loss", "descriptions": None},
        {"kind": "fisher", "labels": "expected"},
        MethodError,
        "sampled or given",
    ),
    ({"measure": "loss", "descriptions": None}, {}, RecipeError, "needs a language model"),
]


@pytest.mark.parametrize(("change", "asked", "error", "text"), FAULTS)
def test_wrong_input_ends_before_the_model_runs(
    lora: Path, change: dict[str, Any], asked: dict[str, Any], error: type[TiesPeftError], text: str
) -> None:
    task = {**tiny.ENCODER, "rows": tiny.rows(), **change}
    bench = tiny.encoder()
    bench.model.encoder.register_forward_hook(lambda *_: pytest.fail("the model ran") if bench.active_adapter else None)
    with pytest.raises(error, match=text):
        gather_statistics(lora, {k: v for k, v in task.items() if v is not None}, bench=bench, **asked)
    assert not (lora / "gram.safetensors").exists()


def test_adapters_that_do_not_fit_or_lie_nowhere(make_lora: Make, make_ia3: Make, lora: Path) -> None:
    bench, task = tiny.encoder(), {**tiny.ENCODER, "rows": tiny.rows()}
    with pytest.raises(CompatibilityError, match="does not fit the base model"):
        gather_statistics(make_lora("other"), task, bench=bench)
    with pytest.raises(MethodError, match="gram statistics are of matrices"):
        gather_statistics(make_ia3("v", vectors=tiny.BERT_VECTORS), task, bench=bench)
    merged = ties_peft.merge([lora])
    with pytest.raises(RecipeError, match="save=False"):
        gather_statistics(merged, task, bench=bench)
    gather_statistics(merged, task, bench=bench, save=False)
    assert ties_peft.merge([merged], method="regmean").modules == merged.modules


def test_statistics_of_an_adapter_that_has_changed_are_made_anew(make_lora: Make) -> None:
    bench, task = tiny.encoder(), {**tiny.ENCODER, "rows": tiny.rows()}
    first = gather_statistics(make_lora("a", shapes=tiny.BERT, gain=0.2), task, bench=bench)
    folder = make_lora("a", shapes=tiny.BERT, gain=0.3)
    again = gather_statistics(folder, task, bench=bench)
    assert again.metadata["adapter"] != first.metadata["adapter"]
    assert ties_peft.merge([folder], method="regmean").modules == tuple(sorted(tiny.BERT))
