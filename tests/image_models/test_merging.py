"""Merges of files of image models without diffusers: parts, weights, names, what is refused, what the files say of themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.run_command import run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ties_peft
from ties_peft import Adapter, AdapterError, CompatibilityError
from ties_peft.adapters.image_models import SDXL, find_layers, layers_of

Tensors = dict[str, torch.Tensor]
UNET = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 6), "mid_block.attentions.0.proj_in": (6, 8)}
TEXT = {"text_model.encoder.layers.0.self_attn.q_proj": (5, 7), "text_model.encoder.layers.0.mlp.fc1": (9, 7)}
FLUX = {"transformer_blocks.0.attn.to_q": (8, 8), "single_transformer_blocks.3.attn.to_v": (8, 8)}
PARTS = {"lora_unet_": UNET, "lora_te_": TEXT}


def kohya(seed: int, gain: float = 1.0, rank: int = 2, alpha: float = 1.0, parts: Any = None) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for prefix, modules in (PARTS if parts is None else parts).items():
        for module, (out, width) in modules.items():
            name = prefix + module.replace(".", "_")
            found[f"{name}.lora_down.weight"] = torch.randn(rank, width, generator=draw)
            found[f"{name}.lora_up.weight"] = gain * torch.randn(out, rank, generator=draw)
            found[f"{name}.alpha"] = torch.tensor(alpha)
    return found


def deltas(tensors: Tensors) -> dict[str, np.ndarray]:
    """By kohya's names, in float64."""
    found = {}
    for key in tensors:
        name, _, end = key.partition(".")
        if end == "alpha":
            A, B = (tensors[f"{name}.lora_{side}.weight"].double().flatten(1).numpy() for side in ("down", "up"))
            found[name] = float(tensors[key]) / A.shape[0] * B @ A
    return found


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)
    return path


def test_parts_have_weights_of_their_own(tmp_path: Path) -> None:
    one, two = kohya(1), kohya(2)
    paths = [write(tmp_path / "a.safetensors", one), write(tmp_path / "b.safetensors", two)]
    command = ("merge", *paths, "--method", "task_arithmetic", "--scale", "1", "--rank", "max", "--target", "kohya")
    done = run(*command, "--weights", "1,-2", "--weights-for", "text_encoder=0.5,3", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    found, first, second = (deltas(each) for each in (load_file(tmp_path / "out/lora.safetensors"), one, two))
    assert found.keys() == first.keys()
    for name, value in found.items():
        a, b = (0.5, 3) if name.startswith("lora_te_") else (1, -2)
        assert np.abs(value - (a * first[name] + b * second[name])).max() < 1e-4
    none = run(*command, "--weights-for", "text_encoder=0", "--out", tmp_path / "none")
    assert none.code == 0, none.err
    kept = load_file(tmp_path / "none/lora.safetensors")
    assert kept and all(key.startswith("lora_unet_") for key in kept)
    assert "expected one number" in run(*command, "--weights-for", "text_encoder=1,2,3", "--out", tmp_path / "x").err
    assert "--weights-for" in run(*command, "--weights", "norm", "--weights-for", "unet=1", "--out", tmp_path / "x").err


def test_scope_adapter_ranks_each_part_by_itself(tmp_path: Path) -> None:
    """A text encoder a thousand times smaller keeps its own share of entries, as if it were merged alone."""
    small = {
        key: tensor * (1e-3 if key.startswith("lora_te_") and "up" in key else 1) for key, tensor in kohya(1).items()
    }
    both = write(tmp_path / "both.safetensors", small)
    alone = write(tmp_path / "te.safetensors", {key: one for key, one in small.items() if key.startswith("lora_te_")})
    whole = ties_peft.merge([both], "ties", density=0.3, rank="max")
    part = ties_peft.merge([alone], "ties", density=0.3, rank="max")
    assert part.modules == tuple(f"text_encoder.{name}" for name in sorted(TEXT))
    for name in part.modules:
        assert part.delta(name).abs().max() > 0
        assert torch.allclose(whole.delta(name), part.delta(name), atol=1e-9)


def test_files_of_three_formats_and_a_peft_adapter_are_merged_together(tmp_path: Path) -> None:
    tensors = kohya(1)
    first = write(tmp_path / "kohya.safetensors", tensors)
    second = ties_peft.convert(first, target="diffusers").save(tmp_path / "diffusers")
    third = ties_peft.convert(first, part="unet").save(tmp_path / "peft")
    comfy = {}
    for module in UNET:
        name = f"lora_unet_{module.replace('.', '_')}"
        comfy[f"diffusion_model.{module}.lora_A.weight"] = tensors[f"{name}.lora_down.weight"]
        comfy[f"diffusion_model.{module}.lora_B.weight"] = tensors[f"{name}.lora_up.weight"]
        comfy[f"diffusion_model.{module}.alpha"] = tensors[f"{name}.alpha"]
    fourth = write(tmp_path / "comfy.safetensors", comfy)
    merged = ties_peft.merge([first, second, third, fourth], method="task_arithmetic", scale=1, rank="max")
    expected = deltas(tensors)
    for prefix, modules in PARTS.items():
        times = 4 if prefix == "lora_unet_" else 2
        part = "unet" if times == 4 else "text_encoder"
        for module in modules:
            value = times * expected[prefix + module.replace(".", "_")]
            assert np.abs(merged.delta(f"{part}.{module}").numpy() - value).max() < 1e-4
    assert any("written for diffusers" in one for one in merged.report.warnings)


def test_a_pattern_stands_for_all_files(tmp_path: Path) -> None:
    for seed in range(3):
        write(tmp_path / f"loras/{seed}.safetensors", kohya(seed))
    done = run("merge", str(tmp_path / "loras/*.safetensors"), "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["report"]["adapters"]) == 3
    several = run("merge", tmp_path / "loras", "--out", tmp_path / "no")
    assert several.code == 2 and "3 files of weights: 0.safetensors, 1.safetensors" in several.err


def test_flux_layers_made_of_separate_loras_come_back(tmp_path: Path) -> None:
    """Queries, keys and values with an A of their own become one layer of blocks, and are taken apart again."""
    draw = torch.Generator().manual_seed(1)
    layers = [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_v",
        "single_transformer_blocks.0.attn.to_k",
    ]
    layers += ["single_transformer_blocks.0.proj_mlp"]
    tensors = {}
    for rank, layer in zip((2, 3, 2, 2), layers, strict=True):
        tensors[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, 8, generator=draw)
        tensors[f"transformer.{layer}.lora_B.weight"] = torch.randn(32 if "mlp" in layer else 8, rank, generator=draw)
        tensors[f"transformer.{layer}.alpha"] = torch.tensor(float(rank))
    path = write(tmp_path / "a/pytorch_lora_weights.safetensors", tensors)
    there = ties_peft.convert(path, target="kohya").save(tmp_path / "there")
    names = {key.partition(".")[0] for key in load_file(there / "lora.safetensors")}
    assert names == {"lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1"}
    back = ties_peft.convert(there, target="diffusers").save(tmp_path / "back")
    found = load_file(back / "pytorch_lora_weights.safetensors")
    assert {key for key in tensors if "lora" in key} == found.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in found)


REFUSED = {
    "vllm": (PARTS, "vllm", "image model"),
    "peft": (PARTS, "peft", "text_encoder, unet.*--target diffusers"),
    "T5 of Flux": (
        {
            "lora_unet_": {"single_blocks.0.linear2": (8, 40)},
            "lora_te3_": {"encoder.block.0.layer.0.SelfAttention.q": (8, 8)},
        },
        "diffusers",
        "text_encoder_2.*Flux.*--weights-for text_encoder_2=0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_target_cannot_hold_is_refused(tmp_path: Path, case: str) -> None:
    parts, target, words = REFUSED[case]
    path = write(tmp_path / "a.safetensors", kohya(1, parts=parts))
    with pytest.raises(CompatibilityError, match=words):
        ties_peft.merge([path], target=target)


def test_a_model_without_known_names_keeps_them(tmp_path: Path) -> None:
    """In ComfyUI's names, and under kohya's with a base in one file; diffusers is refused, as it has names of its own."""
    modules = {"blocks.0.self_attn.q": (8, 8), "blocks.0.ffn.0": (16, 8)}
    native = {f"model.diffusion_model.{name}.weight": torch.zeros(shape) for name, shape in modules.items()}
    base = write(tmp_path / "base.safetensors", native)
    path = write(tmp_path / "a.safetensors", kohya(1, parts={"lora_unet_": modules}))
    with pytest.raises(AdapterError, match=r"underscores for dots.*--base"):
        Adapter.load(path)
    assert Adapter.load(path, base=base).modules == tuple(f"diffusion_model.{name}" for name in sorted(modules))
    with pytest.raises(CompatibilityError, match=r"--target kohya"):
        ties_peft.merge([path], base=base)
    merged = ties_peft.merge([path], "ties", base=base, target="kohya", density=1.0).save(tmp_path / "out")
    assert deltas(load_file(merged / "lora.safetensors")).keys() == deltas(load_file(path)).keys()


def test_what_files_say_of_their_training(tmp_path: Path) -> None:
    noted = {
        "ss_tag_frequency": json.dumps({"10_ink": {"ink": 9, "a\u001b[31mred": 4}}),
        "modelspec.trigger_phrase": "inkstyle | `x`",
        "ss_base_model_version": "sd_v1",
    }
    first = write(tmp_path / "a.safetensors", kohya(1), noted)
    second = write(tmp_path / "b.safetensors", kohya(2), noted | {"modelspec.trigger_phrase": "paper"})
    seen = run("inspect", first, second)
    assert "trigger words: inkstyle" in seen.out and "\u001b[31m" not in seen.out and seen.code == 0
    (shown, _) = json.loads(run("inspect", first, second, "--json").out)["adapters"]
    assert (shown["model"], shown["parts"]) == ("Stable Diffusion", ["text_encoder", "unet"])
    assert shown["training"]["trigger words"] == noted["modelspec.trigger_phrase"]
    out = ties_peft.merge([first, second], target="kohya").save(tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "trigger words: `` inkstyle | `x` ``" in card and "paper" in card and "\u001b" not in card
    assert "library_name: diffusers" in card and str(tmp_path) not in card
    with safe_open(out / "lora.safetensors", "pt") as file:
        written = file.metadata()
    assert written["ss_base_model_version"] == "sd_v1"
    assert written["modelspec.trigger_phrase"] == "inkstyle | `x`, paper"


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(tmp_path: Path, alpha: float) -> None:
    with pytest.raises(AdapterError, match="alpha is"):
        Adapter.load(write(tmp_path / "a.safetensors", kohya(1, alpha=alpha)))


def test_a_file_is_not_saved_as_a_folder_of_peft(tmp_path: Path) -> None:
    adapter = Adapter.load(write(tmp_path / "a.safetensors", kohya(1)))
    with pytest.raises(CompatibilityError, match=r"text_encoder, unet.*target='diffusers'"):
        adapter.save(tmp_path / "out")


def lycoris(kind: str) -> tuple[Tensors, np.ndarray, torch.Tensor]:
    """(the tensors of one module, its delta by the definition in float64, the base's weight)."""
    draw = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    weight = noise(8, 6)
    if kind == "LoHa":
        own = {"hada_w1_a": noise(8, 2), "hada_w1_b": noise(2, 6), "hada_w2_a": noise(8, 2), "hada_w2_b": noise(2, 6)}
        a, b, c, d = (one.double().numpy() for one in own.values())
        delta = 1.5 * (a @ b) * (c @ d)
    elif kind == "LoKr":
        own = {"lokr_w1": noise(2, 3), "lokr_w2_a": noise(4, 2), "lokr_w2_b": noise(2, 2)}
        a, b, c = (one.double().numpy() for one in own.values())
        delta = 1.5 * np.kron(a, b @ c)
    elif kind == "LoKr of whole matrices":
        own = {"lokr_w1": noise(2, 3), "lokr_w2": noise(4, 2)}
        delta = np.kron(*(one.double().numpy() for one in own.values()))
    else:
        own = {"lora_down.weight": noise(2, 6), "lora_up.weight": noise(8, 2), "dora_scale": noise(8, 1).abs() + 1}
        a, b, magnitude = (one.double().numpy() for one in own.values())
        moved = weight.double().numpy() + 1.5 * b @ a
        delta = magnitude * moved / np.linalg.norm(moved, axis=1, keepdims=True) - weight.double().numpy()
    return {**own, "alpha": torch.tensor(3.0)}, delta, weight


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr of whole matrices", "DoRA"])
def test_lycoris_types_that_peft_has_are_read(tmp_path: Path, kind: str) -> None:
    module = next(iter(UNET))
    own, delta, weight = lycoris(kind)
    tensors = {f"lora_unet_{module.replace('.', '_')}.{end}": tensor for end, tensor in own.items()}
    path = write(tmp_path / "a.safetensors", tensors)
    pipeline = tmp_path / "base"
    write(pipeline / "unet/diffusion_pytorch_model.safetensors", {f"{module}.weight": weight})
    (pipeline / "model_index.json").write_text("{}")
    base = pipeline if kind == "DoRA" else None
    if base:
        with pytest.raises(AdapterError, match=r"DoRA.*--base"):
            Adapter.load(path)
    merged = ties_peft.merge([path], "ties", base=base, density=1.0, rank="max", target="kohya")
    assert merged.modules == (f"unet.{module}",)
    assert np.abs(merged.delta(merged.modules[0]).double().numpy() - delta).max() < 1e-5 * np.abs(delta).max() + 1e-5
    (found,) = deltas(load_file(merged.save(tmp_path / "out") / "lora.safetensors")).values()
    assert np.abs(found - delta).max() < 1e-4


def test_lycoris_types_that_cannot_be_held_are_refused(tmp_path: Path) -> None:
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    fused = {f"{module}.lokr_w1": torch.ones(6, 2), f"{module}.lokr_w2": torch.ones(4, 4)}
    with pytest.raises(AdapterError, match=r"a LoKr of a layer that diffusers holds as .*to_q.*Leave it out"):
        Adapter.load(write(tmp_path / "a.safetensors", fused))
    mixed = kohya(1) | {"lora_unet_mid_block_attentions_0_proj_out.lokr_w1": torch.ones(2, 2)}
    with pytest.raises(AdapterError, match=r"LoKr, LoRA.*Leave it out"):
        Adapter.load(write(tmp_path / "b.safetensors", mixed))
    by_input = {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.ones(1, 8)}
    one = {key: tensor for key, tensor in kohya(1).items() if "proj_in" in key}
    with pytest.raises(AdapterError, match=r"dora_scale is \[1, 8\], expected \[6, 1\]"):
        Adapter.load(write(tmp_path / "c.safetensors", one | by_input))
    small = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)}
    loha = {f"lora_unet_mid_block_attentions_0_proj_in.{end}": torch.ones(shape) for end, shape in small.items()}
    with pytest.raises(AdapterError, match="only the base tells"):
        Adapter.load(write(tmp_path / "d.safetensors", loha))


def test_dry_run_names_model_and_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya(1))
    plan = json.loads(run("merge", path, "--target", "kohya", "--dry-run", "--json").out)["plan"]
    assert (plan["target"], plan["model"], plan["parts"]) == ("kohya", "Stable Diffusion", ["text_encoder", "unet"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_dtype_is_as_asked(tmp_path: Path, dtype: str) -> None:
    path = write(tmp_path / "a.safetensors", kohya(1))
    for target, name in (("kohya", "lora"), ("diffusers", "pytorch_lora_weights")):
        out = ties_peft.merge([path], target=target, dtype=dtype, rank=2).save(tmp_path / target)
        tensors = load_file(out / f"{name}.safetensors")
        assert {str(one.dtype) for key, one in tensors.items() if "alpha" not in key} == {f"torch.{dtype}"}
        if target == "kohya":
            assert all(float(one) == 2 for key, one in tensors.items() if key.endswith(".alpha"))


@pytest.mark.parametrize(
    ("module", "kohyas"),
    [
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("up_blocks.2.resnets.2.time_emb_proj", "output_blocks.8.0.emb_layers.1"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("down_blocks.0.resnets.2.conv1", None),  # a level has two layers on the way down
        ("mid_block.attentions.1.proj_in", None),
        ("up_blocks.0.downsamplers.0.conv", None),
    ],
)
def test_a_module_of_sdxl_has_the_name_of_the_ldm_code_or_none(module: str, kohyas: str | None) -> None:
    found = layers_of(SDXL, {module: (8, 8)})
    assert (None if found is None else [layer.name for layer in found]) == (None if kohyas is None else [kohyas])
    if kohyas is not None:
        for name, joined in ((kohyas, False), (kohyas.replace(".", "_"), True)):
            known = find_layers({name: (8, 8)}, joined)
            assert known is not None and known[1][name].modules == (module,)
