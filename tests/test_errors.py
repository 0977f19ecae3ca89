"""The texts of the main messages, word by word: changing one is a decision, not an accident."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PREFIX, SHAPES
from safetensors.torch import load_file, save_file

import ties_peft
from ties_peft import Recipe, TiesPeftError
from ties_peft.adapters.types import peft_types
from ties_peft.errors import printable, unknown

Make = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"
Q_A = "base_model.model.layers.0.q.lora_A.weight"
Q_B = "base_model.model.layers.0.q.lora_B.weight"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are named by short relative paths, so that messages hold no temporary folder."""
    monkeypatch.chdir(tmp_path)


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(TiesPeftError) as caught:
        call()
    return str(caught.value)


def of_merge(*adapters: str, **asked: Any) -> str:
    return message(lambda: ties_peft.merge(list(adapters), **asked))


def of_load(name: str) -> str:
    return message(lambda: ties_peft.Adapter.load(name))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder.name


# AdapterError


def test_no_folder() -> None:
    assert of_load("./a") == "adapter './a': there is no such folder. Check the path."


def test_a_misspelt_folder_names_the_one_that_is_there(tmp_path: Path) -> None:
    for name in ("first", "last"):
        (tmp_path / name).mkdir()
    (tmp_path / "fist").write_text("a file, which is none of them")
    missing = str(tmp_path / "fisrt")
    text = f"adapter {missing!r}: there is no such folder. Did you mean {str(tmp_path / 'first')!r}? Check the path."
    assert of_load(missing) == text
    assert "Did you mean" not in of_load(str(tmp_path / "quite-another"))
    assert "Did you mean" not in of_load(str(tmp_path / "no-such-folder" / "fisrt"))


def test_no_config(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert of_load("a") == (
        "adapter 'a': there is no adapter_config.json in it. It holds nothing. "
        "Name the folder that PEFT's save_pretrained wrote."
    )


def test_not_json(make_lora: Make) -> None:
    (make_lora("a") / "adapter_config.json").write_text("{'r': 8}")
    message = of_load("a")
    for part in ("adapter 'a'", "adapter_config.json", "not JSON", "double quotes: line 1 column 2", "save"):
        assert part in message


def test_no_peft_type(make_lora: Make) -> None:
    make_lora("a", peft_type=None)
    assert of_load("a") == (
        "adapter 'a': peft_type is None in adapter_config.json; expected one of "
        f"{', '.join(peft_types())}. Is this a PEFT adapter?"
    )


def test_another_peft_type(make_lora: Make) -> None:
    make_lora("a", peft_type="LOHA")
    assert of_load("a") == ("adapter 'a' holds no LoHa tensors. Save it again with PEFT's save_pretrained.")


def test_no_weights(make_lora: Make) -> None:
    (make_lora("a") / WEIGHTS).unlink()
    assert of_load("a") == (
        "adapter 'a': no adapter_model.safetensors or adapter_model.bin beside adapter_config.json; the folder holds "
        "adapter_config.json. Save the adapter again with PEFT's save_pretrained."
    )


def test_empty_weights(make_lora: Make) -> None:
    (make_lora("a") / WEIGHTS).write_bytes(b"")
    assert of_load("a") == ("adapter 'a': adapter_model.safetensors is empty. Download or save the adapter again.")


def test_lfs_pointer(make_lora: Make) -> None:
    (make_lora("a") / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert of_load("a") == (
        "adapter 'a': adapter_model.safetensors is a Git LFS pointer, not the weights. "
        "Run `git lfs pull` in its repository, or download the file itself."
    )


def test_truncated(make_lora: Make) -> None:
    path = make_lora("a") / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    text = of_load("a")
    assert text.startswith("adapter 'a': adapter_model.safetensors is not a whole safetensors file (")
    assert text.endswith(" It is truncated or damaged: download or save the adapter again.")


def test_more_than_tensors(make_lora: Make) -> None:
    folder = make_lora("a")
    (folder / WEIGHTS).unlink()
    torch.save({"a": Path}, folder / "adapter_model.bin")
    assert of_load("a") == (
        "adapter 'a': adapter_model.bin holds more than tensors, and loading that could run code. It was not "
        "executed. Get the adapter as safetensors, or convert it where you trust it."
    )


def test_lone_a(make_lora: Make) -> None:
    name = edit(make_lora("a"), lambda t: t.pop(Q_B))
    assert of_load(name) == (
        "adapter 'a', module 'layers.0.q': there is a lora_A but no lora_B. Save the adapter again, whole."
    )


def test_unlike_ranks_of_a_and_b(make_lora: Make) -> None:
    name = edit(make_lora("a"), lambda t: t.update({Q_A: torch.ones(3, 10)}))
    assert of_load(name) == (
        "adapter 'a', module 'layers.0.q': lora_A is [3, 10] and lora_B is [12, 4]; expected [r, in] and [out, r] "
        "with the same r, at least 1. The file is damaged: save the adapter again."
    )


def test_nan(make_lora: Make) -> None:
    name = edit(make_lora("a"), lambda t: t[Q_A].fill_(float("nan")))
    assert of_merge(name) == (
        f"adapter 'a' holds NaN or infinity in 1 tensor(s): {Q_A}. Its training diverged: leave it out."
    )


def test_dora(make_lora: Make) -> None:
    name = make_lora("a", use_dora=True).name
    assert of_load(name) == (
        "adapter 'a', module 'layers.0.q': use_dora is True, but there is no lora_magnitude_vector. "
        "Save the adapter again."
    )
    sizes = {module: shape[0] for module, shape in SHAPES.items()}
    magnitudes = {f"{PREFIX}{module}.lora_magnitude_vector": torch.ones(size) for module, size in sizes.items()}
    edit(Path("a"), lambda t: t.update(magnitudes))
    assert of_load(name) == (
        "adapter 'a' is a DoRA, whose task vector depends on the weights it was trained on. Name the base model: "
        "--base PATH_OR_ID (base=...); only the tensors that are needed are read."
    )


def test_pissa(make_lora: Make) -> None:
    make_lora("a", init_lora_weights="pissa")
    assert of_load("a") == (
        "adapter 'a' was initialised with 'pissa', which changes the base's weights, so its tensors are not a delta "
        "to the plain base. Convert it with PEFT first: "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
    )


def test_unknown_module(make_lora: Make) -> None:
    adapter = ties_peft.Adapter.load(make_lora("a").name)
    assert message(lambda: adapter.delta("layers.0.k")) == (
        "adapter 'a': unknown module 'layers.0.k': did you mean 'layers.0.q'? "
        "Known: layers.0.q, layers.0.up, layers.1.q."
    )


# CompatibilityError


def test_two_kinds(make_lora: Make, make_ia3: Make) -> None:
    assert of_merge(make_lora("a").name, make_ia3("b").name) == (
        "the adapters are of 2 types, which have no common form:\n"
        "  LoRA     a\n"
        "  (IA)³    b\n"
        "Merge each type separately."
    )


def test_widths(make_lora: Make) -> None:
    first = make_lora("a", shapes={"x": (4, 5), "y": (4, 5)})
    second = make_lora("b", shapes={"x": (4, 6), "y": (3, 5)}, rank=2)
    assert of_merge(first.name, second.name) == (
        "the adapters disagree on the shape of 2 module(s):\n"
        "  x: a has 4 × 5, b has 4 × 6\n"
        "  y: a has 4 × 5, b has 3 × 5\n"
        "They were trained on different base models, so their task vectors cannot be added. Leave some out."
    )


def test_files_of_unknown_formats(make_lora: Make) -> None:
    first, second = make_lora("a", shapes={"x": (4, 5)}), make_lora("b", shapes={"y": (4, 5)})
    assert of_merge(first.name, second.name) == (
        "b and a have no module in common:\n"
        "  a: x, … (1)\n"
        "  b: y, … (1)\n"
        "They may belong to different base models. If they do not, use --allow-disjoint (allow_disjoint=True)."
    )


# RecipeError and MethodError

ASKED: list[tuple[dict[str, Any], str]] = [
    (
        {"method": "tise"},
        f"unknown method 'tise': did you mean 'ties'? Known: {', '.join(i.name for i in ties_peft.methods())}.",
    ),
    ({"space": "dela"}, "unknown space 'dela': did you mean 'delta'? Known: core, delta, factors, knots."),
    ({"weights": [1]}, "1 weight for 2 adapters. Give one weight per adapter, in their order."),
    ({"weights": [1, float("nan")]}, "the weights contain nan; expected finite numbers."),
    ({"weights": [0, 0]}, "every weight is 0, so nothing is left to merge. Give at least one adapter a weight."),
    ({"rank": 0}, "rank is 0; expected a whole number from 1 up, max or auto."),
    (
        {"scale": float("inf")},
        "scale is inf; expected a finite number, or a formula in N, the number of adapters: 1/N, 1/sqrt(N), N^-1/4 or "
        "0.7*N^-1/4.",
    ),
    ({"dtype": "fp16"}, "unknown dtype 'fp16': did you mean 'float16'? Known: bfloat16, float16, float32."),
    (
        {"density": 1.5},
        "method 'auto', parameter 'density' is 1.5: input should be less than or equal to 1 "
        "(share of the entries that the trim keeps, in (0, 1]).",
    ),
    (
        {"scope": "all"},
        "method 'auto', parameter 'scope' is 'all': input should be 'adapter' or 'module' "
        "(rank magnitudes over the whole adapter (the paper) or each module).",
    ),
    (
        {"method": "average", "density": 0.2},
        "method 'average': unknown parameter 'density'. Methods that have it: "
        f"{', '.join(i.name for i in ties_peft.methods() if 'density' in {p.name for p in i.parameters})}. Known: none.",
    ),
    (
        {"method": "average", "weights": [1, -1]},
        "method 'average': the weights sum to 0, which an average divides by.",
    ),
]


@pytest.mark.parametrize(("asked", "text"), ASKED)
def test_what_was_asked(make_lora: Make, asked: dict[str, Any], text: str) -> None:
    assert of_merge(make_lora("a").name, make_lora("b", seed=1).name, **asked) == text


def test_no_adapters() -> None:
    assert of_merge() == "no adapters were given. Name at least one folder or Hub id."


def test_rank_of_ia3(make_ia3: Make) -> None:
    assert of_merge(make_ia3("a").name, rank=8) == "rank is 8, but (IA)³ vectors have no rank. Leave it out."


def test_the_output_is_there(make_lora: Make) -> None:
    merged = ties_peft.merge([make_lora("a").name])
    merged.save("out")
    assert message(lambda: merged.save("out")) == (
        "the output 'out' exists and is not empty. Choose another folder, or replace it with --force (force=True)."
    )
    Path("out/notes.txt").write_text("mine")
    assert message(lambda: merged.save("out", force=True)) == (
        "the output 'out' holds files that ties_peft did not write (notes.txt), so --force (force=True) does not "
        "replace it. Choose another folder, or empty it yourself."
    )


def test_the_output_is_an_input(make_lora: Make) -> None:
    folder = make_lora("a").resolve()
    merged = ties_peft.merge(["a"])
    assert message(lambda: merged.save("a", force=True)) == (
        f"the output 'a' is, holds or lies in the input '{folder}'. Choose another folder."
    )


def test_a_recipe_with_an_unknown_key() -> None:
    text = "adapters:\n  - adapter: a\n    parameter: {weight: 1}\n"
    assert message(lambda: Recipe.from_yaml(text, "my.yaml")) == (
        "my.yaml, line 3: unknown key 'parameter': did you mean 'parameters'? Known: adapter, parameters."
    )


# The bricks


def test_unknown_names_the_nearest_or_none() -> None:
    assert unknown("thing", "zzz", ["b", "a"]) == "unknown thing 'zzz'. Known: a, b."
    assert unknown("thing", "aa", []) == "unknown thing 'aa'. Known: none."


def test_printable_is_safe_for_a_terminal() -> None:
    assert printable("a\x1b]0;x\x07\u202eb\nc") == "a\\x1b]0;x\\x07\\u202eb\\nc"
    assert printable("é日") == "é日"


def test_a_message_of_any_length_ends_with_what_to_do() -> None:
    for name in ("x" * 100_000, "x " * 50_000, "\x1b" * 100_000):
        message = str(TiesPeftError(f"adapter {name}: it is no adapter. Check the path."))
        assert len(message) < 5_000
        assert message.endswith("Check the path.")
        assert "\x1b" not in message


@pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
def test_hostile_names_reach_no_terminal(make_lora: Make) -> None:
    """Names of modules and values of configs come from files that anyone may have written."""
    hostile = "\x1b[2J\x1b]0;owned\x07"
    make_lora("a", shapes={f"x{hostile}": (4, 5)}, base_model_name_or_path=hostile, task_type=hostile)
    merged = ties_peft.merge(["a"], density=0.5, rank=1)
    for text in (str(merged.report), repr(merged), *merged.report.warnings):
        assert "\x1b" not in text
    make_lora("b", use_dora=hostile)
    make_lora("c", lora_alpha=hostile)
    for name in "bc":
        assert "\x1b" not in of_load(name)
    json.loads(json.dumps(merged.report.to_dict()))


def test_the_report_is_text_inside_a_notebook_too(make_lora: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    report = ties_peft.merge([make_lora("a"), make_lora("b", seed=1)]).report
    assert "2 LoRA adapters" in str(report) and repr(report) == str(report)
