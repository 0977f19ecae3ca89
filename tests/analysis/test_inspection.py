"""`inspect` of several adapters: one line each within 80 columns, norm ratios, and cosines against their definition."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli.run_command import run
from conftest import SAMPLES, SHAPES
from oracles import definition
from rich.console import Console

from ties_peft.analysis.inspection import Inspection, inspect

Make = Callable[..., Path]
TASKS = ("ag_news", "banking77", "cr", "sst2", "subj", "trec")


def lines_at(inspection: Inspection, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(inspection)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_six_adapters_have_a_line_each_within_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SAMPLES.parent)
    seen = inspect([f"adapters/lora/{task}" for task in TASKS])
    lines = lines_at(seen, 80)
    assert max(map(len, lines)) <= 80
    least = min(one.norm for one in seen.adapters)
    for number, one in enumerate(seen.adapters, start=1):
        (line,) = [line.split() for line in lines if line.startswith(f"{number}  {one.source} ") and " LoRA " in line]
        assert line[2:] == ["LoRA", str(one.ranks[0]), "2", "36", f"{one.norm:.3g}", f"{one.norm / least:.1f}"]
    assert sum(line.startswith("base ") for line in lines) == 1  # what all have in common is said once


def test_cosines_are_those_of_the_whole_task_vectors(make_lora: Make) -> None:
    folders = [
        make_lora("a", seed=1),
        make_lora("b", seed=2, rank=2, shapes={**SHAPES, "layers.1.up": (20, 12)}),
        make_lora("zero", seed=3, gain=0),
    ]
    found = json.loads(run("inspect", *folders, "--json").out)["cosines"]
    one, two, _ = definition.matrix([definition.read(folder) for folder in folders])
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert found[1][0] == found[0][1] == pytest.approx(cosine, abs=1e-6)
    assert [found[i][i] for i in range(3)] == [1, 1, 1] and found[2][:2] == [0, 0]
    lines = [line.split() for line in run("inspect", *folders[:2]).out.splitlines()]
    assert [line[-1] for line in lines if line[:1] == ["2"] and "LoRA" not in line] == [f"{cosine:.2f}"]


def test_what_differs_names_its_adapters(make_lora: Make) -> None:
    folders = [make_lora("a"), make_lora("b", seed=1, base_model_name_or_path="org/other", use_rslora=True)]
    out = run("inspect", *folders).out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "base org/base, FEATURE_EXTRACTION (1)" in lines and "org/other, FEATURE_EXTRACTION (2)" in out
    assert any(line.startswith("2 unusual rsLoRA") for line in lines)


def test_adapters_that_do_not_fit_have_no_cosines(make_lora: Make, make_ia3: Make) -> None:
    seen = inspect([str(make_lora("a")), str(make_ia3("b"))])
    assert seen.cosines is None and seen.mergeable is False
    assert any(line.split()[:5] == ["2", seen.adapters[1].source, "(IA)³", "–", "–"] for line in lines_at(seen, 200))
