"""Share what all commands need: the options of a merge as flags, completion, progress, warnings and JSON."""

from __future__ import annotations

import inspect
import json
import pkgutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console, RenderableType

from ..errors import RecipeError, TiesPeftWarning, printable, printable_lines
from ..learning import ANSWERS, GENERATED, GENERATED_ROWS
from ..merging.options import OPTIONS, Option
from ..search import DETAIL

if TYPE_CHECKING:
    from ..merging.loading import Loading

EVERY = 30.0  # seconds from line to line where there is no terminal
PERIOD = 3600.0  # seconds over which the speed is taken: one step of a search can take minutes

# Completions of a value, for the shell. They import nothing more, because they run at every press of the tab key.


def method_names() -> list[str]:
    """Return the names of this package's own methods: those of the files that define them."""
    return _files("methods")


def space_names() -> list[str]:
    """Return the names of the spaces: those of the files that define them."""
    return _files("spaces")


def _files(folder: str) -> list[str]:
    found = pkgutil.iter_modules([str(Path(__file__).parent.parent / folder)])
    return sorted(entry.name for entry in found if entry.name not in ("base", "aliases"))


def complete_from(values: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a completion by a list of values."""
    known = tuple(values)
    return lambda incomplete: [value for value in known if value.startswith(incomplete)]


def complete_method(incomplete: str) -> list[str]:
    """Return the methods that the last stage of a name such as `dare+ti` may become."""
    earlier, plus, last = incomplete.rpartition("+")
    return [f"{earlier}{plus}{name}" for name in method_names() if name.startswith(last)]


# The options of a merge as flags


def takes_merge_options(
    after: str, names: Iterable[str] = (), unless: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command options of a merge as flags, in place of its `**options`, which receive them as they were typed.

    Args:
        after: the parameter of the command behind which they are listed.
        names: of the options, in the general panel of the help; by default all, in panels of their own. Of all, one that is
            not given is None, or False: a recipe's value may stand between it and the default.
        unless: a further sentence of the help of options that a search may set.
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
    """Return the parameter of an option; of a `whole` recipe without its default."""
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


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


# The rows on which adapters are imitated

ROWS_HELP = (
    "Rows of text: a .jsonl, .csv or .txt file, a data set on the Hub (org/name), a number of rows of random "
    f"tokens, or {GENERATED}: each adapter of a causal language model writes its own. Once for each adapter, or once for all."
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
        help=f"Where the answers to the prompts of a causal language model come from: {', '.join(ANSWERS)}.",
        show_default="teachers; none for plain text",
    ),
]
AnswerTokens = Annotated[int, typer.Option(help="The largest number of tokens in an answer that an adapter writes.")]
State = Annotated[
    Path | None,
    typer.Option(
        help="A folder for the state of the work, from which the same command continues after a stop.",
        show_default=False,
    ),
]


def one_for_each(given: list[Any] | None, count: int, flag: str) -> Any:
    """Return one value for all adapters, a list with one for each, or None; refuse any other number."""
    if not given:
        return None
    if len(given) not in (1, count):
        raise RecipeError(
            f"{flag} is there {len(given)} times for {count} adapters ({', '.join(map(str, given))}). Give it "
            "once, or once for each adapter in their order."
        )
    return given[0] if len(given) == 1 else given


def read_rows_option(given: list[str] | None, count: int) -> Any:
    """Return what --rows says, for all adapters or for each; None where it is not given."""
    return one_for_each(None if given is None else list(map(row_source, given)), count, "--rows")


def row_source(value: str) -> Any:
    """Return a number as a number, and what is no keyword as a path, so that no value is taken for a text."""
    if value.isdecimal():
        return int(value)
    return value if value == GENERATED else Path(value)


class _Stage(NamedTuple):
    """Where the work is: the stage, and when and at which step it was first told of."""

    stage: str
    done: int
    total: int
    begun: float
    first: int


class ProgressLines:
    """What the work does, in lines on standard error: for output that is not a terminal.

    Args:
        clock: seconds since any moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._begun = clock, clock()
        self._stage: _Stage | None = None  # replaced as a whole, because another thread reads it

    def update(self, stage: str, done: int, total: int) -> None:
        """Take note of how far a stage is."""
        at = self._stage
        same = at is not None and _name(at.stage) == _name(stage) and at.done <= done
        begun, first = (at.begun, at.first) if at is not None and same else (self._clock(), done)
        self._stage = _Stage(stage, done, total, begun, first)

    def line(self) -> str:
        """Return what there is to say now."""
        at, now = self._stage, self._clock()
        so_far = f"({_time(now - self._begun)} so far)"
        if at is None:
            return f"working {so_far}"
        ahead, behind = at.total - at.done, at.done - at.first
        left = f", about {_time(ahead * (now - at.begun) / behind)} left" if ahead and behind else ""
        return f"{at.stage}: {at.done} of {at.total}{left} {so_far}"

    def run(self, wait: Callable[[float], bool]) -> None:
        """Write a line every half minute, until `wait`, which takes the seconds, returns whether the work is done."""
        while not wait(EVERY):
            sys.stderr.write(f"{printable(self.line())}\n")
            sys.stderr.flush()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Write the lines from a thread of their own, because one step of the work can take minutes."""
        done = threading.Event()
        thread = threading.Thread(target=self.run, args=(done.wait,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _name(stage: str) -> str:
    """Return a stage's name without what changes while it lasts."""
    return stage.partition(DETAIL)[0]


def _time(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds: 1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on standard error: bars on a terminal, one for each stage, and elsewhere a line every half minute."""
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
    with Progress(*columns, console=console, transient=True, speed_estimate_period=PERIOD) as progress:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            name = _name(stage)
            if name not in tasks:
                tasks[name] = progress.add_task(printable(stage), total=total)
            progress.update(tasks[name], description=printable(stage), completed=done)

        yield tell


@contextmanager
def print_warnings_after() -> Iterator[None]:
    """Print the warnings of the work when it is done, each once."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", TiesPeftWarning)
        yield
    said = (str(one.message) for one in found if issubclass(one.category, TiesPeftWarning))
    print_warnings(list(dict.fromkeys(said)))


def print_rich(content: RenderableType) -> None:
    """Print a table or a report; its text is escaped where it is made (`make_text`)."""
    Console().print(content)


def print_text(text: str) -> None:
    """Print text on standard output, control characters escaped."""
    typer.echo(printable_lines(text))


def print_loading(loading: Loading, out: Path) -> None:
    """Print where the result is, and the lines of Python that load it."""
    print_text(f"\nwritten to {out}; load it with\n")
    print_text("\n".join(f"  {line}" for line in loading.lines(str(out))))


def print_messages(kind: str, messages: Iterable[str]) -> None:
    """Print messages on standard error, control characters escaped.

    Args:
        kind: error, warning or note.
        messages: a line each.
    """
    for message in messages:
        sys.stderr.write(f"{kind}: {printable_lines(message)}\n")


def print_warnings(found: list[str]) -> None:
    """Print warnings on standard error."""
    print_messages("warning", found)


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output; JSON escapes control characters itself."""
    typer.echo(json.dumps(value, default=str))
