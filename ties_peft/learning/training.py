"""Training: an adapter fitted to labelled rows by gradients, as users do who do not merge.

It is what a few examples give without any merge (the control `trained` of a search), and what gives the signs
that TIES elects (`few_shot_signs`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from ..adapters.adapter import Adapter
from ..errors import RecipeError
from ..evaluation.scorers import Classification, Exam, Progress
from ..evaluation.task import Task
from .student import Student

LABELLED = ("descriptions", "head")  # the measures whose labels can be trained on
STEPS, ROWS, DECAY = 60, 16, 0.01
RATES = {True: 1e-3, False: 1e-2}  # of LoRA, and of (IA)³, whose numbers lie around 1


def check_trainable(task: Task) -> None:
    """Refuse a task without labels to train on.

    Raises: RecipeError.
    """
    if task.measure not in LABELLED:
        raise RecipeError(
            f"task {task.name!r}: training is on labels, for measures {' and '.join(LABELLED)}, not '{task.measure}'."
        )


def train(
    start: Adapter,
    exams: Sequence[Exam],
    seed: int = 0,
    steps: int = STEPS,
    rate: float | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """An adapter trained on the labels of some exams, in turn.

    AdamW on the cross-entropy, at most 16 rows a step, drawn anew for each.

    Args:
        start: what it begins as; its modules and ranks stay.
        exams: of measure `descriptions` or `head`, on one bench.
        seed: of the rows' draws.
        steps: in all.
        rate: of learning; 1e-3 for LoRA and 1e-2 for (IA)³ by default.
        progress: called as progress(stage, done, of).
    Raises: RecipeError where an exam has no labels to train on.
    """
    for exam in exams:
        check_trainable(exam.task)
    bench = exams[0].bench
    student = Student(start, bench, seed=seed)
    optimiser = torch.optim.AdamW(
        list(student.numbers.values()), lr=rate or RATES[start.peft_type.has_rank], weight_decay=DECAY
    )
    generator = torch.Generator().manual_seed(seed)
    with bench.heads(start), student.on(), torch.enable_grad():
        for step in range(steps):
            exam = exams[step % len(exams)]
            assert isinstance(exam, Classification)
            places = torch.randperm(exam.rows, generator=generator)[:ROWS].tolist()
            optimiser.zero_grad(set_to_none=False)
            loss = cross_entropy(exam.logits(places), exam.labels[torch.tensor(places)].to(bench.device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if progress is not None:
                progress("training", step + 1, steps)
    return Adapter.from_tensors(start.config, student.tensors(torch.float32), "trained on a few examples")
