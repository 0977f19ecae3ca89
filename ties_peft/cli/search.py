"""`ties-peft search`: the weights, or any numbers and choices of a recipe, that do best on a few examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..errors import RecipeError
from ..learning import ANSWER_TOKENS
from ..merging.options import DEVICE, read_flag
from ..search import AUTO, BUDGET, CONTROLS, GRID, IMITATE, PENALTY, SETTINGS, TRAINED, WEIGHTS
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
    State,
    arguments_for,
    base_option,
    check_output,
    one_for_each,
    print_json,
    print_rich,
    print_text,
    progress_and_warnings,
    read_rows_option,
    takes_merge_options,
)

if TYPE_CHECKING:
    from ..search.found import Found

OPTIONS = ("method", "space", "scale", "rank", "densities", "seed", "allow_disjoint")
Tune = Annotated[
    list[str] | None,
    typer.Option(
        help=escape(
            "An option to search and its values in YAML, NAME=RANGE or NAME=CHOICES: density=[0.05,1.0]; "
            "method=[ties,flat_tsv]; 'scale={low: 0.1, high: 3, log: true}'; adapters=some tries each adapter with and without. "
            "A list of two numbers is a range, any other list holds choices. Repeatable."
        ),
        show_default="weights=[-1.5,1.5]",
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        help="Where the trials are kept, for a later run or for other processes: a path (SQLite), journal:PATH, or a "
        "database's URL, such as postgresql+psycopg2://… for PostgreSQL.",
        show_default="OUT.study.db",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE, in YAML: a parameter of the method that is not searched. Repeatable."),
]
Tasks = Annotated[
    list[str] | None,  # paths; the wider type would leave too little room for the help at 80 columns
    typer.Option(
        "--task",
        help=f"A task file with a few labelled rows. With --objective {IMITATE} its labels are not used; give it once for all "
        "adapters, or once for each.",
        show_default=False,
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        help=f"{IMITATE}: search without labels. The score is how closely the merge predicts what each adapter predicts on its "
        "own --rows.",
        show_default="the labels of --task",
    ),
]
Rows = Annotated[list[str] | None, typer.Option("--rows", help=ROWS_HELP, show_default="the tasks' rows")]
Judge = Annotated[
    Path | None,
    typer.Option(
        help="A task file with other rows, on which the result and the controls are measured once, at the end."
    ),
]
Controls = Annotated[
    bool,
    typer.Option(
        "--controls/--no-controls",
        help=f"Compare the result with: {', '.join(CONTROLS)}. Where other options than weights are searched, '{WEIGHTS}' is named "
        f"'{SETTINGS}'.",
    ),
]
Penalty = Annotated[
    float,
    typer.Option(help="A factor: this times the mean of |w| is subtracted from the score where weights are searched."),
]
StudyName = Annotated[
    str, typer.Option(help="The name of the search in the storage. The same search with the same name is continued.")
]
Budget = Annotated[
    int | None,
    typer.Option(
        help="The number of merges that are tried, in all runs and processes together.",
        show_default=f"{BUDGET}; with the sampler {GRID} all combinations",
    ),
]
Trained = Annotated[
    bool, typer.Option("--trained", help="Compare the result with a new LoRA, trained on the same rows, too.")
]
Sampler = Annotated[
    str | None,
    typer.Option(
        help=f"What chooses the next trial: {GRID} (each combination of choices once), cobyla (for ranges), tpe, random, or {AUTO} "
        "(cobyla where only ranges are searched, else tpe).",
        show_default=f"{GRID} where only choices are searched, in no more combinations than the budget; else {AUTO}",
    ),
]


@takes_merge_options("budget", OPTIONS, unless=" Fixed, unless --tune names it.")
def search(
    adapters: Adapters,
    out: Out,
    task: Tasks = None,
    objective: Objective = None,
    rows: Rows = None,
    count: Count = None,
    answers: Answers = None,
    answer_tokens: AnswerTokens = ANSWER_TOKENS,
    tune: Tune = None,
    budget: Budget = None,
    settings: Settings = None,
    penalty: Penalty = PENALTY,
    judge: Judge = None,
    controls: Controls = True,
    trained: Trained = False,
    storage: Storage = None,
    study: StudyName = "search",
    sampler: Sampler = None,
    state: State = None,
    base: Annotated[str | None, base_option("the task's or adapters'")] = None,
    device: ModelDevice = DEVICE,
    force: Force = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Search for the weights, or other options of a merge, that score best on a few rows.

    By default a merge is scored by the labels of --task; with --objective imitate, by the adapters' own predictions.

    --rows, --count, --answers, --answer-tokens and --state are for --objective imitate alone.

    For LoRAHub add --method task_arithmetic --scale 1 --rank max.
    """
    given = dict(locals())
    from ..merging.recipes.overrides import read_pairs
    from ..search.search import search as find
    from ..search.storage import storage_path

    parameters = read_pairs("--set", settings, "elect=count")
    storage = storage or f"{out}.study.db"
    kept = {"the storage": storage_path(storage), "the state (--state)": state}
    check_output(out, force, adapters, parameters, kept)
    changed = {
        **_objective(objective, list(map(Path, task or [])), len(adapters)),
        "parameters": parameters,
        "tune": read_pairs("--tune", tune, "density=[0.1,1.0]") if tune else None,
        "rows": read_rows_option(rows, len(adapters)),
        "controls": (*(CONTROLS if controls else ()), *((TRAINED,) if trained else ())),
        "storage": storage,
        **{name: read_flag(name, value) if isinstance(value, str) else value for name, value in options.items()},
    }
    with progress_and_warnings("Repeat the same command to continue: the trials so far are kept.") as progress:
        found = find(**arguments_for(find, given, **changed, progress=progress))
    found.adapter.save(out, force)
    _show(found, out, storage, study, as_json)


def _objective(objective: str | None, tasks: list[Path], adapters: int) -> dict[str, Any]:
    """Return the objective of the search: imitation, with a task for all adapters or for each, or the task with labels."""
    if objective == IMITATE:
        return {"objective": IMITATE, "tasks": one_for_each(tasks, adapters, "--task")}
    if objective is not None:
        raise RecipeError(
            f"--objective is {objective!r}; expected {IMITATE}. Leave it out to search by the labels of --task."
        )
    if len(tasks) != 1:
        raise RecipeError(
            f"--task is given {len(tasks)} times; expected one task file with labelled rows. For a search without labels add "
            f"--objective {IMITATE}."
        )
    return {"objective": tasks[0]}


def _show(found: Found, out: Path, storage: str, study: str, as_json: bool) -> None:
    """Print the result, and where the trials are."""
    from ..search.storage import without_password

    place = without_password(storage)
    if as_json:
        print_json({"out": str(out), "storage": place, "study": study, **found.to_dict()})
        return
    print_rich(found.tables())
    print_text(f"\nbest of {found.tried}:\n{found.recipe.to_yaml()}\nwritten to {out}; load it with\n")
    print_text("\n".join(f"  {line}" for line in found.adapter.loading.lines(str(out))))
    print_text(f"\nthe trials are kept in {place} (study {study!r}); {_more(found)}")


def _more(found: Found) -> str:
    """Return how to try more."""
    if len(found.trials) == found.combinations:
        return "all combinations of the choices were tried"
    # With a larger budget the default could be the grid, and a study has one sampler.
    sampler = "--sampler tpe, " if found.sampler == "tpe" else ""
    return f"to try more, repeat the command with {sampler}a larger --budget and --force"
