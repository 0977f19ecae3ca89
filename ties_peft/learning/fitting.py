"""Fitting: Adam on the student's numbers, stopped by rows that it does not learn from.

A fifth of every teacher's rows is held back. Each step takes a batch of one teacher; every so often the
mean divergence on the held-back rows is measured, and the numbers that did best are what counts. A
fit that makes it much worse, or not a number, starts again with a quarter of the step, so that the
rate needs no care: it is a share of the numbers' own size (see `Student.unit`).

The plan of batches depends on the seed alone, and all else on the vectors that `FitState` holds and on the number of
threads, which `distil` fixes; so a fit that was stopped and goes on gives the same bits as one that was not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..evaluation.scorers import Progress
from .checkpoint import Checkpoint
from .student import Student
from .teachers import Teacher

BETAS = (0.9, 0.99)
EPSILON = 1e-12
WARMUP_STEPS = 10  # steps until the full rate
VALIDATIONS = 12  # times that the held-back rows are measured
PATIENCE = 4  # looks without a better one before it stops
DIVERGED = 1.5  # times the start's divergence: too large a step
MAX_RETRIES = 3
HELD_OUT = 5  # one row in so many is held back
POOLED_BATCHES = 8  # batches among whose rows those of like length are put together


@dataclass(frozen=True)
class FitOptions:
    """How a fit is done.

    Attributes:
        steps: at most.
        rate: the largest step of a number, as a share of its unit.
        batch: rows in a step.
        seed: of the batches, and of which rows are held back.
        threads: of an operation of torch; it decides how sums are rounded.
    """

    steps: int
    rate: float
    batch: int
    seed: int
    threads: int = 1


@dataclass
class FitState:
    """A fit on its way.

    Attributes:
        step: how many are done.
        rate: in force.
        flat, mean, square: the numbers and Adam's moments, (n,) each.
        best: the numbers that did best, (n,).
        lowest: their divergence.
        retries: how often the rate was lowered.
        history: (step, divergence on the held-back rows), the start first.
    """

    step: int
    rate: float
    flat: Tensor
    mean: Tensor
    square: Tensor
    best: Tensor
    lowest: float
    retries: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)


def split_rows(teachers: Sequence[Teacher], seed: int) -> list[tuple[list[int], list[int]]]:
    """For each teacher the rows to learn from and those held back, both sorted."""
    parts = []
    for number, teacher in enumerate(teachers):
        order = list(range(len(teacher.sequences)))
        random.Random(f"{seed} held {number}").shuffle(order)
        count = max(1, len(order) // HELD_OUT)
        parts.append((sorted(order[count:]), sorted(order[:count])))
    return parts


def batch_plan(
    teachers: Sequence[Teacher], rows: Sequence[Sequence[int]], options: FitOptions
) -> list[tuple[int, list[int]]]:
    """For each step the teacher and its rows: every teacher in turn, every row before one comes again.

    Rows of like length share a batch. Every teacher has the same number of steps, whatever its rows.
    """
    queues: list[list[list[int]]] = [[] for _ in teachers]
    draws = [random.Random(f"{options.seed} batches {number}") for number in range(len(teachers))]
    turns = random.Random(f"{options.seed} turns")
    plan: list[tuple[int, list[int]]] = []
    while len(plan) < options.steps:
        for number in turns.sample(range(len(teachers)), len(teachers)):
            if not queues[number]:
                queues[number] = _epoch(teachers[number], rows[number], options.batch, draws[number])
            plan.append((number, queues[number].pop()))
    return plan[: options.steps]


def fit(
    student: Student, teachers: Sequence[Teacher], options: FitOptions, checkpoint: Checkpoint, progress: Progress
) -> FitState:
    """Fit the student to its teachers.

    Args:
        student: on no bench yet; it holds the best numbers afterwards.
        teachers: their predictions kept.
        options: how.
        checkpoint: where the state is saved, and may come from.
        progress: called as progress(stage, done, of).
    Returns: the last state; its history starts with the start's own divergence.
    """
    parts = split_rows(teachers, options.seed)
    plan = batch_plan(teachers, [learnt for learnt, _ in parts], options)
    held = [kept for _, kept in parts]
    interval = max(5, math.ceil(options.steps / VALIDATIONS))
    with student.attached():
        state = load_state(checkpoint, student) or _start_state(student, teachers, held, options)
        student.set(state.flat)
        while state.step < options.steps and not _stopped_early(state):
            _step(student, teachers, plan[state.step], state, options)
            if state.step % interval == 0 or state.step == options.steps:
                _validate(student, teachers, held, state)
                save_state(checkpoint, state)
            progress("distil", state.step, options.steps)
    student.set(state.best)
    return state


def divergence(teachers: Sequence[Teacher], held: Sequence[Sequence[int]]) -> float:
    """The mean over teachers of the mean divergence on some rows of each."""
    return sum(teacher.measure(rows)[0] for teacher, rows in zip(teachers, held, strict=True)) / len(teachers)


def load_state(checkpoint: Checkpoint, student: Student) -> FitState | None:
    """The state that an earlier run left, if it did."""
    found = checkpoint.read("fit")
    if found is None:
        return None
    tensors, facts = found
    held: dict[str, Any] = {name: tensor.to(student.flat.device) for name, tensor in tensors.items()}
    facts["history"] = [(int(step), float(value)) for step, value in facts["history"]]
    return FitState(**held, **facts)


def save_state(checkpoint: Checkpoint, state: FitState) -> None:
    """Keep a state."""
    tensors = {name: getattr(state, name) for name in ("flat", "mean", "square", "best")}
    facts = {name: getattr(state, name) for name in ("step", "rate", "lowest", "retries", "history")}
    checkpoint.write("fit", tensors, facts)


def _start_state(
    student: Student, teachers: Sequence[Teacher], held: Sequence[Sequence[int]], options: FitOptions
) -> FitState:
    start = divergence(teachers, held)
    nothing = torch.zeros_like(student.flat)
    return FitState(
        0, options.rate, student.flat.clone(), nothing, nothing.clone(), student.flat.clone(), start, 0, [(0, start)]
    )


def _step(
    student: Student, teachers: Sequence[Teacher], batch: tuple[int, list[int]], state: FitState, options: FitOptions
) -> None:
    """One step of Adam, with a warm-up and then a cosine down to nothing."""
    number, places = batch
    teacher = teachers[number]
    student.gradient.zero_()
    width = teacher.micro_batch(len(places))
    with teacher.own_head():
        for start in range(0, len(places), width):
            loss = teacher.compare(places[start : start + width]).divergence.sum() / len(places)
            loss.backward()  # type: ignore[no-untyped-call]
    state.step += 1
    share = min(1.0, state.step / WARMUP_STEPS) * (1 + math.cos(math.pi * (state.step - 1) / options.steps)) / 2
    with torch.no_grad():
        for moment, value, beta in zip(
            (state.mean, state.square), (student.gradient, student.gradient.square()), BETAS, strict=True
        ):
            moment.lerp_(value, 1 - beta)
        size = (state.square / (1 - BETAS[1] ** state.step)).sqrt_().add_(EPSILON)
        student.flat -= state.rate * share * student.unit * (state.mean / (1 - BETAS[0] ** state.step)) / size
    state.flat = student.flat


def _validate(student: Student, teachers: Sequence[Teacher], held: Sequence[Sequence[int]], state: FitState) -> None:
    """Measure the held-back rows; keep what is best, or start again with a smaller step."""
    now = divergence(teachers, held)
    state.history.append((state.step, now))
    if now < state.lowest:
        state.lowest, state.best = now, student.flat.clone()
    elif not now <= DIVERGED * state.history[0][1] and state.retries < MAX_RETRIES:
        state.retries, state.rate, state.step = state.retries + 1, state.rate / 4, 0
        student.set(state.best)
        state.mean.zero_()
        state.square.zero_()


def _stopped_early(state: FitState) -> bool:
    """Whether the last looks brought nothing better."""
    since = [value for _, value in state.history[-PATIENCE:]]
    return len(state.history) > PATIENCE and state.lowest < min(since)


def _epoch(teacher: Teacher, rows: Sequence[int], batch: int, draw: random.Random) -> list[list[int]]:
    """One pass over the rows, in batches of like length, in random order."""
    order = draw.sample(list(rows), len(rows))
    found = []
    for start in range(0, len(order), batch * POOLED_BATCHES):
        pool = sorted(order[start : start + batch * POOLED_BATCHES], key=lambda place: len(teacher.sequences[place]))
        found += [pool[at : at + batch] for at in range(0, len(pool), batch)]
    draw.shuffle(found)
    return found
