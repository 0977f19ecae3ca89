"""Refusals that know what was meant: each names the way out, by Python and by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.run_command import run
from safetensors.torch import load_file, save_file
from sampling import covering

import ties_peft
from ties_peft import Recipe, TiesPeftError, TiesPeftWarning
from ties_peft.merging.recipes.mergekit import METHODS
from ties_peft.methods import method_classes
from ties_peft.methods.aliases import COMBINATION_TYPES, MERGEKIT, PARAMETERS

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of_python(call: Callable[[], Any]) -> str:
    with pytest.raises(TiesPeftError) as caught:
        call()
    return str(caught.value)


def of_command(*arguments: object) -> str:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, ""), outcome
    return outcome.err


def hint(message: str) -> str:
    """The part of a message that is about this case: the list of all known names proves nothing."""
    return message.partition("Known:")[0]


# What was asked: arguments in Python, flags, and the words that bear the meaning

WITH_DENSITY = ("ties", "dare", "breadcrumbs", "della")
ASKED: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]] = {
    "PEFT's and mergekit's linear": (
        {"method": "linear"},
        ("--method", "linear"),
        ("PEFT", "task_arithmetic", "mergekit", "average"),
    ),
    "dare_linear": ({"method": "dare_linear"}, ("--method", "dare_linear"), ("dare", "factors")),
    "PEFT's svd": ({"method": "svd"}, ("--method", "svd"), ("PEFT", "task_arithmetic")),
    "PEFT's ties_svd": ({"method": "ties_svd"}, ("--method", "ties_svd"), ("PEFT", "is ties")),
    "mergekit's nuslerp": ({"method": "nuslerp"}, ("--method", "nuslerp"), ("mergekit", "is slerp")),
    "a stage of PEFT's": ({"method": "dare_linear+ties"}, ("--method", "dare_linear+ties"), ("PEFT", "is dare")),
    "a space as method": ({"method": "knots"}, ("--method", "knots"), ("is a space", "--space knots", 'space="knots"')),
    "a method as space": ({"space": "ties"}, ("--space", "ties"), ("is a method", "--method ties", 'method="ties"')),
    "density in percent": ({"density": 20}, ("--density", "20"), ("Did you mean 0.2?",)),
    "density in percent, of another": (
        {"method": "dare", "density": 50},
        ("--method", "dare", "--density", "50"),
        ("Did you mean 0.5?",),
    ),
    "another share in percent": (
        {"method": "boosting", "beta": 5},
        ("--method", "boosting", "--set", "beta=5"),
        ("Did you mean 0.05?",),
    ),
    "density of a sum": (
        {"method": "task_arithmetic", "density": 0.2},
        ("--method", "task_arithmetic", "--density", "0.2"),
        ("task_arithmetic", "density", *WITH_DENSITY),
    ),
    "a parameter of another space": ({"balanced": True}, ("--set", "balanced=true"), ("balanced", "space core")),
    "lam": ({"lam": 0.5}, ("--set", "lam=0.5"), ("lam", "is scale here", "--scale", "scale=")),
    "lambda": ({"lambda": 0.5}, ("--set", "lambda=0.5"), ("lambda", "is scale here", "--scale", "scale=")),
    "PEFT's svd_rank": ({"svd_rank": 8}, ("--set", "svd_rank=8"), ("is rank here", "--rank", "rank=")),
    "PEFT's election": (
        {"majority_sign_method": "total"},
        ("--set", "majority_sign_method=total"),
        ("is elect here",),
    ),
    "an argument as parameter": ({}, ("--set", "restore_norm=true"), ("--restore-norm", "restore_norm=")),
}


BOTH = [(name, by) for name, (asked, *_) in ASKED.items() for by in ("python", "command") if asked or by == "command"]


@pytest.mark.parametrize(("name", "by"), covering(BOTH, lambda case: case))
def test_what_was_asked(make_lora: Make, name: str, by: str) -> None:
    asked, flags, words = ASKED[name]
    names = [make_lora("a").name, make_lora("b", seed=1).name]
    if by == "python":
        message = of_python(lambda: ties_peft.merge(names, **asked))
    else:
        message = of_command("merge", *names, *flags, "--out", "out")
    for word in words:
        assert word in hint(message), message


def test_a_share_just_above_1_is_not_taken_for_percent(make_lora: Make) -> None:
    names = [make_lora("a").name]
    assert "id you mean" not in of_python(lambda: ties_peft.merge(names, density=1.5))


def test_every_alias_is_one() -> None:
    """An alias is no name of ours and leads to one; PEFT's names are those of `add_merged_adapter`, mergekit's its own."""
    ours = set(method_classes())
    fields = {field for cls in method_classes().values() for field in cls.model_fields}
    assert not set(MERGEKIT) & ours and set(MERGEKIT.values()) <= ours
    assert {name: rule.method for name, rule in METHODS.items() if name not in ours} == MERGEKIT
    assert {meaning.method for meaning in COMBINATION_TYPES.values()} <= ours
    assert not set(PARAMETERS) & fields
    assert set(PARAMETERS.values()) <= fields | {"scale", "rank", "weights", "method"}


# Recipes: the text, the line that is named, and the words

RECIPES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "density at the top": ("adapters: [a]\ndensity: 0.2", 2, ("belongs under `parameters:`",)),
    "scale at the top": ("adapters: [a]\nscale: 0.5", 2, ("belongs under `parameters:`",)),
    "mergekit's lambda at the top": ("adapters: [a]\nlambda: 0.5", 2, ("belongs under `parameters:`",)),
    "another method's parameter at the top": ("adapters: [a]\nepsilon: 0.1", 2, ("belongs under `parameters:`",)),
    "a space's parameter at the top": ("adapters: [a]\nbalanced: true", 2, ("belongs under `parameters:`",)),
    "weight at the top": ("adapters: [a]\nweight: 0.5", 2, ("belongs under `parameters:` of an adapter",)),
    "weight beside the adapter": (
        "adapters:\n- adapter: a\n  weight: 0.5",
        3,
        ("belongs under `parameters:` of this adapter",),
    ),
    "density beside the adapter": ("adapters:\n- adapter: a\n  density: 0.5", 3, ("belongs under `parameters:`",)),
    "scale of one adapter": (
        "adapters:\n- adapter: a\n  parameters: {scale: 0.5}",
        3,
        ("belongs under `parameters:` at the top",),
    ),
    "dtype under parameters": ("adapters: [a]\nparameters:\n  dtype: float16", 3, ("dtype", "belongs at the top")),
    "method under parameters": (
        "adapters: [a]\nparameters:\n  merge_method: ties",
        3,
        ("merge_method", "belongs at the top"),
    ),
    "PEFT's name in a recipe of ours": ("merge_method: dare_linear\nadapters: [a]", 1, ("PEFT", "is dare", "factors")),
    "lam under parameters": ("adapters: [a]\nparameters:\n  lam: 0.5", 3, ("is scale here",)),
    "percent": ("adapters: [a]\nparameters:\n  density: 20", 3, ("Did you mean 0.2?",)),
    "layers of models": ("slices:\n- sources: []\nmerge_method: slerp", 1, ("full models",)),
}


@pytest.mark.parametrize(("by", "name"), covering(product(["python", "command"], RECIPES), lambda case: case))
def test_recipes(make_lora: Make, here: Path, name: str, by: str) -> None:
    text, line, words = RECIPES[name]
    make_lora("a")
    (here / "my.yaml").write_text(text)
    if by == "python":
        message = of_python(lambda: Recipe.from_file("my.yaml"))
    else:
        message = of_command("merge", "--recipe", "my.yaml", "--out", "out")
    assert f"my.yaml, line {line}: " in message
    for word in words:
        assert word in hint(message), message


# Files that are no adapters


def full_model(folder: Path, **files: bytes) -> Path:
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.ones(2, 3)}, folder / "model.safetensors")
    return folder


def pipeline(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


def gguf(folder: Path) -> Path:
    folder.mkdir()
    (folder / "lora-q8_0.gguf").write_bytes(b"GGUF")
    return folder


def foreign(
    tensors: dict[str, tuple[int, ...]], config: Any = None, name: str = "x.safetensors"
) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        folder.mkdir()
        save_file({key: torch.ones(shape) for key, shape in tensors.items()}, folder / name)
        if config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


KOHYA = {"lora_unet_a_to_q.lora_down.weight": (2, 4), "lora_unet_a_to_q.lora_up.weight": (4, 2)}
MLX = {"model.layers.0.q_proj.lora_a": (4, 2), "model.layers.0.q_proj.lora_b": (2, 4)}
DORA = {"fine_tune_type": "dora", "lora_parameters": {"rank": 2, "scale": 1.0}}
FILES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "a full model": (full_model, ("full model", "LlamaForCausalLM", "mergekit")),
    "a full model's file": (lambda at: full_model(at) / "model.safetensors", ("full model", "LlamaForCausalLM")),
    "a pipeline": (pipeline, ("full model", "StableDiffusionPipeline")),
    "GGUF": (lambda at: gguf(at) / "lora-q8_0.gguf", ("GGUF", "cannot be read")),
    "a folder of GGUF": (gguf, ("GGUF", "cannot be read")),
    "GGUF of the Hub": (lambda at: Path("org/name:lora.gguf"), ("GGUF", "cannot be read")),
    "LyCORIS LoKr, with dots": (foreign({"diffusion_model.a.to_q.lokr_w1": (2, 2)}), ("LyCORIS", "LoKr")),
    "LyCORIS Tucker": (foreign({**KOHYA, "lora_unet_a_to_q.lora_mid.weight": (2, 2)}), ("LyCORIS", "LoCon")),
    "MLX DoRA": (
        foreign({**MLX, "model.layers.0.q_proj.m": (4,)}, DORA, "adapters.safetensors"),
        ("MLX-LM", "DoRA"),
    ),
    "MLX DoRA by its config": (foreign(MLX, DORA, "adapters.safetensors"), ("MLX-LM", "DoRA")),
    "MLX DoRA by its tensors": (foreign({**MLX, "model.layers.0.q_proj.m": (4,)}), ("MLX-LM", "DoRA")),
    "MLX in full": (
        foreign({"model.layers.0.q_proj.weight": (4, 4)}, {"fine_tune_type": "full"}, "adapters.safetensors"),
        ("MLX-LM", "full", "no adapter"),
    ),
}


@pytest.mark.parametrize(
    ("by", "name"), covering(product(["load", "convert", "merge", "inspect"], FILES), lambda case: case)
)
def test_files(here: Path, name: str, by: str) -> None:
    make, words = FILES[name]
    path = str(
        make(here / "x").relative_to(here) if "org" not in str(make) and name != "GGUF of the Hub" else make(here)
    )
    if by == "load":
        message = of_python(lambda: ties_peft.Adapter.load(path))
    elif by == "inspect":
        outcome = run("inspect", path)
        assert outcome.code == 2
        message = outcome.err
    else:
        message = of_command(by, path, "--out", "out")
    for word in words:
        assert word in message, message
    assert "Name the folder that PEFT's save_pretrained wrote" not in message
    assert "ties-peft convert" not in message  # it cannot


def test_a_folder_may_be_called_gguf(make_lora: Make) -> None:
    assert ties_peft.Adapter.load(make_lora("from.gguf").name).modules


def test_a_mergekit_recipe_of_full_models(here: Path) -> None:
    for name in "ab":
        full_model(here / name)
    (here / "mk.yaml").write_text("models: [a, b]\nmerge_method: linear\ndtype: float16")
    message = of_command("merge", "--recipe", "mk.yaml", "--out", "out")
    assert "full model" in message and "mergekit" in message


# Parts


DIFFUSERS = {
    f"{part}.{module}.{side}.weight": shape
    for part in ("unet", "text_encoder")
    for module in ("a.to_q",)
    for side, shape in (("lora_A", (2, 4)), ("lora_B", (4, 2)))
}
PEFT_KEYS = {
    f"{part}.blocks.0.q.{side}.weight": shape
    for part in ("encoder", "decoder")
    for side, shape in (("lora_A", (2, 4)), ("lora_B", (4, 2)))
}
PARTS: dict[str, tuple[dict[str, tuple[int, ...]], str, tuple[str, ...]]] = {
    "diffusers": (DIFFUSERS, "pytorch_lora_weights.safetensors", ("unet", "text_encoder")),
    "kohya": (KOHYA, "x.safetensors", ("unet",)),
    "MLX has none": (MLX, "adapters.safetensors", ("no parts", "--part")),
    "PEFT's names": (PEFT_KEYS, "x.safetensors", ("encoder", "decoder")),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("by", ["python", "command"])
def test_an_unknown_part_lists_those_there_are(here: Path, name: str, by: str) -> None:
    tensors, file, words = PARTS[name]
    foreign(tensors, name=file)(here / "x")
    if by == "python":
        message = of_python(lambda: ties_peft.convert("x", part="prior", alpha=2))
    else:
        message = of_command("convert", "x", "--part", "prior", "--alpha", "2", "--out", "out")
    assert "'prior'" in message
    for word in words:
        assert word in message, message


# ComfyUI's names


@pytest.mark.parametrize(
    "sides", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_A.default", "lora_B.default")]
)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_comfyui_names_without_alpha_have_alpha_rank(here: Path, sides: tuple[str, str], alpha: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = {
        name: (torch.randn(rank, 5, generator=draw), torch.randn(6, rank, generator=draw))
        for name, rank in (("double_blocks.0.img_attn.qkv", 4), ("double_blocks.0.img_attn.proj", 2))
    }
    tensors = {
        f"diffusion_model.{name}.{side}.weight": tensor
        for name, pair in pairs.items()
        for side, tensor in zip(sides, pair, strict=True)
    }
    if alpha is not None:
        tensors |= {f"diffusion_model.{name}.alpha": torch.tensor(alpha) for name in pairs}
    save_file(tensors, here / "flux.safetensors")
    with pytest.warns(TiesPeftWarning) as said:
        made = ties_peft.convert("flux.safetensors")
    text = " ".join(str(one.message) for one in said)
    assert "ComfyUI" in text and (("alpha = rank" in text) is (alpha is None))
    stacked = {"double_blocks.0.img_attn.qkv": ("to_q", "to_k", "to_v"), "double_blocks.0.img_attn.proj": ("to_out.0",)}
    for name, (A, B) in pairs.items():
        expected = (1 if alpha is None else alpha / A.shape[0]) * B.double() @ A.double()
        found = torch.cat([made.delta(f"transformer_blocks.0.attn.{own}").double() for own in stacked[name]])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Advice that cannot help


def zeros(folder: Path) -> str:
    held = load_file(folder / "adapter_model.safetensors")
    save_file({key: torch.zeros_like(t) for key, t in held.items()}, folder / "adapter_model.safetensors")
    return folder.name


def test_no_weights_are_advised_for_an_adapter_of_zeros(make_lora: Make) -> None:
    names = [make_lora("a", gain=9).name, zeros(make_lora("none", seed=1)), make_lora("c", seed=2, gain=0.1).name]
    with pytest.warns(TiesPeftWarning) as said:
        merged = ties_peft.merge(names)
    about = [text for text in merged.report.warnings if "none" in text]
    assert len(about) == 1 and "is 0 everywhere" in about[0] and "Leave it out" in about[0]
    assert {str(one.message) for one in said} == set(merged.report.warnings)
    # the others are compared all the same, there and before the merge
    assert any("a (" in text and "c (" in text and "--weights" in text for text in merged.report.warnings)
    shown = run("inspect", *names).out
    assert "--weights" in shown and "3 of 3 modules do nothing" in shown


def test_zeros_alone_are_no_reason_for_weights(make_lora: Make) -> None:
    with pytest.warns(TiesPeftWarning, match="is 0 everywhere"):
        merged = ties_peft.merge([zeros(make_lora("a")), zeros(make_lora("b", seed=1))])
    assert not any("--weights" in text for text in merged.report.warnings)
