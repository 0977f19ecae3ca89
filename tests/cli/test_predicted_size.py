"""What --dry-run says of the size of the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.run_command import run

import ties_peft

Make = Callable[..., Path]


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_it_is_that_of_the_tensors_that_are_written(make_lora: Make, make_ia3: Make, tmp_path: Path, kind: str) -> None:
    make = make_lora if kind == "lora" else make_ia3
    folders = [str(make(name, seed=seed)) for seed, name in enumerate("ab")]
    asked = ["--dtype", "float16", *(["--rank", "3"] if kind == "lora" else [])]
    plan = json.loads(run("merge", *folders, *asked, "--dry-run", "--json").out)["plan"]
    assert run("merge", *folders, *asked, "--out", str(tmp_path / "out")).code == 0
    tensors = ties_peft.Adapter.load(tmp_path / "out").tensors
    assert plan["bytes"] == sum(tensors.read(name).nbytes for name in tensors.names)
    assert f"{plan['bytes']:,} of tensors" in run("merge", *folders, *asked, "--dry-run").out
