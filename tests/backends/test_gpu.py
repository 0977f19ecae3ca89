"""Merges on a GPU: the CPU's results, the same bytes each time, and memory that does not grow with the threads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ties_peft
from ties_peft.task_vectors.tiles import threads_fixed

ROOT = Path(__file__).parents[2]
Make = Callable[..., Path]
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
WIDE = {"layers.0.q": (512, 384), "layers.1.q": (300, 500)}


def gpu(test: Any) -> Any:
    """Mark a test as one that needs a GPU."""
    for mark in on_gpu:
        test = mark(test)
    return test


def ties_in_float64(deltas: list[np.ndarray], density: float) -> np.ndarray:
    """Return TIES from its definition, each module trimmed on its own."""
    kept = []
    for delta in deltas:
        order = np.argsort(-np.abs(delta).ravel(), kind="stable")
        mask = np.zeros(delta.size, bool)
        mask[order[: int(density * delta.size + 1e-9)]] = True
        kept.append(np.where(mask.reshape(delta.shape), delta, 0))
    stacked = np.stack(kept)
    signs = np.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked * signs > 0
    return (stacked * agree).sum(0) / np.maximum(agree.sum(0), 1)


@gpu
def test_ties_on_a_gpu_is_the_definition(make_lora: Make) -> None:
    paths = [make_lora(f"a{n}", rank=8, seed=n, shapes=WIDE) for n in range(4)]
    merged = ties_peft.merge(paths, density=0.3, scope="module", rank="max", device="cuda")
    for name in merged.modules:
        deltas = [ties_peft.Adapter.load(path).delta(name).double().numpy() for path in paths]
        wanted = ties_in_float64(deltas, 0.3)
        error = np.linalg.norm(merged.delta(name).numpy() - wanted) / np.linalg.norm(wanted)
        assert error < 1e-3, (name, error)


@gpu
@pytest.mark.parametrize("space", ["delta", "core", "knots", "factors"])
def test_two_runs_on_a_gpu_give_the_same_bytes(make_lora: Make, space: str) -> None:
    paths = [make_lora(f"a{n}", rank=8, seed=n, shapes=WIDE) for n in range(4)]
    scope = {"scope": "module"} if space == "factors" else {}
    one, other = (ties_peft.merge(paths, space=space, device="cuda", rank=8, **scope) for _ in range(2))
    assert one.tensors.names == other.tensors.names
    assert all(torch.equal(one.tensors.read(name), other.tensors.read(name)) for name in one.tensors.names)


@gpu
def test_memory_on_a_gpu_does_not_grow_with_the_threads(make_lora: Make) -> None:
    paths = [make_lora(f"a{n}", rank=8, seed=n, shapes={"layers.0.q": (4096, 4096)}) for n in range(2)]
    peaks = []
    for threads in (1, 8):
        torch.cuda.reset_peak_memory_stats()
        with threads_fixed(threads):
            ties_peft.merge(paths, device="cuda", rank=8)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.2 * peaks[0]


@gpu
def test_random_masks_are_those_of_the_cpu(make_lora: Make) -> None:
    paths = [make_lora(f"a{n}", rank=8, seed=n, shapes=WIDE) for n in range(3)]
    here, there = (ties_peft.merge(paths, method="dare", rank="max", seed=7, device=d) for d in ("cpu", "cuda"))
    for name in here.modules:
        torch.testing.assert_close(
            there.delta(name), here.delta(name), rtol=0, atol=1e-4 * here.delta(name).abs().max()
        )


@pytest.mark.slow
def test_the_check_runs_every_stage_and_names_what_failed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    told = json.loads(out.read_text(encoding="utf-8"))
    if not torch.cuda.is_available():  # its tests are skipped, which is a problem
        assert done.returncode == 1, done.stderr
        assert any("skipped" in problem for problem in told["problems"])
    assert told["against the CPU"]["largest relative error"] == 0.0
    assert told["against the CPU"]["relative errors"].keys() >= {
        "ties delta lora",
        "ties core lora",
        "average delta ia3",
    }
    assert told["module"]["core"]["median seconds of the further runs"] > 0
    assert told["model"]["delta"]["peak MB of the process"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_check_writes_nothing_without_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, out.exists()) == (2, False)
    assert "CUDA" in done.stderr
