"""The scripts beside the package: they import what is there. What they measure is not tested here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for folder in ("benchmarks", "adapters") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_script_can_be_imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("adapters", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    importlib.import_module(path.stem)
