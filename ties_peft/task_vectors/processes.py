"""Processes: one merge by several processes, on any number of machines; a no-op when alone.

`torchrun -m ties_peft merge …` and `accelerate launch -m ties_peft merge …` start the processes and tell
each its number; there is no scheduler here. The modules are shared out by cost, and what all must know
is gathered. Every module is computed by one process as it would be alone, and what is gathered does not
depend on who sends it, so that the result has the same bytes for any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import ProcessError, one_line

Value = TypeVar("Value")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that work on one merge.

    Attributes:
        number: of this one, from 0.
        size: how many there are.
    """

    number: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.number == 0

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """The names that are this process's, in their order: the dearest first to whoever has least to do.

        Law: every name is one process's, and every process knows whose.
        """
        loads = [0.0] * self.size
        owners = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += costs[name]
        return [name for name in costs if owners[name] == self.number]

    def gather(self, value: Value) -> list[Value]:
        """What each process gives, by their numbers; all must ask, in the same order.

        Raises: ProcessError where one of them is gone.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.number} of {self.size} lost another one ({one_line(error)}). "
                "Nothing was written; what the other one said last tells why. Start the job again."
            ) from None
        return values


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The processes that a launcher started together, connected through gloo; alone without one.

    A launcher is known by the variables it sets: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or "RANK" not in os.environ:
        yield SINGLE_PROCESS
        return
    try:
        dist.init_process_group("gloo")
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the {size} processes could not connect: {one_line(error)}. Start them with torchrun or accelerate launch."
        ) from None
    try:
        yield ProcessGroup(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
