"""A merge on another device: nothing of it strays to the CPU and back, and the result is the CPU's.

No accelerator is needed: `pretended_device` refuses what one would refuse. What it cannot show is speed, and a device's own
rounding.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from backends.pretended_device import DEVICE, PretendedTensor, pretended_device
from safetensors.torch import save_file
from sampling import covering

import ties_peft
from ties_peft import Merged
from ties_peft.adapters.statistics import Statistics
from ties_peft.methods import method_classes
from ties_peft.task_vectors.tiles import ThreadPool, threads_fixed

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]
UNLIKE = ("lego",)  # it takes rows by a list, which the pretended device cannot place and a real one can
CELLS = [
    (name, space)
    for name, cls in method_classes().items()
    for space in cls.spaces
    if name not in UNLIKE and (space == "delta" or "lora" in cls.kinds)  # (IA)³ has its vectors alone
]


def both(adapters: list[Any], **asked: Any) -> tuple[Merged, Merged, list[int]]:
    """The merge here and there, and how many numbers were brought back at a time."""
    here = ties_peft.merge(adapters, **asked)
    with pretended_device() as traffic:
        there = ties_peft.merge(adapters, device=DEVICE.type, **asked)
    return here, there, traffic.back


def assert_same(here: Merged, there: Merged) -> None:
    assert here.modules == there.modules
    for name in here.modules:
        one, other = here.delta(name), there.delta(name)
        assert type(other) is torch.Tensor
        torch.testing.assert_close(other, one, rtol=0, atol=1e-4 * float(one.abs().max()))
    seen, wanted = there.report.to_dict(), here.report.to_dict()
    assert [line["kept"] for line in seen["adapters"]] == [line["kept"] for line in wanted["adapters"]]
    assert seen["conflict"] == pytest.approx(wanted["conflict"], abs=1e-3)
    for name in here.tensors.names:
        assert type(there.tensors.read(name)) is torch.Tensor


def attach(path: Path, kind: str, seed: int) -> None:
    """Random statistics, written beside an adapter."""
    adapter = ties_peft.Adapter.load(path)
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in adapter.layout.items():
        x = torch.randn(40, module.shape[-1], generator=draw)
        found[name] = x.T @ x / 40 if kind == "gram" else torch.randn(module.shape, generator=draw).square()
    Statistics.make(kind, adapter.digest, found, 40).save(path)


@pytest.mark.parametrize(
    ("method", "space", "rank"),
    covering(
        [(*cell, rank) for cell, rank in product(CELLS, [3, 12])],
        lambda case: (case[0], case[1:], (case[0] in ("ties", "average"), case[1])),
    ),
)
def test_every_method_in_every_space(make_lora: Make, make_ia3: Make, method: str, space: str, rank: int) -> None:
    cls = method_classes()[method]
    lora = "lora" in cls.kinds
    count = 2 if method == "slerp" else 3
    paths = [make_lora(f"a{n}", rank=rank, seed=n) if lora else make_ia3(f"a{n}", seed=n) for n in range(count)]
    for n, path in enumerate(paths):
        if cls.needs:
            attach(path, cls.needs, n)
    rank_asked = {"rank": 8} if lora else {}
    here, there, back = both(list(paths), method=method, space=space, **rank_asked)
    assert back, "nothing was done there"
    assert_same(here, there)


OPTIONS: list[dict[str, Any]] = [
    {"scope": "module"},
    {"elect": "count", "weights": [1, 2, -0.5]},
    {"disjoint": "max"},
    {"method": "dare+ties", "dare.density": 0.5},
    {"method": "ties+iso_c", "space": "core"},
    {"method": "ties", "space": "core", "compress_first": True},
    {"method": "ties", "space": "core", "balanced": False},
    {"weights": "norm", "restore_norm": True, "dtype": "bfloat16"},
]


@pytest.mark.parametrize("asked", OPTIONS)
def test_options(make_lora: Make, asked: dict[str, Any]) -> None:
    paths = [make_lora(f"a{n}", seed=n) for n in range(3)]
    assert_same(*both(list(paths), rank=8, **asked)[:2])


@pytest.mark.parametrize("space", ["delta", "core"])
def test_signs_of_another(make_lora: Make, space: str) -> None:
    paths = [make_lora(f"a{n}", seed=n) for n in range(3)]
    assert_same(*both(list(paths[:2]), rank=8, space=space, sign_from=paths[2])[:2])


def test_ia3(make_ia3: Make) -> None:
    assert_same(*both([make_ia3(f"a{n}", seed=n) for n in range(3)])[:2])


def test_prepared(make_lora: Make) -> None:
    paths = [make_lora(f"a{n}", seed=n) for n in range(3)]
    wanted = ties_peft.merge(paths, space="core", rank=8)
    with pretended_device():
        assert_same(wanted, ties_peft.prepare(paths, space="core", device=DEVICE.type).merge(rank=8))


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_whole_heads(make_lora: Make, tmp_path: Path, method: str) -> None:
    draw = torch.Generator().manual_seed(0)
    head = torch.randn(5, 12, generator=draw)
    base = tmp_path / "base"
    base.mkdir()
    save_file({"score.weight": head}, base / "model.safetensors")
    paths = []
    for n in range(3):
        path = make_lora(f"a{n}", seed=n, modules_to_save=["score"])
        weights = path / "adapter_model.safetensors"
        adapter = ties_peft.Adapter.load(path)
        tensors = {name: adapter.tensors.read(name) for name in adapter.tensors.names}
        own = head + torch.randn(5, 12, generator=draw)
        save_file({**tensors, "base_model.model.score.weight": own}, weights, metadata={"format": "pt"})
        paths.append(path)
    here, there, _ = both(list(paths), method=method, rank=8, heads="merge", base=base)
    assert_same(here, there)
    name = "base_model.model.score.weight"
    torch.testing.assert_close(there.tensors.read(name), here.tensors.read(name))


def test_no_task_vector_comes_back(make_lora: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a sample, the candidates of a threshold and the factors of the result, all of them small."""
    for module in ("task_vectors.threshold", "merging.thresholds"):
        monkeypatch.setattr(f"ties_peft.{module}.SORTED_SIZE", 500)
    paths = [make_lora(f"a{n}", seed=n, shapes={"layers.0.q": (400, 300)}) for n in range(3)]
    for space in ("delta", "core", "knots"):
        here, there, back = both(list(paths), rank=8, space=space)
        assert_same(here, there)
        assert max(back) < 400 * 300 / 8


@pytest.mark.parametrize("method", ["ties", "pcb", "dare"])
def test_memory_does_not_grow_with_the_number_of_threads(
    make_lora: Make, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """One thread computes the tiles on a device, one after another, and so only its buffers are there."""
    monkeypatch.setattr("ties_peft.task_vectors.tiles.DEVICE_TILE", 97)
    for module in ("task_vectors.threshold", "merging.thresholds"):
        monkeypatch.setattr(f"ties_peft.{module}.SORTED_SIZE", 50)
    buffers: dict[int, dict[str, int]] = {}
    scratch = ThreadPool.scratch

    def watched(pool: ThreadPool, name: str, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        if device.type == DEVICE.type:
            of_thread = buffers.setdefault(threading.get_ident(), {})
            of_thread[name] = max(of_thread.get(name, 0), math.prod(shape))
        return scratch(pool, name, shape, device)

    monkeypatch.setattr(ThreadPool, "scratch", watched)
    with threads_fixed(4):
        assert_same(*both([make_lora(f"a{n}", seed=n) for n in range(3)], rank=8, method=method)[:2])
    (largest,) = buffers.values()
    assert all(numbers <= 5 * 97 for numbers in largest.values())  # five sums of one tile


@pytest.mark.parametrize("asked", ["highest", "high"])
def test_a_gpu_multiplies_in_full_precision_whatever_the_process_allows(make_lora: Make, asked: str) -> None:
    matmul, seen = torch.backends.cuda.matmul, []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        paths = [make_lora(f"a{n}", seed=n) for n in range(2)]
        ties_peft.merge(paths, progress=lambda stage, done, of: seen.append(matmul.fp32_precision))
        assert set(seen) == {"ieee"} and torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_pretended_device_refuses_what_a_real_one_would() -> None:
    with pretended_device() as traffic:
        there = torch.ones(3, device=DEVICE.type)
        assert isinstance(there, PretendedTensor) and there.device.type == DEVICE.type
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="numpy"):
            there.numpy()
        assert isinstance(there.mul_(2) + 1, PretendedTensor) and float(there.sum()) == 6
        assert (there.cpu() == 2).all() and traffic.back == [3]
