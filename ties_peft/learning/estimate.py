"""Estimate the time and the memory of a distillation before it starts, from one step that is measured."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..evaluation.scorers import BATCH
from .fitting import Fit
from .student import Student
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


def estimate(fit: Fit) -> Estimate:
    """Measure one step on the largest batch of a fit, and return what all of the work will take.

    The parameters stay as they are; the gradients that the step leaves are set to 0 by the fit.
    """
    trained = [_padded(fit.teachers[number], rows) for number, rows in fit.batches]
    held = sum(_padded(teacher, rows) for teacher, rows in zip(fit.teachers, fit.held_out, strict=True))
    taught = sum(_padded(teacher, range(len(teacher.sequences))) for teacher in fit.teachers)
    # the start, each validation, and at the end the start and the result as they are written
    measured = (1 + fit.validations + 2) * held
    forward_seconds, step_seconds = _measure_step(fit)
    cache = sum(teacher.cache_bytes for teacher in fit.teachers)
    parameters = sum(p.numel() * p.element_size() for p in fit.student.parameters.values())
    peak = _peak_memory(fit.student.bench.device)
    return Estimate(
        steps=fit.options.steps,
        forward_tokens=taught + measured,
        trained_tokens=sum(trained),
        cache_bytes=cache,
        seconds=(taught + measured) * forward_seconds + sum(trained) * step_seconds,
        memory=None if peak is None else peak + cache + ADAM_COPIES * parameters,
    )


def print_estimate(found: Estimate) -> None:
    """Print an estimate on standard error, unless the work is short."""
    if found.seconds >= PRINTED_FROM:
        print(found, file=sys.stderr)


def _measure_step(fit: Fit) -> tuple[float, float]:
    """Return the seconds per token of a forward pass, and of a forward and a backward pass, on the largest batch."""
    teacher, rows = max(
        ((fit.teachers[number], rows[: fit.teachers[number].micro_batch(len(rows))]) for number, rows in fit.batches),
        key=lambda batch: _padded(*batch),
    )
    bench = fit.student.bench
    inputs = bench.pad_batch([teacher.sequences[row] for row in rows])
    with fit.student.attached(), teacher.own_head(), torch.enable_grad():
        _run(fit.student, inputs)  # the first pass allocates memory
        started = _now(bench.device)
        output = _run(fit.student, inputs)
        forward = _now(bench.device)
        output.float().log_softmax(-1).mean().backward()  # type: ignore[no-untyped-call]
        done = _now(bench.device)
    tokens = inputs["input_ids"].numel()
    return (forward - started) / tokens, (done - started) / tokens


def _run(student: Student, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the output of the model with the student attached."""
    found = student.bench.model(**inputs)
    output: torch.Tensor = found.last_hidden_state if student.bench.form == "encoder" else found.logits
    return output


def _padded(teacher: Teacher, rows: Sequence[int]) -> int:
    """Return the tokens of some rows, as many as the longest for each row in the batches of the teacher's size."""
    lengths = sorted((len(teacher.sequences[row]) for row in rows), reverse=True)
    size = teacher.micro_batch(BATCH)
    return sum(lengths[start] * len(lengths[start : start + size]) for start in range(0, len(lengths), size))


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
