"""Adapters loaded in a PEFT model, merged into one more of them, on tiny models with random weights."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ties_peft
from ties_peft.merging.live import COMBINATION_TYPES

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning"),
    pytest.mark.filterwarnings("ignore:.*density 1.*:UserWarning"),
]
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
NEW_PEFT = pytest.mark.skipif(
    tuple(map(int, peft.__version__.split(".")[:2])) < (0, 20),
    reason="older releases of PEFT save, combine or refuse otherwise",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES, intermediate_size=24)).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


TARGETS = {
    llama: (["q_proj", "v_proj", "down_proj"], ["q_proj", "up_proj"]),
    bert: (["query", "value"], ["query", "output.dense"]),
    gpt2: (["c_attn", "c_fc"], ["c_attn", "c_proj"]),
}


def lora(targets: Any, r: int = 4, **settings: Any) -> Any:
    return peft.LoraConfig(r=r, **{"lora_alpha": 2 * r, "target_modules": targets, **settings})


def ia3(targets: list[str], feedforward: list[str]) -> Any:
    return peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)


def loaded(base: Any, **configs: Any) -> Any:
    """A PeftModel with adapters of random values; the first is active."""
    (first, config), *others = configs.items()
    model = peft.get_peft_model(base, config, adapter_name=first)
    for name, config in others:
        model.add_adapter(name, config)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=draw) / 6)
            elif "ia3_" in name:
                tensor.copy_(1 + torch.randn(tensor.shape, generator=draw) / 4)
    return model


def two(build: Callable[[], Any], **extra: Any) -> Any:
    """`red` and `blue`, alike in little: ranks, scalings, patterns, modules."""
    if build is t5:
        return loaded(
            t5(),
            red=ia3(["SelfAttention.k", "SelfAttention.v", "wo"], ["wo"]),
            blue=ia3(["SelfAttention.k", "wi"], ["wi"]),
        )
    red, blue = TARGETS[build]
    patterns = {"rank_pattern": {"0.*": 2}, "alpha_pattern": {f"{blue[0]}": 5}}
    return loaded(build(), red=lora(red, **extra), blue=lora(blue, 3, use_rslora=True, **patterns, **extra))


def alike(base: Any, count: int = 3, targets: Any = ("q_proj", "up_proj"), **settings: Any) -> Any:
    """Adapters of one form, as PEFT's own merging wants them."""
    names = ("red", "blue", "green", "pink")[:count]
    return loaded(base, **{name: lora(list(targets), **settings) for name in names})


def output(model: Any, adapter: str | None = None) -> Tensor:
    if adapter is not None:
        model.set_adapter(adapter)
    kind = model.config.model_type
    given = {"labels": TOKENS} if kind == "t5" else {}
    with torch.no_grad():
        out = model(input_ids=TOKENS, **given)
    return out.last_hidden_state if kind == "bert" else out.logits


def changed_base(base: Any, merged: ties_peft.Adapter) -> Any:
    """The base with the merged task vector in its weights."""
    with torch.no_grad():
        for name in merged.modules:
            layer, delta = base.get_submodule(name), merged.delta(name)
            if merged.peft_type.name == "ia3":
                side = delta[None, :] if merged.layout[name].on_input else delta[:, None]
                layer.weight.mul_(1 + side)
            else:
                layer.weight.add_(delta if isinstance(layer, nn.Linear) else delta.T)
    return base


def tensors(adapter: ties_peft.Adapter) -> dict[str, Tensor]:
    return {name: adapter.tensors.read(name) for name in adapter.tensors.names}


def deltas(model: Any, adapter: str) -> dict[str, Tensor]:
    """PEFT's own view of what an adapter adds."""
    layers = {name: m for name, m in model.named_modules() if adapter in getattr(m, "lora_A", ())}
    return {name: layer.get_delta_weight(adapter).detach().float() for name, layer in layers.items()}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], within: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=within, rtol=within), name


class State:
    """All there is to see of a model."""

    def __init__(self, model: Any) -> None:
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.objects = {name: id(t) for name, t in named.items()}
        self.values = {name: t.detach().clone() for name, t in named.items()}
        self.flags = {name: t.requires_grad for name, t in named.items()}
        self.training = {name: m.training for name, m in model.named_modules()}
        self.active = copy.deepcopy(
            {
                "model": model.active_adapter,
                "tuner": model.base_model.active_adapter,
                **{n: m._active_adapter for n, m in model.named_modules() if hasattr(m, "_active_adapter")},
            }
        )
        self.disabled = {n: m.disable_adapters for n, m in model.named_modules() if hasattr(m, "disable_adapters")}
        self.scalings = {n: dict(m.scaling) for n, m in model.named_modules() if hasattr(m, "lora_A")}
        self.configs = dict(model.peft_config)
        self.random = torch.get_rng_state()

    def assert_same(self, model: Any, but: str | None = None) -> None:
        now = State(model)
        for field in ("objects", "flags", "training", "active", "disabled", "configs"):
            mine = {k: v for k, v in getattr(now, field).items() if but is None or but not in k.split(".")}
            assert mine == getattr(self, field), field
        for name, value in self.values.items():
            assert torch.equal(now.values[name], value), name
        for name, scalings in self.scalings.items():
            assert {k: v for k, v in now.scalings[name].items() if k != but} == scalings
        assert torch.equal(now.random, self.random)


# what the merged adapter computes


@NEW_PEFT
@pytest.mark.parametrize("build", [llama, bert, gpt2, t5])
@pytest.mark.parametrize(
    "asked", [{"method": "ties", "density": 0.5}, {"method": "task_arithmetic", "weights": [2, -0.5]}]
)
def test_it_computes_base_plus_delta_and_what_the_files_give(
    build: Callable[[], Any], asked: dict[str, Any], tmp_path: Path
) -> None:
    model = two(build)
    merged = ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", **asked)
    found = output(model, "merged")
    assert not torch.allclose(found, output(model, "red"), atol=1e-3)
    assert torch.allclose(found, output(changed_base(build(), merged)), atol=1e-5)

    model.save_pretrained(tmp_path, selected_adapters=["red", "blue"])
    filed = ties_peft.merge([tmp_path / "red", tmp_path / "blue"], **asked)
    ours, theirs = tensors(merged), tensors(filed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    filed.save(tmp_path / "merged")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "merged")
    assert torch.allclose(found, output(again), atol=1e-5)


@NEW_PEFT
@pytest.mark.parametrize("build", [llama, gpt2, t5])
def test_peft_saves_it_and_loads_it_again(build: Callable[[], Any], tmp_path: Path) -> None:
    model = two(build)
    merged = ties_peft.add_merged_adapter(model, ["red", "blue"], "merged")
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    reread = ties_peft.Adapter.load(tmp_path / "merged")
    assert {n: t.tolist() for n, t in tensors(reread).items()} == {n: t.tolist() for n, t in tensors(merged).items()}
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "merged")
    assert torch.allclose(output(again), output(model, "merged"), atol=1e-6)


def test_what_comes_back_saves_with_its_provenance(tmp_path: Path) -> None:
    model = two(llama)
    merged = ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", density=0.3)
    folder = merged.save(tmp_path / "out")
    assert {"adapter_config.json", "recipe.yaml", "provenance.json", "README.md"} <= {f.name for f in folder.iterdir()}
    assert merged.recipe.adapters == ("red", "blue")
    assert merged.report.method == "ties"
    model.load_adapter(folder, "again")
    assert torch.equal(output(model, "again"), output(model, "merged"))
    kept = tensors(merged)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].clone()
    live = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["merged"].weight
    live.data.zero_()  # what trains in the model is not what came back
    assert torch.equal(tensors(merged)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], kept)


def test_one_adapter_comes_back_as_it_was() -> None:
    model = two(llama)
    ties_peft.add_merged_adapter(model, ["blue"], "merged", density=1.0)
    assert torch.allclose(output(model, "merged"), output(model, "blue"), atol=1e-5)


# what stays as it was


@pytest.mark.parametrize("build", [llama, gpt2, t5])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_else_changes(build: Callable[[], Any], training: bool) -> None:
    model = two(build).train(training)
    model.set_adapter("blue")
    before = State(model)
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", density=0.5)
    before.assert_same(model, but="merged")
    new = {name: m for name, m in model.named_modules() if "merged" in name.split(".")}
    assert all(m.training == training for m in new.values())
    assert all(not p.requires_grad for name, p in model.named_parameters() if "merged" in name.split("."))
    assert model.get_model_status().active_adapters == ["blue"]
    assert "merged" in model.get_model_status().available_adapters


def test_several_active_adapters_and_switched_off_ones_stay_so() -> None:
    model = two(llama)
    model.base_model.set_adapter(["red", "blue"])
    with model.disable_adapter():
        before = State(model)
        plain = output(model)
        ties_peft.add_merged_adapter(model, ["red", "blue"], "merged")
        before.assert_same(model, but="merged")
        assert torch.equal(output(model), plain)
    assert model.base_model.active_adapters == ["red", "blue"]


def test_an_optimiser_goes_on_with_the_same_parameters() -> None:
    model = two(llama).train()
    optimiser = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged")
    before = State(model)
    optimiser.step()
    after = State(model)
    moved = {name for name, value in before.values.items() if not torch.equal(after.values[name], value)}
    assert moved == {name for name in before.values if "lora_" in name and "red" in name.split(".")}


def test_the_merged_adapter_can_be_trained_on() -> None:
    model = two(llama)
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged")
    model.set_adapter("merged")
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in model.named_parameters() if "merged" in n.split(".")}


def test_the_new_adapter_inherits_nothing() -> None:
    model = two(llama, lora_dropout=0.5, init_lora_weights="gaussian")
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", rank=5)
    config = model.peft_config["merged"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (5, 5, 0.0)
    assert (config.use_rslora, config.init_lora_weights, config.inference_mode) == (False, True, True)
    assert not config.rank_pattern and not config.alpha_pattern


# devices, dtypes, scalings, models


@NEW_PEFT
def test_bfloat16_adapters_make_a_bfloat16_adapter(tmp_path: Path) -> None:
    def build(**configs: Any) -> Any:
        base = llama().to(torch.bfloat16)
        names = list(configs)
        model = peft.get_peft_model(base, configs[names[0]], adapter_name=names[0], autocast_adapter_dtype=False)
        for name in names[1:]:
            model.add_adapter(name, configs[name], autocast_adapter_dtype=False)
        return model

    wide = {"init_lora_weights": False}
    model = build(red=lora(["q_proj"], **wide), blue=lora(["q_proj", "up_proj"], **wide))
    merged = ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", density=0.5)
    assert merged.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path, selected_adapters=["red", "blue"])
    filed = ties_peft.merge([tmp_path / "red", tmp_path / "blue"], density=0.5)
    assert all(torch.equal(tensors(merged)[name], tensor) for name, tensor in tensors(filed).items())
    exact = ties_peft.add_merged_adapter(model, ["red", "blue"], "exact", density=0.5, dtype="float32")
    assert merged.report.rounding < 0.01
    for name in exact.modules:
        assert torch.allclose(merged.delta(name), exact.delta(name), atol=0.05)
    assert {p.dtype for n, p in model.named_parameters() if "exact" in n} == {torch.float32}
    assert torch.isfinite(output(model, "merged")).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu() -> None:
    model, same = two(llama).to("cuda"), two(llama)
    merged = ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", density=0.5)
    filed = ties_peft.add_merged_adapter(same, ["red", "blue"], "merged", density=0.5)
    assert all(torch.equal(tensors(merged)[name], tensor) for name, tensor in tensors(filed).items())
    assert {p.device.type for p in model.parameters()} == {"cuda"}


def test_adapters_of_two_dtypes_make_a_float32_one() -> None:
    model = two(llama)
    for _, layer in model.named_modules():
        if "red" in getattr(layer, "lora_A", ()):
            layer.lora_A["red"].to(torch.bfloat16)
            layer.lora_B["red"].to(torch.bfloat16)
    assert ties_peft.add_merged_adapter(model, ["red", "blue"], "merged").dtype == torch.float32


def test_the_scaling_in_force_counts() -> None:
    model = alike(llama(), 2)
    layer = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    layer.set_scale("red", -3)
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", combination_type="cat")
    red, blue = deltas(model, "red"), deltas(model, "blue")
    assert_close(deltas(model, "merged"), {name: red[name] + blue[name] for name in red}, 1e-5)


def test_modules_in_common_are_not_asked_for() -> None:
    model = loaded(llama(), red=lora(["q_proj"]), blue=lora(["up_proj"]))
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", combination_type="cat")
    assert_close(deltas(model, "merged"), {**deltas(model, "red"), **deltas(model, "blue")}, 1e-5)


def test_many_modules_arrive_each_at_its_place() -> None:
    base = llama(num_hidden_layers=12)
    layers = {"layers_to_transform": [0, 1, 2, 10], "layers_pattern": "layers"}
    model = loaded(base, red=lora("all-linear"), blue=lora(["q_proj", "up_proj"], **layers), green=lora(["v_proj"]))
    ties_peft.add_merged_adapter(model, ["blue", "green"], "merged", combination_type="cat")
    assert_close(deltas(model, "merged"), {**deltas(model, "blue"), **deltas(model, "green")}, 1e-5)


def test_names_that_end_alike_are_told_apart(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"proj": nn.Linear(6, 6), "other": nn.Linear(6, 6)})
        return nn.ModuleDict({"proj": nn.Linear(6, 6), "inner": inner})

    model = loaded(build(), red=lora("proj"), blue=lora("proj"))
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged")
    assert set(deltas(model, "merged")) == {"base_model.model.proj"}
    assert isinstance(model.get_submodule("base_model.model.inner.proj"), nn.Linear)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "merged", adapter_name="merged")
    assert set(deltas(again, "merged")) == {"base_model.model.proj"}


@NEW_PEFT
def test_multi_head_attention() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = alike(nn.ModuleDict({"mha": attention, "lin": nn.Linear(8, 8)}), 2, ["mha", "lin"])
    values = torch.randn(1, 3, 8)
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", combination_type="cat")
    with torch.no_grad():
        model.base_model.set_adapter(["red", "blue"])
        both = model.base_model.model["mha"](values, values, values)[0]
        model.set_adapter("merged")
        one = model.base_model.model["mha"](values, values, values)[0]
    assert torch.allclose(one, both, atol=1e-5)


@NEW_PEFT
def test_experts() -> None:
    """PEFT wants all adapters of a model to name their parameters alike, so the new one says what they say."""
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "num_local_experts": 3, "num_hidden_layers": 1}
    base = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).eval()
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    red, blue = (lora(["q_proj"], r, target_parameters=parameters) for r in (2, 3))
    model = loaded(base, red=red, blue=blue)
    model.base_model.set_adapter(["red", "blue"])
    both = output(model)
    merged = ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", combination_type="cat")
    assert sum("experts" in name for name in merged.modules) == 6
    assert torch.allclose(output(model, "merged"), both, atol=1e-5)
    assert (both - output(model, "red")).abs().max() > 1e-2


def test_a_tuner_without_a_peft_model_around_it() -> None:
    model = two(llama)
    merged = ties_peft.add_merged_adapter(model.base_model, ["red", "blue"], "merged")
    assert torch.allclose(output(model, "merged"), output(changed_base(llama(), merged)), atol=1e-5)


def test_signs_may_come_from_a_loaded_adapter(tmp_path: Path) -> None:
    model = alike(llama())
    merged = ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", sign_from="green", density=1.0)
    model.save_pretrained(tmp_path, selected_adapters=["red", "blue", "green"])
    folders = [tmp_path / name for name in ("red", "blue")]
    filed = ties_peft.merge(folders, sign_from=str(tmp_path / "green"), density=1.0)
    assert all(torch.equal(tensors(merged)[name], tensor) for name, tensor in tensors(filed).items())
    assert "sign_from: green" in merged.recipe.to_yaml()


# PEFT's words


@pytest.mark.parametrize("name", sorted(COMBINATION_TYPES))
@pytest.mark.parametrize("build", [llama, t5])
def test_every_combination_type_is_accepted(name: str, build: Callable[[], Any]) -> None:
    model = two(t5) if build is t5 else alike(llama())
    trims = name not in ("cat", "svd", "linear")
    asked = {"density": 0.5} if trims else {}
    if "ties" in name:
        asked |= {"majority_sign_method": "frequency"}
    merged = ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", [1.0, 0.5], combination_type=name, **asked)
    assert torch.isfinite(output(model, "merged")).all()
    assert merged.report.scale == 1
    assert merged.report.rank == (None if build is t5 else 8 if name in ("cat", "linear") else 4)


WEIGHTS = {"weights": [1.0, -0.5, 2.0]}
TRIMMED = {"density": 0.4, "weights": [1.0, 1.0, 1.0]}
AGREE: list[dict[str, Any]] = [
    {"combination_type": "cat", **WEIGHTS},
    {"combination_type": "ties", **TRIMMED},
    {"combination_type": "ties", **TRIMMED, "majority_sign_method": "frequency"},
    {"combination_type": "ties_svd", **TRIMMED},
    *({"combination_type": "svd", **WEIGHTS, "svd_rank": rank} for rank in (None, 2, 16)),
    *({"combination_type": "ties_svd", **TRIMMED, "svd_rank": rank} for rank in (2, 16)),
    {"combination_type": "ties_svd", **TRIMMED, "svd_rank": 16, "majority_sign_method": "frequency"},
    {"combination_type": "magnitude_prune", "density": 0.4, **WEIGHTS},
    {"combination_type": "magnitude_prune_svd", "density": 0.4, **WEIGHTS, "svd_rank": 16},
]


@NEW_PEFT
@pytest.mark.parametrize("asked", AGREE, ids=lambda asked: "-".join(map(str, asked.values())))
def test_peft_agrees(asked: dict[str, Any]) -> None:
    model = alike(llama())
    adapters = ["red", "blue", "green"]
    ties_peft.add_merged_adapter(model, adapters, "merged", **asked)
    model.add_weighted_adapter(adapters=adapters, adapter_name="theirs", **asked)
    assert_close(deltas(model, "merged"), deltas(model, "theirs"))


@pytest.mark.parametrize("name", ["dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"])
def test_masks_come_from_the_seed(name: str) -> None:
    model = alike(llama(), 2)
    made = {}
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # which has no say
        asked: dict[str, Any] = {"combination_type": name, "seed": seed}
        made[number] = tensors(ties_peft.add_merged_adapter(model, ["red", "blue"], f"merged{number}", **asked))
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    assert not all(torch.equal(made[0][key], made[2][key]) for key in made[0])


@NEW_PEFT
@pytest.mark.parametrize("name", ["dare_linear_svd", "dare_ties_svd"])
def test_peft_agrees_where_nothing_is_dropped(name: str) -> None:
    model = alike(llama())
    asked: dict[str, Any] = {"combination_type": name, "density": 1.0, "svd_rank": 16, "weights": [1.0, 1.0, 1.0]}
    ties_peft.add_merged_adapter(model, ["red", "blue", "green"], "merged", **asked)
    model.add_weighted_adapter(adapters=["red", "blue", "green"], adapter_name="theirs", **asked)
    assert_close(deltas(model, "merged"), deltas(model, "theirs"))


def test_linear_is_the_sum_without_cross_terms() -> None:
    model = alike(llama(), 2)
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", [2.0, -1.0], combination_type="linear")
    red, blue = deltas(model, "red"), deltas(model, "blue")
    assert_close(deltas(model, "merged"), {name: 2 * red[name] - blue[name] for name in red}, 1e-5)


def test_ia3_vectors_are_merged_as_distances_from_one() -> None:
    model = two(t5)
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged", combination_type="linear")
    found = [m.ia3_l for m in model.modules() if "merged" in getattr(m, "ia3_l", ())]
    assert len(found) == 16
    for vectors in found:
        own = [vectors[name] for name in ("red", "blue") if name in vectors]
        assert torch.allclose(vectors["merged"], 1 + sum(vector - 1 for vector in own), atol=1e-6)


def test_what_is_given_wins_over_what_the_name_means() -> None:
    model = alike(llama())
    merged = ties_peft.add_merged_adapter(
        model, ["red", "blue"], "merged", combination_type="ties_svd", space="core", scale=0.5, rank=3, scope="adapter"
    )
    assert (merged.report.space, merged.report.scale, merged.report.rank) == ("core", 0.5, 3)
    assert merged.recipe.parameters["scope"] == "adapter"


# refusals: each clear, each before anything has changed


REFUSED = {
    "a name that is taken": (["red", "blue"], "blue", {}, "'blue' is loaded already"),
    "an unknown adapter": (["red", "blu"], "merged", {}, "unknown adapter 'blu': did you mean 'blue'"),
    "one text for the adapters": ("red", "merged", {}, "expected a list of names"),
    "an adapter object": ([object()], "merged", {}, "expected a list of names"),
    "no adapter": ([], "merged", {}, "no adapters were given"),
    "too few weights": (["red", "blue"], "merged", {"weights": [1.0]}, "1 weight for 2 adapters"),
    "PEFT's order of arguments": (["red", "blue"], [1.0, 1.0], {"weights": "merged"}, r"adapter_name is \[1.0, 1.0\]"),
    "a dot in the name": (["red", "blue"], "mer.ged", {}, "PyTorch cannot hold"),
    "an empty name": (["red", "blue"], "", {}, "PyTorch cannot hold"),
    "the name of a method of PyTorch's": (["red", "blue"], "type", {}, "PyTorch cannot hold"),
    "the name of a module": (["red", "blue"], "self_attn", {}, "names of the model's parameters"),
    "two rules": (["red", "blue"], "merged", {"method": "ties", "combination_type": "cat"}, "both name a rule"),
    "an unknown type": (["red", "blue"], "merged", {"combination_type": "tie"}, "did you mean 'ties'"),
    "an unknown method": (["red", "blue"], "merged", {"method": "tie"}, "did you mean 'ties'"),
    "two ranks": (["red", "blue"], "merged", {"rank": 3, "svd_rank": 3}, "rank and svd_rank are the same"),
    "an unknown election": (["red", "blue"], "merged", {"majority_sign_method": "all"}, "Known: frequency, total"),
    "two elections": (["red", "blue"], "merged", {"majority_sign_method": "total", "elect": "mass"}, "are the same"),
    "a density for a sum": (["red", "blue"], "merged", {"combination_type": "svd", "density": 0.5}, "density"),
    "a density above 1": (["red", "blue"], "merged", {"density": 20}, "density"),
    "a parameter that nothing has": (["red", "blue"], "merged", {"svd_clamp": 0.9}, "svd_clamp"),
    "unequal ranks apart": (["red", "blue"], "merged", {"combination_type": "ties"}, "needs equal ranks"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_refusals(case: tuple[Any, Any, dict[str, Any], str]) -> None:
    adapters, name, asked, message = case
    model = two(llama)
    before = State(model)
    with pytest.raises(ties_peft.TiesPeftError, match=message):
        ties_peft.add_merged_adapter(model, adapters, name, **asked)
    before.assert_same(model)


def test_a_merged_base_is_refused() -> None:
    model = alike(llama())
    model.merge_adapter(["red"])
    before = State(model)
    with pytest.raises(ties_peft.RecipeError, match="red is merged into the base"):
        ties_peft.add_merged_adapter(model, ["red", "blue"], "merged")
    before.assert_same(model)


@NEW_PEFT
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "lora_only"}, "trained biases"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"trainable_token_indices": [1]}, "trained token embeddings"),
        ({"init_lora_weights": "pissa"}, "pissa"),
    ],
)
def test_what_cannot_be_merged_from_files_cannot_here(settings: dict[str, Any], message: str) -> None:
    model = loaded(llama(), red=lora(["q_proj"]), blue=lora(["q_proj"], **settings))
    before = State(model)
    with pytest.raises(ties_peft.AdapterError, match=f"(?s)'blue'.*{message}"):
        ties_peft.add_merged_adapter(model, ["red", "blue"], "merged")
    before.assert_same(model)
    if "init_lora_weights" in settings:  # loaded beside, it is nobody's business
        ties_peft.add_merged_adapter(model, ["red"], "merged")
        before.assert_same(model, but="merged")


@NEW_PEFT
@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_variants_of_lora_beside_a_plain_one(settings: dict[str, Any]) -> None:
    targets = ["query", "value"]
    model = loaded(bert(), red=lora(targets), blue=lora(targets, **settings))
    before = State(model)
    merged = ties_peft.add_merged_adapter(model, ["blue"], "merged", combination_type="cat")
    before.assert_same(model, but="merged")
    assert torch.allclose(output(model, "merged"), output(model, "blue"), atol=1e-5)
    assert merged.config.get("lora_bias") == settings.get("lora_bias")
    ties_peft.add_merged_adapter(model, ["red", "blue"], "both", combination_type="cat")


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "PROMPT_TUNING"])
def test_other_kinds_are_refused_by_name(kind: str) -> None:
    config = {
        "ADALORA": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        "LOHA": lambda: peft.LoHaConfig(target_modules=["q_proj"]),
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }[kind]()
    model = peft.get_peft_model(llama(), config, adapter_name="red")
    with pytest.raises(ties_peft.AdapterError, match=f"'red' is of (PEFT type '{kind}'|type AdaLoRA|type LoHa)"):
        ties_peft.add_merged_adapter(model, ["red"], "merged")


@pytest.mark.parametrize("model", [None, "path", nn.Linear(2, 2)])
def test_no_peft_model_at_all(model: Any) -> None:
    with pytest.raises(ties_peft.RecipeError, match="expected a PeftModel"):
        ties_peft.add_merged_adapter(model, ["red"], "merged")


def test_values_that_are_elsewhere_are_refused() -> None:
    model = alike(llama(), 2)
    model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["red"].to("meta")
    with pytest.raises(ties_peft.AdapterError, match="is offloaded"):
        ties_peft.add_merged_adapter(model, ["red", "blue"], "merged")


@pytest.mark.parametrize("where", ["before", "after", "elsewhere", "base"])
def test_where_peft_fails_the_model_is_as_before(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = two(llama).train()
    tuner = model.base_model
    inject = tuner.inject_adapter
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")

    def failing(*args: Any, **settings: Any) -> None:
        if where == "before":
            raise ValueError("no room")
        inject(*args, **settings)
        if where == "after":
            raise ValueError("no room")
        if where == "elsewhere":
            layer.lora_B["merged"] = nn.Linear(2, 2)
        if where == "base":
            layer.base_layer.weight.data = layer.base_layer.weight.data.clone()

    before = State(model)
    monkeypatch.setattr(tuner, "inject_adapter", failing)
    told = {"elsewhere": "other tensors", "base": "changed 1 tensor"}.get(where, "cannot add adapter 'merged': no room")
    with pytest.raises(ties_peft.CompatibilityError, match=told):
        ties_peft.add_merged_adapter(model, ["red", "blue"], "merged")
    before.assert_same(model)
    monkeypatch.undo()
    ties_peft.add_merged_adapter(model, ["red", "blue"], "merged")
    before.assert_same(model, but="merged")


def test_importing_ties_peft_imports_neither_peft_nor_transformers() -> None:
    code = "import sys, ties_peft; sys.exit(bool({'peft', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
