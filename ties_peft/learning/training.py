"""Train an adapter on labelled rows.

A search compares its result with such an adapter (the control `trained`), and `few_shot_signs` takes signs from one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from ..adapters.adapter import Adapter
from ..errors import RecipeError
from ..evaluation.scorers import Classification, Scorer
from ..evaluation.task import Task
from ..merging.plan import Progress
from .student import Student

TRAINABLE_MEASURES = ("descriptions", "head")  # measures with labels to train on
STEPS, ROWS, DECAY = 60, 16, 0.01
LORA_RATE, IA3_RATE = 1e-3, 1e-2  # learning rates


def check_trainable(task: Task) -> None:
    """Refuse a task without labels to train on.

    Raises: RecipeError.
    """
    if task.measure not in TRAINABLE_MEASURES:
        raise RecipeError(
            f"task {task.name!r} has measure '{task.measure}'; training needs labels, so expected measure "
            f"{' or '.join(TRAINABLE_MEASURES)}, of an encoder or a sequence classifier. Language models are not trained here."
        )


def train(
    start: Adapter,
    scorers: Sequence[Scorer],
    seed: int = 0,
    steps: int = STEPS,
    rate: float | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """Return an adapter trained on the labels of some tasks.

    Each step of AdamW minimises the cross-entropy of at most 16 random rows of one task; the tasks take turns.

    Args:
        start: the adapter that training starts from; its modules and ranks stay.
        scorers: of tasks with measure `descriptions` or `head`, on one bench.
        seed: of the rows of each step.
        steps: in all.
        rate: the learning rate; by default 1e-3 for LoRA and 1e-2 for (IA)³.
        progress: called as progress(stage, done, of).
    Raises: RecipeError where a task has no labels to train on.
    """
    for scorer in scorers:
        check_trainable(scorer.task)
    bench = scorers[0].bench
    student = Student(start, bench, seed=seed)
    default = LORA_RATE if start.peft_type.has_rank else IA3_RATE
    optimiser = torch.optim.AdamW(list(student.parameters.values()), lr=rate or default, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(seed)
    with bench.applied_extra_tensors(start), student.attached(), torch.enable_grad():
        for step in range(steps):
            scorer = scorers[step % len(scorers)]
            assert isinstance(scorer, Classification)
            places = torch.randperm(scorer.rows, generator=generator)[:ROWS].tolist()
            optimiser.zero_grad(set_to_none=False)
            loss = cross_entropy(scorer.logits(places), scorer.labels[torch.tensor(places)].to(bench.device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if progress is not None:
                progress("training", step + 1, steps)
    return Adapter.from_tensors(start.config, student.tensors(torch.float32), "trained on a few examples")
