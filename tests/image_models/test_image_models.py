"""LoRAs of image models, file to file, against what diffusers computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import ties_peft

pytest.importorskip("diffusers")

from image_models.pipelines import (
    ARCHITECTURES,
    Patched,
    draw,
    kohya_tensors,
    outputs,
    pipeline,
    write_diffusers,
    write_kohya,
)

FILES = {"diffusers": "pytorch_lora_weights.safetensors", "kohya": "lora.safetensors"}
WRITERS = ("diffusers", "diffusers with metadata", "kohya")
PIPES: dict[str, Any] = {}


@pytest.fixture(params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pipe_of(name: str) -> Any:
    if name not in PIPES:
        PIPES[name] = pipeline(name)
    return PIPES[name]


def write(writer: str, name: str, seed: int, folder: Path) -> tuple[Path, Any]:
    pipe = pipe_of(name)
    loras = draw(pipe, name, seed)
    folder.mkdir()
    if writer == "kohya":
        return write_kohya(name, loras, folder / "style.safetensors"), loras
    return write_diffusers(pipe, loras, folder, "metadata" in writer), loras


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], plain: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        assert (plain[part] - value).abs().max() > 1e-2 * value.abs().max(), part  # the LoRA does something
        assert (found[part] - value).abs().max() <= 1e-4 * max(1.0, float(value.abs().max())), part


@pytest.mark.parametrize("writer", WRITERS)
def test_two_files_are_merged_into_one_that_diffusers_loads(name: str, writer: str, tmp_path: Path) -> None:
    pipe = pipe_of(name)
    (first, one), (second, two) = (write(writer, name, seed, tmp_path / str(seed)) for seed in (1, 2))
    plain = outputs(pipe, name)
    with Patched(pipe, [(0.7, one), (-0.4, two)]):
        expected = outputs(pipe, name)
    options = {"method": "task_arithmetic", "weights": [0.7, -0.4], "scale": 1, "rank": "max"}
    ties_peft.merge([first, second], target="diffusers", **options).save(tmp_path / "out")
    pipe.load_lora_weights(tmp_path / "out")
    try:
        agree(outputs(pipe, name), expected, plain)
    finally:
        pipe.unload_lora_weights()


def test_one_file_alone_is_the_same_in_every_format(name: str, tmp_path: Path) -> None:
    """An identity merge by TIES, of each format into each, is read by diffusers where it reads that format."""
    pipe = pipe_of(name)
    plain = outputs(pipe, name)
    for number, writer in enumerate(("diffusers with metadata", "kohya")):
        path, loras = write(writer, name, 3, tmp_path / str(number))
        with Patched(pipe, [(1.0, loras)]):
            expected = outputs(pipe, name)
        for target, file in FILES.items():
            out = tmp_path / f"{number}-{target}"
            merged = ties_peft.merge([path], "ties", density=1.0, target=target)
            merged.save(out)
            assert sorted(one.name for one in out.iterdir()) == sorted(
                ["README.md", "provenance.json", "recipe.yaml", file]
            )
            if target == "kohya":
                assert load_file(out / file).keys() == kohya_tensors(name, loras).keys()
                again = ties_peft.convert(out / file, target="diffusers")
                out = again.save(tmp_path / f"{number}-again")
            pipe.load_lora_weights(out)
            try:
                agree(outputs(pipe, name), expected, plain)
            finally:
                pipe.unload_lora_weights()


@pytest.mark.parametrize("writer", ["diffusers with metadata", "kohya"])
def test_formats_round_trip_bit_for_bit(name: str, writer: str, tmp_path: Path) -> None:
    path, _ = write(writer, name, 4, tmp_path / "a")
    other, own = ("kohya", "diffusers") if writer != "kohya" else ("diffusers", "kohya")
    there = ties_peft.convert(path, target=other).save(tmp_path / "there")
    back = ties_peft.convert(there / FILES[other], target=own).save(tmp_path / "back")
    same(path, back / FILES[own])


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
def test_a_part_round_trips_through_peft(name: str, target: str, tmp_path: Path) -> None:
    path, loras = write("kohya" if target == "kohya" else "diffusers with metadata", name, 5, tmp_path / "a")
    for part in loras:
        folder = ties_peft.convert(path, part=part).save(tmp_path / part)
        back = ties_peft.convert(folder, part=part, target=target, base_model=name).save(tmp_path / f"{part}-back")
        found, whole = load_file(back / FILES[target]), load_file(path)
        assert found and all(torch.equal(tensor, whole[key]) for key, tensor in found.items())


def same(first: Path, second: Path) -> None:
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    for key in one:
        assert one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]), key
    with safe_open(first, "pt") as a, safe_open(second, "pt") as b:
        assert ("lora_adapter_metadata" in (a.metadata() or {})) == ("lora_adapter_metadata" in (b.metadata() or {}))
