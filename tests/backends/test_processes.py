"""Several processes make the same bytes as one; a lost one ends the job and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ties_peft.adapters.adapter import Adapter, check_adapters
from ties_peft.adapters.tensors import SafetensorsFile
from ties_peft.task_vectors.processes import SINGLE_PROCESS, ProcessGroup

SHAPES = {"layers.0.q": (37, 53), "layers.0.up": (90, 61), "layers.1.q": (24, 24)}
LEAVES = "import torch.distributed as d; d.init_process_group('gloo')"  # connects, and is gone


def start(arguments: list[str], number: int, size: int, port: int) -> subprocess.Popen[str]:
    """One process of a job, told its number as torchrun tells it."""
    launcher = {"RANK": str(number), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    given = {**os.environ, **launcher, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen([sys.executable, *arguments], env=given, stdout=-1, stderr=-1, text=True)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def command(folders: list[Path], out: Path, *more: str) -> list[str]:
    return ["-m", "ties_peft", "merge", *map(str, folders), "--out", str(out), *more]


@pytest.fixture
def folders(make_lora: Callable[..., Path]) -> list[Path]:
    few = dict(list(SHAPES.items())[:2])
    return [make_lora(f"a{n}", rank=4, seed=n, shapes=few if n == 1 else SHAPES) for n in range(3)]


SETTINGS = [["--scope", "adapter"], ["--scope", "module"], ["--space", "core"], ["--method", "pcb"]]


@pytest.mark.parametrize("more", [SETTINGS[0], *(pytest.param(more, marks=pytest.mark.slow) for more in SETTINGS[1:])])
def test_two_processes_write_the_same_bytes_as_one(folders: list[Path], tmp_path: Path, more: list[str]) -> None:
    subprocess.run([sys.executable, *command(folders, tmp_path / "one", *more)], check=True, capture_output=True)
    port = free_port()
    both = [start(command(folders, tmp_path / "two", *more), number, 2, port) for number in range(2)]
    spoken = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], spoken
    assert "written to" in spoken[0][0] and spoken[1] == ("", ""), spoken
    for name in ("adapter_model.safetensors", "adapter_config.json", "recipe.yaml", "provenance.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_lost_process_ends_the_job_with_a_message_and_no_output(folders: list[Path], tmp_path: Path) -> None:
    port = free_port()
    lost = start(["-c", LEAVES], 1, 2, port)
    stays = start(command(folders, tmp_path / "out"), 0, 2, port)
    lost.communicate(timeout=120)
    out, error = stays.communicate(timeout=120)
    assert (stays.returncode, out) == (2, "")
    assert error.startswith("error: process 0 of 2 lost another one") and "Traceback" not in error, error
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []


@pytest.mark.parametrize("place", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_damaged_adapter_is_named_whichever_process_looked_at_it(
    folders: list[Path], tmp_path: Path, place: int
) -> None:
    weights = folders[place] / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    port = free_port()
    both = [start(command(folders, tmp_path / "out"), number, 2, port) for number in range(2)]
    spoken = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [2, 2], spoken
    for out, error in spoken:
        assert out == "" and error.startswith(f"error: adapter '{folders[place]}' holds NaN"), spoken
    assert not (tmp_path / "out").exists()


def test_each_file_is_looked_through_by_one_process(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: set[str] = set()
    plain = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: (read.add(self.label), plain(self, name))[1])
    given: dict[int, Any] = {}

    class Half(ProcessGroup):
        def gather(self, value: Any) -> list[Any]:
            given[self.number] = value
            return [given.get(number, value * 2) for number in range(self.size)]

    opened = {number: [Adapter.load(folder) for folder in folders] for number in (1, 0)}
    seen = {}
    for number, adapters in opened.items():
        read.clear()
        check_adapters(adapters, Half(number, 2))
        seen[number] = sorted(read)
    assert seen == {1: [str(folders[1])], 0: [str(folders[0]), str(folders[2])]}
    read.clear()
    assert [(a.digest, a.norm()) for a in opened[0]] == [
        (a.digest, a.norm()) for a in (Adapter.load(folder) for folder in folders)
    ]


def test_modules_are_shared_by_cost_each_once() -> None:
    costs = {"a": 5.0, "b": 1.0, "c": 4.0, "d": 2.0, "e": 5.0}
    shares = [ProcessGroup(number, 2).share(costs) for number in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(costs)
    assert [sum(costs[name] for name in share) for share in shares] == [9.0, 8.0]
    assert SINGLE_PROCESS.share(costs) == list(costs)
    assert SINGLE_PROCESS.gather("x") == ["x"]
