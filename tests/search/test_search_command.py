"""`ties-peft search` and `ties-peft signs`, on a tiny base in a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.running import run

import ties_peft

sys.path.insert(0, str(Path(__file__).parents[1] / "statistics"))
import tiny

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved_encoder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def task(tmp_path: Path, base: Path) -> Path:
    lines = "\n".join(json.dumps(row) for row in tiny.rows())
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps({**tiny.ENCODER, "rows": "rows.jsonl", "base": str(base)}), encoding="utf-8")
    return path


@pytest.fixture
def folders(make_lora: Make) -> list[Path]:
    return [make_lora(name, seed=seed, shapes=tiny.BERT, gain=0.1) for seed, name in enumerate("ab")]


def test_a_search_prints_its_controls_and_writes_an_adapter(folders: list[Path], task: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("search", *folders, "--task", task, "--judge", task, "--budget", 4, "--out", out)
    assert done.code == 0, done.err
    rows = [line.split("  ")[0] for line in done.out.splitlines()]
    assert rows[1:7] == ["found", "base", "mean", "best single", "random weights", "random adapters"]
    assert "best of 4 trials:" in done.out
    assert ties_peft.Adapter.load(out).modules == tuple(sorted(tiny.BERT))
    assert (tmp_path / "out.study.db").is_file()


def test_it_goes_on_and_as_json(folders: list[Path], task: Path, tmp_path: Path) -> None:
    common = ("search", *folders, "--task", task, "--no-controls", "--json")
    flags = ("--tune", "density=[0.1,1.0]", "--tune", "scale={low: 0.5, high: 2, log: true}", "--method", "ties")
    storage = ("--storage", f"journal:{tmp_path / 'log'}")
    first = run(*common, *flags, *storage, "--budget", 2, "--out", tmp_path / "first")
    more = run(*common, *flags, *storage, "--budget", 4, "--out", tmp_path / "more")
    assert (first.code, more.code) == (0, 0), first.err + more.err
    assert json.loads(more.out)["trials"][:2] == json.loads(first.out)["trials"]
    assert len(json.loads(more.out)["trials"]) == 4


def test_bad_input_is_one_message(folders: list[Path], task: Path, tmp_path: Path) -> None:
    common = ("search", *folders, "--task", task, "--out", tmp_path / "out")
    for flags, text in (
        (("--tune", "density"), "expected NAME=VALUE"),
        (("--tune", "densty=[0.1,1.0]", "--method", "ties"), "did you mean 'density'"),
        (("--budget", 0), "the budget is 0"),
        (("--storage", "nosuch://x"), "the study cannot be kept in 'nosuch://x'"),
        (("--rank", "many"), "the rank is 'many'"),
    ):
        done = run(*common, *flags)
        assert done.code == 2
        assert text in done.err
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_signs_are_written_and_taken(folders: list[Path], task: Path, tmp_path: Path) -> None:
    done = run("signs", *folders, "--task", task, "--steps", 4, "--out", tmp_path / "signs")
    assert done.code == 0, done.err
    assert f"--set sign_from={tmp_path / 'signs'}" in done.out
    merged = run("merge", *folders, "--set", f"sign_from={tmp_path / 'signs'}", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err
