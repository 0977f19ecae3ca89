"""The Hub, over HTTP: downloads with revision and subfolder, offline, private; and what is pushed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cli.run_command import run
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from safetensors.torch import save
from sources.hub_stub import Stub, serving

import ties_peft
from ties_peft import Adapter, AdapterError, RecipeError
from ties_peft.adapters.base_model import BaseModel

Make = Callable[..., Path]
WRONG = "hf_aTokenThatOpensNothing"
ALL = ["README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json", "recipe.yaml"]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    """The stub, and huggingface_hub talking to it alone, with an empty cache and no token."""
    with serving() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        disable_progress_bars()  # as HF_HUB_DISABLE_PROGRESS_BARS would, had it been there at the import
        yield made
        enable_progress_bars()


def contents(folder: Path, within: str = "") -> dict[str, bytes]:
    return {f"{within}{path.name}": path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(stub: Stub, make_lora: Make) -> Stub:
    stub.repos["org/one"] = {
        "main": {**contents(make_lora("local/a")), "optimizer.pt": b"x" * 10},
        "v1": contents(make_lora("local/b", seed=1)),
    }
    stub.repos["org/many"] = {
        "main": {
            **contents(make_lora("local/c", seed=2), "checkpoint-5/"),
            **contents(make_lora("local/d", seed=3), "named/"),
        }
    }
    return stub


@pytest.mark.parametrize(
    ("source", "there"),
    [
        ("org/one", "local/a"),
        ("org/one@main", "local/a"),
        ("org/one@v1", "local/b"),
        ("org/many:checkpoint-5", "local/c"),
        ("org/many@main:named", "local/d"),
        ("org/many:named/", "local/d"),
        ("org/many:named/adapter_model.safetensors", "local/d"),
    ],
)
def test_a_source_of_the_hub(hub: Stub, source: str, there: str) -> None:
    adapter = Adapter.load(source)
    assert adapter.digest == Adapter.load(there).digest
    assert adapter.source == source.rstrip("/")
    assert not any("optimizer" in request for request in hub.requests), "only what is needed is fetched"


def test_a_base_model_in_a_folder_of_the_hub(hub: Stub) -> None:
    """A pipeline's part, whose one file has diffusers' name; nothing else of the repository is fetched."""
    file = "diffusion_pytorch_model.safetensors"
    parts = {part: save({f"{part}.weight": torch.ones(2)}) for part in ("unet", "vae")}
    hub.repos["org/pipeline"] = {"main": {f"{part}/{file}": content for part, content in parts.items()}}
    hub.repos["org/pipeline"]["main"] |= {f"{part}/config.json": b'{"model_type": "gpt2"}' for part in ("unet", "vae")}
    for source in ("org/pipeline:unet", "org/pipeline@main:unet/"):
        assert BaseModel.load(source).names == ("unet.weight",)
        assert BaseModel.load(source).is_conv1d("h.0.attn.c_proj") is True
    assert not any("vae/" in request for request in hub.requests)
    for source in ("org/pipeline:../unet", "org/pipeline:/etc"):
        with pytest.raises(AdapterError, match="no path inside a repository"):
            BaseModel.load(source)
    with pytest.raises(AdapterError, match=r"there is no model.safetensors"):
        BaseModel.load("org/pipeline:text_encoder")


def test_arguments_and_text_are_one_source(hub: Stub) -> None:
    first = Adapter.load("org/many", revision="main", subfolder="named")
    assert first.source == "org/many@main:named"
    assert Adapter.load(first.source).digest == first.digest


def test_a_recipe_finds_the_subfolder_again(hub: Stub) -> None:
    merged = ties_peft.merge([Adapter.load("org/many", subfolder="named"), "org/one@v1"])
    assert merged.recipe.adapters == ("org/many:named", "org/one@v1")
    again = ties_peft.Recipe.from_yaml(merged.recipe.to_yaml())
    assert ties_peft.merge(list(again.adapters)).digest == merged.digest


def test_the_adapters_inside_a_repository_are_named(hub: Stub) -> None:
    with pytest.raises(
        AdapterError,
        match=r"2 of its sub-folders: checkpoint-5, named\. Name one of them, such as org/many:checkpoint-5",
    ):
        Adapter.load("org/many")


def test_a_full_model_is_known_by_its_config_alone(hub: Stub) -> None:
    config = json.dumps({"architectures": ["LlamaForCausalLM"]}).encode()
    hub.repos["org/full"] = {"main": {"config.json": config, "model.safetensors": b"x" * 10}}
    with pytest.raises(AdapterError, match=r"full model .LlamaForCausalLM.*mergekit"):
        Adapter.load("org/full")
    assert not any("model.safetensors" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("org/none", "RepositoryNotFoundError"),
        ("org/one@v9", "RevisionNotFoundError"),
        ("org/one:nowhere", r"no adapter_config\.json in it"),
        ("org/one:../../etc", "no path inside a repository"),
        ("org/one:/etc", "no path inside a repository"),
        ("org/one@../../v1", "no such folder"),
        ("org/..", "no such folder"),
        ("../etc", "no such folder"),
    ],
)
def test_what_is_not_there_is_said(hub: Stub, source: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=words):
        Adapter.load(source)
    assert not (tmp_path.parent / "etc").exists()


def test_offline_the_cache_serves(hub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = Adapter.load("org/one@v1").digest
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert Adapter.load("org/one@v1").digest == digest
    with pytest.raises(AdapterError, match="Hub gave no adapter"):
        Adapter.load("org/many:named")
    assert len(hub.requests) == asked


def test_a_private_repository_needs_the_token_and_does_not_tell_it(hub: Stub) -> None:
    hub.private.add("org/one")
    with pytest.raises(AdapterError, match="RepositoryNotFoundError"):
        Adapter.load("org/one")
    with pytest.raises(AdapterError) as caught:
        Adapter.load("org/one", token=WRONG)
    assert WRONG not in "".join(traceback.format_exception(caught.value))
    assert Adapter.load("org/one", token=hub.allowed).modules


def test_tokenizer_files_of_the_hub_come_along(hub: Stub, tmp_path: Path) -> None:
    """The cache holds links to its blobs; those are followed."""
    for revision in ("main", "v1"):
        hub.repos["org/one"][revision]["tokenizer.json"] = b'{"version": "1.0"}'
    merged = ties_peft.merge(["org/one", "org/one@v1"])
    assert (merged.save(tmp_path / "out") / "tokenizer.json").read_bytes() == b'{"version": "1.0"}'


# Pushing


def test_a_merge_is_pushed_and_loaded_again(hub: Stub, make_lora: Make) -> None:
    merged = ties_peft.merge(["local/a", "local/b"])
    pushed = ties_peft.push(merged, "me/merged", token=hub.allowed)
    assert sorted(hub.repos["me/merged"]["main"]) == sorted(pushed.files) == ALL
    assert pushed.url.startswith(f"{hub.url}/me/merged/commit/")
    assert Adapter.load("me/merged").digest == merged.digest
    card = hub.repos["me/merged"]["main"]["README.md"].decode()
    assert card.startswith("---\nbase_model: org/base\nlibrary_name: peft\n")


def test_a_folder_is_pushed_without_what_is_not_the_adapters(hub: Stub, tmp_path: Path) -> None:
    folder = ties_peft.merge(["local/a", "local/b"]).save(tmp_path / "out")
    (folder / "notes.txt").write_text("secret")
    (folder / ".env").write_text("secret")
    (tmp_path / "passwd").write_text("secret")
    (folder / "tokenizer.json").symlink_to(tmp_path / "passwd")
    with pytest.warns(ties_peft.TiesPeftWarning, match=r"\.env, notes\.txt, tokenizer\.json"):
        pushed = ties_peft.push(folder, "me/merged", token=hub.allowed, message="again", revision="main")
    assert list(pushed.files) == ALL
    assert all(b"secret" not in content for content in hub.repos["me/merged"]["main"].values())
    assert hub.messages == ["again"]


def test_what_cannot_be_pushed(hub: Stub, tmp_path: Path) -> None:
    merged = ties_peft.merge(["local/a", "local/b"])
    for repo in ("merged", "../x", "me/..", "me/a b", "/abs/olute", ""):
        with pytest.raises(RecipeError, match="no name on the Hub"):
            ties_peft.push(merged, repo, token=hub.allowed)
    with pytest.raises(RecipeError, match="no folder"):
        ties_peft.push(tmp_path / "nowhere", "me/merged", token=hub.allowed)
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        ties_peft.push(tmp_path / "local", "me/merged", token=hub.allowed)
    with pytest.raises(RecipeError, match="logged in") as caught:
        ties_peft.push(merged, "me/merged", token=WRONG)
    assert WRONG not in "".join(traceback.format_exception(caught.value))
    assert "me/merged" not in hub.repos


def test_weights_that_are_a_link_are_not_pushed(hub: Stub, tmp_path: Path) -> None:
    folder = ties_peft.merge(["local/a", "local/b"]).save(tmp_path / "out")
    (folder / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(RecipeError, match="links to elsewhere"):
        ties_peft.push(folder, "me/merged", token=hub.allowed)


def test_the_command_pushes(hub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    run("merge", "local/a", "local/b", "--out", "out")
    done = run("push", "out", "me/merged", "--private", "--json", env={"HF_TOKEN": hub.allowed})
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["files"] == ALL
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.allowed not in done.out
    refused = run("push", "out", "me/merged")
    assert refused.code == 2
    assert refused.err.startswith("error: the Hub did not take out as 'me/merged'")


def test_the_endpoint_of_the_environment_is_asked(hub: Stub, tmp_path: Path) -> None:
    """In a process of its own, by the command line, as a user has it: HF_ENDPOINT, HF_HOME, HF_TOKEN."""
    hub.private.add("org/one")
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": hub.allowed,
        "HF_HUB_DISABLE_XET": "1",
    }
    code = "import sys; from ties_peft import cli; cli.main()"

    def command(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    said = command("merge", "org/one@v1", "org/many:named", "--out", "out")
    pushed = command("push", "out", "me/merged")
    assert pushed.count("\n") == 2, "no progress bar, this being no terminal"
    said += pushed
    assert hub.allowed not in said
    kept = contents(tmp_path / "out")
    sent = hub.repos["me/merged"]["main"]
    assert {**kept, "README.md": kept["README.md"].replace(b"'path/to/this/folder'", b"'me/merged'")} == sent
    assert b"PeftModel.from_pretrained(base, 'me/merged')" in sent["README.md"]
    assert all(hub.allowed.encode() not in content for content in contents(tmp_path / "out").values())
    assert torch.equal(Adapter.load("out").delta("layers.0.q"), Adapter.load("me/merged").delta("layers.0.q"))
