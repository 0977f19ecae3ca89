"""Memory does not grow with the number of adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
SHAPES = {"layers.0.q": (1536, 1536), "layers.1.q": (1536, 1536)}
PROGRAM = """
import resource, sys, warnings
warnings.simplefilter("ignore")
import ties_peft
from ties_peft.task_vectors.kernels import backends as fast
fast.MIN_ENTRIES = 1 << 62  # a compiler, loaded for large merges, takes what it takes whatever their number
ties_peft.merge(sys.argv[3:], rank=16, method=sys.argv[1], space=sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_megabytes(folders: list[Path], method: str = "ties", space: str = "delta") -> float:
    """Peak resident memory of a process that merges the adapters."""
    command = [sys.executable, "-c", PROGRAM, method, space, *map(str, folders)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # each thread's own heap is what glibc makes of it
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=alone)
    return int(ran.stdout) / 1024


def test_a_further_adapter_costs_less_than_a_megabyte(make_lora: Callable[..., Path]) -> None:
    folders = [make_lora(f"a{n}", rank=16, alpha=16, seed=n, shapes=SHAPES) for n in range(64)]
    few, many = peak_megabytes(folders[:4]), peak_megabytes(folders)
    assert (many - few) / 60 < 1.0, f"4 adapters: {few:.0f} MB, 64: {many:.0f} MB"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "space"), [("task_arithmetic", "delta"), ("ties", "delta"), ("average", "core")])
def test_of_many_adapters_each_costs_little_more_than_its_factors(
    make_lora: Callable[..., Path], method: str, space: str
) -> None:
    """From 64 on they have more columns than a side, which has its own, fixed cost."""
    folders = [make_lora(f"a{n}", rank=16, seed=n, shapes={"layers.0.q": (1024, 1024)}) for n in range(256)]
    few, many = (peak_megabytes(some, method, space) for some in (folders[:96], folders))
    own = 2 * 1024 * 16 * 4 / 1e6
    assert (many - few) / 160 < 1.5 * own, f"96 adapters: {few:.0f} MB, 256: {many:.0f} MB"
