"""Find out which adapters `distil` is to imitate, on which rows, and how their predictions are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter, check_is_list
from ..errors import RecipeError, unknown
from ..evaluation.evaluate import find_base
from ..evaluation.loaded_model import LANGUAGE, Bench
from ..evaluation.rows import FILES, Row, is_row_source, read_rows, texts_of
from ..evaluation.scorers import Classification, check_form, form_for
from ..evaluation.task import SLOT, Task, is_task, read_task
from ..merging.members import short_names
from . import ANSWERS, GENERATED, GENERATED_ROWS
from .teachers import BASE, LabelTeacher, Teacher
from .token_teachers import TokenTeacher
from .written_rows import AnswerWriter, RowWriter, Writer, line_ends, random_rows, row_beginning

RANDOM_ROWS = 800
TEXT_TOKENS = 48  # of a row that an adapter writes, at most, besides its answer
OWN, GIVEN, NONE = ANSWERS
MIN_ROWS = 5  # rows: one is held out of five
FORM_OF_TASK_TYPE = {"CAUSAL_LM": LANGUAGE, "SEQ_CLS": "classifier"}  # what a config says that needs no task
DEFAULT_TASKS = {LANGUAGE: Task("loss", label=None), "classifier": Task("head")}


@dataclass(frozen=True)
class RowSpec:
    """The rows that the user asked for.

    Attributes:
        name: of the adapter, short and unique, for tables.
        task: how its predictions are read; None where that follows from the model.
        texts: what it reads; None for random tokens and for rows that it writes itself.
        count: how many rows of random tokens, or that it writes.
        origin: where the rows come from.
        targets: the answer to each text, where they are given.
        generated: whether it writes its rows itself.
    """

    name: str
    task: Task | None
    texts: tuple[str, ...] | None
    count: int
    origin: str
    targets: tuple[str, ...] | None = None
    generated: bool = False


@dataclass(frozen=True)
class TeacherSpec:
    """One adapter to imitate, and its rows."""

    adapter: Adapter
    rows: RowSpec

    @property
    def name(self) -> str:
        """The adapter's, short and unique, for tables."""
        return self.rows.name

    @property
    def task(self) -> Task | None:
        """How its predictions are read; None where that follows from the model."""
        return self.rows.task


def read_teacher_specs(
    adapters: Sequence[Any], rows: Any = None, tasks: Any = None, count: int | None = None, answers: str | None = None
) -> list[TeacherSpec]:
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
    every = zip(names, tasks_of, given, strict=True)
    asked = [_row_spec(*one, count or GENERATED_ROWS, answers == GIVEN) for one in every]
    return [TeacherSpec(*one) for one in zip(opened, asked, strict=True)]


def open_bench(
    specs: Sequence[TeacherSpec],
    base: str | Path | None,
    device: str,
    bench: Bench | None,
    precision: torch.dtype | str | None = None,
) -> Bench:
    """Load the base model in the form that the tasks need, and check that every adapter and task fits it.

    Raises: RecipeError where the form is not known, differs between tasks, or cannot be imitated.
    """
    if bench is None:
        forms = {_form(spec) for spec in specs}
        if len(forms) != 1:
            raise RecipeError(
                f"the tasks need {len(forms)} forms of the base model ({', '.join(sorted(forms))}); one is loaded. "
                "Imitate those of one form at a time."
            )
        tasks = [spec.task for spec in specs if spec.task is not None]
        chosen = find_base([spec.adapter for spec in specs], tasks, base)
        bench = Bench.load(chosen, forms.pop(), device, dtype=precision)
    if bench.form == "seq2seq":
        raise RecipeError(
            f"'{bench.base}' is a sequence-to-sequence model, whose predictions cannot be imitated yet; those of "
            "encoders, sequence classification and causal models can be."
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


@dataclass(frozen=True)
class Answering:
    """How answers to prompts come about; see `distil`.

    Attributes:
        answers: one of `ANSWERS`; None for what suits each adapter's rows.
        tokens: in an answer, at most.
        seed: of the sampling and of random tokens.
    """

    answers: str | None
    tokens: int
    seed: int


def make_teachers(specs: Sequence[TeacherSpec], bench: Bench, how: Answering) -> list[Teacher]:
    """Tokenize the rows of each adapter; no adapter is run yet.

    Raises: RecipeError where there are too few rows, or rows are to be written by a model that cannot.
    """
    return [_teacher(spec.adapter, spec.rows, bench, how) for spec in specs]


def make_base_teacher(rows: Any, bench: Bench, how: Answering) -> Teacher:
    """Return the base model as a teacher, on text of its own (`keep_base`); all positions are judged.

    Raises: RecipeError where the model is no causal one, or the rows cannot be used.
    """
    if bench.form != "causal":
        raise RecipeError(f"keep_base needs a causal language model; '{bench.base}' is loaded as {bench.form}.")
    asked = _row_spec(BASE, None, rows, GENERATED_ROWS, False)
    return _teacher(None, asked, bench, replace(how, answers=NONE))


def _teacher(adapter: Adapter | None, spec: RowSpec, bench: Bench, how: Answering) -> Teacher:
    form = LANGUAGE if bench.form == "causal" else bench.form
    task = spec.task or DEFAULT_TASKS[form]
    if form != LANGUAGE:
        _check_no_writing(spec, bench, how)
    writer = _writer(spec, task, bench, how) if form == LANGUAGE else None
    starts: list[int] | None = None
    if spec.generated:
        sequences = [row_beginning(bench, task.format_of_prompts.partition(SLOT)[0])] * spec.count
    elif spec.texts is None:
        digest = BASE if adapter is None else adapter.digest
        sequences = random_rows(bench, spec.count, how.seed, digest, task.descriptions)
    else:
        texts = task.fill_template(list(spec.texts))
        texts = [text.rstrip() for text in texts] if writer or spec.targets else texts  # as `evaluate` reads prompts
        sequences, _ = bench.token_ids(texts, task.max_tokens)
        if spec.targets is not None:
            sequences, starts = _with_targets(bench, texts, spec.targets, task.max_tokens)
    kept = [place for place, ids in enumerate(sequences) if ids]
    if len(kept) < MIN_ROWS:
        raise RecipeError(
            f"adapter '{spec.name}' has {len(kept)} rows with a token in them ({spec.origin}); expected "
            f"{MIN_ROWS} at least. Give more, or a number of rows of random tokens."
        )
    sequences = [sequences[place] for place in kept]
    if form != LANGUAGE:
        assert adapter is not None
        scorer = Classification(bench, task, labelled=False, sequences=sequences)
        return LabelTeacher(scorer, adapter, spec.name, spec.origin)
    starts = None if starts is None else [starts[place] for place in kept]
    choices = choice_tokens(bench, task) if starts or (writer and writer.prompted) else ()
    return TokenTeacher(bench, adapter, sequences, spec.name, spec.origin, writer, choices, starts)


def _check_no_writing(spec: RowSpec, bench: Bench, how: Answering) -> None:
    """Refuse answers and written rows where the model is no causal one."""
    if spec.generated or how.answers is not None:
        asked = f"rows '{GENERATED}'" if spec.generated else f"answers '{how.answers}'"
        raise RecipeError(
            f"{asked}: only a causal language model can write; '{bench.base}' is loaded as {bench.form}. Give texts, or a "
            "number of rows of random tokens."
        )


def _writer(spec: RowSpec, task: Task, bench: Bench, how: Answering) -> Writer | None:
    """Return what an adapter is asked to write; None for nothing."""
    if spec.generated:
        pieces = [piece.rstrip() for piece in task.format_of_prompts.split(SLOT)[1:]]
        if not any(pieces):
            return RowWriter(TEXT_TOKENS, how.tokens, (), (), how.seed)
        ids = tuple(tuple(one) for one in bench.all_token_ids(pieces, special=False))
        return RowWriter(TEXT_TOKENS, how.tokens, ids, line_ends(bench), how.seed)
    if spec.texts is None or (task.label is None and spec.task is not None) or how.answers in (GIVEN, NONE):
        return None
    return AnswerWriter(how.tokens, how.seed, spec.task is None)


def _with_targets(
    bench: Bench, texts: Sequence[str], targets: Sequence[str], most: int
) -> tuple[list[list[int]], list[int]]:
    """Return prompts with the given answers as token ids, and where the answers begin; both are tokenized together."""
    pairs = [tokenized(bench, text, target) for text, target in zip(texts, targets, strict=True)]
    prompts = [prompt[-most:] for prompt, _ in pairs]
    return [[*prompt, *answer] for prompt, (_, answer) in zip(prompts, pairs, strict=True)], list(map(len, prompts))


def tokenized(bench: Bench, text: str, target: str) -> tuple[list[int], list[int]]:
    """Return token ids of a prompt and of what follows it, as they are in running text."""
    joint = text + (target if target[:1].isspace() or not target else f" {target}")
    whole, alone = bench.all_token_ids([joint, text])
    return whole[: len(alone)], whole[len(alone) :]


def choice_tokens(bench: Bench, task: Task) -> tuple[int, ...]:
    """Return the first token of each choice of a task; empty where it has none, or where two begin with the same one."""
    if task.choices is None:
        return ()
    prompt = task.template.replace(SLOT, "a").rstrip()
    firsts = tuple((tokenized(bench, prompt, choice)[1] or [-1])[0] for choice in task.choices)
    return firsts if len(set(firsts)) == len(firsts) and -1 not in firsts else ()


def _row_spec(name: str, task: Task | None, rows: Any, count: int, labelled: bool) -> RowSpec:
    """Return one adapter's rows, `count` of them where it writes them, with their labels where these are the answers."""
    described = task is not None and task.descriptions is not None
    if rows == GENERATED:
        return RowSpec(name, task, None, count, "written by the adapter", None, True)
    if rows is None and task is not None and task.rows is not None:
        origin = task.rows if isinstance(task.rows, str) else "the task's rows"
        return _from_rows(name, task, task.read(), origin, task.where, labelled)
    if rows is None or (isinstance(rows, int) and not isinstance(rows, bool)):
        number = RANDOM_ROWS if rows is None else rows
        origin = "random tokens and words of the labels" if described else "random tokens"
        return RowSpec(name, task, None, number, origin)
    if isinstance(rows, (str, Path)):
        field = "text" if task is None else task.text
        read = read_rows(rows, limit=None if task is None else task.limit, text=field)
        return _from_rows(name, task, read, str(rows), f"rows {str(rows)!r}", labelled)
    if isinstance(rows, Sequence) and all(isinstance(text, str) for text in rows):
        if labelled:
            raise RecipeError(
                f"answers '{GIVEN}': the rows of '{name}' are texts without labels. Give a file with both, and a task that "
                f"names their keys; or answers='{NONE}' for texts that end with their answers."
            )
        return RowSpec(name, task, tuple(rows), 0, "texts given")
    raise RecipeError(
        f"rows of '{name}' are {rows!r}; expected a list of texts, the path of a .jsonl, .csv or .txt file, "
        f"a data set on the Hub, a number of random-token rows, or '{GENERATED}'."
    )


def _from_rows(name: str, task: Task | None, rows: list[Row], origin: str, where: str, labelled: bool) -> RowSpec:
    """Return the texts of rows that were read, and their answers if they count."""
    texts = texts_of(rows, "text" if task is None else task.text, where)
    targets = None
    if labelled and (task is None or task.label is None):
        raise RecipeError(
            f"answers '{GIVEN}': the task of '{name}' names no label. Give one with the key (label: KEY)."
        )
    if labelled and task is not None and task.choices is not None:
        targets = tuple(task.choices[number] for number in task.label_numbers(rows))
    elif labelled and task is not None:
        targets = tuple(task.target_texts(rows))
    return RowSpec(name, task, tuple(texts), 0, origin, targets)


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
