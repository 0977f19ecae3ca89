"""The lines that load a result: run as they are printed, they give a model on which the adapter has its effect."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from cli.run_command import run
from peft_types.models import TOKENS, WIDTHS, bert, clip, gpt2, llama, t5, vit, whisper
from safetensors.torch import load_file, save_file
from sampling import some
from torch import Tensor, nn

import ties_peft
from ties_peft.merging.loading import AdapterFacts, find_loading

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {**WIDTHS, "num_hidden_layers": 2}
STATES = ("named", "noted", "bare", "some", "differ")  # what the adapters say of their task; see `state_of`


@dataclass(frozen=True)
class Case:
    """A base, how it was loaded for training, and what was trained.

    Attributes:
        base: makes the model that is saved.
        auto: the class that loaded it for training.
        task: its task type.
        targets: of the LoRA.
        options: further arguments for the training's from_pretrained.
        settings: further settings of the LoRA.
        tokens: the vocabulary that it was resized to.
        inputs: for a forward pass.
        alone: whether the module paths and heads tell the class where nothing else does.
        with_base: whether they do together with the base's config.
    """

    base: Callable[[], nn.Module]
    auto: Any
    task: str | None
    targets: list[str]
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokens: int | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=lambda: {"input_ids": TOKENS})
    alone: bool = False
    with_base: bool = True


def roberta() -> nn.Module:
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**SMALL, max_position_embeddings=12))


def distilbert() -> nn.Module:
    sizes = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_heads": 4, "n_layers": 2, "max_position_embeddings": 8}
    return hf.DistilBertForMaskedLM(hf.DistilBertConfig(**sizes))


def opt() -> nn.Module:
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=40,
            hidden_size=16,
            ffn_dim=24,
            num_attention_heads=4,
            num_hidden_layers=2,
            word_embed_proj_dim=16,
        )
    )


def neox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL))


def bart() -> nn.Module:
    sides = {
        f"{s}_{k}": v
        for s in ("encoder", "decoder")
        for k, v in {"layers": 1, "attention_heads": 4, "ffn_dim": 24}.items()
    }
    return hf.BartForConditionalGeneration(
        hf.BartConfig(vocab_size=60000, d_model=16, max_position_embeddings=12, **sides)
    )


def padded_llama() -> nn.Module:
    """With a token that fills up rows, by which a classifier finds the last of the others."""
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0))


def bert_alone() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**SMALL, max_position_embeddings=8))


def bert_classifier() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, max_position_embeddings=8, num_labels=4))


VIT = ["query", "q_proj", "value", "v_proj"]
PAIRS = {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :3]}
SOUND = {"input_features": torch.linspace(-1, 1, 256).reshape(2, 8, 16).sin(), "decoder_input_ids": TOKENS[:, :3]}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8).sin()}
CLASSES, LABELS = hf.AutoModelForSequenceClassification, {"num_labels": 3}
WHOLE = {"modules_to_save": ["embed_tokens", "lm_head"]}

CASES = {
    "Llama": Case(llama, hf.AutoModelForCausalLM, "CAUSAL_LM", ["q_proj", "v_proj"], alone=True),
    "Llama without a head": Case(llama, hf.AutoModel, "FEATURE_EXTRACTION", ["q_proj", "v_proj"], alone=True),
    "Llama that classifies": Case(padded_llama, CLASSES, "SEQ_CLS", ["q_proj", "v_proj"], LABELS, with_base=False),
    "Llama with more tokens": Case(
        llama, hf.AutoModelForCausalLM, "CAUSAL_LM", ["q_proj"], settings=WHOLE, tokens=44, alone=True
    ),
    "GPT-2": Case(gpt2, hf.AutoModelForCausalLM, "CAUSAL_LM", ["c_attn", "c_proj"], alone=True),
    "GPT-NeoX": Case(neox, hf.AutoModelForCausalLM, "CAUSAL_LM", ["query_key_value"], alone=True),
    "OPT": Case(opt, hf.AutoModelForCausalLM, "CAUSAL_LM", ["q_proj", "v_proj"]),
    "T5": Case(t5, hf.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", ["q", "v"], inputs=PAIRS, alone=True),
    "BART": Case(bart, hf.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", ["q_proj", "v_proj"], inputs=PAIRS),
    "Whisper": Case(whisper, hf.WhisperForConditionalGeneration, None, ["q_proj", "v_proj"], inputs=SOUND),
    "BERT without a head": Case(bert_alone, hf.AutoModel, "FEATURE_EXTRACTION", ["query", "value"], alone=True),
    "a BERT's encoder": Case(bert, hf.AutoModel, "FEATURE_EXTRACTION", ["query", "value"], alone=True),
    "BERT that fills masks": Case(bert, hf.AutoModelForMaskedLM, None, ["query", "value"]),
    "BERT that classifies": Case(bert, CLASSES, "SEQ_CLS", ["query", "value"], LABELS, with_base=False),
    "BERT trained on a classifier": Case(
        bert_classifier, CLASSES, "SEQ_CLS", ["query"], {**LABELS, "ignore_mismatched_sizes": True}
    ),
    "BERT that answers": Case(bert, hf.AutoModelForQuestionAnswering, "QUESTION_ANS", ["query", "value"], alone=True),
    "RoBERTa that tags": Case(
        roberta, hf.AutoModelForTokenClassification, "TOKEN_CLS", ["query"], {"num_labels": 5}, with_base=False
    ),
    "RoBERTa that classifies": Case(roberta, CLASSES, "SEQ_CLS", ["query"], LABELS, alone=True),
    "DistilBERT without a head": Case(distilbert, hf.AutoModel, "FEATURE_EXTRACTION", ["q_lin"], alone=True),
    "DistilBERT that classifies": Case(distilbert, CLASSES, "SEQ_CLS", ["q_lin"], LABELS, alone=True),
    "ViT": Case(
        vit, hf.AutoModelForImageClassification, None, VIT, settings={"modules_to_save": ["classifier"]}, inputs=PIXELS
    ),
    "CLIP text": Case(clip, hf.CLIPTextModelWithProjection, None, ["q_proj", "v_proj"]),
}


def load(case: Case, base: Path) -> nn.Module:
    """The base as it was loaded for training."""
    torch.manual_seed(7)  # of a head that the base's files lack
    model = case.auto.from_pretrained(base, **case.options).eval()
    if case.tokens is not None:
        model.resize_token_embeddings(case.tokens, mean_resizing=False)
    return model  # type: ignore[no-any-return]


def train(case: Case, base: Path, folder: Path, seed: int) -> dict[str, Any]:
    """An adapter as PEFT saves it, its LoRA random and its head one's own but the same for every seed; the config."""
    config = peft.LoraConfig(
        r=4,
        task_type=case.task,
        target_modules=case.targets,
        init_lora_weights=False,
        fan_in_fan_out=case.base is gpt2,
        **case.settings,
    )
    model = peft.get_peft_model(load(case, base), config)
    draw, alike = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw)
        elif parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=alike)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    saved: dict[str, Any] = json.loads(path.read_text()) | {"base_model_name_or_path": "org/base"}
    noted = {
        "base_model_class": type(model.get_base_model()).__name__,
        "parent_library": type(model.get_base_model()).__module__,
    }
    return saved | {"auto_mapping": noted}


def say(state: str, folders: list[Path], configs: list[dict[str, Any]], task: str | None) -> None:
    """Write what the adapters say of their task.

    named: the task type, as PEFT does. noted: none, but auto_mapping, as PEFT does then. bare: neither. some: the
    task type in one alone. differ: another task type in each.
    """
    other = "CAUSAL_LM" if task == "FEATURE_EXTRACTION" else "FEATURE_EXTRACTION"
    tasks = {
        "named": (task, task),
        "noted": (None, None),
        "bare": (None, None),
        "some": (task, None),
        "differ": (task, other),
    }
    for folder, config, own in zip(folders, configs, tasks[state], strict=True):
        mapping = config["auto_mapping"] if state == "noted" else None
        text = json.dumps(config | {"task_type": own, "auto_mapping": mapping})
        (folder / "adapter_config.json").write_text(text)


def printed(out: str) -> str:
    """The lines of Python that a command printed."""
    return "\n".join(line.strip() for line in out.split("load it with\n")[1].splitlines() if line.strip())


def answer(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs)[0]  # type: ignore[no-any-return]


def known(case: Case, state: str, at_hand: bool) -> bool:
    """Whether there is evidence that tells the class."""
    if state in ("named", "some") and case.task not in (None, "FEATURE_EXTRACTION"):
        return True
    return state == "noted" or case.alone or (at_hand and case.with_base)


@pytest.mark.parametrize("name", some(CASES, 12))
def test_the_printed_lines_load_the_result(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every architecture, whatever the adapters say of their task, with the base's config at hand and without.

    The oracle is PEFT on the class that the adapters were trained on.
    """
    case, base = CASES[name], tmp_path / "there/org/base"
    torch.manual_seed(3)
    case.base().save_pretrained(base)  # type: ignore[operator]
    folders = [tmp_path / "here/a", tmp_path / "here/b"]
    configs = [train(case, base, folder, seed) for seed, folder in enumerate(folders)]
    (tmp_path / "here/out").mkdir()
    seen: dict[str, None] = {}
    for state in STATES:
        say(state, folders, configs, case.task)
        for place in ("here", "there"):  # org/base is a folder in the one of them alone
            monkeypatch.chdir(tmp_path / place)
            out = tmp_path / "here/out"
            done = run("merge", *folders, "--method", "average", "--out", out, "--force")
            assert done.code == 0, done.err
            lines = printed(done.out)
            if not known(case, state, place == "there"):
                assert "class of the base model is not known" in lines and "PeftModel.from_pretrained" in lines, (
                    state,
                    place,
                    lines,
                )
                assert not re.search(r"import (Auto|\w+For)", lines)
                continue
            assert "class of the base model is not known" not in lines, (state, place, lines)
            if lines in seen:
                continue
            seen[lines] = None
            monkeypatch.chdir(tmp_path / "there")
            check(case, base, out, lines)
    assert seen


def check(case: Case, base: Path, out: Path, lines: str) -> None:
    """The lines give the answers of PEFT on the class that was trained, which are others than the base's own."""
    space: dict[str, Any] = {}
    torch.manual_seed(7)
    exec(lines, space)
    found = answer(space["model"], case.inputs)
    expected = answer(peft.PeftModel.from_pretrained(load(case, base), out), case.inputs)
    torch.testing.assert_close(found, expected, msg=lines)
    bare = load(case, base)
    assert not torch.allclose(found, answer(bare, case.inputs), atol=1e-3)


# What is left out is said


def test_task_types_that_differ_are_warned_of(make_lora: Any) -> None:
    a, b, c = (
        make_lora("a", task_type="CAUSAL_LM"),
        make_lora("b", seed=1, task_type="SEQ_2_SEQ_LM"),
        make_lora("c", task_type=None),
    )
    with pytest.warns(
        ties_peft.TiesPeftWarning, match=r"task_type is left out: .*CAUSAL_LM: a; SEQ_2_SEQ_LM: b; none: c"
    ):
        merged = ties_peft.merge([a, b, c])
    assert "task_type" not in merged.config
    provenance = json.loads(str(merged.files()["provenance.json"]))["report"]
    assert provenance["task_type"].startswith("left out: the adapters differ")
    assert sum("task_type is left out" in text for text in provenance["warnings"]) == 1
    row = next(line for line in str(merged.report).splitlines() if line.startswith("task type"))
    assert "left out" in row


def test_a_task_type_that_goes_with_its_head_is_said(make_lora: Any) -> None:
    folder = make_lora("a", task_type="SEQ_CLS")
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.score.weight": torch.ones(3, 10)}, path)
    assert ties_peft.merge([folder]).report.task_type == "SEQ_CLS"
    with pytest.warns(ties_peft.TiesPeftWarning, match=r"task_type is left out: the result lacks .*--heads keep=NAME"):
        merged = ties_peft.merge([folder], heads="drop")
    assert "task_type" not in merged.config


def test_nothing_is_said_where_nothing_is_lost(make_lora: Any) -> None:
    for task in (None, "CAUSAL_LM"):
        merged = ties_peft.merge([make_lora("a", task_type=task), make_lora("b", seed=1, task_type=task)])
        assert not [text for text in merged.report.warnings if "task_type" in text]
        assert merged.report.task_type == (task or "")


# diffusers, of which the lines are run on a stand-in: a model of torch under its module's name


class Unet(nn.Module):
    """A model with some of a UNet's paths."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn": nn.ModuleDict({"to_q": nn.Linear(6, 5)})})])

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.down_blocks[0]["attn"]["to_q"](x),)  # type: ignore[index]


class UNet2DConditionModel(Unet):
    """As diffusers names it."""

    asked: tuple[object, ...] = ()

    @classmethod
    def from_pretrained(cls, name: str, subfolder: str | None = None) -> UNet2DConditionModel:
        cls.asked = (name, subfolder)
        return cls()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("diffusers")
    module.UNet2DConditionModel = UNet2DConditionModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", module)
    yield


@pytest.mark.parametrize(
    ("config", "part"),
    [(None, "unet"), ("unet/config.json", "unet"), ("config.json", None)],
    ids=["unknown", "pipeline", "part"],
)
def test_a_unet_is_loaded_by_diffusers(
    make_lora: Any,
    tmp_path: Path,
    stand_in: None,
    monkeypatch: pytest.MonkeyPatch,
    config: str | None,
    part: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    if config is not None:
        (tmp_path / "org/base" / config).parent.mkdir(parents=True)
        (tmp_path / "org/base" / config).write_text('{"_class_name": "UNet2DConditionModel"}')
    shapes = {"down_blocks.0.attn.to_q": (5, 6)}
    folders = [make_lora(name, seed=seed, shapes=shapes, task_type=None) for seed, name in enumerate("ab")]
    done = run("merge", *folders, "--out", tmp_path / "out")
    space: dict[str, Any] = {}
    exec(printed(done.out), space)
    assert UNet2DConditionModel.asked == ("org/base", part)
    x = torch.ones(2, 6)
    delta = ties_peft.Adapter.load(tmp_path / "out").delta("down_blocks.0.attn.to_q")
    torch.testing.assert_close(answer(space["model"], {"x": x}), answer(Unet(), {"x": x}) + x @ delta.T)


def test_a_converted_unet_lora_says_how_it_is_loaded(tmp_path: Path, stand_in: None) -> None:
    pairs = {
        f"unet.down_blocks.0.attn.to_q.lora.{side}.weight": torch.ones(s)
        for side, s in (("down", (2, 6)), ("up", (5, 2)))
    }
    save_file(pairs, tmp_path / "unet.safetensors")
    done = run("convert", tmp_path / "unet.safetensors", "--base-name", "org/base", "--out", tmp_path / "out")
    space: dict[str, Any] = {}
    exec(printed(done.out), space)
    assert UNet2DConditionModel.asked == ("org/base", "unet")


def test_a_transformer_of_diffusers_is_not_guessed(
    make_lora: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_lora("a", shapes={"transformer_blocks.0.attn.to_q": (5, 6)}, task_type=None)
    assert not ties_peft.merge([folder]).loading.name
    (tmp_path / "org/base/transformer").mkdir(parents=True)
    (tmp_path / "org/base/transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    loading = ties_peft.merge([folder]).loading
    assert (loading.library, loading.name, dict(loading.options)) == (
        "diffusers",
        "FluxTransformer2DModel",
        {"subfolder": "transformer"},
    )


# Where the config is looked for, and what it may say


def test_the_config_in_the_hubs_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    evidence = AdapterFacts("org/base", paths=("model.decoder.layers.0.self_attn.q_proj",))
    assert not find_loading(evidence).name
    home = tmp_path / "models--org--base"
    (home / "snapshots/abc").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs/main").write_text("abc")
    (home / "snapshots/abc/config.json").write_text('{"architectures": ["OPTForCausalLM"]}')
    assert find_loading(evidence).name == "AutoModelForCausalLM"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"architectures": "x"}',
        '{"architectures": ["os; import evil"]}',
        '{"_class_name": "a b"}',
        "\x00",
        "{}",
    ],
)
def test_a_config_that_is_none_is_no_evidence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for path in ("model.decoder.layers.0.q_proj", "transformer_blocks.0.attn.to_q"):
        assert not find_loading(AdapterFacts(str(tmp_path), paths=(path,))).name


@pytest.mark.parametrize(
    ("evidence", "config", "name"),
    [
        # a task type that the base cannot have been trained with
        ({"tasks": ("SEQ_2_SEQ_LM",), "paths": ("model.layers.0.q",)}, None, "AutoModelForCausalLM"),
        (
            {"tasks": ("SEQ_2_SEQ_LM",), "paths": ("x.0.q",)},
            {"architectures": ["XForCausalLM"]},
            "AutoModelForCausalLM",
        ),
        ({"tasks": ("SEQ_CLS",), "paths": ("encoder.layer.0.q",)}, {"architectures": ["BertModel"]}, ""),
        # a base saved without a head, an adapter trained with one
        (
            {"tasks": ("CAUSAL_LM",), "paths": ("model.layers.0.q",)},
            {"architectures": ["LlamaModel"]},
            "AutoModelForCausalLM",
        ),
        ({"paths": ("bert.encoder.layer.0.q",)}, {"architectures": ["BertModel"], "model_type": "bert"}, ""),
        # text and images
        (
            {"paths": ("model.language_model.layers.0.q",)},
            {"architectures": ["XForConditionalGeneration"]},
            "XForConditionalGeneration",
        ),
        ({"paths": ("model.layers.0.q",)}, {"architectures": ["XForConditionalGeneration"]}, "AutoModelForCausalLM"),
        # code of the base's own
        (
            {"paths": ("y.0.q",)},
            {"architectures": ["YForAll"], "auto_map": {"AutoModelForSeq2SeqLM": "modeling_y.YForAll"}},
            "AutoModelForSeq2SeqLM",
        ),
        ({"mappings": (("YForAll", "transformers_modules.y"),), "paths": ("y.0.q",)}, None, ""),
        ({"mappings": (("A", "transformers.a"), ("B", "transformers.b")), "paths": ("y.0.q",)}, None, ""),
    ],
)
def test_evidence_that_disagrees(
    tmp_path: Path, evidence: dict[str, Any], config: dict[str, Any] | None, name: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert find_loading(AdapterFacts(str(tmp_path), **evidence)).name == name
