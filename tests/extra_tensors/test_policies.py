"""What becomes of whole layers, on adapters made by hand: every policy, every message, every place that says it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PREFIX, lora_config, lora_tensors, write_adapter
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import ties_peft
from ties_peft import Adapter, Recipe, cli
from ties_peft.analysis.inspection import inspect
from ties_peft.merging.merge import merge_recipe

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
SHAPES = {"layers.0.q": (12, 10), "layers.0.up": (20, 12)}
Tensors = dict[str, Tensor]
Hold = Callable[..., Path]


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hold:
    """hold(name, {tensor: values}, seed=…, **config) → a LoRA that holds whole tensors too."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, extra: Tensors, seed: int = 0, shapes: Any = SHAPES, **config: Any) -> Path:
        tensors = lora_tensors(shapes, 4, seed) | {PREFIX + key: tensor for key, tensor in extra.items()}
        write_adapter(tmp_path / name, lora_config(shapes, 4, 8, **config), tensors)
        return Path(name)

    return make


def head(seed: int = 0, labels: int = 2, name: str = "score", dtype: torch.dtype = torch.float32) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {f"{name}.weight": torch.randn(labels, 12, generator=draw).to(dtype)}


def whole(merged: Adapter) -> Tensors:
    return {key.removeprefix(PREFIX): merged.tensors.read(key) for key in merged.extra_keys}


def refusal(*adapters: Path, **asked: Any) -> str:
    with pytest.raises(ties_peft.TiesPeftError) as caught:
        ties_peft.merge(list(adapters), **asked)
    return str(caught.value)


# What is kept


@pytest.mark.parametrize("policy", ["error", "average"])
def test_what_one_holds_or_all_agree_on_is_kept(hold: Hold, policy: str) -> None:
    same, own = head(1), head(2, name="pooler.dense")
    folders = [hold("a", same), hold("b", same | own, seed=1), hold("c", {}, seed=2)]
    merged = ties_peft.merge(folders, heads=policy)
    assert whole(merged).keys() == {"score.weight", "pooler.dense.weight"}
    assert torch.equal(whole(merged)["score.weight"], same["score.weight"])
    assert torch.equal(whole(merged)["pooler.dense.weight"], own["pooler.dense.weight"])
    assert [(line.module, line.form, line.fate, line.adapters) for line in merged.report.riders] == [
        ("pooler.dense", "plain", "only", ["b"]),
        ("score", "layer", "identical", ["a", "b"]),
    ]


def test_one_value_that_differs_is_a_difference(hold: Hold) -> None:
    changed = {key: tensor.clone() for key, tensor in head(1).items()}
    changed["score.weight"][1, 11] += 1e-6
    assert "score: weight 2 × 12, with different values in a, b" in refusal(
        hold("a", head(1)), hold("b", changed, seed=1)
    )


def test_equal_values_in_two_dtypes_agree(hold: Hold) -> None:
    half = head(1, dtype=torch.bfloat16)
    full = {key: tensor.float() for key, tensor in half.items()}
    merged = ties_peft.merge([hold("a", half), hold("b", full, seed=1)])
    assert torch.equal(whole(merged)["score.weight"], half["score.weight"])


def test_a_kept_tensor_keeps_its_dtype_unless_one_is_asked_for(hold: Hold) -> None:
    folder = hold("a", head(1, dtype=torch.float16) | {"norm.num_batches_tracked": torch.tensor(7)})
    kept = whole(ties_peft.merge([folder]))
    assert kept["score.weight"].dtype == torch.float16
    assert whole(ties_peft.merge([folder], dtype="bfloat16"))["score.weight"].dtype == torch.bfloat16
    assert kept["norm.num_batches_tracked"].dtype == torch.int64


def test_keep_takes_all_of_one_and_nothing_else(hold: Hold) -> None:
    folders = [hold("x/a", head(1) | head(2, name="pooler")), hold("y/b", head(3), seed=1)]
    merged = ties_peft.merge(folders, heads="keep=b")
    assert whole(merged).keys() == {"score.weight"}
    assert torch.equal(whole(merged)["score.weight"], head(3)["score.weight"])
    assert "pooler: left out, held by a; the base's own is used." in merged.report.warnings


def test_drop_leaves_even_equal_ones_out(hold: Hold) -> None:
    merged = ties_peft.merge(
        [hold("a", head(1), task_type="SEQ_CLS"), hold("b", head(1), 1, task_type="SEQ_CLS")], heads="drop"
    )
    assert merged.extra_keys == () and "task_type" not in merged.config
    assert "score: left out, held by a, b; the base's own is used." in merged.report.warnings


@pytest.mark.parametrize("weights", [[1, 1, 1], [3, -1, 0.5], [2, 0, 1]])
def test_the_average_is_the_weighted_mean_over_those_that_hold_it(hold: Hold, weights: list[float]) -> None:
    heads = [head(seed) for seed in range(3)]
    folders = [hold(f"a{i}", own, seed=i) for i, own in enumerate(heads)] + [hold("bare", {}, seed=9)]
    merged = ties_peft.merge(folders, weights=[*weights, 5], heads="average")
    expected = sum(w * h["score.weight"].double() for w, h in zip(weights, heads, strict=True)) / sum(weights)
    assert torch.allclose(whole(merged)["score.weight"].double(), expected, atol=1e-6)


def test_the_average_sees_a_layers_weights(hold: Hold) -> None:
    key = "layers.1.norm.weight"
    folders = [hold(f"a{i}", {key: torch.full((3,), float(i))}, seed=i, modules_to_save=["norm"]) for i in range(2)]
    weights = [1, [{"filter": "norm", "value": 3}, {"value": 1}]]
    assert whole(ties_peft.merge(folders, weights=weights, heads="average"))[key].tolist() == [0.75] * 3


def test_order_does_not_matter_to_the_average(hold: Hold) -> None:
    folders = [hold(f"a{i}", head(i), seed=i) for i in range(3)]
    one, other = (ties_peft.merge(order, heads="average") for order in (folders, folders[::-1]))
    assert torch.allclose(whole(one)["score.weight"], whole(other)["score.weight"], atol=1e-6)


def test_an_adapter_of_weight_0_brings_no_head(hold: Hold) -> None:
    merged = ties_peft.merge([hold("a", head(1)), hold("b", head(2, 3), seed=1)], weights=[1, 0])
    assert torch.equal(whole(merged)["score.weight"], head(1)["score.weight"])


# How it is written


def test_the_config_says_where_whole_layers_begin(hold: Hold) -> None:
    extra = {"classifier.dense.weight": torch.ones(3, 3), "classifier.dense.bias": torch.ones(3), **head(1)}
    merged = ties_peft.merge([hold("a", extra | {"embed.weight": torch.ones(5, 2)}, task_type="SEQ_CLS")])
    assert merged.config["modules_to_save"] == ["classifier", "score"]
    assert merged.config["task_type"] == "SEQ_CLS"


def test_a_task_with_a_head_needs_one(hold: Hold) -> None:
    assert "task_type" not in ties_peft.merge([hold("a", {}, task_type="SEQ_CLS")]).config
    assert ties_peft.merge([hold("a", {}, task_type="CAUSAL_LM")]).config["task_type"] == "CAUSAL_LM"


def test_a_bias_goes_under_the_layer_that_another_adapts(hold: Hold) -> None:
    a = hold("a", {"layers.0.up.bias": torch.ones(20)}, shapes={"layers.0.q": (12, 10)}, bias="all")
    merged = ties_peft.merge([a, hold("b", {}, seed=1)])
    assert list(whole(merged)) == ["layers.0.up.base_layer.bias"]
    assert merged.config["bias"] == "lora_only"
    assert ties_peft.merge([a]).config["bias"] == "all"


def test_one_bias_outside_the_modules_makes_it_all(hold: Hold) -> None:
    extra = {"layers.0.q.base_layer.bias": torch.ones(12), "layers.0.k.bias": torch.ones(4)}
    assert ties_peft.merge([hold("a", extra)]).config["bias"] == "all"


def test_an_ia3_config_has_no_bias(make_ia3: Callable[..., Path], hold: Hold, tmp_path: Path) -> None:
    """PEFT's IA3Config knows no such key; the tensor is read from the file without it."""
    folder = make_ia3("v")
    tensors = load_file(folder / "adapter_model.safetensors") | {f"{PREFIX}layers.0.q.bias": torch.ones(4)}
    config = json.loads((folder / "adapter_config.json").read_text())
    merged = ties_peft.merge([write_adapter(tmp_path / "w", config, tensors)])
    assert "bias" not in merged.config and list(whole(merged)) == ["layers.0.q.bias"]


def test_copies_are_left_out_and_said(hold: Hold) -> None:
    one = torch.arange(2.0)
    extra = head(1) | {"score.bias": one, "score.modules_to_save.bias": one + 0, "score.original_module.bias": one - 1}
    merged = ties_peft.merge([hold("a", extra)], density=1)
    assert list(whole(merged)) == ["score.bias", "score.weight"]
    (warning,) = merged.report.warnings
    for fact in ("a has 2 tensor(s)", "left out: base_model.model.score.modules_to_save.bias, …"):
        assert fact in warning


def test_a_lone_modules_to_save_is_the_layer_itself(hold: Hold) -> None:
    merged = ties_peft.merge([hold("a", {"score.modules_to_save.weight": torch.ones(2, 2)})])
    assert list(whole(merged)) == ["score.weight"]


def test_a_base_weight_under_an_adapted_module_is_kept(hold: Hold) -> None:
    """PEFT adds it for lm_head and embed_tokens; without the base there is no telling whether it is the base's own."""
    weight = torch.ones(12, 10)
    merged = ties_peft.merge([hold("a", {"layers.0.q.base_layer.weight": weight}), hold("b", {}, seed=1)])
    assert list(whole(merged)) == ["layers.0.q.base_layer.weight"]
    assert "modules_to_save" not in merged.config
    told = refusal(Path("a"), hold("c", {"layers.0.q.base_layer.weight": weight + 1}, seed=1))
    assert "layers.0.q: weight 12 × 10, with different values in a, c" in told


def test_what_the_config_asks_for_in_vain_is_said(hold: Hold) -> None:
    merged = ties_peft.merge([hold("a", {}, modules_to_save=["head"], trainable_token_indices=[3])], density=1)
    assert merged.report.warnings == [
        "a: its config asks for modules_to_save ['head'], but its file holds no such tensor.",
        "a: its config asks for trainable_token_indices [3], but its file holds no such tensor.",
    ]
    assert not {"modules_to_save", "trainable_token_indices"} & merged.config.keys()


@pytest.mark.parametrize("entry", ["score", ["score"], ["core", 3, None, ""], {"score": 1}, 7])
def test_a_config_of_any_form_is_read(hold: Hold, entry: Any) -> None:
    merged = ties_peft.merge([hold("a", head(1), modules_to_save=entry)])
    assert merged.config["modules_to_save"] == ["score"]


# Messages


def test_differing_layers_of_many(hold: Hold) -> None:
    biases = {f"layers.{i}.k.bias": torch.ones(4) for i in range(9)}
    other = {key: tensor + 1 for key, tensor in biases.items()}
    message = refusal(*(hold(f"a{i}", own, seed=i) for i, own in enumerate([biases, other, biases, biases, biases])))
    assert message.startswith(
        "the adapters hold 9 whole layer(s) that differ:\n  layers.0.k: bias 4, with different values in a0, a1, a2, a3, a4\n"
    )
    assert message.endswith(
        "\n  … and 1 more\nSay which to keep: --heads keep=a0 or keep=a1 or keep=a2 or keep=a3 or …; leave them out with "
        "drop, or take their weighted mean with average (heads=… in Python)."
    )


def test_a_layer_of_other_tensors_differs(hold: Hold) -> None:
    message = refusal(hold("a", head(1)), hold("b", head(1) | {"score.bias": torch.ones(2)}, seed=1))
    assert "  score: a has weight 2 × 12, b has bias 2, weight 2 × 12\n" in message
    assert "no average" in message


def test_counters_have_no_mean(hold: Hold) -> None:
    folders = [hold(f"a{i}", head(1) | {"score.seen": torch.tensor(i)}, seed=i) for i in range(2)]
    assert "whole numbers:\n  score: seen one number, weight 2 × 12, with different values in a0, a1" in refusal(
        *folders, heads="average"
    )


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ("mean", "heads is 'mean'; expected one of error, drop, keep=NAME, average, merge."),
        (None, "heads is None; expected one of error, drop, keep=NAME, average, merge."),
        ("keep=", "heads is 'keep='; expected one of error, drop, keep=NAME, average, merge."),
        ("keep=aa", "heads is 'keep=aa': unknown adapter 'aa': did you mean 'a'? Known: a, b, c."),
        ("keep=c", "heads is 'keep=c', but c holds no whole layers. Leave it out."),
    ],
)
def test_policies_that_cannot_be(hold: Hold, policy: Any, told: str) -> None:
    assert refusal(hold("a", head(1)), hold("b", head(2), 1), hold("c", {}, 2), heads=policy) == told


def test_weights_without_a_sum(hold: Hold) -> None:
    folders = [hold("a", head(1)), hold("b", head(2), seed=1)]
    assert refusal(*folders, weights=[1, -1], method="task_arithmetic", heads="average") == (
        "heads is 'average', but the weights of the adapters that hold 'score' sum to 0, which an average divides by."
    )


def test_a_layer_cannot_be_whole_and_adapted(hold: Hold) -> None:
    whole_q = {"layers.0.q.weight": torch.ones(12, 10)}
    a = hold("a", whole_q, shapes={"layers.0.up": (20, 12)}, modules_to_save=["layers.0.q"])
    b = hold("b", head(1), seed=1)
    assert refusal(a, b) == (
        "layer 'layers.0.q' is saved whole in a, while b adapts 'layers.0.q' or rows of it; one PEFT adapter cannot do "
        "both. Leave the whole layers out (--heads drop), keep those of another adapter (--heads keep=NAME; heads=… in "
        "Python), or leave one adapter out."
    )
    assert list(whole(ties_peft.merge([a, b], heads="keep=b"))) == ["score.weight"]


def test_a_dtype_that_cannot_hold_a_head(hold: Hold) -> None:
    folder = hold("a", {"score.weight": torch.full((2, 2), 1e30)})
    assert refusal(folder, dtype="float16") == (
        "tensor 'base_model.model.score.weight' holds values beyond float16. Write float32 or bfloat16 (--dtype, dtype=…), "
        'or leave the whole layers out (--heads drop, heads="drop").'
    )


@pytest.mark.parametrize("name", ["score.weight", "layers.0.q.base_layer.bias"])
def test_hostile_names_and_numbers(hold: Hold, name: str) -> None:
    hostile = f"x\x1b[2J.{name}"
    folders = [hold(f"a{i}", {hostile: torch.full((2,), float(i))}, seed=i) for i in range(2)]
    assert "\x1b" not in refusal(*folders)
    merged = ties_peft.merge(folders, heads="drop")
    console = Console(width=200)
    with console.capture() as printed:
        console.print(inspect(["a0"]))
    for text in (str(merged.report), *merged.report.warnings, printed.get()):
        assert "\x1b" not in text
    assert "NaN" in refusal(hold("nan", {name: torch.full((2,), float("nan"))}))


# Where it is said


def test_report_card_provenance_recipe(hold: Hold, tmp_path: Path) -> None:
    folders = [hold("a", head(1) | {"layers.0.k.bias": torch.ones(4)}), hold("b", head(2), seed=1)]
    merged = ties_peft.merge(folders, heads="average")
    merged.save("out")
    assert "1 bias: kept, held by a\n" in str(merged.report)
    assert "score: the weighted mean of a, b\n" in str(merged.report)
    card = Path("out/README.md").read_text()
    assert "\n- 1 bias: kept, held by a\n- score: the weighted mean of a, b\n" in card
    found = json.loads(Path("out/provenance.json").read_text())
    assert [f"{r['module']}: {r['fate']}" for r in found["report"]["riders"]] == ["layers.0.k: only", "score: average"]
    assert found["recipe"]["heads"] == "average"
    again = merge_recipe(Recipe.from_file("out/recipe.yaml"))
    assert all(torch.equal(again.tensors.read(k), merged.tensors.read(k)) for k in merged.tensors.names)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["ties-peft", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_the_command_line(hold: Hold, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hold("a", head(1)), hold("b", head(2, 3), seed=1)
    assert run(monkeypatch, "merge", "a", "b", "--out", "out") == 2
    assert "--heads keep=a or keep=b" in capsys.readouterr().err and not Path("out").exists()
    assert run(monkeypatch, "merge", "a", "b", "--heads", "keep=b", "--dry-run") == 0
    assert "heads     score: kept from b\n" in capsys.readouterr().out
    assert run(monkeypatch, "merge", "a", "b", "--heads", "drop", "--out", "out", "--json") == 0
    captured = capsys.readouterr()
    assert "warning: score: left out, held by a, b; the base's own is used.\n" in captured.err
    assert json.loads(captured.out)["report"]["riders"][0]["fate"] == "left out"


def test_inspect_says_what_rides_along_and_whether_it_can_be_merged(hold: Hold) -> None:
    biases = {f"layers.{i}.k.bias": torch.ones(4) for i in range(3)}
    hold("a", head(1) | biases | {"score.original_module.weight": torch.ones(2, 12)}), hold("b", head(2, 3), seed=1)
    seen = inspect(["a", "b"])
    assert seen.adapters[0].riders == ("score (weight 2 × 12)", "3 biases", "1 unused copy of whole layers")
    assert seen.mergeable is False and "score: a has weight 2 × 12, b has weight 3 × 12" in str(seen.verdict)


def test_prepare_has_the_policy_too(hold: Hold) -> None:
    folders = [hold("a", head(1)), hold("b", head(2), seed=1)]
    merged = ties_peft.prepare(folders, heads="keep=a").merge("average")
    assert torch.equal(whole(merged)["score.weight"], head(1)["score.weight"])


# The names in a file


@pytest.mark.parametrize(
    ("path", "module", "tensor", "form"),
    [
        ("score.weight", "score", "weight", "layer"),
        ("bert.pre_classifier.dense.weight", "bert.pre_classifier", "dense.weight", "layer"),
        ("layers.0.q.base_layer.bias", "layers.0.q", "bias", "bias"),
        ("lm_head.base_layer.weight", "lm_head", "weight", "base"),
        ("lm_head.weight", "lm_head", "weight", "plain"),
        ("layers.3.norm.bias", "layers.3.norm", "bias", "bias"),
        ("mha.in_proj_bias", "mha", "in_proj_bias", "bias"),
        ("wte.token_adapter.trainable_tokens_delta", "wte", "token_adapter.trainable_tokens_delta", "tokens"),
        ("wte.token_adapter.base_layer.weight", "wte", "weight", "base"),
        ("logit_scale", "logit_scale", "logit_scale", "plain"),
    ],
)
def test_what_a_name_says(hold: Hold, path: str, module: str, tensor: str, form: str) -> None:
    adapter = Adapter.load(hold("a", {path: torch.ones(1, 2)}, trainable_token_indices=[4]))
    (found,) = adapter.extra_tensors(["classifier", "score"])
    assert (found.module, found.tensor, found.role) == (module, tensor, form)
    merged = ties_peft.merge([adapter])
    assert merged.extra_keys == (PREFIX + path.replace("token_adapter.base_layer.", ""),)  # no row is trained there
