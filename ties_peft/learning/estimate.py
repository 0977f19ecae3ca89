"""Estimate the time and the memory of a distillation before it starts, from one step that is measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..evaluation.scorers import BATCH
from .fitting import Fit
from .module_outputs import ModuleInputs
from .teachers import Teacher

PRINTED_FROM = 10.0  # seconds; shorter work is not announced
ADAM_COPIES = 5  # of the fitted parameters: two moments, the best ones, and two while a state is saved


@dataclass(frozen=True)
class Estimate:
    """What a distillation will take at most; a fit that stops early takes less.

    Attributes:
        steps: at most.
        forward_tokens: that pass through the model without gradients: teachers and held-out rows, padding included.
        trained_tokens: that pass through it forwards and backwards, padding included.
        cache_bytes: of the teachers' predictions.
        seconds: on this machine as busy as it is now.
        memory: bytes, the largest amount that this process will have used; None where it cannot be measured.
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
    """Measure one step on the largest part of a batch of a fit, and return what all of the work will take.

    With a closed form (see `module_outputs`) Gram matrices are held and the start is measured twice more; to add a token
    to them takes about as long as to pass it through the model.

    The parameters stay as they are; the gradients that the step leaves are set to 0 by the fit.
    """
    trained = [_padded(fit.teachers[number], rows, len(rows)) for number, rows in fit.batches]
    held = sum(_padded(teacher, rows) for teacher, rows in zip(fit.teachers, fit.held_out, strict=True))
    taught = sum(_padded(teacher, range(len(teacher.sequences))) for teacher in fit.teachers)
    # the start, each validation, and at the end the start and the result as they are written
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
    parts = [
        (fit.teachers[number], part) for number, rows in fit.batches for part in _parts(fit.teachers[number], rows)
    ]
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


def _parts(teacher: Teacher, rows: Sequence[int]) -> list[list[int]]:
    return teacher.parts(rows, len(rows))


def _padded(teacher: Teacher, rows: Sequence[int], size: int = BATCH) -> int:
    """Return the tokens of some rows, as many as the longest for each row in the parts that are run at once."""
    return sum(len(part) * max(len(teacher.sequences[row]) for row in part) for part in teacher.parts(rows, size))


def _now(device: torch.device) -> float:
    """Return the time when all work on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int | None:
    """Return the bytes that this process has used at most: of the GPU if it is used, else of the machine."""
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
