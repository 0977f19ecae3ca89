"""`ties-peft distil`: one adapter that imitates several, on rows without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..adapters import sources
from ..errors import RecipeError
from ..learning import ANSWER_TOKENS, BATCH_SIZE, FITS
from .base import (
    ROWS_HELP,
    Answers,
    AnswerTokens,
    Count,
    Json,
    State,
    one_for_each,
    print_result,
    print_warnings_after,
    progress_bar,
    read_rows_option,
    row_source,
)

Rows = Annotated[
    list[str] | None,
    typer.Option("--rows", help=ROWS_HELP, show_default="the tasks' rows, else 800 of random tokens"),
]
KeepBase = Annotated[
    str | None,
    typer.Option(
        help="Rows, as --rows takes them, on which the result is to predict what the bare base predicts.",
        show_default="none",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="The precision in which the base is loaded: float32, bfloat16 or float16.",
        show_default="what transformers chooses",
    ),
]
KeepWeight = Annotated[float, typer.Option(help="How much the rows of --keep-base count, beside the weights.")]
Tasks = Annotated[
    list[Path] | None,
    typer.Option(
        "--task",
        help="A task file that says how predictions are read. Once for each adapter, or once for all.",
        show_default="the model's own",
    ),
]

Start = Annotated[str | None, typer.Option(help="An adapter to start from.", show_default="a merge")]
Kind = Annotated[
    str | None, typer.Option(help="The PEFT type of the result: lora or ia3.", show_default="the adapters'")
]
Fit = Annotated[str, typer.Option(help=f"What of a LoRA is trained: {' or '.join(FITS)}; of (IA)³ always the vectors.")]
Steps = Annotated[int | None, typer.Option(help="The largest number of training steps.", show_default="by the rows")]
Weights = Annotated[
    str | None,
    typer.Option(help="How much each adapter counts in the fit, such as 1,2.", show_default="all the same"),
]
Seed = Annotated[int, typer.Option(help="The seed of batches, held-back rows and random tokens.")]
Threads = Annotated[
    int,
    typer.Option(
        help="The number of threads of an operation on the CPU. The bytes of the result depend on it, and not on the number of cores."
    ),
]

Base = Annotated[str | None, typer.Option(help="Folder or Hub id of the base model.", show_default="the adapters'")]
Rank = Annotated[
    int | None, typer.Option(help="The rank of the result, a whole number.", show_default="the adapters' largest")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="The dtype of the tensors: float32, float16 or bfloat16.", show_default="the inputs'"),
]
BaseName = Annotated[
    str | None, typer.Option(help="The name of the base model in the result's config.", show_default="the inputs'")
]


def distil(
    adapters: Annotated[list[str], typer.Argument(help="Folders or Hub ids.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    rows: Rows = None,
    count: Count = None,
    task: Tasks = None,
    answers: Answers = None,
    answer_tokens: AnswerTokens = ANSWER_TOKENS,
    keep_base: KeepBase = None,
    keep_weight: KeepWeight = 1.0,
    base: Base = None,
    rank: Rank = None,
    start: Start = None,
    kind: Kind = None,
    fit: Fit = FITS[0],
    steps: Steps = None,
    weights: Weights = None,
    batch_size: Annotated[int, typer.Option(help="The number of rows in a step.")] = BATCH_SIZE,
    seed: Seed = 0,
    device: Annotated[str, typer.Option(help="The device that the model runs on.")] = "cpu",
    precision: Precision = None,
    threads: Threads = 1,
    dtype: Dtype = None,
    base_name: BaseName = None,
    state: State = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that ties-peft wrote.")] = False,
    as_json: Json = False,
) -> None:
    """Merge adapters, then train the result to imitate them on rows without labels."""
    from ..learning.distil import distil as distil_adapters

    _check_folders(adapters, out, force, state)
    with print_warnings_after(), progress_bar() as tell:
        made = distil_adapters(
            adapters,
            start=start,
            rows=read_rows_option(rows, len(adapters)),
            rank=rank,
            seed=seed,
            device=device,
            threads=threads,
            dtype=dtype,
            tasks=one_for_each(task, len(adapters), "--task"),
            base=base,
            kind=kind,
            fit=fit,
            steps=steps,
            weights=_numbers(weights),
            batch_size=batch_size,
            state=state,
            base_model=base_name,
            progress=tell,
            count=count,
            answers=answers,
            answer_tokens=answer_tokens,
            keep_base=None if keep_base is None else row_source(keep_base),
            keep_weight=keep_weight,
            precision=precision,
        )
    made.save(out, force)
    print_result(made, out, {"distil": made.recipe}, as_json)


def _check_folders(adapters: list[str], out: Path, force: bool, state: Path | None) -> None:
    """Refuse a folder that cannot be written, or that holds an adapter or the state, before any work."""
    from ..adapters.writer import check_output_folder, check_outside_output

    read = [path for path in map(sources.local_path, adapters) if path is not None]
    check_output_folder(out, force, read)
    check_outside_output(out, state, "the state (--state)")


def _numbers(text: str | None) -> list[float] | None:
    """Return the numbers of a list such as 1,2.5."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights is {text!r}; expected a number for each adapter, such as 1,2.") from None
