"""Make synthetic adapters that behave like trained ones, and measure the time and memory of a step."""

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
    """Return (B, A) with a decaying spectrum and rows and columns of unequal norm; half is shared by all adapters."""
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
    """Write adapters as PEFT writes them, with alpha = r."""
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
    """The wall seconds of a step, and the megabytes by which it raised the peak memory of the process."""

    seconds: float = 0.0
    megabytes: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure a `with` block. The peak never falls, so a step of less memory must be measured before one of more."""
    cost = Cost()
    before, start = peak(), time.perf_counter()
    yield cost
    cost.seconds, cost.megabytes = time.perf_counter() - start, peak() - before


def peak() -> float:
    """Return the peak resident memory of the process so far, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    """Describe the machine and the versions, in one line."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"
