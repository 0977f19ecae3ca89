"""Divide a large task vector into tiles of rows, and compute them in several threads.

A tile is small enough to stay in a core's cache. The tiles depend on the shape, the sort of device and the kernels in
use, never on the number of threads, and one thread computes a tile alone: any number of threads gives the same bits.
Each thread reuses its buffers, because new memory costs more than the arithmetic that is done in it.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .kernels.backends import TorchKernels

TILE = 1 << 18  # entries of a tile, about: a megabyte in float32; with smaller ones threads wait for each other
DEVICE_TILE = 1 << 22  # entries of a tile on another device, where a smaller operation takes no less time
Result = TypeVar("Result")


def empty(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return new float32 memory; on the CPU from NumPy, whose large pages are there ten times as fast."""
    return (
        torch.from_numpy(np.empty(tuple(shape), np.float32))
        if device.type == "cpu"
        else torch.empty(*shape, device=device)
    )


@dataclass(frozen=True)
class Tile:
    """Select some rows of a part.

    Attributes:
        number: in the grid of tiles.
        rows: (start, stop).
        out: memory that the result may be written into, of their shape.
    """

    number: int
    rows: tuple[int, int]
    out: Tensor | None = None


class ThreadPool:
    """Run threads that work through tiles, each with its own scratch memory.

    Attributes:
        threads: their number.
        kernels: what reads, counts and merges the entries of a tile.
    """

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self.kernels = TorchKernels()
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._local = threading.local()
        self._process = os.getpid()

    def tiles(self, shape: Sequence[int], device: torch.device) -> list[tuple[int, int]]:
        """Return the row ranges (start, stop) of the tiles of a shape on a device, in order."""
        length, width = shape[0], shape[1] if len(shape) > 1 else 1
        entries = TILE * self.kernels.tiles if device.type == "cpu" else DEVICE_TILE
        step = max(1, entries // max(1, width))
        return [(start, min(start + step, length)) for start in range(0, length, step)]

    def map(self, work: Callable[..., Result], items: Sequence[object], one_thread: bool = False) -> list[Result]:
        """Return work(item) for every item, in order.

        Args:
            work: called by several threads.
            items: each goes to the next thread that is free.
            one_thread: call it in this thread alone: where there is little work, and for tiles on another device, which
                computes one after the other in any case and then needs memory for the buffers of one thread only.
        """
        if self._pool is None or len(items) < 2 or one_thread:
            return [work(item) for item in items]
        results: list[Any] = [None] * len(items)
        # Every thread takes its next item from here. A future for each item would cost as much as the item.
        places = iter(range(len(items)))

        def work_on_items() -> None:
            try:
                for place in places:
                    results[place] = work(items[place])
            except BaseException:
                for _ in places:  # leave no item to the other threads
                    pass
                raise

        for thread in [self._pool.submit(work_on_items) for _ in range(min(self.threads, len(items)))]:
            thread.result()
        return results

    def submit(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Start work in another thread; return a function that waits for its result.

        If there is no other thread, that function does the work.
        """
        return work if self._pool is None else self._pool.submit(work).result

    def scratch(self, purpose: str, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return a float32 buffer of this thread, which holds what its last use left there.

        Args:
            purpose: a name; buffers of two purposes do not overlap.
            shape: of the buffer.
            device: that holds it.
        """
        count = math.prod(shape)
        buffers: dict[tuple[str, torch.device], Tensor] = self._local.__dict__.setdefault("buffers", {})
        flat = buffers.get((purpose, device))
        if flat is None or flat.numel() < count:
            flat = torch.empty(count, dtype=torch.float32, device=device)
            buffers[purpose, device] = flat
        return flat[:count].view(*shape)

    @property
    def usable(self) -> bool:
        """Whether it has as many threads as torch would use now, in this process: a fork has no threads."""
        return self.threads == max(1, torch.get_num_threads()) and self._process == os.getpid()

    def close(self) -> None:
        """End the threads and free their memory."""
        if self._pool is not None:
            self._pool.shutdown()


@contextmanager
def thread_pool(kept: list[ThreadPool] | None = None, kernels: TorchKernels | None = None) -> Iterator[ThreadPool]:
    """Provide as many threads as torch would use, while torch uses one thread in each; restore its setting afterwards.

    Args:
        kept: a list of the pool of an earlier call, which is reused with its memory, or an empty one; it then holds
            this call's pool. None to close the pool afterwards.
        kernels: what reads, counts and merges the entries of a tile; torch by default.

    One thread per operation makes a result independent of the number of threads. On tiles it is also faster: a parallel
    region for 0.1 ms of work costs as much as the work.
    """
    pool = kept[0] if kept and kept[0].usable else ThreadPool(torch.get_num_threads())
    pool.kernels = kernels or TorchKernels()
    if kept is not None:
        kept[:] = [pool]
    try:
        with threads_fixed(), full_precision():
            yield pool
    finally:
        if kept is None:
            pool.close()


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply in full float32 on a GPU, never in TF32; restore the process's setting afterwards."""
    matmul: Any = torch.backends.cuda.matmul
    name, full = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)


@contextmanager
def threads_fixed(count: int = 1) -> Iterator[None]:
    """Let torch use so many threads in an operation, so that a sum has the same bits on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
