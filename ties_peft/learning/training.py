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
from ..evaluation.scorers import Classification, Progress, Scorer
from ..evaluation.task import Task
from .student import Student

TRAINABLE_MEASURES = ("descriptions", "head")  # the measures whose labels can be trained on
STEPS, ROWS, DECAY = 60, 16, 0.01
RATES = {True: 1e-3, False: 1e-2}  # of LoRA, and of (IA)³, whose numbers lie around 1


def check_trainable(task: Task) -> None:
    """Refuse a task without labels to train on.

    Raises: RecipeError.
    """
    if task.measure not in TRAINABLE_MEASURES:
        raise RecipeError(
            f"task {task.name!r}: training is on labels, for measures {' and '.join(TRAINABLE_MEASURES)}, not '{task.measure}'."
        )


def train(
    start: Adapter,
    scorers: Sequence[Scorer],
    seed: int = 0,
    steps: int = STEPS,
    rate: float | None = None,
    progress: Progress | None = None,
) -> Adapter:
    """An adapter trained on the labels of some scorers, in turn.

    AdamW on the cross-entropy, at most 16 rows a step, drawn anew for each.

    Args:
        start: what it begins as; its modules and ranks stay.
        scorers: of measure `descriptions` or `head`, on one bench.
        seed: of the rows' draws.
        steps: in all.
        rate: of learning; 1e-3 for LoRA and 1e-2 for (IA)³ by default.
        progress: called as progress(stage, done, of).
    Raises: RecipeError where a scorer has no labels to train on.
    """
    for scorer in scorers:
        check_trainable(scorer.task)
    bench = scorers[0].bench
    student = Student(start, bench, seed=seed)
    optimiser = torch.optim.AdamW(
        list(student.parameters.values()), lr=rate or RATES[start.peft_type.has_rank], weight_decay=DECAY
    )
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
