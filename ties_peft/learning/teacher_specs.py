"""Read what `distil` is asked for: the adapters to imitate, the rows and the task of each. Make a teacher of each adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter, check_is_list
from ..errors import RecipeError, unknown
from ..evaluation.evaluate import find_base
from ..evaluation.loaded_model import LANGUAGE, Bench, check_text_model
from ..evaluation.rows import (
    FILES,
    NAME_COLUMN,
    PLAIN_TEXT,
    PROMPT,
    TEXT,
    Row,
    is_row_source,
    read_rows,
    text_column,
    texts_of,
)
from ..evaluation.scorers import Classification, check_form, form_for
from ..evaluation.task import SLOT, Task, is_task, read_task
from ..merging.members import short_names
from ..merging.values import check_whole
from . import ANSWERS, GENERATED, GENERATED_ROWS
from .teachers import BASE, LabelTeacher, Teacher
from .token_teachers import TokenTeacher
from .written_rows import AnswerWriter, RowWriter, Writer, end_tokens, line_ends, random_rows, row_beginning

RANDOM_ROWS = 800
TEXT_TOKENS = 48  # at most, in each part of a prompt that an adapter writes
_, GIVEN, NONE = ANSWERS
RENAME_COLUMN = (  # said of rows without a task
    f"Rename the one that holds the text to '{TEXT}' or '{PROMPT}', or give a task that names it (--task FILE or tasks=, with text: KEY)."
)
MIN_ROWS = 5  # since one of five rows is held out
FORM_OF_TASK_TYPE = {"CAUSAL_LM": LANGUAGE, "SEQ_CLS": "classifier"}  # of adapters that need no task
DEFAULT_TASKS = {LANGUAGE: Task("loss", label=None), "classifier": Task("head")}


@dataclass(frozen=True)
class RowSpec:
    """The rows that the user asked for, of one adapter.

    Attributes:
        texts: what the adapter reads; None for random tokens and for rows that it writes itself.
        count: the number of rows of random tokens, or of rows that it writes.
        origin: where the rows come from, in words.
        targets: the answer to each text, where the answers are given.
        generated: whether the adapter writes its rows itself.
        by_default: whether they are rows of random tokens because none were asked for.
    """

    texts: tuple[str, ...] | None
    count: int
    origin: str
    targets: tuple[str, ...] | None = None
    generated: bool = False
    by_default: bool = False


@dataclass(frozen=True)
class TeacherSpec:
    """One adapter to imitate, as the user asked for it.

    Attributes:
        adapter: the adapter.
        name: of the adapter, short and unique, for tables.
        task: how its predictions are read; None where that follows from the model.
        rows: its rows.
    """

    adapter: Adapter
    name: str
    task: Task | None
    rows: RowSpec


def read_teacher_specs(
    adapters: Sequence[Any], rows: Any = None, tasks: Any = None, count: int | None = None, answers: str | None = None
) -> list[TeacherSpec]:
    """Open the adapters and find the task and the rows of each; see `distil`.

    Raises: RecipeError naming a task or rows that belong to no adapter, or an adapter without them; CompatibilityError for
        a LoRA of an image model.
    """
    check_is_list(adapters)
    if count is not None:
        check_whole("count", count, 1)
    if not adapters:
        raise RecipeError("expected a list of adapters to imitate, at least one: distil([...]).")
    opened = [a if isinstance(a, Adapter) else Adapter.load(a) for a in adapters]
    for adapter in opened:
        check_text_model(adapter)
    names = short_names([adapter.label for adapter in opened])
    keys = [{_lookup_key(a), own.label, name} for a, own, name in zip(adapters, opened, names, strict=True)]
    named = _for_each("tasks", tasks, keys, names)
    given_tasks = [_read_task(task, adapter) for task, adapter in zip(named, opened, strict=True)]
    given_rows = _for_each("rows", rows, keys, names)
    written, labelled = count or GENERATED_ROWS, answers == GIVEN
    specs = [
        TeacherSpec(adapter, name, task, _row_spec(name, task, own_rows, written, labelled))
        for adapter, name, task, own_rows in zip(opened, names, given_tasks, given_rows, strict=True)
    ]
    if count is not None and not any(spec.rows.generated for spec in specs):
        raise RecipeError(
            f"count is {count}, and no adapter writes rows. Leave it out, or ask for written rows (--rows {GENERATED} or "
            f"rows='{GENERATED}')."
        )
    return specs


def _read_task(given: Any, adapter: Adapter) -> Task | None:
    """Return the task of an adapter. It need not name a measure: then the adapter's task type says how it predicts."""
    if given is None:
        return None
    form = _form_of(adapter)
    return read_task(given, None if form is None else DEFAULT_TASKS[form].measure)


def open_bench(
    specs: Sequence[TeacherSpec],
    base: str | Path | None,
    device: str,
    bench: Bench | None,
    precision: torch.dtype | str | None = None,
) -> Bench:
    """Load the base model in the form that the tasks need, and check that every adapter and task fits it.

    Raises: RecipeError where there are too few rows, and where the form is not known, differs between tasks, or cannot be
        imitated.
    """
    _check_numbers_of_rows(specs)
    if bench is None:
        forms = {_form(spec) for spec in specs}
        if len(forms) != 1:
            raise RecipeError(
                f"the tasks need {len(forms)} forms of the base model ({', '.join(sorted(forms))}), and one is loaded. "
                "Imitate the adapters of one form at a time."
            )
        tasks = [spec.task for spec in specs if spec.task is not None]
        chosen = find_base([spec.adapter for spec in specs], tasks, base)
        bench = Bench.load(chosen, forms.pop(), device, dtype=precision)
    if bench.form == "seq2seq":
        raise RecipeError(
            f"'{bench.base}' is a sequence-to-sequence model; expected an encoder, a sequence classifier or a causal language "
            "model, whose adapters can be imitated. Choose a base of one of these."
        )
    for spec in specs:
        if spec.task is not None:
            check_form(bench, spec.task)
        elif bench.form == "encoder":
            raise RecipeError(_needs_task(spec))
        bench.check_all(spec.adapter)
    return bench


@dataclass(frozen=True)
class AnswerOptions:
    """Where the answers to prompts come from; see `distil`.

    Attributes:
        answers: one of `ANSWERS`; None for the default of each adapter's rows.
        tokens: the largest number in an answer.
        seed: of the sampling and of random tokens.
    Raises: RecipeError for unknown answers and for a number of tokens below 1.
    """

    answers: str | None
    tokens: int
    seed: int

    def __post_init__(self) -> None:
        if self.answers is not None and self.answers not in ANSWERS:
            raise RecipeError(unknown("kind of answers", str(self.answers), ANSWERS))
        check_whole("answer_tokens", self.tokens, 1)


def make_teachers(specs: Sequence[TeacherSpec], bench: Bench, options: AnswerOptions) -> list[Teacher]:
    """Tokenize the rows of each adapter; no adapter is run yet.

    Raises: RecipeError where there are too few rows, or where a model that is not causal would have to write.
    """
    return [_teacher(spec.adapter, spec.name, spec.task, spec.rows, bench, options) for spec in specs]


def make_base_teacher(rows: Any, bench: Bench, options: AnswerOptions) -> Teacher:
    """Return the base model as a teacher, on rows of its own (`keep_base`), of which every token is compared.

    Raises: RecipeError where the model is no causal one, or the rows cannot be used.
    """
    if bench.form != "causal":
        raise RecipeError(
            f"keep_base: the base '{bench.base}' is loaded as {bench.form}; expected a causal language model. Leave keep_base out."
        )
    asked = _row_spec(BASE, None, rows, GENERATED_ROWS, labelled=False)
    return _teacher(None, BASE, None, asked, bench, replace(options, answers=NONE))


def _teacher(
    adapter: Adapter | None, name: str, given_task: Task | None, rows: RowSpec, bench: Bench, options: AnswerOptions
) -> Teacher:
    causal = bench.form == "causal"
    task = given_task or DEFAULT_TASKS[LANGUAGE if causal else bench.form]
    if not causal:
        _check_no_writing(rows, bench, options)
    writer = _writer(rows, given_task, bench, options) if causal else None
    digest = BASE if adapter is None else adapter.digest
    sequences, starts = _sequences(rows, task, bench, options.seed, digest, are_prompts=writer is not None)
    kept = [place for place, ids in enumerate(sequences) if ids]
    _check_number(name, len(kept), f"rows with a token in them ({rows.origin})", "Give more rows")
    sequences = [sequences[place] for place in kept]
    if not causal:
        assert adapter is not None
        scorer = Classification(bench, task, labelled=False, sequences=sequences)
        return LabelTeacher(scorer, adapter, name, rows.origin)
    starts = None if starts is None else [starts[place] for place in kept]
    choices = choice_tokens(bench, task) if starts or (writer and writer.prompted) else ()
    return TokenTeacher(bench, adapter, sequences, name, rows.origin, writer, choices, starts)


def _check_number(name: str, rows: int, what: str, remedy: str) -> None:
    """Raise RecipeError for fewer rows than are needed to hold one out."""
    if rows < MIN_ROWS:
        raise RecipeError(
            f"adapter '{name}' has {rows} {what}; expected at least {MIN_ROWS}. {remedy}, or a number of rows of random tokens."
        )


def _check_numbers_of_rows(specs: Sequence[TeacherSpec]) -> None:
    """Refuse too few rows, as far as they can be counted before the model is loaded."""
    for spec in specs:
        if spec.rows.generated:
            _check_number(spec.name, spec.rows.count, "rows to write", "Ask for more (--count or count=)")
        elif spec.rows.texts is not None:
            _check_number(spec.name, len(spec.rows.texts), f"rows ({spec.rows.origin})", "Give more rows")


def _check_no_writing(rows: RowSpec, bench: Bench, options: AnswerOptions) -> None:
    """Refuse answers and written rows for a model that is not causal."""
    if rows.generated or options.answers is not None:
        asked = f"rows '{GENERATED}'" if rows.generated else f"answers '{options.answers}'"
        raise RecipeError(
            f"{asked}: only a causal language model can write; '{bench.base}' is loaded as {bench.form}. Give texts, or a "
            "number of rows of random tokens."
        )


def _writer(rows: RowSpec, task: Task | None, bench: Bench, options: AnswerOptions) -> Writer | None:
    """Return what lets an adapter write its rows or its answers; None where it writes nothing."""
    if rows.generated:
        pieces = prompt_pieces(task or DEFAULT_TASKS[LANGUAGE])
        if not any(pieces):
            return RowWriter(TEXT_TOKENS, options.tokens, (), (), options.seed)
        ids = tuple(map(tuple, bench.all_token_ids(pieces, special=False)))
        return RowWriter(TEXT_TOKENS, options.tokens, ids, line_ends(bench), options.seed)
    unlabelled = task is not None and task.label is None
    if rows.texts is None or unlabelled or options.answers in (GIVEN, NONE):
        return None
    return AnswerWriter(options.tokens, options.seed, whole=task is None)


def prompt_pieces(task: Task) -> list[str]:
    """Return what follows each slot in the form of a task's prompts. All are empty where it is not known how a prompt ends."""
    return [piece.rstrip() for piece in task.format_of_prompts.split(SLOT)[1:]]


def _sequences(
    rows: RowSpec, task: Task, bench: Bench, seed: int, digest: str, are_prompts: bool
) -> tuple[list[list[int]], list[int] | None]:
    """Return the token ids of each row, and where the given answers begin in them; None without given answers."""
    if rows.generated:
        return [row_beginning(bench, task.format_of_prompts.partition(SLOT)[0])] * rows.count, None
    if rows.texts is None:
        return random_rows(bench, rows.count, seed, digest, task.descriptions), None
    texts = task.fill_template(list(rows.texts))
    if rows.targets is not None:
        return _with_targets(bench, [text.rstrip() for text in texts], rows.targets, task.max_tokens)
    texts = [text.rstrip() for text in texts] if are_prompts else texts  # as `evaluate` reads prompts
    return bench.token_ids(texts, task.max_tokens)[0], None


def _with_targets(
    bench: Bench, texts: Sequence[str], targets: Sequence[str], most: int
) -> tuple[list[list[int]], list[int]]:
    """Return prompts with their answers, tokenized together, and where each answer begins.

    Each answer is followed by the model's end token, because an adapter that is not matched there need not stop.
    """
    pairs = [tokenized(bench, text, target) for text, target in zip(texts, targets, strict=True)]
    pairs = [(prompt, ended(bench, answer)) for prompt, answer in pairs]
    prompts = [prompt[-most:] for prompt, _ in pairs]
    return [[*prompt, *answer] for prompt, (_, answer) in zip(prompts, pairs, strict=True)], list(map(len, prompts))


def tokenized(bench: Bench, text: str, target: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a prompt and of the text that follows it, as in running text."""
    joint = text + (target if target[:1].isspace() or not target else f" {target}")
    whole, alone = bench.all_token_ids([joint, text])
    return whole[: len(alone)], whole[len(alone) :]


def ended(bench: Bench, answer: list[int]) -> list[int]:
    """Return an answer with the model's end token behind it, unless it ends with one or the model has none."""
    ends = end_tokens(bench)
    chosen = getattr(bench.tokenizer, "eos_token_id", None)
    if not ends or (answer and answer[-1] in ends):
        return answer
    return [*answer, min(ends) if chosen is None else chosen]


def choice_tokens(bench: Bench, task: Task) -> tuple[int, ...]:
    """Return the first token of each choice of a task; empty without choices, or where two have the same first token."""
    if task.choices is None:
        return ()
    prompt = task.template.replace(SLOT, "a").rstrip()
    firsts = tuple((tokenized(bench, prompt, choice)[1] or [-1])[0] for choice in task.choices)
    return firsts if len(set(firsts)) == len(firsts) and -1 not in firsts else ()


def _row_spec(name: str, task: Task | None, rows: Any, count: int, labelled: bool) -> RowSpec:
    """Return one adapter's rows.

    Args:
        name: of the adapter, for messages.
        task: of the adapter.
        rows: as given; None for the default.
        count: the number of rows that it writes, if it writes them.
        labelled: whether the labels of the rows are the answers.
    """
    if rows == GENERATED:
        return RowSpec(None, count, "written by the adapter", generated=True)
    if rows is None and task is not None and task.rows is not None:
        origin = task.rows if isinstance(task.rows, str) else "the task's rows"
        return _from_rows(name, task, task.read(), origin, task.where, labelled, task.text)
    if rows is None or (isinstance(rows, int) and not isinstance(rows, bool)):
        described = task is not None and task.descriptions is not None
        origin = "random tokens and words of the labels" if described else "random tokens"
        return RowSpec(None, RANDOM_ROWS if rows is None else rows, origin, by_default=rows is None)
    if isinstance(rows, (str, Path)):
        named = task.text if task else TEXT
        read = read_rows(rows, limit=task.limit if task else None, text=named)
        column = text_column(read) if named == TEXT else named
        asked = task and replace(task, rows=str(rows))  # so that messages about labels name these rows
        return _from_rows(name, asked, read, str(rows), f"rows {str(rows)!r}", labelled, column)
    if not (isinstance(rows, Sequence) and all(isinstance(text, str) for text in rows)):
        raise RecipeError(
            f"rows of '{name}' are {rows!r}; expected a list of texts, the path of a .jsonl, .csv or .txt file, "
            f"a data set on the Hub, a number of rows of random tokens, or '{GENERATED}'."
        )
    if labelled:
        raise RecipeError(
            f"answers '{GIVEN}': the rows of '{name}' are texts without labels. Give a file with both, and a task that "
            f"names their keys; or answers='{NONE}' for texts that end with their answers."
        )
    return RowSpec(tuple(rows), 0, "texts given")


def _from_rows(
    name: str, task: Task | None, rows: list[Row], place: str, where: str, labelled: bool, column: str
) -> RowSpec:
    """Return the texts of a column of rows that were read and, if asked for, their labels as answers."""
    texts = tuple(texts_of(rows, column, where, NAME_COLUMN if task is not None else RENAME_COLUMN))
    origin = place if place.endswith(PLAIN_TEXT) else f"{place}, column {column}"
    if not labelled:
        return RowSpec(texts, 0, origin)
    if task is None or task.label is None:
        raise RecipeError(f"answers '{GIVEN}': the task of '{name}' names no label. Name its key (label: KEY).")
    choices = task.choices
    answers = [choices[number] for number in task.label_numbers(rows)] if choices else task.target_texts(rows)
    return RowSpec(texts, 0, origin, tuple(answers))


def _for_each(what: str, given: Any, keys: Sequence[set[Any]], names: Sequence[str]) -> list[Any]:
    """Return one value for each adapter, from values by the adapter's name, values in order, or one for all."""
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
    """Return one entry for each of `count` adapters, from a list of `count` entries or of one for all.

    Raises: RecipeError for another number of entries, and for texts that could be meant for each adapter or for all.
    """
    if what == "rows" and all(isinstance(entry, str) for entry in given) and not all(map(is_row_source, given)):
        if len(given) == count > 1:
            shared, single = (repr(rows) for rows in ([given], [[text] for text in given]))
            raise RecipeError(
                f"rows is a list of {count} texts for {count} adapters, which has two meanings. Write rows={shared} if every "
                f"adapter reads all texts, or rows={single} if each reads its own. A string that ends in {', '.join(FILES)} "
                "is the path of a file."
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
    form = _form_of(spec.adapter)
    if form is None:
        raise RecipeError(_needs_task(spec))
    return form


def _form_of(adapter: Adapter) -> str | None:
    """Return the form of base model that an adapter's task type needs; None where it does not say."""
    return FORM_OF_TASK_TYPE.get(str(adapter.config.get("task_type")))


def _needs_task(spec: TeacherSpec) -> str:
    return (
        f"adapter '{spec.name}' has no task, and its config does not say how it predicts: task_type is "
        f"{spec.adapter.config.get('task_type')!r}; expected CAUSAL_LM or SEQ_CLS. Give its task (tasks=, --task); for an encoder "
        "one with descriptions."
    )
