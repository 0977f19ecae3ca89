"""Patterns, folders of several adapters, tokenizer files, targets, and what inspect says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli.run_command import run

import ties_peft
from ties_peft import Adapter, AdapterError, Recipe, RecipeError
from ties_peft.adapters import sources
from ties_peft.merging.merge import merge_recipe

Make = Callable[..., Path]


@pytest.fixture
def runs(make_lora: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("cab"):
        make_lora(f"runs/{name}", seed=seed)
    (tmp_path / "runs/log.txt").write_text("")
    return tmp_path


def test_a_pattern_is_sorted_and_said(runs: Path) -> None:
    done = run("merge", "runs/*", "--out", "out", "--weights", "3")
    assert done.code == 0
    assert "note: 'runs/*' stands for 3: runs/a, runs/b, runs/c; no adapters, so left out: runs/log.txt." in done.err
    recipe = Recipe.from_file("out/recipe.yaml")
    assert (recipe.adapters, recipe.weights) == (("runs/a", "runs/b", "runs/c"), (3.0, 3.0, 3.0))
    plain = ties_peft.merge(["runs/a", "runs/b", "runs/c"], weights=[3, 3, 3])
    assert Adapter.load("out").digest == plain.digest == ties_peft.merge(["runs/?"], weights=[3, 3, 3]).digest


def test_a_pattern_in_a_recipe_has_one_weight_for_all(runs: Path) -> None:
    text = "adapters: [{adapter: 'runs/[ab]', parameters: {weight: 2.0}}, runs/c]"
    merged = merge_recipe(Recipe.from_yaml(text))
    assert merged.recipe.adapters == ("runs/a", "runs/b", "runs/c")
    assert merged.recipe.weights == (2.0, 2.0, 1.0)


def test_a_pattern_that_fits_nothing(runs: Path) -> None:
    for pattern, words in (("nowhere/*", "it fits nothing"), ("runs/*.txt", "such as runs/log.txt")):
        with pytest.raises(AdapterError, match=words):
            ties_peft.merge([pattern])


def test_a_folder_of_that_very_name_is_no_pattern(make_lora: Make) -> None:
    assert sources.expand_pattern(str(make_lora("a[1]"))) == ([str(make_lora("a[1]"))], [])


def test_several_adapters_in_one_folder(runs: Path) -> None:
    with pytest.raises(AdapterError, match=r"3 of its sub-folders: a, b, c\. Name one of them, such as runs/a"):
        Adapter.load("runs")
    assert Adapter.load("runs:b").digest == Adapter.load("runs/b").digest == Adapter.load("runs", subfolder="b").digest
    assert Adapter.load("runs", subfolder="b").source == "runs/b"
    seen = run("inspect", "runs")
    assert seen.code == 0
    assert "runs holds 3 adapters: a, b, c." in seen.out and "They can be merged" in seen.out


@pytest.mark.parametrize("inside", ["../elsewhere", "/etc", "a/../../b", "nowhere", "a\nb", ""])
def test_a_subfolder_leads_into_its_folder(runs: Path, inside: str) -> None:
    with pytest.raises(AdapterError):
        Adapter.load(f"runs:{inside}")


# Tokenizer files


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)


def test_tokenizer_files_are_copied_where_they_agree(runs: Path) -> None:
    put(runs / "runs/a", tokenizer="{}", vocab="1")
    put(runs / "runs/b", tokenizer="{}")
    merged = ties_peft.merge(["runs/a", "runs/b", "runs/c"])
    assert merged.report.copied == ["tokenizer.json", "vocab.json"]
    assert "tokenizer.json, vocab.json" in str(merged.report)
    out = merged.save("out")
    assert ((out / "tokenizer.json").read_text(), (out / "vocab.json").read_text()) == ("{}", "1")
    assert sorted(json.loads((out / "provenance.json").read_text())["copied"]) == merged.report.copied
    merged.save("out", force=True)


def test_tokenizer_files_that_differ_are_left_out_and_said(runs: Path) -> None:
    put(runs / "runs/a", tokenizer="{}", vocab="1")
    put(runs / "runs/b", tokenizer="{ }")
    with pytest.warns(ties_peft.TiesPeftWarning, match=r"left out \(tokenizer\.json, vocab\.json\).*differ.*a / b"):
        merged = ties_peft.merge(["runs/a", "runs/b"])
    assert sorted(p.name for p in merged.save("out").iterdir() if "token" in p.name or "vocab" in p.name) == []
    assert "would be lost: tokenizer files" in run("inspect", "runs/a", "runs/b").out


def test_a_link_out_of_the_folder_is_not_copied(runs: Path) -> None:
    (runs / "secret").write_text("secret")
    (runs / "runs/a/tokenizer.json").symlink_to(runs / "secret")
    with pytest.warns(ties_peft.TiesPeftWarning, match="leads out of its folder"):
        out = ties_peft.merge(["runs/a", "runs/b"]).save("out")
    assert not (out / "tokenizer.json").exists()


def test_force_spares_a_tokenizer_that_was_not_copied(runs: Path) -> None:
    put(runs / "runs/a", tokenizer="{}")
    merged = ties_peft.merge(["runs/a", "runs/b"])
    out = merged.save("out")
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(RecipeError, match=r"did not write \(tokenizer\.json\)"):
        merged.save("out", force=True)
    assert (out / "tokenizer.json").read_text() == "mine"


# Targets and convert


def test_convert_keeps_the_function_and_states_the_loss(make_lora: Make, tmp_path: Path) -> None:
    folder = make_lora("a", rank=8, use_rslora=True, alpha_pattern={"up": 3}, rank_pattern={"layers.0.q": 2})
    source = Adapter.load(folder)
    same = ties_peft.convert(folder)
    assert same.ranks == (8,) and same.report.energy == pytest.approx(1)
    for name in source.modules:
        assert torch.allclose(same.delta(name), source.delta(name), atol=1e-4)
    low = ties_peft.convert(folder, rank=2, dtype="bfloat16", target="vllm")
    exact = {name: source.delta(name).double().numpy() for name in source.modules}
    kept = {name: (np.linalg.svd(delta, compute_uv=False)[:2] ** 2).sum() for name, delta in exact.items()}
    expected = sum(kept.values()) / sum((delta**2).sum() for delta in exact.values())
    assert low.report.energy == pytest.approx(expected, rel=1e-4)
    done = run("convert", folder, "--rank", "2", "--out", tmp_path / "out", "--json")
    assert json.loads(done.out)["lost"] == pytest.approx(1 - expected, abs=1e-4)
    assert run("convert", folder, "--out", folder, "--force").code == 2


def test_convert_ia3(make_ia3: Make) -> None:
    source = Adapter.load(make_ia3("a"))
    made = ties_peft.convert(source)
    assert made.peft_type.name == "ia3"
    assert all(torch.allclose(made.delta(name), source.delta(name), atol=1e-6) for name in source.modules)
