"""`ties-peft search`: the weights, or any numbers and choices of a recipe, that do best on a few examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..errors import RecipeError
from ..learning import ANSWER_TOKENS
from ..merging.options import DEVICE, read_flag
from ..search import BUDGET, CONTROLS, GRID, IMITATE, PENALTY, TRAINED
from .base import (
    ROWS_HELP,
    Answers,
    AnswerTokens,
    Count,
    Json,
    State,
    one_for_each,
    print_json,
    print_rich,
    print_text,
    print_warnings,
    print_warnings_after,
    progress_bar,
    read_rows_option,
    takes_merge_options,
)

if TYPE_CHECKING:
    from ..search.search import Found

OPTIONS = ("method", "space", "scale", "rank", "densities", "seed", "allow_disjoint")
Tune = Annotated[
    list[str] | None,
    typer.Option(
        help=escape(
            "NAME=RANGE or NAME=CHOICES, in YAML: density=[0.05,1.0]; method=[ties,flat_tsv]; "
            "'scale={low: 0.1, high: 3, log: true}'; adapters=some. Repeatable."
        ),
        show_default="weights=[-1.5,1.5]",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="Where the trials are kept: a path (SQLite), journal:PATH, or a database's URL, such as "
        "postgresql+psycopg2://… for PostgreSQL.",
        show_default="OUT.study.db",
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="NAME=VALUE, a parameter that is fixed, in YAML. Repeatable.")
]

Tasks = Annotated[
    list[str] | None,  # paths; the wider type would leave too little room for the help at 80 columns
    typer.Option(
        "--task",
        help=f"A task file with the few labelled rows; with --objective {IMITATE} one that says how predictions are read, once "
        "for each adapter, or once for all.",
        show_default=False,
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        help=f"{IMITATE}: without labels, how well the merge predicts what each adapter predicts on its own --rows.",
        show_default="the labels of --task",
    ),
]
Rows = Annotated[
    list[str] | None,
    typer.Option("--rows", help=ROWS_HELP, show_default="the tasks' rows"),
]
Judge = Annotated[
    Path | None,
    typer.Option(help="A task file with other rows, on which the result and the controls are measured at the end."),
]
Controls = Annotated[bool, typer.Option("--controls/--no-controls", help=f"Compare with {', '.join(CONTROLS)}.")]

Penalty = Annotated[
    float, typer.Option(help="The factor on the mean of |w| that is subtracted from the score where weights are tuned.")
]
StudyName = Annotated[str, typer.Option(help="The name of the search in the storage; a search of that name continues.")]
Base = Annotated[
    str | None, typer.Option(help="Folder or Hub id of the base model.", show_default="the task's or adapters'")
]

Budget = Annotated[int, typer.Option(help="The number of trials, over all processes.")]
Trained = Annotated[
    bool, typer.Option("--trained", help="Compare with a new LoRA that is trained on the same rows, too.")
]
Sampler = Annotated[
    str, typer.Option(help=f"The sampler: auto, cobyla, tpe, random or {GRID} (each combination of choices once).")
]


@takes_merge_options("budget", OPTIONS, unless=" Fixed, unless --tune names it.")
def search(
    adapters: Annotated[list[str], typer.Argument(help="Folders or Hub ids.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    task: Tasks = None,
    objective: Objective = None,
    rows: Rows = None,
    count: Count = None,
    answers: Answers = None,
    answer_tokens: AnswerTokens = ANSWER_TOKENS,
    tune: Tune = None,
    budget: Budget = BUDGET,
    settings: Settings = None,
    penalty: Penalty = PENALTY,
    judge: Judge = None,
    controls: Controls = True,
    trained: Trained = False,
    storage: Storage = None,
    study: StudyName = "search",
    sampler: Sampler = "auto",
    state: State = None,
    base: Base = None,
    device: Annotated[str, typer.Option(help="The device that the model runs on.")] = DEVICE,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that ties-peft wrote.")] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Search for the weights or other options that score best on a few examples, or that imitate the adapters best.

    For LoRAHub add --method task_arithmetic --scale 1 --rank max.

    With --objective imitate no labels are needed; --rows, --count, --answers, --answer-tokens and --state are for it alone.
    """
    from ..merging.recipes.overrides import read_pairs
    from ..search.search import search as find

    parameters = read_pairs("--set", settings, "elect=count")
    place = storage or f"{out}.study.db"
    _check_paths(out, force, place, adapters, parameters, state)
    imitates, tasks = _tasks(objective, list(map(Path, task or [])), len(adapters))
    with progress_bar() as tell:
        found = find(
            adapters,
            IMITATE if imitates else tasks,
            read_pairs("--tune", tune, "density=[0.1,1.0]") if tune else None,
            budget,
            parameters=parameters,
            penalty=penalty,
            judge=judge,
            controls=(*(CONTROLS if controls else ()), *((TRAINED,) if trained else ())),
            storage=place,
            study=study,
            sampler=sampler,
            base=base,
            device=device,
            progress=tell,
            rows=read_rows_option(rows, len(adapters)),
            tasks=tasks if imitates else None,
            count=count,
            answers=answers,
            answer_tokens=answer_tokens,
            state=state,
            **{name: read_flag(name, value) if isinstance(value, str) else value for name, value in options.items()},
        )
    found.adapter.save(out, force)
    _warn_of_base(adapters, task or [], base)
    _show(found, out, place, study, as_json)


def _tasks(objective: str | None, given: list[Path], adapters: int) -> tuple[bool, Any]:
    """Return whether the search imitates, and its task: the one with labels, or one or more for the adapters to imitate."""
    if objective is not None:
        if objective != IMITATE:
            raise RecipeError(
                f"--objective is {objective!r}; expected {IMITATE}, or --task with labelled rows without it."
            )
        return True, one_for_each(given, adapters, "--task")
    if len(given) != 1:
        raise RecipeError(
            f"--task is there {len(given)} times; expected one file with labelled rows, or --objective {IMITATE} for a search "
            "without labels."
        )
    return False, given[0]


def _check_paths(
    out: Path, force: bool, storage: str, adapters: list[str], parameters: Mapping[str, Any], state: Path | None
) -> None:
    """Refuse an output that is in the way of an input, of the storage or of the state."""
    from ..adapters.writer import check_output_folder, check_outside_output
    from ..merging.merged import inputs
    from ..merging.recipes.recipe import Recipe
    from ..search.storage import storage_path

    check_output_folder(out, force, inputs(Recipe(adapters=tuple(adapters), parameters=parameters)))
    check_outside_output(out, storage_path(storage), "the storage")
    check_outside_output(out, state, "the state (--state)")


def _warn_of_base(adapters: list[str], tasks: list[str], base: str | None) -> None:
    """Show the warnings about the base; of those about the merges the report has what counts."""
    from ..adapters.adapter import load_adapters
    from ..evaluation.evaluate import find_base
    from ..evaluation.task import read_task

    with print_warnings_after():
        find_base(load_adapters(adapters), list(map(read_task, tasks)), base)


def _show(found: Found, out: Path, storage: str, study: str, as_json: bool) -> None:
    from ..search.storage import without_password

    print_warnings(found.adapter.report.warnings)
    if as_json:
        print_json({"out": str(out), "storage": without_password(storage), "study": study, **found.to_dict()})
        return
    print_rich(found.tables())
    print_text(f"\nbest of {len(found.trials)} trials:\n{found.recipe.to_yaml()}\nwritten to {out}")
    print_text(
        f"the trials stay in {without_password(storage)} (study {study!r}); the same command with a larger --budget and "
        "--force goes on from there"
    )
