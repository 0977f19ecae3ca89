"""Whole layers through PEFT: what it saved, merged, and read back by it, computes what the policy promises."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from extra_tensors.models import (
    Base,
    bert,
    causal,
    distilbert,
    ia3,
    llama,
    load,
    logits,
    lora,
    roberta,
    train,
)
from safetensors.torch import load_file

import ties_peft

pytestmark = pytest.mark.filterwarnings("ignore")
ONE = {"density": 1.0, "rank": "max"}
P = "base_model.model."


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


CASES: dict[str, tuple[Base, Callable[[], Any], dict[str, Any]]] = {
    "a head": (bert(), lora, {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
    "a head of two layers": (roberta, lora, {"modules_to_save": ["classifier"]}),
    "a head before the head": (
        distilbert,
        lambda: lora(targets=["q_lin"]),
        {"modules_to_save": ["classifier", "pre_classifier"]},
    ),
    "a head on (IA)³": (bert(), ia3, {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
    "biases of the modules": (bert(), lambda: lora(bias="lora_only"), {"bias": "lora_only"}),
    "all biases": (bert(), lambda: lora(bias="all"), {"bias": "all"}),
    "norms": (
        bert(),
        lambda: lora(modules_to_save=["LayerNorm"]),
        {
            "modules_to_save": sorted(
                ["bert.embeddings.LayerNorm", "classifier"]
                + [f"bert.encoder.layer.{i}.{part}output.LayerNorm" for i in (0, 1) for part in ("attention.", "")]
            )
        },
    ),
    "a larger vocabulary": (
        lambda: llama(added=4),
        lambda: causal(modules_to_save=["embed_tokens", "lm_head"]),
        {"modules_to_save": ["lm_head", "model.embed_tokens"], "task_type": "CAUSAL_LM"},
    ),
    "tied embeddings": (
        lambda: llama(tied=True),
        lambda: causal(modules_to_save=["embed_tokens"]),
        {"modules_to_save": ["model.embed_tokens"]},
    ),
    "trained tokens": (
        llama,
        lambda: causal(trainable_token_indices=[5, 17, 1]),
        {"trainable_token_indices": {"model.embed_tokens": [5, 17, 1]}},
    ),
    "trained tokens of tied embeddings": (
        lambda: llama(tied=True),
        lambda: causal(trainable_token_indices=[5, 17]),
        {"trainable_token_indices": {"model.embed_tokens": [5, 17]}},
    ),
    "trained tokens of two layers": (
        llama,
        lambda: causal(trainable_token_indices={"embed_tokens": [5, 17], "lm_head": [3]}),
        {"trainable_token_indices": {"lm_head": [3], "model.embed_tokens": [5, 17]}},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Base, Callable[[], Any], dict[str, Any]]:
    return CASES[request.param]


def test_one_adapter_computes_what_it_did(case: tuple[Base, Callable[[], Any], dict[str, Any]], tmp_path: Path) -> None:
    base, config, written = case
    expected = train(base, config(), tmp_path / "a")
    plain = torch.as_tensor(base()(input_ids=torch.tensor([[5, 1, 17, 9, 30], [2, 8, 8, 3, 11]])).logits)
    assert not torch.allclose(expected, plain.detach(), atol=0.05)  # the adapter does something
    settings = {"density": 1.0} if "ia3" in str(config().peft_type).lower() else ONE
    ties_peft.merge([tmp_path / "a"], **settings).save(tmp_path / "out")
    found = config_of(tmp_path / "out")
    assert {key: found.get(key) for key in written} == written
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.allclose(logits(base, tmp_path / "out"), expected, atol=1e-4)
    assert not [w for w in said if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]


def test_every_whole_tensor_comes_back_bit_for_bit(
    case: tuple[Base, Callable[[], Any], dict[str, Any]], tmp_path: Path
) -> None:
    base, config, _ = case
    train(base, config(), tmp_path / "a")
    ties_peft.merge([tmp_path / "a"]).save(tmp_path / "out")
    given, found = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "out")
    whole = {key for key in given if "lora_A" not in key and "lora_B" not in key and "ia3_l" not in key}
    whole = {key for key in whole if "original_module" not in key and ".modules_to_save." not in key}
    assert whole
    for key in whole:
        assert torch.equal(found[key], given[key]), key


@pytest.mark.parametrize("config", [lora, ia3])
def test_one_head_for_two(tmp_path: Path, config: Callable[[], Any]) -> None:
    """Two adapters with one frozen head, averaged: the mean of what they do, under that head."""
    for number, name in enumerate("ab"):
        train(bert(), config(), tmp_path / name, seed=number, only="nothing")
    merged = ties_peft.merge([tmp_path / "a", tmp_path / "b"], "average", **({"rank": "max"} if config is lora else {}))
    merged.save(tmp_path / "out")
    assert [(line.module, line.fate, line.adapters) for line in merged.report.riders] == [
        ("classifier", "identical", ["a", "b"])
    ]
    assert config_of(tmp_path / "out")["task_type"] == "SEQ_CLS"
    for key, tensor in tensors_of(tmp_path / "a").items():
        if "classifier" in key:
            assert torch.equal(tensors_of(tmp_path / "out")[key], tensor)
    load(bert(), tmp_path / "out")


def two(tmp_path: Path, labels: tuple[int, int] = (2, 2), config: Callable[[], Any] = lora) -> list[Path]:
    """Two adapters with heads of their own."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, (folder, count) in enumerate(zip(folders, labels, strict=True)):
        train(bert(count), config(), folder, seed=number)
    return folders


@pytest.mark.parametrize("config", [lora, ia3])
def test_two_heads(tmp_path: Path, config: Callable[[], Any]) -> None:
    folders = two(tmp_path, config=config)
    with pytest.raises(ties_peft.CompatibilityError) as caught:
        ties_peft.merge(folders)
    assert str(caught.value) == (
        "the adapters hold 1 whole layer(s) that differ:\n"
        "  classifier: bias 2, weight 2 × 16, with different values in a, b\n"
        "Say which to keep: --heads keep=a or keep=b; leave them out with drop, or take their weighted mean with average "
        "(heads=… in Python)."
    )
    a, b = map(tensors_of, folders)
    key = f"{P}classifier.weight"
    for name, given in (("a", a), ("b", b)):
        merged = ties_peft.merge(folders, heads=f"keep={name}")
        merged.save(tmp_path / f"keep{name}")
        kept = load(bert(), tmp_path / f"keep{name}").base_model.model.classifier.modules_to_save["default"]
        assert torch.equal(kept.weight, given[key])
        assert merged.config["task_type"] == "SEQ_CLS"
    merged = ties_peft.merge(folders, weights=[3, 1], heads="average")
    merged.save(tmp_path / "mean")
    mean = load(bert(), tmp_path / "mean").base_model.model.classifier.modules_to_save["default"].weight
    expected = (3 * a[key].double() + b[key].double()) / 4
    assert torch.allclose(mean.double(), expected, atol=1e-6)
    merged = ties_peft.merge(folders, heads="drop")
    merged.save(tmp_path / "drop")
    assert "task_type" not in merged.config and "modules_to_save" not in merged.config
    bare = load(bert(), tmp_path / "drop").base_model.model
    assert torch.equal(bare.classifier.weight, bert()().classifier.weight)


def test_unlike_numbers_of_labels(tmp_path: Path) -> None:
    folders = two(tmp_path, (2, 3))
    told = "  classifier: a has bias 2, weight 2 × 16, b has bias 3, weight 3 × 16\n"
    with pytest.raises(ties_peft.CompatibilityError) as caught:
        ties_peft.merge(folders)
    assert told in str(caught.value)
    assert "they have no average" in str(caught.value)
    with pytest.raises(ties_peft.CompatibilityError) as caught:
        ties_peft.merge(folders, heads="average")
    assert str(caught.value) == (
        "heads is 'average', but 1 whole layer(s) have no mean, because their shapes or tensors differ or hold whole numbers:\n"
        f"{told}Keep one adapter's, --heads keep=a or keep=b, or leave them out, --heads drop (heads=… in Python)."
    )
    ties_peft.merge(folders, heads="keep=b").save(tmp_path / "out")
    assert logits(bert(3), tmp_path / "out").shape == (2, 3)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_two(tmp_path: Path, bias: str) -> None:
    """One adapts the queries, the other the values: each one's bias finds its place in the whole."""
    train(bert(), lora(None, ["query"], bias=bias), tmp_path / "a")
    train(bert(), lora(None, ["query", "value"], bias=bias), tmp_path / "b", seed=1)
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ties_peft.CompatibilityError, match="whole layer"):
        ties_peft.merge(folders)
    merged = ties_peft.merge(folders, "average", heads="average")
    merged.save(tmp_path / "out")
    assert merged.config["bias"] == bias
    model = load(bert(), tmp_path / "out").base_model.model
    a, b = map(tensors_of, folders)
    for name in ("query", "value"):
        end = f"bert.encoder.layer.0.attention.self.{name}"
        own = [t.get(f"{P}{end}.base_layer.bias", t.get(f"{P}{end}.bias")) for t in (a, b)]
        held = [tensor.double() for tensor in own if tensor is not None]
        found = model.get_submodule(end).base_layer.bias
        assert torch.allclose(found.double(), sum(held) / len(held), atol=1e-6), name
    assert not torch.equal(found, bert()().get_submodule(end).bias)


def test_trained_tokens_of_two(tmp_path: Path) -> None:
    for number, (name, tokens) in enumerate({"a": [5, 17], "b": [5, 17], "c": [5, 9]}.items()):
        train(llama, causal(trainable_token_indices=tokens), tmp_path / name, seed=number)
    merged = ties_peft.merge([tmp_path / "a", tmp_path / "b"], heads="average")
    merged.save(tmp_path / "out")
    key = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = [tensors_of(tmp_path / name)[key].double() for name in ("a", "b", "out")]
    assert torch.allclose((rows[0] + rows[1]) / 2, rows[2], atol=1e-6)
    load(llama, tmp_path / "out")
    for policy in ("error", "average"):
        with pytest.raises(ties_peft.CompatibilityError) as caught:
            ties_peft.merge([tmp_path / "a", tmp_path / "c"], heads=policy)
        row = "  model.embed_tokens: a has rows 2 × 16 for the tokens 5, 17, c has rows 2 × 16 for the tokens 5, 9\n"
        assert row in str(caught.value)
    merged = ties_peft.merge([tmp_path / "a", tmp_path / "c"], heads="keep=c")
    assert merged.config["trainable_token_indices"] == {"model.embed_tokens": [5, 9]}


def test_embeddings_that_peft_saves_unasked(tmp_path: Path) -> None:
    """A vocabulary made larger than the base's on the disk rides along whatever the config says."""
    llama().save_pretrained(tmp_path / "base")

    def larger() -> Any:
        model = llama(added=4)
        model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
        return model

    expected = train(larger, causal(), tmp_path / "a")
    assert f"{P}model.embed_tokens.weight" in tensors_of(tmp_path / "a")
    merged = ties_peft.merge([tmp_path / "a"], **ONE)
    merged.save(tmp_path / "out")
    assert "modules_to_save" not in merged.config  # as in the adapter's own config

    def bare() -> Any:
        model = larger()
        model.get_input_embeddings().weight.data.zero_()  # what a fresh resize leaves in the new rows is not known
        return model

    assert torch.allclose(logits(bare, tmp_path / "out"), expected, atol=1e-4)


def test_signs_from_an_adapter_with_another_head(tmp_path: Path) -> None:
    folders = two(tmp_path, (2, 3))
    plain = ties_peft.merge(folders[:1], sign_from=folders[1])
    assert plain.report.riders[0].adapters == ["a"] and len(plain.report.riders) == 1
    assert torch.equal(plain.tensors.read(f"{P}classifier.weight"), tensors_of(folders[0])[f"{P}classifier.weight"])
