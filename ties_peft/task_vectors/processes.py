"""Divide one merge among several processes, on any number of machines.

`torchrun -m ties_peft merge …` and `accelerate launch -m ties_peft merge …` start the processes and number them. The
modules are divided by cost. One process computes a module as it would alone, and what all need is gathered in the
processes' order, so that the result has the same bytes for any number of processes.
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
    """Identify this process among those that work on one merge, and pass values between them.

    Attributes:
        number: of this process, from 0.
        size: how many processes there are.
    """

    number: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.number == 0

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """Return the names that this process works on, in their order.

        Names are assigned by falling cost, each to the process with the lowest cost so far.

        Law: every name belongs to one process, and all processes agree on which.
        """
        loads = [0.0] * self.size
        owners = {}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += costs[name]
        return [name for name in costs if owners[name] == self.number]

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all processes, by their numbers; all must call this, in the same order.

        Raises: ProcessError if one of them has ended.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.number} of {self.size} lost another one ({one_line(error)}). "
                "Nothing was written. Read the last output of the other process, and start the job again."
            ) from None
        return values


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """Connect the processes that a launcher started, through gloo; without a launcher there is one process.

    A launcher is recognised by the variables that it sets: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
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
