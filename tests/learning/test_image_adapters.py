"""LoRAs of image models where rows of text are read: one message, before a base model is looked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.run_command import run
from safetensors.torch import save_file

import ties_peft
from ties_peft import CompatibilityError

TASK = {"measure": "loss", "label": None, "rows": ["a", "b", "c", "d", "e"]}
NAMES = {
    "kohya": (
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",
    ),
    "diffusers": (
        "unet.mid_block.attentions.0.proj_in.lora_A.weight",
        "unet.mid_block.attentions.0.proj_in.lora_B.weight",
    ),
}
CALLS: dict[str, Callable[[Path], Any]] = {
    "evaluate": lambda path: ties_peft.evaluate(path, TASK),
    "distil": lambda path: ties_peft.distil([path, path], rows=20),
    "search": lambda path: ties_peft.search([path, path], TASK),
    "few_shot_signs": lambda path: ties_peft.few_shot_signs([path, path], [TASK]),
    "gather_statistics": lambda path: ties_peft.gather_statistics(path, TASK, "gram", save=False),
}
COMMANDS = {
    "evaluate": ("evaluate", "{path}", "--task", "{task}"),
    "distil": ("distil", "{path}", "{path}", "--out", "{out}"),
    "search": ("search", "{path}", "{path}", "--task", "{task}", "--out", "{out}"),
    "signs": ("signs", "{path}", "--task", "{task}", "--out", "{out}"),
    "statistics": ("statistics", "{path}", "--task", "{task}"),
}


def image_lora(folder: Path, form: str) -> Path:
    down, up = NAMES[form]
    save_file({down: torch.ones(2, 8), up: torch.ones(6, 2)}, folder / "image.safetensors")
    return folder / "image.safetensors"


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("call", CALLS)
def test_a_lora_of_an_image_model_is_refused(call: str, form: str, tmp_path: Path) -> None:
    path = image_lora(tmp_path, form)
    with pytest.raises(CompatibilityError) as caught:
        CALLS[call](path)
    for part in (str(path), "unet of an image model", "expected an adapter of a language model", "ties-peft merge"):
        assert part in str(caught.value)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_say_so_too(command: str, tmp_path: Path) -> None:
    task = tmp_path / "task.yaml"
    task.write_text("measure: loss\nlabel: null\nrows: rows.txt\n", encoding="utf-8")
    (tmp_path / "rows.txt").write_text("a\nb\n", encoding="utf-8")
    values = {"path": image_lora(tmp_path, "kohya"), "task": task, "out": tmp_path / "out"}
    done = run(*(part.format(**values) for part in COMMANDS[command]))
    assert done.code == 2
    assert done.err.startswith("error: adapter") and "unet of an image model" in done.err
    assert not (tmp_path / "out").exists()


def test_an_objective_of_ones_own_may_judge_images(tmp_path: Path) -> None:
    """A search with a callable reads no text, so it is not for this check to refuse it."""
    path = image_lora(tmp_path, "kohya")
    with pytest.raises(ties_peft.TiesPeftError) as caught:
        ties_peft.search([path], lambda adapter: pytest.fail("a trial was made"), {"weights": "all"})
    assert "image model" not in str(caught.value)
