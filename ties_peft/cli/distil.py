"""`ties-peft distil`: make one adapter that imitates several, on rows without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RecipeError
from ..learning import ANSWER_TOKENS, BATCH_SIZE, FITS
from ..merging.options import DEVICE
from .base import (
    ROWS_HELP,
    Adapters,
    Answers,
    AnswerTokens,
    Count,
    Force,
    Json,
    ModelDevice,
    Out,
    Precision,
    State,
    arguments_for,
    base_option,
    check_output,
    one_for_each,
    print_result,
    progress_and_warnings,
    read_rows_option,
    row_source,
    takes_merge_options,
)

Rows = Annotated[
    list[str] | None,
    typer.Option("--rows", help=ROWS_HELP, show_default="the tasks' rows, else 800 of random tokens"),
]
KeepBase = Annotated[
    str | None,
    typer.Option(
        help="Rows, as for --rows, on which the result is trained to predict what the base predicts without an adapter.",
        show_default="none",
    ),
]
KeepWeight = Annotated[float, typer.Option(help="The weight of the rows of --keep-base, beside --weights.")]
Tasks = Annotated[
    list[Path] | None,
    typer.Option(
        "--task",
        help="A task file that says how predictions are read. Encoders need one, with descriptions. Give it once for all "
        "adapters, or once for each.",
        show_default="the model's own predictions",
    ),
]

Start = Annotated[str | None, typer.Option(help="The adapter that training starts from.", show_default="a merge")]
Kind = Annotated[
    str | None, typer.Option(help="The PEFT type of the result: lora or ia3.", show_default="the adapters'")
]
Fit = Annotated[
    str,
    typer.Option(
        help=f"What is trained of a LoRA: {FITS[0]} (A and B) or {FITS[1]} (one number for each direction). Of (IA)³ it is "
        "always the vectors."
    ),
]
Steps = Annotated[
    int | None, typer.Option(help="The largest number of training steps.", show_default="from the number of rows")
]
Weights = Annotated[
    str | None,
    typer.Option(help="One number for each adapter, its weight in the training: 1,2.", show_default="1 each"),
]
Seed = Annotated[int, typer.Option(help="The seed of batches, held-out rows and random tokens.")]
Threads = Annotated[
    int,
    typer.Option(
        help="The number of CPU threads that compute. The bytes of the result depend on it, but not on the machine's number of "
        "cores."
    ),
]

Rank = Annotated[
    int | None, typer.Option(help="The rank of the result, a whole number.", show_default="the adapters' largest")
]


@takes_merge_options("threads", ("dtype", "base_model"))
def distil(
    adapters: Adapters,
    out: Out,
    rows: Rows = None,
    count: Count = None,
    task: Tasks = None,
    answers: Answers = None,
    answer_tokens: AnswerTokens = ANSWER_TOKENS,
    keep_base: KeepBase = None,
    keep_weight: KeepWeight = 1.0,
    base: Annotated[str | None, base_option("the task's or adapters'")] = None,
    rank: Rank = None,
    start: Start = None,
    kind: Kind = None,
    fit: Fit = FITS[0],
    steps: Steps = None,
    weights: Weights = None,
    batch_size: Annotated[int, typer.Option(help="The number of rows in a step.")] = BATCH_SIZE,
    seed: Seed = 0,
    device: ModelDevice = DEVICE,
    precision: Precision = None,
    threads: Threads = 1,
    state: State = None,
    force: Force = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Merge adapters, then train the result to imitate them on rows without labels."""
    given = dict(locals())
    from ..learning.distil import distil as distil_adapters

    check_output(out, force, adapters, kept={"the state (--state)": state})
    changed = {
        "rows": read_rows_option(rows, len(adapters)),
        "tasks": one_for_each(task, len(adapters), "--task"),
        "weights": _numbers(weights),
        "keep_base": None if keep_base is None else row_source(keep_base),
    }
    kept = (
        "Nothing is written; with --state FOLDER the same command would continue."
        if state is None
        else f"Repeat the same command to continue from {state}."
    )
    with progress_and_warnings(kept) as progress:
        made = distil_adapters(**arguments_for(distil_adapters, given, **changed, progress=progress, **options))
    made.save(out, force)
    print_result(made, out, {"distil": made.recipe}, as_json)


def _numbers(text: str | None) -> list[float] | None:
    """Return the numbers of a list such as 1,2.5."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights is {text!r}; expected a number for each adapter, such as 1,2.") from None
