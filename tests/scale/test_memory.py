"""Memory does not grow with the number of adapters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SHAPES = {"layers.0.q": (1536, 1536), "layers.1.q": (1536, 1536)}
PROGRAM = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import ties_peft
ties_peft.merge(sys.argv[1:], rank=16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_megabytes(folders: list[Path]) -> float:
    """Peak resident memory of a process that merges the adapters in delta space."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, folders)], capture_output=True, text=True, check=True
    )
    return int(ran.stdout) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_a_further_adapter_costs_less_than_a_megabyte(make_lora: Callable[..., Path]) -> None:
    folders = [make_lora(f"a{n}", rank=16, alpha=16, seed=n, shapes=SHAPES) for n in range(64)]
    few, many = peak_megabytes(folders[:4]), peak_megabytes(folders)
    assert (many - few) / 60 < 1.0, f"4 adapters: {few:.0f} MB, 64: {many:.0f} MB"
