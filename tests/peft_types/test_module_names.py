"""One module under the names of several releases of transformers: adapters meet, and what is written loads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from peft_types.matrix import merged_weights, randomised
from peft_types.models import TOKENS, WIDTHS
from safetensors.torch import load_file, save_file
from torch import nn

import ties_peft
from ties_peft import AdapterError, CompatibilityError
from ties_peft.adapters.base_model import BaseModel
from ties_peft.adapters.module_names import match_names, newer_names, older_names

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = {**WIDTHS, "num_hidden_layers": 2, "max_position_embeddings": 8, "projection_dim": 16, "bos_token_id": 0}
TEXT |= {"eos_token_id": 1}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
VISION |= {"image_size": 8, "patch_size": 4}
TARGETS = ["q_proj", "v_proj", "fc2"]


def clip_text() -> hf.PreTrainedModel:
    return hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT))


def clip_vision() -> hf.PreTrainedModel:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION))


def llava(vision: Callable[..., Any] = hf.CLIPVisionConfig) -> hf.PreTrainedModel:
    text = hf.LlamaConfig(**WIDTHS, num_hidden_layers=1)
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision(**VISION), text_config=text, image_token_index=3)
    )


# a model whose modules have lost a prefix, and what stood in front of them before
TOWERS: dict[str, tuple[Callable[[], hf.PreTrainedModel], list[tuple[str, str]]]] = {
    "CLIPTextModel": (clip_text, [("", "text_model.")]),
    "CLIPVisionModel": (clip_vision, [("", "vision_model.")]),
    "SiglipTextModel": (lambda: hf.SiglipTextModel(hf.SiglipTextConfig(**TEXT)), [("", "text_model.")]),
    "SiglipVisionModel": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)), [("", "vision_model.")]),
    "LLaVA": (
        llava,
        [
            ("model.vision_tower.", "model.vision_tower.vision_model."),
            ("model.vision_tower.", "vision_tower.vision_model."),
        ],
    ),
}
NEW = not any(name.startswith("text_model.") for name, _ in clip_text().named_modules())
pytestmark = [pytestmark, pytest.mark.skipif(not NEW, reason="transformers before 5.6 has the old names")]


def adapted(base: nn.Module, folder: Path, seed: int, front: tuple[str, str] = ("", ""), **settings: Any) -> Path:
    """Save an adapter of PEFT's, its modules' names beginning as in an older release."""
    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS, **settings})
    randomised(peft.get_peft_model(deepcopy(base), config)).save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    new, old = (f"base_model.model.{part}" for part in front)
    save_file({name.replace(new, old, 1): tensor for name, tensor in load_file(path).items()}, path)
    return folder


def make(build: Callable[[], hf.PreTrainedModel]) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return build().eval()


@pytest.mark.parametrize("name", TOWERS)
def test_every_older_name_leads_to_a_module_of_the_model(name: str) -> None:
    build, fronts = TOWERS[name]
    model = make(build)
    for path, layer in model.named_modules():
        for new, old in fronts:
            if path.startswith((f"{new}encoder.", f"{new}embeddings.")) and isinstance(
                layer, (nn.Linear, nn.Embedding)
            ):
                before = old + path.removeprefix(new)
                assert path in newer_names(before)
                assert before in older_names(path)


@pytest.mark.parametrize("name", TOWERS)
def test_adapters_of_every_release_meet_under_the_newest_names(name: str, tmp_path: Path) -> None:
    """The mean of all orders of old and new, against W′ − W by PEFT of the same adapters under the new names."""
    build, fronts = TOWERS[name]
    base = make(build)
    (tower, _), *_ = fronts
    regex = rf"{re.escape(tower)}encoder\..*({'|'.join(TARGETS)})"
    named = [("", ""), *fronts, fronts[-1]]
    now, then = [], []
    for place, front in enumerate(named):
        now.append(adapted(base, tmp_path / f"now{place}", place, target_modules=regex))
        then.append(adapted(base, tmp_path / f"then{place}", place, front, target_modules=regex))
    before = {key: tensor.double() for key, tensor in base.state_dict().items()}
    wanted = {key: torch.zeros_like(tensor) for key, tensor in before.items()}
    for folder in now:
        for key, tensor in merged_weights(base, folder).items():
            wanted[key] += (tensor - before[key]) / len(now)
    for order in itertools.permutations(then):
        merged = ties_peft.merge(list(order), "average", rank="max")
        assert list(merged.modules) == list(ties_peft.Adapter.load(now[0]).modules)
        assert sum("older versions of transformers" in text for text in merged.report.warnings) == len(fronts) + 1
    merged.save(tmp_path / "out")
    found = merged_weights(base, tmp_path / "out")
    changed = 0
    for key, change in wanted.items():
        assert torch.dist(found[key] - before[key], change) <= 1e-5 * max(1, float(change.norm())), key
        changed += bool(change.any())
    assert changed == len(merged.modules)


def test_modules_of_the_old_adapters_alone_follow(tmp_path: Path) -> None:
    """What no new adapter has is written under the new name too, also through an adapter in between."""
    base, front = make(clip_text), ("", "text_model.")
    sets = [(["q_proj"], front), (["q_proj", "v_proj"], front), (["v_proj"], ("", ""))]
    given = [
        adapted(base, tmp_path / str(place), place, own, target_modules=targets)
        for place, (targets, own) in enumerate(sets)
    ]
    for order in itertools.permutations(given):
        merged = ties_peft.merge(list(order), "average")
        assert all(name.startswith("encoder.") for name in merged.modules)
        assert len(merged.modules) == 4


def test_a_name_that_others_must_keep_is_kept_by_all() -> None:
    """The second cannot go with the third, whose module is of another form; so the first stays with it."""
    layouts: Sequence[dict[str, object]] = [
        {"text_model.encoder.a": 1},
        {"text_model.encoder.a": 1, "text_model.encoder.b": 2},
        {"encoder.a": 1, "encoder.b": 3},
    ]
    assert match_names(layouts) == [{}, {}, {}]
    assert match_names([layouts[0], layouts[2]]) == [{"text_model.encoder.a": "encoder.a"}, {}]
    both = {"text_model.encoder.a": 1, "vision_model.encoder.a": 1}
    assert match_names([both, {"encoder.a": 1}]) == [{}, {}]


def test_old_names_alone_are_kept_and_said(tmp_path: Path) -> None:
    """They are those of CLIPTextModelWithProjection in every release."""
    base = make(clip_text)
    given = [adapted(base, tmp_path / str(seed), seed, ("", "text_model.")) for seed in range(2)]
    merged = ties_peft.merge(given, "average", rank="max")
    assert all(name.startswith("text_model.encoder.") for name in merged.modules)
    [told] = [text for text in merged.report.warnings if "text_model." in text]
    assert "CLIPTextModelWithProjection" in told and "5.6" in told and "--modules" in told
    merged.save(tmp_path / "out")
    other = make(lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT)))
    with torch.no_grad():
        plain = other(input_ids=TOKENS).text_embeds
        moved = peft.PeftModel.from_pretrained(deepcopy(other), tmp_path / "out")(input_ids=TOKENS).text_embeds
    assert (moved - plain).abs().max() > 1e-2


def test_a_base_whose_class_has_the_prefix_needs_no_word(tmp_path: Path) -> None:
    base = make(lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**TEXT)))
    base.save_pretrained(tmp_path / "base")
    given = adapted(base, tmp_path / "a", 0)
    merged = ties_peft.merge([given], base=tmp_path / "base")
    assert not [text for text in merged.report.warnings if "text_model." in text]
    model = peft.PeftModel.from_pretrained(deepcopy(base), given, adapter_name="a")
    live = ties_peft.add_merged_adapter(model, ["a"], "again")
    assert not [text for text in live.report.warnings if "text_model." in text]


def test_both_encoders_of_one_model_are_no_older_names(tmp_path: Path) -> None:
    text, vision = hf.CLIPTextConfig(**TEXT), hf.CLIPVisionConfig(**VISION)
    both = make(lambda: hf.CLIPModel(hf.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())))
    given = adapted(both, tmp_path / "both", 0)
    assert not [text for text in ties_peft.merge([given]).report.warnings if "text_model." in text]
    with pytest.raises(CompatibilityError, match="no module in common"):
        ties_peft.merge([given, adapted(make(clip_text), tmp_path / "text", 1)])
    both.save_pretrained(tmp_path / "base")
    base = BaseModel.load(tmp_path / "base")
    assert base.find("encoder.layers.0.self_attn.q_proj.weight") is None, "it may be either encoder's"
    assert base.find("text_model.encoder.layers.0.self_attn.q_proj.weight") is not None


@pytest.mark.parametrize("dora", [False, True])
def test_a_base_without_the_prefix_decides(dora: bool, tmp_path: Path) -> None:
    """`convert` and `merge` with --base: the result has the base's names, loads, and computes what the adapter does."""
    base = make(clip_text)
    base.save_pretrained(tmp_path / "base")
    assert "encoder.layers.0.mlp.fc2" in BaseModel.load(tmp_path / "base").modules
    now = adapted(base, tmp_path / "now", 0, use_dora=dora)
    then = adapted(base, tmp_path / "then", 0, ("", "text_model."), use_dora=dora)
    ties_peft.merge([then, then], "average", base=tmp_path / "base", rank="max").save(tmp_path / "merged")
    made = ties_peft.convert(then, base=tmp_path / "base")
    assert any("of the base ('encoder." in text for text in made.report.warnings)
    made.save(tmp_path / "made")
    assert_same_effect(base, now, tmp_path / "merged", tmp_path / "made")


def assert_same_effect(base: nn.Module, wanted: Path, *folders: Path) -> None:
    with torch.no_grad():
        plain = base(input_ids=TOKENS).last_hidden_state
        expected = peft.PeftModel.from_pretrained(deepcopy(base), wanted).eval()(input_ids=TOKENS).last_hidden_state
        assert (expected - plain).abs().max() > 1e-2
        for folder in folders:
            found = peft.PeftModel.from_pretrained(deepcopy(base), folder).eval()(input_ids=TOKENS).last_hidden_state
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_convert_writes_the_names_that_are_listed(tmp_path: Path) -> None:
    base = make(clip_text)
    now, then = adapted(base, tmp_path / "now", 0), adapted(base, tmp_path / "then", 0, ("", "text_model."))
    listed = tmp_path / "names.txt"
    listed.write_text("\n".join(name for name, _ in base.named_modules()))
    made = ties_peft.convert(then, modules=listed)
    assert any("'text_model.encoder." in text and "as 'encoder." in text for text in made.report.warnings)
    assert not any("5.6" in text for text in made.report.warnings)
    made.save(tmp_path / "made")
    assert_same_effect(base, now, tmp_path / "made")
    listed.write_text("\n".join(f"text_model.{name}" for name, _ in base.named_modules()))
    back = ties_peft.convert(now, modules=listed)
    assert list(back.modules) == list(ties_peft.Adapter.load(then).modules)
    listed.write_text("other.q_proj\n")
    with pytest.raises(AdapterError, match="are not in the base"):
        ties_peft.convert(then, modules=listed)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("known", ["base", "modules"])
def test_a_file_of_older_names_is_converted_to_those_of_the_base(form: str, known: str, tmp_path: Path) -> None:
    base = make(clip_text)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "names.txt").write_text("\n".join(name for name, _ in base.named_modules()))
    now = adapted(base, tmp_path / "now", 0, lora_alpha=3)  # a scaling of 1, as of files that say none
    tensors = {}
    for key, tensor in load_file(now / "adapter_model.safetensors").items():
        module, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        if form == "kohya":
            end = {"lora_A": "lora_down", "lora_B": "lora_up"}[side]
            tensors[f"lora_te_text_model_{module.replace('.', '_')}.{end}.weight"] = tensor
        else:
            tensors[f"text_encoder.text_model.{module}.{side}.weight"] = tensor
    (tmp_path / "file").mkdir()
    save_file(tensors, tmp_path / "file" / "lora.safetensors")
    given = {"base": tmp_path / "base"} if known == "base" else {"modules": tmp_path / "names.txt"}
    made = ties_peft.convert(tmp_path / "file" / "lora.safetensors", **given)
    assert any("written under the base's names" in text for text in made.report.warnings)
    made.save(tmp_path / "made")
    assert_same_effect(base, now, tmp_path / "made")


def test_newer_names_than_the_checkpoint_stay(tmp_path: Path) -> None:
    """A checkpoint keeps old names, so it does not tell the model's: those of the file are newer, and written."""
    base = make(clip_text)
    old = tmp_path / "old.safetensors"
    save_file({f"text_model.{name}": tensor.clone() for name, tensor in base.state_dict().items()}, old)
    now = adapted(base, tmp_path / "now", 0, lora_alpha=3)
    names = load_file(now / "adapter_model.safetensors")
    (tmp_path / "file").mkdir()
    file = tmp_path / "file" / "lora.safetensors"
    save_file({f"text_encoder.{name.removeprefix('base_model.model.')}": t for name, t in names.items()}, file)
    made = ties_peft.convert(file, base=old)
    assert list(made.modules) == list(ties_peft.Adapter.load(now).modules)
    merged = ties_peft.merge([now], base=old)
    assert merged.modules == made.modules
