"""Find out which adapters `distil` is to imitate, on which rows, and how their predictions are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter, check_is_list
from ..errors import RecipeError, unknown
from ..evaluation.evaluate import find_base
from ..evaluation.loaded_model import LANGUAGE, Bench
from ..evaluation.rows import FILES, is_row_source, read_rows, texts_of
from ..evaluation.scorers import Classification, check_form, form_for
from ..evaluation.task import Task, is_task, read_task
from ..merging.members import short_names
from .teachers import LabelTeacher, Teacher, TokenTeacher, random_rows

RANDOM_ROWS = 800
MIN_ROWS = 5  # rows: one is held out of five
FORM_OF_TASK_TYPE = {"CAUSAL_LM": LANGUAGE, "SEQ_CLS": "classifier"}  # what a config says that needs no task
DEFAULT_TASKS = {LANGUAGE: Task("loss", label=None), "classifier": Task("head")}


@dataclass(frozen=True)
class TeacherSpec:
    """What the user asked for one adapter to imitate.

    Attributes:
        adapter: the one to imitate.
        name: short and unique, for tables.
        task: how its predictions are read; None where that follows from the model.
        texts: what it reads; None for random tokens.
        count: how many rows of random tokens.
        origin: where the rows come from.
    """

    adapter: Adapter
    name: str
    task: Task | None
    texts: tuple[str, ...] | None
    count: int
    origin: str


def read_teacher_specs(adapters: Sequence[Any], rows: Any = None, tasks: Any = None) -> list[TeacherSpec]:
    """Open the adapters and find the task and the texts of each; see `distil`.

    Raises: RecipeError naming a task or rows that belong to no adapter, or an adapter without them.
    """
    check_is_list(adapters)
    if not adapters:
        raise RecipeError("expected a list of adapters to imitate, at least one: distil([...]).")
    opened = [a if isinstance(a, Adapter) else Adapter.load(a) for a in adapters]
    names = short_names([adapter.label for adapter in opened])
    keys = [
        {given, own.label, name} for given, own, name in zip(map(_lookup_key, adapters), opened, names, strict=True)
    ]
    tasks_of = [None if task is None else read_task(task) for task in _for_each("tasks", tasks, keys, names)]
    given = _for_each("rows", rows, keys, names)
    return [_teacher(*one) for one in zip(opened, names, tasks_of, given, strict=True)]


def open_bench(specs: Sequence[TeacherSpec], base: str | Path | None, device: str, bench: Bench | None) -> Bench:
    """Load the base model in the form that the tasks need, and check that every adapter and task fits it.

    Raises: RecipeError where the form is not known, differs between tasks, or cannot be imitated.
    """
    if bench is None:
        forms = {_form(spec) for spec in specs}
        if len(forms) != 1:
            raise RecipeError(
                f"the tasks need {len(forms)} forms of the base model ({', '.join(sorted(forms))}); distil loads one. "
                "Imitate those of one form at a time."
            )
        tasks = [spec.task for spec in specs if spec.task is not None]
        chosen = find_base([spec.adapter for spec in specs], tasks, base)
        bench = Bench.load(chosen, forms.pop(), device)
    if bench.form == "seq2seq":
        raise RecipeError(
            f"'{bench.base}' is a sequence-to-sequence model, whose predictions distil cannot imitate yet; it does so "
            "with encoders, sequence classification and causal models."
        )
    for spec in specs:
        if spec.task is not None:
            check_form(bench, spec.task)
        elif bench.form == "encoder":
            raise RecipeError(_needs_task(spec))
        bench.check(spec.adapter)
        bench.check_complete(spec.adapter)
        spec.adapter.check()
    return bench


def make_teachers(specs: Sequence[TeacherSpec], bench: Bench, seed: int) -> list[Teacher]:
    """Tokenize the rows of each adapter; no adapter is run yet.

    Raises: RecipeError where there are too few rows.
    """
    return [_teacher_of(spec, bench, seed) for spec in specs]


def _teacher_of(spec: TeacherSpec, bench: Bench, seed: int) -> Teacher:
    form = LANGUAGE if bench.form == "causal" else bench.form
    task = spec.task or DEFAULT_TASKS[form]
    if spec.texts is None:
        sequences = random_rows(bench, spec.count, seed, spec.adapter.digest, task.descriptions)
    else:
        found, _ = bench.token_ids(task.fill_template(list(spec.texts)), task.max_tokens)
        sequences = [ids for ids in found if ids]
    if len(sequences) < MIN_ROWS:
        raise RecipeError(
            f"adapter '{spec.name}' has {len(sequences)} rows with a token in them ({spec.origin}); expected "
            f"{MIN_ROWS} at least, of which one in five is held out. Give more, or none for random tokens."
        )
    if form == LANGUAGE:
        return TokenTeacher(bench, spec.adapter, sequences, spec.name, spec.origin)
    scorer = Classification(bench, task, labelled=False, sequences=sequences)
    return LabelTeacher(scorer, spec.adapter, spec.name, spec.origin)


def _teacher(adapter: Adapter, name: str, task: Task | None, rows: Any) -> TeacherSpec:
    if rows is None and task is not None and task.rows is not None:
        texts = texts_of(task.read(), task.text, task.where)
        origin = task.rows if isinstance(task.rows, str) else "the task's rows"
        return TeacherSpec(adapter, name, task, tuple(texts), 0, origin)
    if rows is None or (isinstance(rows, int) and not isinstance(rows, bool)):
        count = RANDOM_ROWS if rows is None else rows
        described = task is not None and task.descriptions is not None
        origin = "random tokens and words of the labels" if described else "random tokens"
        return TeacherSpec(adapter, name, task, None, count, origin)
    if isinstance(rows, (str, Path)):
        field = "text" if task is None else task.text
        limit = None if task is None else task.limit
        texts = texts_of(read_rows(rows, limit=limit, text=field), field, f"rows {str(rows)!r}")
        return TeacherSpec(adapter, name, task, tuple(texts), 0, str(rows))
    if isinstance(rows, Sequence) and all(isinstance(text, str) for text in rows):
        return TeacherSpec(adapter, name, task, tuple(rows), 0, "texts given")
    raise RecipeError(
        f"rows of '{name}' are {rows!r}; expected a list of texts, the path of a .jsonl, .csv or .txt file, "
        "a data set on the Hub, or a number of random-token rows."
    )


def _for_each(what: str, given: Any, keys: Sequence[set[Any]], names: Sequence[str]) -> list[Any]:
    """Return what is given for each adapter: by name, in order, or the same for all."""
    if given is None or isinstance(given, (str, Path, int, Task)):
        return [given] * len(keys)
    known = set().union(*keys)
    if isinstance(given, Mapping) and what == "tasks" and is_task(given) and known.isdisjoint(map(_lookup_key, given)):
        return [given] * len(keys)
    if not isinstance(given, Mapping):
        return _in_order(what, list(given), len(keys))
    by_key = {_lookup_key(key): value for key, value in given.items()}
    for key in by_key:
        if key not in known:
            raise RecipeError(f"{what}: {unknown('adapter', str(key), names)}")
    result = [next((by_key[key] for key in own if key in by_key), None) for own in keys]
    missing = [name for name, value in zip(names, result, strict=True) if value is None]
    if missing:
        raise RecipeError(f"{what}: there are none for {', '.join(missing)}. Give them for every adapter, or for none.")
    return result


def _in_order(what: str, given: list[Any], count: int) -> list[Any]:
    """Return one entry for each of `count` adapters: of a list for each of them, or for all.

    Raises: RecipeError where the number of entries is neither, or where texts could be for each or for all.
    """
    if what == "rows" and all(isinstance(entry, str) for entry in given) and not all(map(is_row_source, given)):
        if len(given) == count > 1:
            shared, single = (repr(rows) for rows in ([given], [[text] for text in given]))
            raise RecipeError(
                f"rows is a list of {count} texts for {count} adapters, which can mean two things. Write rows={shared} if "
                f"every adapter reads all of them, or rows={single} if each reads its own. A string is the path of a file "
                f"if it ends in {', '.join(FILES)}."
            )
        given = [given]
    if len(given) not in (1, count):
        raise RecipeError(
            f"{len(given)} {what} for {count} adapters. Give one for each, in their order, or one for all."
        )
    return given * count if len(given) == 1 else given


def _lookup_key(value: Any) -> Any:
    """Return what identifies an adapter: its path as text, or the object itself."""
    return str(value) if isinstance(value, (str, Path)) else id(value)


def _form(spec: TeacherSpec) -> str:
    """Return the form of base model that an adapter needs."""
    if spec.task is not None:
        return form_for(spec.task)
    form = FORM_OF_TASK_TYPE.get(str(spec.adapter.config.get("task_type")))
    if form is None:
        raise RecipeError(_needs_task(spec))
    return form


def _needs_task(spec: TeacherSpec) -> str:
    return (
        f"adapter '{spec.name}' says task_type {spec.adapter.config.get('task_type')!r}, so how its "
        "predictions are read is not known. Give its task (tasks=, --task), with descriptions for an encoder."
    )
