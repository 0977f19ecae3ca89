"""Estimate the time and the memory of a distillation before it starts, from one step that is measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..evaluation import BATCH_SIZE
from .fitting import Fit
from .module_outputs import ModuleInputs
from .teachers import Teacher

PRINTED_FROM = 10.0  # seconds; the estimate of shorter work is not printed
ADAM_COPIES = 5  # of the fitted parameters: two moments, the best ones, and two while a state is saved


@dataclass(frozen=True)
class Estimate:
    """The largest time and memory that a distillation can take; a fit that stops early takes less.

    Attributes:
        steps: the largest number.
        forward_tokens: that pass through the model without gradients, of teachers and held-out rows, with padding.
        trained_tokens: that pass through it forwards and backwards, with padding.
        cache_bytes: of the teachers' predictions.
        seconds: on this machine with its present load.
        memory: the peak of this process in bytes; None where it cannot be measured.
    """

    steps: int
    forward_tokens: int
    trained_tokens: int
    cache_bytes: int
    seconds: float
    memory: int | None

    def __str__(self) -> str:
        memory = "" if self.memory is None else f", {self.memory / 1e9:.1f} GB of memory"
        return (
            f"distil: {self.steps} steps, about {_duration(self.seconds)}{memory}, of which the teachers' predictions take "
            f"{self.cache_bytes / 1e6:.1f} MB"
        )


def estimate(fit: Fit, closed_form: bool = False) -> Estimate:
    """Measure a forward and a backward pass over the largest part of a batch, and return the time and memory of the whole.

    The parameters stay as they are; the fit sets the gradients to 0 before its first step. With a closed form (see
    `module_outputs`) there are Gram matrices in memory and two more measurements of the held-out rows, and adding a token
    to the matrices takes about as long as passing it through the model.
    """
    trained = [_padded(fit.teachers[number], rows, len(rows)) for number, rows in fit.batches]
    held = sum(_padded(teacher, rows) for teacher, rows in zip(fit.teachers, fit.held_out, strict=True))
    taught = sum(_padded(teacher, range(len(teacher.sequences))) for teacher in fit.teachers)
    # of the start, at each validation, and at the end of the start and the result as they are written
    measured = (1 + fit.validations + 2 + 2 * closed_form) * held
    forward_seconds, step_seconds = _measure_step(fit)
    cache = sum(teacher.cache_bytes for teacher in fit.teachers)
    parameters = sum(p.numel() * p.element_size() for p in fit.student.parameters.values())
    bench = fit.student.bench
    grams = ModuleInputs.bytes_needed(bench, fit.student.start.modules) if closed_form else 0
    peak = _peak_memory(bench.device)
    return Estimate(
        steps=fit.options.steps,
        forward_tokens=taught + measured,
        trained_tokens=sum(trained),
        cache_bytes=cache,
        seconds=(taught * (1 + closed_form) + measured) * forward_seconds + sum(trained) * step_seconds,
        memory=None if peak is None else peak + cache + max(grams, ADAM_COPIES * parameters),
    )


def print_estimate(found: Estimate) -> None:
    """Print an estimate on standard error, unless the work is short."""
    if found.seconds >= PRINTED_FROM:
        print(found, file=sys.stderr)


def _measure_step(fit: Fit) -> tuple[float, float]:
    """Return the seconds per token of a forward pass, and of a forward and a backward pass, on the largest part of a batch."""
    batches = [(fit.teachers[number], rows) for number, rows in fit.batches]
    parts = [(teacher, part) for teacher, rows in batches for part in teacher.parts(rows, len(rows))]
    teacher, rows = max(parts, key=lambda part: _padded(part[0], part[1], len(part[1])))
    device = fit.student.bench.device
    with fit.student.attached(), teacher.own_head(), torch.enable_grad():
        teacher.outputs(rows)  # the first pass allocates memory
        started = _now(device)
        output = teacher.outputs(rows)
        forward = _now(device)
        output.float().log_softmax(-1).mean().backward()  # type: ignore[no-untyped-call]
        done = _now(device)
    tokens = _padded(teacher, rows, len(rows))
    return (forward - started) / tokens, (done - started) / tokens


def _padded(teacher: Teacher, rows: Sequence[int], size: int = BATCH_SIZE) -> int:
    """Return the number of tokens of some rows, each padded to the longest row of the part that is run at once."""
    return sum(len(part) * max(len(teacher.sequences[row]) for row in part) for part in teacher.parts(rows, size))


def _now(device: torch.device) -> float:
    """Return the present time, after all work on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int | None:
    """Return the peak memory of this process so far in bytes: of the GPU if the model is there, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
