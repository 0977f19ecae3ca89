"""`ties-peft statistics`, on a tiny base in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tiny_models as tiny
from cli.run_command import run

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved_encoder(tmp_path_factory.mktemp("base"))


def test_gathers_once_and_says_so(base: Path, make_lora: Make, tmp_path: Path) -> None:
    folder = make_lora("a", shapes=tiny.BERT, gain=0.2, base_model_name_or_path=str(base))
    (tmp_path / "rows.txt").write_text("\n".join(tiny.TEXTS), encoding="utf-8")
    task = tmp_path / "task.yaml"
    task.write_text(json.dumps({**tiny.ENCODER, "rows": "rows.txt"}), encoding="utf-8")
    asked = ("statistics", folder, "--task", task, "--base", base)
    done = [run(*asked, *flags) for flags in (["--json"], [], ["--json", "--again", "--kind", "gram"])]
    assert [(one.code, one.err) for one in done] == [(0, "")] * 3
    first, *told, last = "".join(one.out for one in done).splitlines()
    made = json.loads(first)["statistics"]
    assert [(one["adapter"], one["file"], one["rows"]) for one in made] == [
        (str(folder), "fisher.safetensors", 6),
        (str(folder), "gram.safetensors", 6),
    ]
    assert told == [f"{folder}/{kind}.safetensors: 6 rows of task on {base}" for kind in ("fisher", "gram")]
    assert len(json.loads(last)["statistics"]) == 1
    assert (folder / "gram.safetensors").stat().st_mode & 0o777 == 0o644


def written(folder: Path, texts: Sequence[str]) -> Path:
    """A task's file, its labelled rows beside it."""
    rows = [json.dumps({"text": text, "label": 0}) for text in texts]
    (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    task = folder / "labelled.yaml"
    task.write_text(json.dumps({**tiny.ENCODER, "rows": "rows.jsonl"}), encoding="utf-8")
    return task


def told(folder: Path, base: Path, task: Path, *flags: str) -> str:
    """What the command says on standard error, having succeeded."""
    done = run("statistics", folder, "--task", task, "--base", base, "--kind", "fisher", *flags)
    assert done.code == 0, done.err
    return done.err


def test_says_when_what_is_there_was_made_of_something_else(base: Path, make_lora: Make, tmp_path: Path) -> None:
    folder = make_lora("a", shapes=tiny.BERT, gain=0.2, base_model_name_or_path=str(base))
    task = written(tmp_path, tiny.TEXTS)
    assert told(folder, base, task) == ""
    assert told(folder, base, task) == ""
    assert "made with another labels than" in told(folder, base, task, "--labels", "given")
    written(tmp_path, tiny.TEXTS[1:])
    warned = told(folder, base, task)
    assert "made with another rows than" in warned
    assert warned.count("warning:") == 1
    assert told(folder, base, task, "--again") == ""
    assert told(folder, base, task) == ""


def test_says_once_that_the_adapters_name_another_base(base: Path, make_lora: Make, tmp_path: Path) -> None:
    folder = make_lora("a", shapes=tiny.BERT, gain=0.2, base_model_name_or_path="org/another")
    task = written(tmp_path, tiny.TEXTS[:1])
    message = told(folder, base, task)
    assert message.count("warning:") == 1 and str(base) in message and message.endswith("org/another.\n")
