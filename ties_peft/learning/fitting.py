"""Fit a student to its teachers with Adam, and stop early by held-out rows.

A fifth of every teacher's rows is held out. Each step takes a batch of one teacher. At regular intervals the mean
divergence on the held-out rows is measured, and the parameters with the lowest one are the result. If the divergence
becomes much larger than the start's, or is not a number, the fit restarts from the best parameters with a quarter of
the learning rate. The rate is a share of the size of the parameters (see `Student.parameter_groups`), so it need not be
tuned.

The batches depend on the seed alone, and everything else on the state that `Fit` saves and on the number of threads,
which `distil` sets. So a fit that was stopped and resumed gives the same bits as one that was not.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from ..merging.plan import Progress
from .checkpoint import Checkpoint
from .student import Student
from .teachers import Teacher

BETAS = (0.9, 0.99)
EPSILON = 1e-12
WARMUP_STEPS = 10  # after which the learning rate is the full one
VALIDATIONS = 12  # measurements of the held-out rows in a whole fit
PATIENCE = 4  # validations without an improvement, after which the fit stops
DIVERGED = 1.5  # times the start's divergence; above this the learning rate was too large
MAX_RETRIES = 3
HELD_OUT = 5  # one of this number of rows is held out
POOLED_BATCHES = 8  # batches whose rows are sorted by length together, so that little is padded


@dataclass(frozen=True)
class FitOptions:
    """The options of a fit.

    Attributes:
        steps: the largest number.
        rate: the learning rate, as a share of the size of the parameters.
        batch: rows in a step.
        seed: of the batches, and of the choice of held-out rows.
        threads: of torch's operations, on which the rounding of sums depends.
        weights: of each teacher in the loss and in the divergence on held-out rows; only their ratios matter.
    """

    steps: int
    rate: float
    batch: int
    seed: int
    threads: int = 1
    weights: tuple[float, ...] = ()

    def shares(self, count: int) -> list[float]:
        """Return the weights of `count` teachers, scaled to a mean of 1; all are 1 where none are given."""
        weights = self.weights or (1.0,) * count
        return [weight * count / sum(weights) for weight in weights]


class Fit:
    """A fit in progress.

    Args:
        student: to be fitted.
        teachers: with their predictions set.
        options: of the fit.

    Attributes:
        batches: for each step the number of the teacher and its rows.
        held_out: for each teacher the held-out rows.
        step: the number of steps since the last restart.
        rate: the present learning rate.
        retries: the number of restarts with a lower rate.
        best: the parameters with the lowest divergence on the held-out rows.
        history: (step, divergence on the held-out rows) of the start and of each validation.
    """

    def __init__(self, student: Student, teachers: Sequence[Teacher], options: FitOptions) -> None:
        self.student, self.teachers, self.options = student, teachers, options
        parts = split_rows(teachers, options.seed)
        self.batches = batch_plan(teachers, [learnt for learnt, _ in parts], options)
        self.held_out = [held for _, held in parts]
        self._shares = options.shares(len(teachers))
        self._interval = max(5, math.ceil(options.steps / VALIDATIONS))
        self.retries, self.rate = 0, options.rate
        self.best = student.state_dict()
        self.history: list[tuple[int, float]] = []
        self._restart()

    @property
    def validations(self) -> int:
        """The number of validations of a fit without restarts."""
        return math.ceil(self.options.steps / self._interval)

    def run(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Take the remaining steps; the student has the best parameters afterwards.

        Args:
            checkpoint: where the state is saved at each validation, and read to resume.
            progress: called as progress(stage, done, of).
        """
        steps = self.options.steps
        saved = checkpoint.read("fit")
        if saved is None:
            self.history.append((0, self.divergence()))
        else:
            self._load_state_dict(saved)
        while self.step < steps and not self._stops_early():
            self.take_step()
            if self.step % self._interval == 0 or self.step == steps:
                self._validate()
                checkpoint.write("fit", self._state_dict())
            progress("distil", self.step, steps)
        self.student.load_state_dict(self.best)

    def take_step(self) -> None:
        """Take one step of Adam down the mean divergence of one batch."""
        number, rows = self.batches[self.step]
        teacher = self.teachers[number]
        self._optimiser.zero_grad(set_to_none=False)
        with self.student.attached(), teacher.own_head():
            for part in teacher.parts(rows, len(rows)):
                loss = teacher.compare(part).divergence.sum() / len(rows)
                (self._shares[number] * loss).backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self._schedule.step()
        self.step += 1

    def divergence(self) -> float:
        """Return the weighted mean over teachers of the mean divergence on the held-out rows of each."""
        with self.student.attached():
            teachers = zip(self.teachers, self.held_out, self._shares, strict=True)
            return sum(share * teacher.measure(rows)[0] for teacher, rows, share in teachers) / len(self.teachers)

    def _restart(self) -> None:
        """Start again from the best parameters at the present rate, which warms up and then falls to 0 by a cosine."""
        self.step = 0
        self.student.load_state_dict(self.best)
        groups = self.student.parameter_groups(self.rate)
        self._optimiser = torch.optim.Adam(groups, betas=BETAS, eps=EPSILON)
        self._schedule = LambdaLR(self._optimiser, self._rate_factor)

    def _rate_factor(self, step: int) -> float:
        """Return the factor of the learning rate at a step, counted from 0."""
        return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / self.options.steps)) / 2

    def _validate(self) -> None:
        """Measure the held-out rows; store the parameters if they are the best, or restart with a lower rate."""
        now = self.divergence()
        lowest = min(value for _, value in self.history)
        self.history.append((self.step, now))
        if now < lowest:
            self.best = self.student.state_dict()
        elif not now <= DIVERGED * self.history[0][1] and self.retries < MAX_RETRIES:
            self.retries, self.rate = self.retries + 1, self.rate / 4
            self._restart()

    def _stops_early(self) -> bool:
        """Return whether the last validations brought no improvement."""
        recent = [value for _, value in self.history[-PATIENCE:]]
        return len(self.history) > PATIENCE and min(value for _, value in self.history) < min(recent)

    def _state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the fit depends on."""
        return {
            "step": self.step,
            "rate": self.rate,
            "retries": self.retries,
            "history": self.history,
            "best": self.best,
            "student": self.student.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
        }

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from what `_state_dict` returned."""
        self.rate, self.retries, self.history, self.best = (
            state[key] for key in ("rate", "retries", "history", "best")
        )
        self._restart()
        self.step = state["step"]
        self.student.load_state_dict(state["student"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])


def split_rows(teachers: Sequence[Teacher], seed: int) -> list[tuple[list[int], list[int]]]:
    """Return for each teacher the rows to fit and the held-out rows, both sorted."""
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
    """Return for each step the number of the teacher and its rows.

    The teachers take turns, so each has the same number of steps, whatever the number of its rows. Every row of a teacher
    is used once before any is used again. Rows of similar length share a batch.
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


def _epoch(teacher: Teacher, rows: Sequence[int], batch: int, draw: random.Random) -> list[list[int]]:
    """Return one pass over the rows in batches of similar length, in random order."""
    order = draw.sample(list(rows), len(rows))
    found = []
    for start in range(0, len(order), batch * POOLED_BATCHES):
        pool = sorted(order[start : start + batch * POOLED_BATCHES], key=lambda place: len(teacher.sequences[place]))
        found += [pool[at : at + batch] for at in range(0, len(pool), batch)]
    draw.shuffle(found)
    return found
