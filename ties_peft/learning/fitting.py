"""Fitting: Adam on the student's numbers, stopped by rows that it does not learn from.

A fifth of every lesson's rows is held back. Each step takes a batch of one lesson; every so often the
mean divergence on the held-back rows is measured, and the numbers that did best are what counts. A
fit that makes it much worse, or not a number, starts again with a quarter of the step, so that the
rate needs no care: it is a share of the numbers' own size (see `Student.unit`).

The plan of batches depends on the seed alone, and all else on the vectors that `State` holds and on the number of
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
from .checkpoint import Keeper
from .predictions import Lesson
from .student import Student

BETAS = (0.9, 0.99)
EPSILON = 1e-12
WARM = 10  # steps until the full rate
LOOKS = 12  # times that the held-back rows are measured
PATIENCE = 4  # looks without a better one before it stops
WORSE = 1.5  # times the start's divergence: too large a step
RETRIES = 3
HELD = 5  # one row in so many is held back
POOL = 8  # batches among whose rows those of like length are put together


@dataclass(frozen=True)
class Course:
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
class State:
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


def hold_back(lessons: Sequence[Lesson], seed: int) -> list[tuple[list[int], list[int]]]:
    """For each lesson the rows to learn from and those held back, both sorted."""
    parts = []
    for number, lesson in enumerate(lessons):
        order = list(range(len(lesson.sequences)))
        random.Random(f"{seed} held {number}").shuffle(order)
        count = max(1, len(order) // HELD)
        parts.append((sorted(order[count:]), sorted(order[:count])))
    return parts


def batch_plan(lessons: Sequence[Lesson], rows: Sequence[Sequence[int]], course: Course) -> list[tuple[int, list[int]]]:
    """For each step the lesson and its rows: every lesson in turn, every row before one comes again.

    Rows of like length share a batch. Every lesson has the same number of steps, whatever its rows.
    """
    queues: list[list[list[int]]] = [[] for _ in lessons]
    draws = [random.Random(f"{course.seed} batches {number}") for number in range(len(lessons))]
    turns = random.Random(f"{course.seed} turns")
    plan: list[tuple[int, list[int]]] = []
    while len(plan) < course.steps:
        for number in turns.sample(range(len(lessons)), len(lessons)):
            if not queues[number]:
                queues[number] = _epoch(lessons[number], rows[number], course.batch, draws[number])
            plan.append((number, queues[number].pop()))
    return plan[: course.steps]


def fit(student: Student, lessons: Sequence[Lesson], course: Course, keeper: Keeper, tell: Progress) -> State:
    """Fit the student to its lessons.

    Args:
        student: on no bench yet; it holds the best numbers afterwards.
        lessons: their predictions kept.
        course: how.
        keeper: where the state is saved, and may come from.
        tell: called as tell(stage, done, of).
    Returns: the last state; its history starts with the start's own divergence.
    """
    parts = hold_back(lessons, course.seed)
    plan = batch_plan(lessons, [learnt for learnt, _ in parts], course)
    held = [kept for _, kept in parts]
    look = max(5, math.ceil(course.steps / LOOKS))
    with student.on():
        state = load_state(keeper, student) or _first(student, lessons, held, course)
        student.set(state.flat)
        while state.step < course.steps and not _finished(state):
            _learn(student, lessons, plan[state.step], state, course)
            if state.step % look == 0 or state.step == course.steps:
                _look(student, lessons, held, state)
                save_state(keeper, state)
            tell("distil", state.step, course.steps)
    student.set(state.best)
    return state


def divergence(lessons: Sequence[Lesson], held: Sequence[Sequence[int]]) -> float:
    """The mean over lessons of the mean divergence on some rows of each."""
    return sum(lesson.measure(rows)[0] for lesson, rows in zip(lessons, held, strict=True)) / len(lessons)


def load_state(keeper: Keeper, student: Student) -> State | None:
    """The state that an earlier run left, if it did."""
    found = keeper.read("fit")
    if found is None:
        return None
    tensors, facts = found
    held: dict[str, Any] = {name: tensor.to(student.flat.device) for name, tensor in tensors.items()}
    facts["history"] = [(int(step), float(value)) for step, value in facts["history"]]
    return State(**held, **facts)


def save_state(keeper: Keeper, state: State) -> None:
    """Keep a state."""
    tensors = {name: getattr(state, name) for name in ("flat", "mean", "square", "best")}
    facts = {name: getattr(state, name) for name in ("step", "rate", "lowest", "retries", "history")}
    keeper.write("fit", tensors, facts)


def _first(student: Student, lessons: Sequence[Lesson], held: Sequence[Sequence[int]], course: Course) -> State:
    start = divergence(lessons, held)
    nothing = torch.zeros_like(student.flat)
    return State(
        0, course.rate, student.flat.clone(), nothing, nothing.clone(), student.flat.clone(), start, 0, [(0, start)]
    )


def _learn(
    student: Student, lessons: Sequence[Lesson], batch: tuple[int, list[int]], state: State, course: Course
) -> None:
    """One step of Adam, with a warm-up and then a cosine down to nothing."""
    number, places = batch
    lesson = lessons[number]
    student.gradient.zero_()
    width = lesson.split(len(places))
    with lesson.dressed():
        for start in range(0, len(places), width):
            loss = lesson.against(places[start : start + width]).divergence.sum() / len(places)
            loss.backward()  # type: ignore[no-untyped-call]
    state.step += 1
    share = min(1.0, state.step / WARM) * (1 + math.cos(math.pi * (state.step - 1) / course.steps)) / 2
    with torch.no_grad():
        for moment, value, beta in zip(
            (state.mean, state.square), (student.gradient, student.gradient.square()), BETAS, strict=True
        ):
            moment.lerp_(value, 1 - beta)
        size = (state.square / (1 - BETAS[1] ** state.step)).sqrt_().add_(EPSILON)
        student.flat -= state.rate * share * student.unit * (state.mean / (1 - BETAS[0] ** state.step)) / size
    state.flat = student.flat


def _look(student: Student, lessons: Sequence[Lesson], held: Sequence[Sequence[int]], state: State) -> None:
    """Measure the held-back rows; keep what is best, or start again with a smaller step."""
    now = divergence(lessons, held)
    state.history.append((state.step, now))
    if now < state.lowest:
        state.lowest, state.best = now, student.flat.clone()
    elif not now <= WORSE * state.history[0][1] and state.retries < RETRIES:
        state.retries, state.rate, state.step = state.retries + 1, state.rate / 4, 0
        student.set(state.best)
        state.mean.zero_()
        state.square.zero_()


def _finished(state: State) -> bool:
    """Whether the last looks brought nothing better."""
    since = [value for _, value in state.history[-PATIENCE:]]
    return len(state.history) > PATIENCE and state.lowest < min(since)


def _epoch(lesson: Lesson, rows: Sequence[int], batch: int, draw: random.Random) -> list[list[int]]:
    """One pass over the rows, in batches of like length, in random order."""
    order = draw.sample(list(rows), len(rows))
    found = []
    for start in range(0, len(order), batch * POOL):
        pool = sorted(order[start : start + batch * POOL], key=lambda place: len(lesson.sequences[place]))
        found += [pool[at : at + batch] for at in range(0, len(pool), batch)]
    draw.shuffle(found)
    return found
