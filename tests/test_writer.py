"""What is written: whole or not at all, as portable as can be, with where it came from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ties_peft
from ties_peft import Adapter, Merged, Recipe, RecipeError
from ties_peft.adapters import writer

Make = Callable[..., Path]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WRITTEN = [CONFIG, WEIGHTS, "README.md", "provenance.json", "recipe.yaml"]
MODULES = ["layers.0.q", "layers.0.up", "layers.1.q"]

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")


@pytest.fixture
def merged(make_lora: Make) -> Merged:
    return ties_peft.merge([make_lora("a"), make_lora("b", seed=1)])


def everything(folder: Path) -> dict[str, bytes | None]:
    """All that lies under a folder, hidden files too."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


# Whole or not at all


def failing(after: int, error: BaseException) -> Callable[..., Any]:
    """A stand-in for `Path.rename` that fails the time after `after` times."""
    rename, calls = Path.rename, iter(range(1000))

    def fail(path: Path, target: Path) -> Path:
        if next(calls) == after:
            raise error
        return rename(path, target)

    return fail


FAULTS = [OSError(28, "No space left on device"), RuntimeError("a bug"), KeyboardInterrupt(), MemoryError()]


@pytest.fixture(params=FAULTS, ids=lambda fault: type(fault).__name__)
def broken_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[BaseException]:
    """save_file writes a little and then fails."""

    def fail(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise request.param

    monkeypatch.setattr(writer, "save_file", fail)
    yield request.param


def test_a_failure_leaves_nothing(merged: Merged, tmp_path: Path, broken_weights: BaseException) -> None:
    before = everything(tmp_path)
    for target in ("out", "new/deep/out"):
        with pytest.raises((RecipeError, type(broken_weights))):
            merged.save(tmp_path / target)
        assert everything(tmp_path) == before


def test_a_failure_leaves_the_old_folder(
    merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_lora: Make
) -> None:
    ties_peft.merge([make_lora("c", seed=2)]).save(tmp_path / "out")
    before = everything(tmp_path)
    for fault in FAULTS:
        with monkeypatch.context() as patch, pytest.raises((RecipeError, type(fault))):
            patch.setattr(writer, "save_file", _raiser(fault))
            merged.save(tmp_path / "out", force=True)
        assert everything(tmp_path) == before


def _raiser(fault: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    return fail


def test_a_full_disk_is_said_in_one_sentence(merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "save_file", _raiser(FAULTS[0]))
    with pytest.raises(RecipeError, match=r"^the output '.*out' cannot be written: .*No space left on device\.$"):
        merged.save(tmp_path / "out")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("fault", [OSError(16, "Device or resource busy"), KeyboardInterrupt()], ids=["busy", "^C"])
def test_a_failure_at_the_last_step_leaves_nothing(
    merged: Merged,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    force: bool,
    after: int,
    fault: BaseException,
) -> None:
    """Renaming fails: of the new folder into place, or of the old one out of the way."""
    if after and not force:
        return  # without an old folder there is one rename only
    if force:
        merged.save(tmp_path / "out")
    before = everything(tmp_path)
    with monkeypatch.context() as patch, pytest.raises((RecipeError, KeyboardInterrupt)):
        patch.setattr(Path, "rename", failing(after, fault))
        merged.save(tmp_path / "out", force=force)
    assert everything(tmp_path) == before


def test_an_adapter_that_fails_to_save_leaves_nothing(
    make_lora: Make, tmp_path: Path, broken_weights: BaseException
) -> None:
    adapter = Adapter.load(make_lora("a"))
    before = everything(tmp_path)
    with pytest.raises((RecipeError, type(broken_weights))):
        adapter.save(tmp_path / "new/out")
    assert everything(tmp_path) == before


def test_parents_that_were_there_stay(merged: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(writer, "save_file", _raiser(FAULTS[0]))
    with pytest.raises(RecipeError):
        merged.save(tmp_path / "mine/new/out")
    assert (tmp_path / "mine").is_dir() and not any((tmp_path / "mine").iterdir())


def test_success_leaves_the_folder_alone(merged: Merged, tmp_path: Path) -> None:
    saved = merged.save(tmp_path / "new/out")
    assert saved == tmp_path / "new/out"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert sorted(path.name for path in saved.iterdir()) == WRITTEN[2:3] + WRITTEN[:2] + WRITTEN[3:]


def test_an_empty_folder_is_taken(merged: Merged, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merged.save(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


def test_force_replaces_all_of_the_old_folder(merged: Merged, make_lora: Make, tmp_path: Path) -> None:
    merged.save(tmp_path / "out")
    Adapter.load(make_lora("a")).save(tmp_path / "out", force=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


@pytest.mark.parametrize(("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_modes_follow_the_umask(merged: Merged, tmp_path: Path, umask: int, folder: int, file: int) -> None:
    before = os.umask(umask)
    try:
        merged.save(tmp_path / "new/out")
    finally:
        os.umask(before)
    assert (tmp_path / "new/out").stat().st_mode & 0o777 == folder
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new/out").iterdir()} == {file}


def test_an_adapter_is_not_saved_over_itself(make_lora: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_lora("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = everything(tmp_path)
    for source, target in ((folder, folder), ("~/a", folder), (folder, folder / "inside")):
        with pytest.raises(RecipeError):
            Adapter.load(source).save(target, force=True)
        assert everything(tmp_path) == before


def test_saved_as_it_was_loaded(make_lora: Make, tmp_path: Path) -> None:
    adapter = Adapter.load(make_lora("a", use_rslora=True, alpha_pattern={"up": 3}))
    again = Adapter.load(adapter.save(tmp_path / "again"))
    assert again.config == adapter.config
    assert again.digest == adapter.digest


# adapter_config.json


def lora_config(**changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "org/base",
        "task_type": "FEATURE_EXTRACTION",
        "inference_mode": True,
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": MODULES,
        **changes,
    }


def written_config(merged: Merged, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((merged.save(folder / "out") / CONFIG).read_text())
    return found


def test_the_config_of_a_lora_is_minimal(make_lora: Make, tmp_path: Path) -> None:
    first = make_lora("a", use_rslora=True, alpha_pattern={"up": 3}, lora_dropout=0.1, auto_mapping={"x": 1})
    merged = ties_peft.merge([first, make_lora("b", seed=1, enable_lora=None, revision="main")])
    assert written_config(merged, tmp_path) == lora_config()


def test_the_config_of_ia3_is_minimal(make_ia3: Make, tmp_path: Path) -> None:
    merged = ties_peft.merge([make_ia3("a", task_type="SEQ_2_SEQ_LM"), make_ia3("b", seed=1, task_type="SEQ_2_SEQ_LM")])
    assert written_config(merged, tmp_path) == {
        "peft_type": "IA3",
        "base_model_name_or_path": "org/base",
        "task_type": "SEQ_2_SEQ_LM",
        "inference_mode": True,
        "target_modules": ["layers.0.down", "layers.0.k", "layers.1.k"],
        "feedforward_modules": ["layers.0.down"],
    }


def test_conv1d_is_kept(make_lora: Make, tmp_path: Path) -> None:
    merged = ties_peft.merge([make_lora(name, fan_in_fan_out=True) for name in "ab"])
    assert written_config(merged, tmp_path) == lora_config(fan_in_fan_out=True)


@pytest.mark.parametrize(
    ("tasks", "kept"),
    [
        (("CAUSAL_LM", "CAUSAL_LM"), "CAUSAL_LM"),
        (("CAUSAL_LM", None), None),
        ((None, None), None),
        ((["CAUSAL_LM"], ["CAUSAL_LM"]), None),  # of a form that no loader knows
    ],
)
def test_the_task_type_is_kept_only_if_all_agree(
    make_lora: Make, tmp_path: Path, tasks: tuple[Any, Any], kept: str | None
) -> None:
    merged = ties_peft.merge([make_lora(str(i), task_type=task) for i, task in enumerate(tasks)])
    assert written_config(merged, tmp_path).get("task_type", None) == kept


def test_the_base_is_the_first_that_is_named(make_lora: Make, tmp_path: Path) -> None:
    unnamed = make_lora("a", base_model_name_or_path=None)
    merged = ties_peft.merge([unnamed, make_lora("b", base_model_name_or_path="org/b")])
    assert written_config(merged, tmp_path)["base_model_name_or_path"] == "org/b"
    assert any("different base models" in warning for warning in merged.report.warnings)
    named = ties_peft.merge([unnamed], base_model="me/mine")
    assert named.base_name == "me/mine"


def test_ranks_are_uniform_and_padded(make_lora: Make, tmp_path: Path) -> None:
    merged = ties_peft.merge([make_lora("a", shapes={"small": (3, 4), "large": (20, 30)})], rank=16)
    tensors = load_file(merged.save(tmp_path / "out") / WEIGHTS)
    shapes = {key.split("model.model.")[1]: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert shapes == {
        "small.lora_A.weight": (16, 4),
        "small.lora_B.weight": (3, 16),
        "large.lora_A.weight": (16, 30),
        "large.lora_B.weight": (20, 16),
    }


def test_every_module_is_written_also_an_empty_one(make_lora: Make, tmp_path: Path) -> None:
    merged = ties_peft.merge([make_lora("a"), make_lora("b", seed=1)], density=0.001)
    assert set(written_config(merged, tmp_path)["target_modules"]) == set(MODULES)
    assert Adapter.load(tmp_path / "out").modules == tuple(MODULES)


# The tensors' dtype


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((torch.float16, torch.float16), torch.float16),
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.float64, torch.float64), torch.float64),
    ],
)
def test_the_dtype_is_that_of_the_inputs(
    make_lora: Make, tmp_path: Path, given: tuple[torch.dtype, torch.dtype], expected: torch.dtype
) -> None:
    merged = ties_peft.merge([make_lora(str(i), seed=i, dtype=dtype) for i, dtype in enumerate(given)])
    tensors = load_file(merged.save(tmp_path / "out") / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {expected}
    assert merged.report.dtype == str(expected).removeprefix("torch.")


def test_the_dtype_of_ia3(make_ia3: Make) -> None:
    folders = [make_ia3(name, seed=seed, dtype=torch.float16) for seed, name in enumerate("abc")]
    merged = ties_peft.merge(folders, method="average")
    assert merged.dtype == torch.float16
    assert 0 < merged.report.rounding < 1e-2


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_the_dtype_that_is_asked_for(make_lora: Make, name: str) -> None:
    folders = [make_lora("a"), make_lora("b", seed=1)]
    by_name, by_dtype = (ties_peft.merge(folders, dtype=dtype) for dtype in (name, getattr(torch, name)))
    assert by_name.dtype == getattr(torch, name)
    assert by_name.digest == by_dtype.digest
    assert by_name.recipe == by_dtype.recipe


def test_rounding_is_what_the_dtype_lost(make_lora: Make) -> None:
    folders = [make_lora("a"), make_lora("b", seed=1)]
    exact = ties_peft.merge(folders)
    assert exact.report.rounding == 0
    rounded = ties_peft.merge(folders, dtype="bfloat16")
    lost = sum((rounded.delta(m) - exact.delta(m)).square().sum() for m in MODULES)
    whole = sum(exact.delta(m).square().sum() for m in MODULES)
    assert rounded.report.rounding == pytest.approx(float((lost / whole).sqrt()), rel=1e-3)
    assert "bfloat16, rounding" in str(rounded.report)


# Where it came from


def test_provenance(merged: Merged, tmp_path: Path) -> None:
    found = json.loads((merged.save(tmp_path / "out") / "provenance.json").read_text())
    assert sorted(found) == ["copied", "recipe", "report", "versions"]
    assert found["recipe"] == merged.recipe.to_dict()
    assert found["report"] == json.loads(json.dumps(merged.report.to_dict()))
    digests = [Adapter.load(tmp_path / name).digest for name in "ab"]
    assert [line["digest"] for line in found["report"]["adapters"]] == digests
    assert found["versions"]["ties_peft"] == ties_peft.__version__
    assert found["versions"]["torch"] == torch.__version__


def test_nothing_written_depends_on_the_time_or_the_folder(merged: Merged, make_lora: Make, tmp_path: Path) -> None:
    again = ties_peft.merge([tmp_path / "a", tmp_path / "b"])
    assert everything(merged.save(tmp_path / "one")) == everything(again.save(tmp_path / "two"))


def test_the_recipe_is_read_back(merged: Merged, tmp_path: Path) -> None:
    merged.save(tmp_path / "out")
    assert Recipe.from_file(tmp_path / "out/recipe.yaml").to_dict() == merged.recipe.to_dict()


def test_the_weights_say_that_they_are_pytorch(merged: Merged, tmp_path: Path) -> None:
    with safe_open(merged.save(tmp_path / "out") / WEIGHTS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def front_matter(card: str) -> dict[str, Any]:
    """As the Hub cuts it out: from the first line `---` to the next."""
    assert card.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card[4 : card.index("\n---\n")])
    return found


def test_the_card(merged: Merged, tmp_path: Path) -> None:
    card = (merged.save(tmp_path / "out") / "README.md").read_text()
    front = front_matter(card)
    assert front["base_model"] == "org/base"
    assert front["library_name"] == "peft"
    assert {"merge", "lora", "dual"} <= set(front["tags"])
    for line in merged.report.adapters:
        assert line.digest[:12] in card
    assert "2 LoRA adapters" in card


def test_the_card_of_ia3(make_ia3: Make, tmp_path: Path) -> None:
    card = (ties_peft.merge([make_ia3("a")]).save(tmp_path / "out") / "README.md").read_text()
    assert "ia3" in front_matter(card)["tags"]
    assert "energy" not in card


@pytest.mark.parametrize(
    ("base", "kept"),
    [
        (None, None),
        ("org/base", "org/base"),
        ("gpt2", "gpt2"),
        ("C:\\models\\Llama: 7b", None),
        ("/content/日本 #1", None),
        ("---\nlicense: mit", None),
        ("yes", "yes"),
        ("1.0", "1.0"),
    ],
)
def test_the_front_matter_holds_no_base_but_a_name_on_the_hub(
    make_lora: Make, tmp_path: Path, base: str | None, kept: str | None
) -> None:
    """Which alone it takes there: a card with any other is refused when it is pushed."""
    merged = ties_peft.merge([make_lora("a", base_model_name_or_path=base)])
    card = (merged.save(tmp_path / "out") / "README.md").read_text()
    front = front_matter(card)
    assert front.get("base_model") == kept
    assert "license" not in front


# The digest


def test_the_digest_ignores_paths_and_the_config_s_text(make_lora: Make) -> None:
    first = Adapter.load(make_lora("a")).digest
    other = make_lora("elsewhere/b", base_model_name_or_path="/other", lora_dropout=0.5, task_type=None)
    config = json.loads((other / CONFIG).read_text())
    (other / CONFIG).write_text(json.dumps(dict(reversed(config.items())), indent=7))
    assert Adapter.load(other).digest == first


def test_the_digest_does_not_depend_on_the_file_s_order(make_lora: Make) -> None:
    folder = make_lora("a")
    first, tensors = Adapter.load(folder).digest, load_file(folder / WEIGHTS)
    save_file(dict(reversed(tensors.items())), folder / WEIGHTS, metadata={"other": "text"})
    assert Adapter.load(folder).digest == first
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    assert Adapter.load(folder).digest == first


@pytest.mark.parametrize(
    "changes", [{"alpha": 9}, {"seed": 1}, {"dtype": torch.float16}, {"use_rslora": True}, {"alpha_pattern": {"up": 1}}]
)
def test_the_digest_sees_what_matters(make_lora: Make, changes: dict[str, Any]) -> None:
    assert Adapter.load(make_lora("a")).digest != Adapter.load(make_lora("b", **changes)).digest
