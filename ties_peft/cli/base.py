"""Help the commands: the options of a merge as flags, shared options, completion, progress, warnings and JSON."""

from __future__ import annotations

import inspect
import json
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console, RenderableType

from ..adapters.found_classes import file_names
from ..errors import RecipeError, TiesPeftWarning, printable, printable_lines
from ..learning import ANSWERS, GENERATED, GENERATED_ROWS
from ..merging.options import OPTIONS, Option
from ..search import DETAIL

if TYPE_CHECKING:
    from ..learning.distilled import Distilled
    from ..merging.merged import Merged

PACKAGE = Path(__file__).parent.parent
INTERVAL = 30.0  # seconds between lines of progress where there is no terminal
SPEED_PERIOD = 3600.0  # seconds over which a bar's speed is measured; one trial of a search can take minutes

# Completions of a value, for the shell. They import nothing more, because they run whenever the tab key is pressed.


def method_names() -> list[str]:
    """Return the names of this package's own methods, which are those of their files."""
    return file_names(PACKAGE / "methods")


def space_names() -> list[str]:
    """Return the names of the spaces, which are those of their files."""
    return file_names(PACKAGE / "spaces")


def complete_from(values: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a completion that offers some values."""
    known = tuple(values)
    return lambda incomplete: [value for value in known if value.startswith(incomplete)]


def complete_method(incomplete: str) -> list[str]:
    """Return the completions of a method's name, or of the last name in a row such as `dare+ti`."""
    earlier, plus, last = incomplete.rpartition("+")
    return [f"{earlier}{plus}{name}" for name in method_names() if name.startswith(last)]


# The options of a merge as flags


def takes_merge_options(
    after: str, names: Iterable[str] = (), unless: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options of a merge as flags, in place of its `**options`, which receive the texts that were typed.

    Args:
        after: the parameter of the command after which the flags are listed.
        names: of the options, which are then listed in the general panel of the help with their defaults. By default all,
            in panels of their own; one that is not given is then None or False, so that a recipe's value applies.
        unless: a further sentence in the help of options that a search may set.
    """
    chosen = tuple(names) or sorted(OPTIONS, key=lambda name: name not in ("method", "space"))

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [one.replace(kind=one.KEYWORD_ONLY) for one in signature.parameters.values() if one.name != "options"]
        place = 1 + [one.name for one in own].index(after)
        own[place:place] = [_parameter(OPTIONS[name], whole=not names, unless=unless) for name in chosen]
        command.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(option: Option, whole: bool, unless: str) -> inspect.Parameter:
    """Return the parameter of an option; `whole` says whether all options are there, without their defaults."""
    flag = isinstance(option.default, bool)
    kind = bool if flag else int | None if isinstance(option.default, int) else str | None
    values = space_names() if option.name == "space" else option.values
    known = f" One of {', '.join(values)}." if option.name == "space" else ""
    described = typer.Option(
        option.flag,
        help=option.help + known + unless * option.tunable,
        show_default=option.shown or False,
        autocompletion=complete_method if option.name == "method" else complete_from(values) if values else None,
        rich_help_panel=option.panel if whole else None,
    )
    default = option.default if flag or not whole else None
    annotation = Annotated[kind, described]  # type: ignore[valid-type]
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


# Arguments and options that several commands share


def base_option(default: str) -> Any:
    """Return the option that names the base model; `default` says in words which one is used without it."""
    return typer.Option(help="Folder or Hub id of the base model.", show_default=default)


AdaptersOrPatterns = Annotated[
    list[str], typer.Argument(help="Folders, files, Hub ids, quoted patterns.", show_default=False)
]
Adapters = Annotated[list[str], typer.Argument(help="Folders or Hub ids.", show_default=False)]
Out = Annotated[Path, typer.Option(help="The folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace a folder that ties-peft wrote.")]
ModelDevice = Annotated[str, typer.Option(help="The device that the model runs on.")]
Precision = Annotated[
    str | None,
    typer.Option(
        help="The precision in which the base is loaded: float32, bfloat16 or float16.",
        show_default="what transformers chooses",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


# The rows on which adapters are imitated

ROWS_HELP = (
    "The rows that the adapters read: a .jsonl, .csv or .txt file, a data set on the Hub (org/name), a number of rows of "
    f"random tokens, or {GENERATED}: each adapter of a causal language model writes its own. Give it once for all adapters, "
    "or once for each. Of a file or a data set the column is read that the task names, else text, or prompt where there is no text."
)
Count = Annotated[
    int | None,
    typer.Option(
        help=f"The number of rows that each adapter writes, with --rows {GENERATED}.", show_default=str(GENERATED_ROWS)
    ),
]
Answers = Annotated[
    str | None,
    typer.Option(
        help=f"The answers to the prompts of a causal language model: {ANSWERS[0]} (each adapter writes its own), {ANSWERS[1]} "
        f"(the labels of the rows, each followed by the model's end token) or {ANSWERS[2]} (the rows themselves are predicted). "
        "With a task (--task) only the tokens of the answers are matched; without one, those of the rows as well. For plain text "
        "give a task with label: null; its rows get no answers.",
        show_default="teachers; none with label: null and for random tokens",
    ),
]
AnswerTokens = Annotated[int, typer.Option(help="The largest number of tokens in an answer that an adapter writes.")]
State = Annotated[
    Path | None,
    typer.Option(
        help="A folder in which the state is saved. After an interruption the same command continues from it.",
        show_default=False,
    ),
]


def arguments_for(function: Callable[..., Any], given: Mapping[str, Any], **others: Any) -> dict[str, Any]:
    """Return the arguments of a function that a command calls.

    Args:
        function: the one that does the work.
        given: all arguments of the command, of which those that the function has by the same name are passed on as they are.
        others: the arguments whose values the command changes.
    """
    own = inspect.signature(function).parameters
    return {name: value for name, value in given.items() if name in own} | others


def check_output(
    out: Path,
    force: bool,
    adapters: Iterable[str],
    parameters: Mapping[str, Any] = MappingProxyType({}),
    kept: Mapping[str, Path | None] = MappingProxyType({}),
) -> None:
    """Refuse, before any work, an output folder that cannot be written, or that overlaps an input or a path to be kept.

    Args:
        out, force: as the command has them.
        adapters, parameters: of a recipe, whose folders are the inputs.
        kept: other paths, by their names in the message.
    """
    from ..adapters.writer import check_output_folder, check_outside_output
    from ..merging.merged import inputs
    from ..merging.recipes.recipe import Recipe

    check_output_folder(out, force, inputs(Recipe(adapters=tuple(adapters), parameters=parameters)))
    for name, path in kept.items():
        check_outside_output(out, path, name)


def one_for_each(given: list[Any] | None, count: int, flag: str) -> Any:
    """Return one value for all adapters, a list with one for each, or None.

    Raises: RecipeError for another number of values.
    """
    if not given:
        return None
    if len(given) not in (1, count):
        raise RecipeError(
            f"{flag} is given {len(given)} times ({', '.join(map(str, given))}); expected once, or once for each of the "
            f"{count} adapters in their order."
        )
    return given[0] if len(given) == 1 else given


def read_rows_option(given: list[str] | None, count: int) -> Any:
    """Return the rows for all adapters or for each; None where --rows is not given."""
    return one_for_each(None if given is None else list(map(row_source, given)), count, "--rows")


def row_source(value: str) -> Any:
    """Return a number, the keyword, or a path, because `distil` reads any other string as the text of a row."""
    if value.isdecimal():
        return int(value)
    return value if value == GENERATED else Path(value)


class _Stage(NamedTuple):
    """The progress of a stage of the work.

    Attributes:
        stage: its name.
        done, total: the number of steps.
        begun: the time of the first report.
        first: the number of steps done at the first report.
    """

    stage: str
    done: int
    total: int
    begun: float
    first: int


class ProgressLines:
    """Writes lines of progress on standard error, for output that is not a terminal.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begun = clock, clock()
        self._stage: _Stage | None = None  # always replaced as a whole, because another thread reads it

    def update(self, stage: str, done: int, total: int) -> None:
        """Store the progress of a stage."""
        last = self._stage
        if last is not None and _name(last.stage) == _name(stage) and last.done <= done:
            self._stage = last._replace(stage=stage, done=done, total=total)
        else:
            self._stage = _Stage(stage, done, total, self._clock(), done)

    def line(self) -> str:
        """Return the line for the present moment."""
        stage, now = self._stage, self._clock()
        so_far = f"({_time(now - self._begun)} so far)"
        if stage is None:
            return f"working {so_far}"
        remaining, measured = stage.total - stage.done, stage.done - stage.first
        left = f", about {_time(remaining * (now - stage.begun) / measured)} left" if remaining and measured else ""
        return f"{stage.stage}: {stage.done} of {stage.total}{left} {so_far}"

    def run(self, wait: Callable[[float], bool]) -> None:
        """Write a line every half minute, until `wait`, called with the seconds to wait, returns that the work is done."""
        while not wait(INTERVAL):
            sys.stderr.write(f"{printable(self.line())}\n")
            sys.stderr.flush()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write the lines from another thread, within a `with` block, because one step of the work can take minutes."""
        done = threading.Event()
        thread = threading.Thread(target=self.run, args=(done.wait,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _name(stage: str) -> str:
    """Return a stage's name without the part that changes during the stage."""
    return stage.partition(DETAIL)[0]


def _time(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds: 1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress_bar(kept: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on standard error: bars on a terminal, one for each stage, and elsewhere a line every half minute.

    Args:
        kept: what remains of the work after an interruption by the user, as a sentence that is printed then.
    """
    try:
        with _bars_or_lines() as update:
            yield update
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted. {kept}".strip() + "\n")
        raise


@contextmanager
def _bars_or_lines() -> Iterator[Callable[[str, int, int], None]]:
    if not sys.stderr.isatty():
        lines = ProgressLines()
        with lines.running():
            yield lines.update
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=SPEED_PERIOD) as progress:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            name = _name(stage)
            if name not in tasks:
                tasks[name] = progress.add_task(printable(stage), total=total)
            progress.update(tasks[name], description=printable(stage), completed=done)

        yield update


@contextmanager
def progress_and_warnings(kept: str = "") -> Iterator[Callable[[str, int, int], None]]:
    """Show progress as `progress_bar` does, and the warnings of a `with` block as they come, each text once.

    Warnings before the first progress wait for it, so that input that is refused before any work gives one message.
    """
    said: set[str] = set()
    waiting: list[str] = []
    started = False

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, TiesPeftWarning) and str(message) not in said:
            said.add(str(message))
            waiting.append(str(message))
            if started:
                print_waiting()

    def print_waiting() -> None:
        nonlocal started
        started = True
        print_warnings(waiting)
        waiting.clear()

    with warnings.catch_warnings(), progress_bar(kept) as tell:
        warnings.simplefilter("always", TiesPeftWarning)
        warnings.showwarning = show

        def update(stage: str, done: int, total: int) -> None:
            print_waiting()
            tell(stage, done, total)

        yield update
        print_waiting()


def print_rich(content: RenderableType) -> None:
    """Print a table or a report; `make_text` has escaped its text."""
    Console().print(content)


def print_text(text: str) -> None:
    """Print text on standard output, control characters escaped."""
    typer.echo(printable_lines(text))


def print_result(made: Merged | Distilled, out: Path, values: dict[str, Any], as_json: bool, remark: str = "") -> None:
    """Print an adapter that was written: as JSON, or its report and the lines of Python that load it.

    Args:
        made: the adapter.
        out: its folder.
        values: of the JSON object, between `out` and `report`.
        as_json: whether to print JSON.
        remark: a text below the report.
    """
    if as_json:
        print_json({"out": str(out), **values, "report": made.report.to_dict()})
        return
    print_rich(made.report.tables())
    print_text(f"{remark}\nwritten to {out}; load it with\n")
    print_text("\n".join(f"  {line}" for line in made.loading.lines(str(out))))


def print_messages(kind: str, messages: Iterable[str]) -> None:
    """Print messages on standard error, control characters escaped.

    Args:
        kind: error, warning or note.
        messages: one for each line.
    """
    for message in messages:
        sys.stderr.write(f"{kind}: {printable_lines(message)}\n")


def print_warnings(found: list[str]) -> None:
    """Print warnings on standard error."""
    print_messages("warning", found)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output; JSON itself escapes control characters."""
    typer.echo(json.dumps(value, default=str))
