"""Draw random numbers that depend on the entry they are for, and on nothing else.

Every entry of a task vector has one uniform number, which a counter-based generator computes from (seed, module, part,
digest of the adapter, index of the entry). Any tiling, number of threads or processes, and device therefore give the
same mask.

Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011): Philox.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

BLOCK = 4  # numbers for each value of the counter


def stream_key(seed: int, module: str, part: int, digest: str) -> int:
    """Return the 128-bit key of the random numbers of one part of one module of one adapter."""
    text = f"{seed}\n{module}\n{part}\n{digest}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def uniform(stream: int, start: int, shape: tuple[int, ...]) -> Tensor:
    """Return uniform float32 numbers in [0, 1) for the entries start, start + 1, … of a stream.

    Law: uniform(k, 0, (n,))[a:b] = uniform(k, a, (b − a,)).
    """
    count = int(np.prod(shape))
    skip = start % BLOCK
    raw = np.random.Philox(key=stream, counter=start // BLOCK).random_raw(count + skip)[skip:]
    return torch.from_numpy((raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)
