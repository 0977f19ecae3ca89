"""Synthetic adapters that behave like trained ones, and a way to read what a step cost."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


def factors(rows: int, columns: int, rank: int, seed: int, shared_seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A): a decaying spectrum, rows and columns of unequal gain, half of the signal shared by all adapters."""
    own, common = (torch.Generator().manual_seed(s) for s in (seed + 1, shared_seed))
    gains = torch.randn(rows, generator=common).div(2).exp(), torch.randn(columns, generator=common).div(2).exp()
    base_b, base_a = torch.randn(rows, rank, generator=common), torch.randn(rank, columns, generator=common)
    B = (base_b + torch.randn(rows, rank, generator=own)) * gains[0].unsqueeze(1) * 0.8 ** torch.arange(rank)
    A = (base_a + torch.randn(rank, columns, generator=own)) * gains[1]
    return B / rows**0.5, A / columns**0.5


def write_adapters(
    folder: Path,
    count: int,
    shapes: Mapping[str, tuple[int, int]],
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> list[Path]:
    """Adapters on disk, as PEFT writes them, alpha = r."""
    paths = []
    for number in range(count):
        tensors = {}
        for place, (name, (rows, columns)) in enumerate(shapes.items()):
            B, A = factors(rows, columns, rank, seed=1000 * place + number, shared_seed=1000 * place)
            tensors[f"{PREFIX}{name}.lora_B.weight"] = B.to(dtype)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = A.to(dtype)
        path = folder / f"adapter-{number}"
        path.mkdir(parents=True)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(shapes)}
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        paths.append(path)
    return paths


@dataclass
class Cost:
    """What a step took: wall seconds, and megabytes by which it raised the process's peak."""

    seconds: float = 0.0
    megabytes: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure the block; the peak only ever rises, so measure the lean step before the greedy one."""
    cost = Cost()
    before, start = peak(), time.perf_counter()
    yield cost
    cost.seconds, cost.megabytes = time.perf_counter() - start, peak() - before


def peak() -> float:
    """The process's peak resident memory so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    """A line that says where the figures come from."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"
