"""Tiles: the fixed row blocks in which a large task vector is worked on, and the threads that do it.

A tile is small enough to stay in a core's cache. The grid depends on the shape, on the sort of device and
on what loops work through it, never on the number of threads, and every tile is computed by one thread:
hence the same bits for any number of threads. Buffers belong to a thread and are used again, because
fresh memory costs more than the arithmetic done in it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .kernels.backends import Kernels

TILE = 1 << 18  # entries a tile holds, about: a megabyte in float32; smaller ones make threads wait for each other
KERNEL_TILES = (
    2  # times as many for compiled loops, which hold a few of them at a time and read some factors anew for each
)
DEVICE_TILE = 1 << 22  # on another device, where an operation on less takes as long as asking for it
Result = TypeVar("Result")


def tiles(shape: Sequence[int], device: torch.device, tall: int = 1) -> list[tuple[int, int]]:
    """The row ranges (start, stop) of a shape's tiles on a device, in order; whole rows, at least one each.

    Args:
        tall: how many times as large as others they are on the CPU.
    """
    length = shape[0]
    width = shape[1] if len(shape) > 1 else 1
    step = max(1, (tall * TILE if device.type == "cpu" else DEVICE_TILE) // max(1, width))
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def empty(shape: Sequence[int], device: torch.device) -> Tensor:
    """New float32 memory; large memory by NumPy, which asks for large pages: they come ten times as fast."""
    return (
        torch.from_numpy(np.empty(tuple(shape), np.float32))
        if device.type == "cpu"
        else torch.empty(*shape, device=device)
    )


class ThreadPool:
    """A few threads that work through tiles, each with its own scratch memory.

    Attributes:
        threads: how many.
        kernels: the compiled functions that they run; None for torch's.
    """

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self.kernels: Kernels | None = None
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._local = threading.local()
        self._process = os.getpid()

    def tiles(self, shape: Sequence[int], device: torch.device) -> list[tuple[int, int]]:
        """The tiles in which it works through a shape."""
        return tiles(shape, device, 1 if self.kernels is None else KERNEL_TILES)

    def map(self, work: Callable[..., Result], items: Sequence[object], little: bool = False) -> list[Result]:
        """work(item) for every item; results in the items' order whatever thread made them.

        Where it is `little` all together, it is done here before others would have woken up.
        """
        if self._pool is None or len(items) < 2 or little:
            return [work(item) for item in items]
        results: list[Any] = [None] * len(items)
        turns = iter(range(len(items)))  # whoever is free takes the next: a future for each would cost as much as it

        def take() -> None:
            try:
                for turn in turns:
                    results[turn] = work(items[turn])
            except BaseException:
                for _ in turns:  # nothing more to do for anybody
                    pass
                raise

        for thread in [self._pool.submit(take) for _ in range(min(self.threads, len(items)))]:
            thread.result()
        return results

    def submit(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Have one thread do something while the others go on; what comes back waits for it.

        Where there are no others it is done then.
        """
        return work if self._pool is None else self._pool.submit(work).result

    def scratch(self, name: str, shape: Sequence[int], like: torch.device) -> Tensor:
        """A float32 buffer of this thread, its content left from the last use."""
        count = 1
        for length in shape:
            count *= length
        held: dict[tuple[str, torch.device], Tensor] = self._local.__dict__.setdefault("held", {})
        flat = held.get((name, like))
        if flat is None or flat.numel() < count:
            flat = torch.empty(count, dtype=torch.float32, device=like)
            held[name, like] = flat
        return flat[:count].view(*shape)

    @property
    def usable(self) -> bool:
        """Whether it is as many threads as torch would use now, and they are this process's: a fork has none."""
        return self.threads == max(1, torch.get_num_threads()) and self._process == os.getpid()

    def close(self) -> None:
        """End the threads and let go of their memory."""
        if self._pool is not None:
            self._pool.shutdown()


@contextmanager
def thread_pool(kept: list[ThreadPool] | None = None, kernels: Kernels | None = None) -> Iterator[ThreadPool]:
    """Threads as many as torch would use, each computing alone; torch's own setting is put back after.

    Args:
        kept: holds those of an earlier call, and then of this one: threads to go on with, and memory that
            is there already, which takes longer to get than to fill. None lets go of them after.
        kernels: the compiled functions that they run.

    One thread per operation is what makes a result independent of the number of threads, and on
    tiles it is also the faster way: a parallel region for 0.1 ms of work costs as much as the work.
    """
    pool = kept[0] if kept and kept[0].usable else ThreadPool(torch.get_num_threads())
    pool.kernels = kernels
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
    """Products on a GPU in full float32, no TF32, whatever the process allows; its own setting is put back after."""
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
    """So many threads to an operation of torch's, so that a sum has the same bits on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
