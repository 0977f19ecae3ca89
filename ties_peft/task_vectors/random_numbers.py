"""Draws: random numbers that depend on what they are for, never on when or where they are drawn.

Every entry of a task vector has its own uniform number, a function of (seed, module, part, adapter's
digest, entry's index) through a counter-based generator. So any tiling, any number of threads or
processes, and any device see the same mask.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011): Philox.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

BLOCK = 4  # numbers that one step of the counter gives


def stream_key(seed: int, module: str, part: int, digest: str) -> int:
    """A 128-bit key for the entries of one part of one module of one adapter."""
    text = f"{seed}\n{module}\n{part}\n{digest}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def uniform(stream: int, start: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform float32 numbers in [0, 1) for the entries start, start + 1, … of a stream.

    Law: uniform(k, 0, (n,))[a:b] = uniform(k, a, (b − a,)).
    """
    count = int(np.prod(shape))
    skip = start % BLOCK
    raw = np.random.Philox(key=stream, counter=start // BLOCK).random_raw(count + skip)[skip:]
    return torch.from_numpy((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)
