"""The options of a merge, each written down once: name, type, default, meaning, and where a recipe holds it.

Recipes, flags and what a search may set are derived from `Options`. The signatures of `merge`, `Prepared.merge` and
`add_merged_adapter` are written out, because editors and type checkers read them as they stand, and
`tests/test_defaults.py` compares them with `Options`. `**options: Unpack[TypedDict]` cannot replace them, because `**` holds
the parameters of the method, and method, space and weights may be given by position.

Importing this module needs neither torch nor pydantic, so that help, completion and usage errors are quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..adapters import TARGETS
from ..errors import RecipeError, unknown
from .recipes.scale import EXPECTED as EXPECTED_SCALE
from .recipes.scale import is_scale

Rank = int | str
Weights = Sequence[Any] | str  # a number or a schedule for each adapter, or `norm`

DEVICE = "cpu"
DTYPES = ("float32", "float16", "bfloat16")
NORM = "norm"
RANKS = ("auto", "max")
ERROR, DROP, AVERAGE, MERGE, KEEP = "error", "drop", "average", "merge", "keep="
POLICIES = (ERROR, DROP, f"{KEEP}NAME", AVERAGE, MERGE)  # what can be done with whole layers in a merge
TOP, PARAMETERS = "top", "parameters"  # the tables of a recipe
COMBINATION, RESULT = "How the adapters are combined", "What is written"  # the panels of the help


@dataclass(frozen=True)
class Option:
    """One option of a merge.

    Attributes:
        help: its meaning, as the command line shows it.
        shown: text for the default on the command line, if not its value.
        panel: of the help; None for the general one.
        flag: on the command line; by default as its name.
        table: of a recipe that holds it: `TOP` or `PARAMETERS`; None for an option that is written beside each adapter.
        key: in that table; by default its name.
        accepts: whether a value is one of its values; None is one too where it is the default.
        expected: its values, in words.
        read: gives the value that a text stands for, or raises ValueError.
        values: what the shell completes.
        closed: whether `values` are all of its values.
        always: whether a saved recipe has it even where it is the default.
        tunable: whether a search may set it.
        name, default: as in `Options`.
    """

    help: str
    shown: str | None = None
    panel: str | None = COMBINATION
    flag: str = ""
    table: str | None = PARAMETERS
    key: str = ""
    accepts: Callable[[Any], bool] = lambda value: True
    expected: str = "text"
    read: Callable[[str], Any] = str
    values: tuple[str, ...] = ()
    closed: bool = False
    always: bool = False
    tunable: bool = False
    name: str = ""
    default: Any = None


def is_policy(value: object) -> bool:
    """Return whether a value is one of `POLICIES`, whatever the name in it."""
    return isinstance(value, str) and (
        value in (ERROR, DROP, AVERAGE, MERGE) or (value.startswith(KEEP) and value != KEEP)
    )


def is_rank(value: Any) -> bool:
    """Return whether a value is a rank that can be asked for."""
    return value in RANKS or (isinstance(value, int) and not isinstance(value, bool) and value >= 1)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _option(default: Any, help: str, shown: str | None = None, **facts: Any) -> Any:
    """Return the field of an option; one that is `closed` accepts its values alone."""
    if facts.get("closed"):
        facts |= {"accepts": facts["values"].__contains__, "expected": " or ".join(facts["values"])}
    return field(default=default, metadata={"option": Option(help, shown, **facts)})


@dataclass(frozen=True)
class Options:
    """What a merge is asked for.

    `adapters` are paths, Hub ids or patterns, as `sources` reads them; `parameters` are the method's own and the space's.
    The report repeats `notes`; a note on a key begins with the key and a colon. In `weights` and `densities` each value may
    be a schedule (see `schedule`), and None in `densities` stands for the method's density.
    """

    adapters: tuple[str, ...]
    weights: tuple[Any, ...] | str | None = _option(
        None,
        "One number per adapter, applied before everything else: 1,0.5,1; or norm, which brings all adapters to the same norm.",
        "1 each",
        table=None,
        expected="numbers with commas between, such as 1,0.5,1, or norm",
        read=lambda text: text if text == NORM else _numbers(text),
    )
    densities: tuple[Any, ...] | None = _option(
        None,
        "One density per adapter: 0.2,0.9.",
        "one for all",
        table=None,
        expected="numbers with commas between, such as 0.2,0.9",
        read=_numbers,
    )
    method: str = _option(
        "auto",
        "The rule by which they are combined; `ties-peft methods` lists them. auto is dual for LoRA, rms_sum for (IA)³, and "
        "ties where a parameter of TIES is given.",
        table=TOP,
        key="merge_method",
        tunable=True,
    )
    parameters: Mapping[str, Any] = field(default_factory=dict)
    space: str = _option("delta", "The coordinates in which they are combined.", always=True, tunable=True)
    scale: int | float | str | None = _option(
        None,
        "λ, the factor on the merged task vector: a number, or 1/sqrt(N), N^-1/4, 0.7*N^-1/4 with N the number of adapters.",
        "the method's",
        accepts=is_scale,
        expected=EXPECTED_SCALE,
        read=lambda text: text if is_scale(text) else float(text),
        tunable=True,
    )
    rank: int | str = _option(
        "auto",
        "The rank of the result: a whole number, max or auto.",
        panel=RESULT,
        accepts=is_rank,
        expected="a whole number from 1 up, max or auto",
        read=lambda text: text if text in RANKS else int(text),
        values=RANKS,
        always=True,
        tunable=True,
    )
    restore_norm: bool = _option(
        False,
        "Scale each module that the rank truncates back to the norm it had before.",
        panel=RESULT,
        expected="true or false",
    )
    seed: int = _option(
        0,
        "The seed of all random numbers.",
        accepts=lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
        expected="a whole number, 0 or more",
        always=True,
        tunable=True,
    )
    dtype: str | None = _option(
        None,
        f"The dtype of the tensors: {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.",
        "the inputs'",
        panel=RESULT,
        table=TOP,
        values=DTYPES,
        closed=True,
    )
    base_model: str | None = _option(
        None,
        "The name of the base model in the result's config.",
        "the inputs'",
        panel=RESULT,
        flag="--base-name",
        table=TOP,
    )
    allow_disjoint: bool = _option(
        False, "Accept adapters that have no module in common.", table=TOP, expected="true or false"
    )
    notes: tuple[str, ...] = ()
    heads: str = _option(
        ERROR,
        "What to do with whole layers (heads, embeddings, biases) that differ: error, drop, keep=NAME, average or merge.",
        panel=RESULT,
        table=TOP,
        accepts=is_policy,
        expected=f"one of {', '.join(POLICIES)}",
        values=tuple(KEEP if policy.startswith(KEEP) else policy for policy in POLICIES),
    )
    target: str | None = _option(
        None,
        f"The program that is to load the result: {', '.join(TARGETS)}.",
        "peft",
        panel=RESULT,
        table=TOP,
        values=TARGETS,
        closed=True,
    )
    base: str | None = _option(
        None,
        "Folder or Hub id of the base model, for adapters whose task vectors depend on its weights.",
        panel=None,
        table=TOP,
    )


def _described(name: str, default: Any, option: Option) -> Option:
    shown = option.shown if option.shown or default is None or default is False else str(default)
    flag = option.flag or f"--{name.replace('_', '-')}"
    return replace(option, name=name, default=default, shown=shown, flag=flag, key=option.key or name)


OPTIONS: Mapping[str, Option] = {
    own.name: _described(own.name, own.default, own.metadata["option"]) for own in fields(Options) if own.metadata
}


def options_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a function's arguments (its `locals()` before it binds any other name) that `make_recipe` takes."""
    return {name: value for name, value in arguments.items() if name in OPTIONS or name == PARAMETERS}


def check_option(name: str, value: Any) -> None:
    """Refuse a value that an option does not have.

    Raises: RecipeError that names the values it has.
    """
    option = OPTIONS[name]
    if option.accepts(value) or (value is None and option.default is None):
        return
    if option.closed:
        raise RecipeError(unknown(name, str(value), option.values))
    raise RecipeError(f"{name} is {value!r}; expected {option.expected}.")


def check_options(options: Options) -> None:
    """Refuse options of which one has a value that it does not have.

    Raises: as `check_option`.
    """
    for name in OPTIONS:
        check_option(name, getattr(options, name))


def read_flag(name: str, text: str | None) -> Any:
    """Return the value of an option that was given as a text; None for None.

    Raises: RecipeError.
    """
    option = OPTIONS[name]
    try:
        return None if text is None else option.read(text)
    except ValueError:
        raise RecipeError(f"{option.flag} is {text!r}; expected {option.expected}.") from None
