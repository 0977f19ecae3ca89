"""Where adapters come from: a folder first, then the Hub; a token is never told."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import ties_peft
from ties_peft import Adapter, AdapterError
from ties_peft.adapters import sources

Make = Callable[..., Path]
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


class Hub:
    """Stands in for `snapshot_download`; notes how it was called."""

    def __init__(self, answer: Path | Exception) -> None:
        self.answer = answer
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **options: Any) -> str:
        self.calls.append((args, options))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path | Exception], Hub]:
    monkeypatch.chdir(tmp_path)

    def put(answer: Path | Exception) -> Hub:
        made = Hub(answer)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made)
        return made

    return put


def test_a_hub_id_is_fetched(make_lora: Make, hub: Callable[..., Hub]) -> None:
    there = hub(make_lora("cache/snapshot"))
    adapter = Adapter.load("org/name")
    assert adapter.source == "org/name"
    assert adapter.digest == Adapter.load("cache/snapshot").digest
    ((args, options),) = there.calls
    assert args == ("org/name",)
    assert options["revision"] is None and options["token"] is None
    assert set(options["allow_patterns"]) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.bin",
        "README.md",
        *sources.TOKENIZER_FILES,
    }


@pytest.mark.parametrize("subfolder", ["checkpoint-1/best", "checkpoint-1/best/"])
def test_revision_token_and_subfolder_reach_the_hub(make_lora: Make, hub: Callable[..., Hub], subfolder: str) -> None:
    make_lora("snapshot/checkpoint-1/best", rank=3)
    there = hub(Path("snapshot"))
    assert Adapter.load("org/name", revision="abc123", subfolder=subfolder, token=TOKEN).ranks == (3,)
    ((_, options),) = there.calls
    assert (options["revision"], options["token"]) == ("abc123", TOKEN)
    assert "checkpoint-1/best/adapter_config.json" in options["allow_patterns"]
    elsewhere = [pattern for pattern in options["allow_patterns"] if not pattern.startswith("checkpoint-1/best/")]
    assert elsewhere == ["README.md"]  # whose licence holds for all of the repository


def test_a_local_folder_wins(make_lora: Make, hub: Callable[..., Hub]) -> None:
    make_lora("org/name", rank=3)
    there = hub(AssertionError("not asked"))
    assert Adapter.load("org/name").ranks == (3,)
    assert Adapter.load("org", subfolder="name").ranks == (3,)
    assert there.calls == []


@pytest.mark.parametrize(
    "name", ["/no/where", "./no/where", "../no", "~/no", "no", "a/b/c", "a//b", "a/", "/", "a b/c"]
)
def test_what_is_no_hub_id_is_not_asked_for(hub: Callable[..., Hub], name: str) -> None:
    there = hub(AssertionError("not asked"))
    with pytest.raises(AdapterError):
        Adapter.load(name)
    assert there.calls == []


@pytest.mark.parametrize("name", ["org/name", "o/n", "org-1/na.me_2-x", "0rg/Name"])
def test_what_may_be_a_hub_id_is_asked_for(make_lora: Make, hub: Callable[..., Hub], name: str) -> None:
    there = hub(make_lora("snapshot"))
    Adapter.load(name)
    assert there.calls[0][0] == (name,)


def test_a_failure_is_said_in_one_sentence(hub: Callable[..., Hub]) -> None:
    hub(OSError("401 Client Error.\n\nRepository Not Found for url: https://…\nlong advice"))
    with pytest.raises(AdapterError) as caught:
        Adapter.load("org/name")
    assert str(caught.value) == (
        "adapter 'org/name': there is no such folder here, and the Hub gave no adapter of that id "
        "(OSError: 401 Client Error.). Check the spelling, the network, and whether the repository is private."
    )


def test_a_failure_without_words(hub: Callable[..., Hub]) -> None:
    hub(TimeoutError())
    with pytest.raises(AdapterError, match=r"TimeoutError"):
        Adapter.load("org/name")


def test_a_repository_without_an_adapter(tmp_path: Path, hub: Callable[..., Hub]) -> None:
    (tmp_path / "snapshot").mkdir()
    hub(tmp_path / "snapshot")
    with pytest.raises(AdapterError, match=r"org/name.*adapter_config\.json"):
        Adapter.load("org/name")


def test_a_subfolder_that_is_not_there_is_named(make_lora: Make, hub: Callable[..., Hub]) -> None:
    make_lora("snapshot")
    hub(Path("snapshot"))
    for source in ("org/name", "snapshot"):
        with pytest.raises(AdapterError, match="nowhere"):
            Adapter.load(source, subfolder="nowhere")


@pytest.mark.parametrize("text", [f"Illegal header value b'Bearer {TOKEN}\\n'", TOKEN, f"url?token={TOKEN}&x"])
def test_the_token_is_never_told(hub: Callable[..., Hub], text: str) -> None:
    """HTTP clients name a header that they refuse, token and all."""
    hub(ValueError(text))
    with pytest.raises(AdapterError) as caught:
        Adapter.load("org/name", token=TOKEN)
    assert TOKEN not in str(caught.value)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_the_token_is_in_nothing_that_is_kept(make_lora: Make, hub: Callable[..., Hub], tmp_path: Path) -> None:
    hub(make_lora("snapshot"))
    adapter = Adapter.load("org/name", token=TOKEN)
    merged = ties_peft.merge([adapter])
    folder = merged.save(tmp_path / "out")
    assert all(TOKEN.encode() not in path.read_bytes() for path in folder.iterdir())
    assert TOKEN not in repr(adapter) + repr(vars(adapter))


def test_merging_hub_ids(make_lora: Make, hub: Callable[..., Hub], tmp_path: Path) -> None:
    hub(make_lora("snapshot"))
    merged = ties_peft.merge(["org/name"], density=1, rank="max")
    merged.save(tmp_path / "org/name")  # a folder of the same name is not the input
    assert merged.recipe.adapters == ("org/name",)


# Folders


def test_the_home_folder(make_lora: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lora("a")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Adapter.load("~/a").source == "~/a"


def test_safetensors_come_before_bin(make_lora: Make) -> None:
    folder = make_lora("a", rank=3)
    torch.save({}, folder / "adapter_model.bin")
    assert Adapter.load(folder).ranks == (3,)


def test_an_old_bin_is_read(make_lora: Make) -> None:
    folder = make_lora("a")
    path = folder / "adapter_model.safetensors"
    first, delta = Adapter.load(folder).digest, Adapter.load(folder).delta("layers.0.q")
    tensors = {key: torch.nn.Parameter(tensor) for key, tensor in load_file(path).items()}
    path.unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    second = Adapter.load(folder)
    assert second.digest == first
    assert torch.equal(second.delta("layers.0.q"), delta)


def test_a_folder_of_diffusers_is_recognised(tmp_path: Path) -> None:
    """Such files have no adapter_config.json; the message says what they are."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/pytorch_lora_weights.safetensors").write_bytes(b"x")
    with pytest.raises(AdapterError, match="pytorch_lora_weights"):
        Adapter.load(tmp_path / "a")


def test_a_folder_that_moves_away_is_said(make_lora: Make) -> None:
    """Reading is lazy, so the file may be gone by the time it is read."""
    folder = make_lora("a")
    adapter = Adapter.load(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="adapter_model"):
        adapter.delta("layers.0.q")


def test_another_working_folder_changes_nothing(
    make_lora: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_lora("a")
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path)
    adapter = Adapter.load("a")
    monkeypatch.chdir(tmp_path / "else")
    assert adapter.delta("layers.0.q").shape == (12, 10)
