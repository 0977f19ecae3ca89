"""Files that are not PEFT's: known by name in merge and inspect, and converted exactly where that can be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.run_command import run
from safetensors.torch import load_file, save_file

import ties_peft
from ties_peft import Adapter, AdapterError, RecipeError

Make = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
MODULES = ("down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0", "mid_block.attn2.to_v")
SHAPES = dict(zip(MODULES, ((12, 10), (10, 12), (6, 8)), strict=True))


def factors(ranks: Mapping[str, int], seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(A, B) of each module."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(r, SHAPES[name][1], generator=draw), torch.randn(SHAPES[name][0], r, generator=draw))
        for name, r in ranks.items()
    }


def delta(pair: tuple[torch.Tensor, torch.Tensor], scaling: float) -> np.ndarray:
    A, B = (tensor.double().numpy() for tensor in pair)
    return np.asarray(scaling * B @ A)


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None, config: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        path,
        metadata=metadata,
    )
    if config is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    return path


def base(folder: Path, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Path:
    tensors = {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    return write(folder / "diffusion_pytorch_model.safetensors", {**tensors, "conv_in.bias": torch.zeros(3)}).parent


def agrees(adapter: Adapter, expected: Mapping[str, np.ndarray]) -> None:
    assert adapter.modules == tuple(sorted(expected))
    for name, value in expected.items():
        assert np.abs(adapter.delta(name).double().numpy() - value).max() <= 1e-5 * np.abs(value).max(), name


# diffusers, as its releases wrote it


def newest(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], part: str = "unet.") -> Tensors:
    return {
        f"{part}{name}.{side}.weight": tensor
        for name, pair in pairs.items()
        for side, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def middle(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], part: str = "unet.") -> Tensors:
    return {
        f"{part}{name}.lora.{side}.weight": tensor
        for name, pair in pairs.items()
        for side, tensor in zip(("down", "up"), pair, strict=True)
    }


def first(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], part: str = "") -> Tensors:
    named = {}
    for name, pair in pairs.items():
        outer, _, own = name.removesuffix(".0").rpartition(".")
        for side, tensor in zip(("down", "up"), pair, strict=True):
            named[f"{part}{outer}.processor.{own}_lora.{side}.weight"] = tensor
    return named


@pytest.mark.parametrize("spelling", [newest, middle, first])
@pytest.mark.parametrize("part", ["unet.", ""])
def test_diffusers_is_converted_exactly(tmp_path: Path, spelling: Callable[..., Tensors], part: str) -> None:
    pairs = factors(dict.fromkeys(MODULES, 4))
    path = write(tmp_path / "x/pytorch_lora_weights.safetensors", spelling(pairs, part))
    with pytest.warns(ties_peft.TiesPeftWarning, match="scaling 1, as the file gives no alpha"):
        made = ties_peft.convert(path.parent, base=base(tmp_path / "base"))
    agrees(made, {name: delta(pair, 1) for name, pair in pairs.items()})
    again = Adapter.load(made.save(tmp_path / "out"))
    assert again.digest == made.digest and again.ranks == (4,)


def test_diffusers_alpha_from_the_file(tmp_path: Path) -> None:
    pairs = factors({MODULES[0]: 4, MODULES[1]: 2, MODULES[2]: 2})
    alphas = {f"unet.{name}.alpha": torch.tensor(float(3 + n)) for n, name in enumerate(MODULES)}
    path = write(tmp_path / "style.safetensors", {**middle(pairs), **alphas})
    made = ties_peft.convert(path)
    agrees(made, {name: delta(pair, (3 + n) / pair[0].shape[0]) for n, (name, pair) in enumerate(pairs.items())})
    with pytest.raises(RecipeError, match="states its alpha itself"):
        ties_peft.convert(path, alpha=8)


@pytest.mark.parametrize("rslora", [False, True])
def test_diffusers_alpha_from_the_metadata(tmp_path: Path, rslora: bool) -> None:
    pairs = factors(dict.fromkeys(MODULES, 4))
    noted = {"unet.r": 4, "unet.lora_alpha": 12, "unet.alpha_pattern": {MODULES[2]: 2}, "unet.use_rslora": rslora}
    path = write(tmp_path / "a.safetensors", newest(pairs), {"lora_adapter_metadata": json.dumps(noted)})
    root = 2 if rslora else 4
    expected = {name: delta(pair, (2 if name == MODULES[2] else 12) / root) for name, pair in pairs.items()}
    agrees(ties_peft.convert(path), expected)


def test_diffusers_of_several_ranks_without_alpha_needs_it(tmp_path: Path) -> None:
    pairs = factors({MODULES[0]: 4, MODULES[1]: 2, MODULES[2]: 2})
    path = write(tmp_path / "pytorch_lora_weights.safetensors", newest(pairs))
    with pytest.raises(AdapterError, match=r"gives no alpha \(ranks 2, 4\).*--alpha NUMBER"):
        ties_peft.convert(path)
    agrees(ties_peft.convert(path, alpha=6), {n: delta(pair, 6 / pair[0].shape[0]) for n, pair in pairs.items()})


def test_one_part_of_a_pipeline_at_a_time(tmp_path: Path) -> None:
    pairs = factors(dict.fromkeys(MODULES, 4))
    text = {
        "text_encoder.text_model.layers.0.self_attn.to_out_lora.down.weight": torch.ones(2, 5),
        "text_encoder.text_model.layers.0.self_attn.to_out_lora.up.weight": torch.ones(5, 2),
        "text_encoder.text_model.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": torch.ones(2, 5),
        "text_encoder.text_model.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": torch.ones(5, 2),
    }
    path = write(tmp_path / "pytorch_lora_weights.safetensors", {**newest(pairs), **text})
    with pytest.raises(AdapterError, match=r"2 part\(s\): text_encoder \(2 modules\), unet \(3 modules\)"):
        ties_peft.convert(path)
    with pytest.warns(ties_peft.TiesPeftWarning, match=r"not converted.*text_encoder \(2 modules\)"):
        agrees(ties_peft.convert(path, part="unet"), {name: delta(pair, 1) for name, pair in pairs.items()})
    ones = {f"text_model.layers.0.self_attn.{name}_proj": np.full((5, 5), 2.0) for name in ("q", "out")}
    agrees(ties_peft.convert(path, part="text_encoder"), ones)
    with pytest.raises(AdapterError, match="--part"):
        ties_peft.convert(path, part="transformer")


def test_the_base_checks_names_and_sizes(tmp_path: Path) -> None:
    path = write(tmp_path / "pytorch_lora_weights.safetensors", newest(factors(dict.fromkeys(MODULES, 4))))
    with pytest.raises(AdapterError, match="1 of its 3 modules are not in the base, such as 'mid_block"):
        ties_peft.convert(path, base=base(tmp_path / "a", {name: SHAPES[name] for name in MODULES[:2]}))
    with pytest.raises(AdapterError, match=r"changes a weight of \[6, 8\], the base's is \[6, 9\]"):
        ties_peft.convert(path, base=base(tmp_path / "b", {**SHAPES, MODULES[2]: (6, 9)}))


# kohya


def kohya(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]], alpha: float | None = None) -> Tensors:
    named = {}
    for name, (A, B) in pairs.items():
        start = f"lora_unet_{name.replace('.', '_')}"
        named |= {f"{start}.lora_down.weight": A, f"{start}.lora_up.weight": B}
        named |= {} if alpha is None else {f"{start}.alpha": torch.tensor(alpha)}
    return named


@pytest.mark.parametrize("alpha", [None, 1.0, 8.0])
def test_kohya_is_converted_with_the_base(tmp_path: Path, alpha: float | None) -> None:
    pairs = factors({MODULES[0]: 4, MODULES[1]: 2, MODULES[2]: 2})
    path = write(tmp_path / "x/style.safetensors", kohya(pairs, alpha))
    expected = {n: delta(p, 1 if alpha is None else alpha / p[0].shape[0]) for n, p in pairs.items()}
    agrees(ties_peft.convert(path, base=base(tmp_path / "base")), expected)
    (tmp_path / "names").write_text("\n".join([*MODULES, "conv_in"]))
    agrees(ties_peft.convert(path, modules=tmp_path / "names"), expected)


def test_kohya_stores_linear_layers_as_convolutions_at_times(tmp_path: Path) -> None:
    pairs = factors(dict.fromkeys(MODULES, 2))
    boxed = {name: tensor.reshape(*tensor.shape, 1, 1) for name, tensor in kohya(pairs).items()}
    path = write(tmp_path / "style.safetensors", boxed)
    agrees(ties_peft.convert(path, base=base(tmp_path / "base")), {n: delta(p, 1) for n, p in pairs.items()})


def test_kohya_is_not_guessed(tmp_path: Path) -> None:
    """Names of a model that no table knows: dots and underscores cannot be told apart."""
    drawn = factors(dict.fromkeys(MODULES, 2))
    names = ("blocks.0.mixer_in", "blocks.0.mixer_out", "mid_mixer.to_v")
    pairs = dict(zip(names, drawn.values(), strict=True))
    path = write(tmp_path / "style.safetensors", kohya(pairs))
    with pytest.raises(AdapterError, match=r"underscores for dots.*--base.*--modules"):
        ties_peft.convert(path)
    (tmp_path / "names").write_text("\n".join(names))
    agrees(ties_peft.convert(path, modules=tmp_path / "names"), {n: delta(pair, 1) for n, pair in pairs.items()})
    (tmp_path / "names").write_text("\n".join([*names, "mid.mixer.to_v"]))
    with pytest.raises(AdapterError, match=r"may be any of mid\.mixer\.to_v, mid_mixer\.to_v"):
        ties_peft.convert(path, modules=tmp_path / "names")
    (tmp_path / "names").write_text(names[0])
    with pytest.raises(AdapterError, match="2 of its 3 modules are not in the base"):
        ties_peft.convert(path, modules=tmp_path / "names")
    with pytest.raises(RecipeError, match="cannot be read"):
        ties_peft.convert(path, modules=tmp_path / "nowhere")


# MLX


def mlx(pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Tensors:
    return {f"{n}.{s}": t.T for n, pair in pairs.items() for s, t in zip(("lora_a", "lora_b"), pair, strict=True)}


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [({"rank": 4, "scale": 20.0, "dropout": 0.0}, 20.0), ({"rank": 4, "alpha": 16, "scale": 10.0}, 40.0)],
)
def test_mlx_is_converted_exactly(tmp_path: Path, parameters: dict[str, float], scaling: float) -> None:
    pairs = factors(dict.fromkeys(MODULES, 4))
    config = {"fine_tune_type": "lora", "lora_parameters": parameters, "model": "org/base", "num_layers": 16}
    path = write(tmp_path / "mlx/adapters.safetensors", mlx(pairs), config=config)
    for source in (path.parent, path):
        made = ties_peft.convert(source)
        agrees(made, {name: delta(pair, scaling) for name, pair in pairs.items()})
        assert made.base_name == "org/base"


def test_mlx_that_is_not_exact_is_refused(tmp_path: Path) -> None:
    pairs = factors(dict.fromkeys(MODULES, 4))
    lora = {"fine_tune_type": "lora", "lora_parameters": {"scale": 1.0}}
    dora = {"fine_tune_type": "dora", "lora_parameters": {"scale": 1.0}}
    with pytest.raises(AdapterError, match="no plain LoRA"):
        ties_peft.convert(write(tmp_path / "a/adapters.safetensors", {**mlx(pairs), "x.m": torch.ones(3)}, config=dora))
    with pytest.raises(AdapterError, match="of type DoRA"):
        ties_peft.convert(write(tmp_path / "b/adapters.safetensors", mlx(pairs), config=dora))
    with pytest.raises(AdapterError, match=r"gives no scale.*--alpha"):
        ties_peft.convert(write(tmp_path / "c/adapters.safetensors", mlx(pairs), config={"lora_layers": 4}))
    experts = {"e.lora_a": torch.ones(2, 3, 4), "e.lora_b": torch.ones(2, 4, 3)}
    with pytest.raises(AdapterError, match="experts"):
        ties_peft.convert(write(tmp_path / "d/adapters.safetensors", experts, config=lora))
    table = {"model.embed_tokens.lora_a": torch.ones(9, 2), "model.embed_tokens.lora_b": torch.ones(2, 4)}
    with pytest.raises(AdapterError, match="embedding"):
        ties_peft.convert(write(tmp_path / "e/adapters.safetensors", table, config=lora))


# PEFT's tensors alone


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "encoder."])
@pytest.mark.parametrize("name", ["", ".default"])
def test_tensors_without_a_config_need_the_alpha(tmp_path: Path, prefix: str, name: str) -> None:
    pairs = factors(dict.fromkeys(MODULES, 4))
    sides = {
        f"{prefix}{module}.{side}{name}.weight": tensor
        for module, pair in pairs.items()
        for side, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    path = write(tmp_path / "adapter_model.safetensors", sides)
    part = "encoder" if prefix == "encoder." else None
    with pytest.raises(AdapterError, match="--alpha NUMBER"):
        ties_peft.convert(path, part=part)
    agrees(ties_peft.convert(path, part=part, alpha=2), {n: delta(pair, 0.5) for n, pair in pairs.items()})


# Refused by name, in merge and in inspect


def put(folder: Path, tensors: Tensors, name: str = "lora.safetensors", config: Any = None) -> Path:
    return write(folder / name, tensors, config=config).parent


PAIRS = factors(dict.fromkeys(MODULES, 2))
REFUSED: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "LyCORIS": (lambda at: put(at, {"lora_unet_a.diff": torch.ones(2, 2)}), ("LyCORIS", "Leave it out")),
    "kohya with DoRA": (
        lambda at: put(at, {**kohya(PAIRS), "lora_unet_a.dora_scale": torch.ones(2)}),
        ("no plain LoRA", "Leave it out"),
    ),
    "MLX": (
        lambda at: put(at, mlx(PAIRS), "adapters.safetensors", {"fine_tune_type": "lora", "lora_parameters": {}}),
        ("MLX-LM", "ties-peft convert"),
    ),
    "MLX without weights": (lambda at: config_alone(at, {"lora_layers": 16}), ("MLX-LM", "no adapters.safetensors")),
    "AdapterHub": (
        lambda at: config_alone(at, {"config": {"architecture": "lora"}, "model_class": "Bert", "name": "x"}),
        ("AdapterHub", "leave it out"),
    ),
    "somebody's own": (lambda at: config_alone(at, {"rank": 8, "layers": [1]}), ("no peft_type", "layers, rank")),
    "nothing known": (lambda at: put(at, {"x": torch.ones(2)}), ("no adapter_config.json", "lora.safetensors")),
}


def config_alone(folder: Path, config: Any) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(tmp_path: Path, make_lora: Make, name: str) -> None:
    make, words = REFUSED[name]
    bad = make(tmp_path / "bad")
    merged = run("merge", make_lora("good"), bad, "--out", tmp_path / "out")
    seen = run("inspect", make_lora("good"), bad)
    for outcome in (merged, seen):
        assert outcome.code == 2
        assert outcome.err.startswith("error: ") and outcome.err.count("error: ") == 1
        for word in ("bad", *words):
            assert word in outcome.err, outcome.err
    assert "good" in seen.out
    assert not (tmp_path / "out").exists()


def test_inspect_tells_in_json_what_is_refused(tmp_path: Path, make_lora: Make) -> None:
    """Facts by key of each source that cannot be merged as it is, beside the sentence that says why."""
    names = ("MLX", "LyCORIS", "somebody's own", "nothing known")
    places = [REFUSED[name][0](tmp_path / name) for name in names]
    prompt = config_alone(tmp_path / "prompt", {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "org/base"})
    found = json.loads(run("inspect", make_lora("a"), make_lora("b", seed=1), *places, prompt, "nowhere", "--json").out)
    mlx_, lycoris, own, unknown, prompts, nowhere = found["refused"]
    held = mlx(PAIRS)
    assert (mlx_["file"], mlx_["tensors"], mlx_["dtypes"]) == ("adapters.safetensors", len(held), ["float32"])
    assert mlx_["numbers"] == sum(tensor.numel() for tensor in held.values())
    assert (mlx_["what"], mlx_["parts"], mlx_["converts"]) == ("an adapter of MLX-LM", {"": 3}, True)
    assert (lycoris["what"], lycoris["converts"]) == ("a LyCORIS adapter of type full differences", False)
    assert (own["what"], own["file"], own["tensors"]) == ("of a config that is not PEFT's", None, None)
    assert (unknown["what"], unknown["tensors"]) == ("not an adapter of a known format", 1)
    assert (prompts["peft_type"], prompts["base"]) == ("PROMPT_TUNING", "org/base")
    assert nowhere["what"] == "" and "no such folder" in nowhere["fault"]
    assert [one["fault"] for one in found["refused"]] == found["faults"]
    assert found["mergeable"] is False and found["verdict"].startswith(
        "The 2 that can be read can be merged: 3 modules"
    )


def test_inspect_shows_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pointer = write(tmp_path / "lfs" / "adapter_model.safetensors", {}, config={"peft_type": "LORA"})
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n")
    monkeypatch.chdir(tmp_path)
    REFUSED["MLX"][0](tmp_path / "mlx")
    out = run("inspect", "lfs", "mlx").out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:3] == [
        "lfs",
        "refused a PEFT adapter of type LORA",
        "file adapter_model.safetensors, which cannot be read",
    ]
    assert lines[-3:] == [
        "refused an adapter of MLX-LM",
        "file adapters.safetensors, 6 tensors, 116 numbers in float32",
        "modules 3",
    ]


def test_the_command_that_a_refusal_names_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}}
    put(tmp_path / "a style", mlx(PAIRS), "adapters.safetensors", config)
    said = run("inspect", "a style").err
    command = said.partition("`ties-peft ")[2].partition("`")[0]
    assert command == "convert 'a style' --out DIR"
    done = run("convert", "a style", "--out", "DIR", "--base-name", "org/model")
    assert done.code == 0
    assert "warning: adapters.safetensors was an adapter of MLX-LM, 3 modules; scaling 2 from its config" in done.err
    made = Adapter.load("DIR")
    assert made.base_name == "org/model"
    agrees(made, {name: delta(pair, 2) for name, pair in PAIRS.items()})
    assert json.loads((tmp_path / "DIR/provenance.json").read_text())["report"]["warnings"][0].startswith("adapters.")


def test_hints_for_what_is_peft_are_refused(make_lora: Make) -> None:
    with pytest.raises(RecipeError, match=r"--alpha \(alpha=…\) is for files that are not PEFT's"):
        ties_peft.convert(make_lora("a"), alpha=3)


def test_an_adapter_that_needs_its_base_is_converted_with_it(make_lora: Make, tmp_path: Path) -> None:
    """DoRA, by its definition in float64: ΔW = m·(W + s·B·A)/‖W + s·B·A‖ − W, the norm over each row."""
    name, draw = "layers.0.q", torch.Generator().manual_seed(3)
    folder = make_lora("dora", shapes={name: (12, 10)}, rank=4, alpha=8, use_dora=True)
    held = load_file(folder / "adapter_model.safetensors")
    magnitude, weight = torch.rand(12, generator=draw) + 1, torch.randn(12, 10, generator=draw)
    save_file(
        {**held, f"base_model.model.{name}.lora_magnitude_vector": magnitude}, folder / "adapter_model.safetensors"
    )
    save_file({f"{name}.weight": weight}, tmp_path / "base.safetensors")
    with pytest.raises(AdapterError, match="--base"):
        ties_peft.convert(folder)
    made = ties_peft.convert(folder, base=tmp_path / "base.safetensors")
    B, A = (held[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "BA")
    moved = weight.double() + 2 * B @ A
    wanted = magnitude.double().unsqueeze(1) * moved / moved.norm(dim=1, keepdim=True) - weight.double()
    assert torch.allclose(made.delta(name).double(), wanted, atol=1e-5)
    again = ties_peft.Recipe.from_yaml(made.recipe.to_yaml())
    assert again.base == str(tmp_path / "base.safetensors")
