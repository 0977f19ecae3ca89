"""Task: labelled rows, and how a prediction is read from a model. A small YAML or JSON file, or a dict.

    name: sst2
    base: sentence-transformers/all-MiniLM-L6-v2
    rows: sst2/test.jsonl              # beside this file; or a data set on the Hub, with split: and config:
    limit: 300
    descriptions: ["a negative opinion: …", "a positive opinion: …"]

Measures:

    descriptions  of an encoder: the label whose description is nearest to the text. logits = temperature · cosine of
                  embeddings, each the mean of the last hidden states over tokens. The bare base embeds the descriptions
    head          of a model with a sequence-classification head: the label of the largest logit
    choices       of a causal or sequence-to-sequence model: the choice of the largest log-probability after the text,
                  summed over its tokens (with mean: true their mean)
    loss          of the same models: mean −log p per token, of the label after the text; of the text with label: null
    exact_match   of the same models: the share of rows where the text generated greedily, cut at `stop` and stripped, is
                  the label
    chrf, bleu    of the same generated text: chrF or BLEU of sacrebleu (the extra `metrics`), which count text that is
                  partly right; the score has both, and the share of exact matches

The measure may be left out where a key belongs to one measure alone: descriptions and temperature to `descriptions`,
choices and mean to `choices`, new_tokens and stop to `exact_match`. With labels and none of these keys it is `head`.
`distil` judges nothing, so a task for it alone needs no measure.

A label in the rows is a number from 0 or a name: one of `labels`, of `choices`, or of the names in the head's config. A
class of a data set on the Hub is read by its name. If the task has no `labels` and the name is none of these names, the
number of the class counts, so that descriptions or choices must be in the order of the data set's classes. With a head
this holds only if its config names no classes (LABEL_0, LABEL_1, …), because heads and data sets of one task differ in
their order at times. Measures of text take the name of the class as the label.

An unknown key is refused with the most similar key and its line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import BeforeValidator, create_model

from ..adapters.config_values import is_number
from ..errors import RecipeError, one_line, unknown
from ..merging.recipes.yaml_document import STRICT, Document, dump, expecting
from .rows import FILES, ClassName, Row, read_rows, texts_of

MEASURES = ("descriptions", "head", "choices", "exact_match", "loss", "chrf", "bleu")
GENERATED = ("exact_match", "chrf", "bleu")  # measures of text that the model generates
LIST_MEASURES = ("descriptions", "choices")  # each needs a list with one text for each label, whose key is its own name
MEASURES_BY_KEY = {  # the measures for which a key has a meaning; other keys have one for every measure
    "labels": ("descriptions", "head", "choices"),
    "descriptions": ("descriptions",),
    "temperature": ("descriptions",),
    "choices": ("choices",),
    "mean": ("choices",),
    "new_tokens": ("exact_match",),
    "stop": ("exact_match",),
}
SLOT = "{text}"
WITHHELD_HINT = (
    " In data sets on the Hub −1 means that the label is not published: choose a split with labels (split: validation)."
)
TaskSource = Any  # a Task, a mapping, or the path of a file


def _differ(texts: Any) -> bool:
    return bool(texts) and len(texts) >= 2 and all(texts) and len(set(texts)) == len(texts)


# The values that a key of a task may have. Null is allowed only where it is named.
_TEXT = expecting("a text", lambda value: isinstance(value, str) and bool(value))
_TEXT_OR_NULL = expecting("a text or null", lambda value: value != "")
_COUNT = expecting("a whole number from 1 up", lambda value: value is not None and value >= 1)
_POSITIVE = expecting("a number above 0", lambda value: is_number(value) and value > 0)
_TEMPLATE = expecting(f"a text with {SLOT} in it", lambda value: SLOT in value)
_TEMPLATE_OR_NULL = expecting(f"a text with {SLOT} in it, or null", lambda value: value is None or SLOT in value)
_FLAG = expecting("true or false")
_Texts = Annotated[
    tuple[str, ...] | None,
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    expecting("two or more different texts", _differ),
]


@dataclass(frozen=True)
class Task:
    """Rows, and how a prediction is read from a model; `read_task` checks it.

    Attributes:
        measure: one of `MEASURES`.
        rows: a file, a data set's id, or the rows themselves; None where rows come from elsewhere.
        name: for tables; by default that of the task's file, else of the rows.
        base: the base model's folder or Hub id; None for the one that the adapter names.
        split, config: of a data set on the Hub.
        limit: the number of rows to read, the first ones; None for all.
        text, label: the keys of a row; label None for rows without one.
        labels: names of the labels in their order.
        descriptions: one text for each label.
        choices: one continuation for each label, with a leading space if it needs one.
        template: what the model reads, with `{text}` in place of the row's text.
        prompt_format: the form of the prompts where rows hold whole prompts, with `{text}` in place of each part that
            differs. Only for prompts that an adapter writes itself (`distil` with rows "generated"). None: the template.
        temperature: of `descriptions`.
        mean: whether `choices` are compared by the mean over tokens.
        max_tokens: longer inputs are cut (those of causal models at their start); the score has their number.
        new_tokens: the largest number of generated tokens.
        stop: generated text is cut before it; None to cut nothing.
    """

    measure: Annotated[str, _TEXT]
    rows: Annotated[str | tuple[Row, ...] | None, _TEXT] = None
    name: Annotated[str, _TEXT] = "task"
    base: Annotated[str | None, _TEXT] = None
    split: Annotated[str, _TEXT] = "test"
    config: Annotated[str | None, _TEXT_OR_NULL] = None
    limit: Annotated[int | None, _COUNT] = None
    text: Annotated[str, _TEXT] = "text"
    label: Annotated[str | None, _TEXT_OR_NULL] = "label"
    labels: _Texts = None
    descriptions: _Texts = None
    choices: _Texts = None
    template: Annotated[str, _TEMPLATE] = SLOT
    prompt_format: Annotated[str | None, _TEMPLATE_OR_NULL] = None
    temperature: Annotated[int | float, _POSITIVE] = 20.0
    mean: Annotated[bool, _FLAG] = False
    max_tokens: Annotated[int, _COUNT] = 256
    new_tokens: Annotated[int, _COUNT] = 16
    stop: Annotated[str | None, _TEXT_OR_NULL] = "\n"

    @property
    def options(self) -> tuple[str, ...] | None:
        """The descriptions or the choices, one for each label; None for other measures."""
        return getattr(self, self.measure) if self.measure in LIST_MEASURES else None

    @property
    def classifies(self) -> bool:
        """Whether a prediction is one of a few labels."""
        return self.measure in ("descriptions", "head", "choices")

    def read(self) -> list[Row]:
        """Return the rows.

        Raises: RecipeError where there are none or they cannot be read.
        """
        if self.rows is None:
            raise RecipeError(f"task {self.name!r} has no rows. Name their file or data set (rows: FILE).")
        if isinstance(self.rows, str):
            return read_rows(self.rows, self.split, self.config, self.limit, self.text)
        return list(self.rows[: self.limit])

    def check_rows(self) -> None:
        """Check the rows without a model; the labels of `head`, which depend on the model's config, are left out.

        Raises: RecipeError where there are no rows, or a text or a label is missing, unknown or out of range.
        """
        rows = self.read()
        self.fill_template(texts_of(rows, self.text, self.where))
        if self.options is not None:
            self.label_numbers(rows)

    def texts(self) -> list[str]:
        """Return the text of each row in the template, as the model reads it."""
        return self.fill_template(texts_of(self.read(), self.text, self.where))

    @property
    def format_of_prompts(self) -> str:
        """The form of a prompt, with `{text}` in place of each part that differs."""
        return self.template if self.prompt_format is None else self.prompt_format

    def fill_template(self, texts: list[str]) -> list[str]:
        """Return texts in the template."""
        return [self.template.replace(SLOT, text) for text in texts]

    def label_numbers(self, rows: list[Row], names: tuple[str, ...] | None = None) -> list[int]:
        """Return the number of each row's label.

        Args:
            rows: as `read` returns them.
            names: the labels' names in their order, for a task without `labels`.
        Raises: RecipeError naming the first row whose label is missing, unknown or out of range.
        """
        known = self.labels or names or self.options or ()
        count = len(self.options or known)
        return [self._number(row, known, count, place) for place, row in enumerate(rows)]

    def target_texts(self, rows: list[Row]) -> list[str]:
        """Return the label of each row as the text that the model should generate; empty where `label` is None."""
        if self.label is None:
            return [""] * len(rows)
        for place, row in enumerate(rows):
            value = self._label_of(row, place)
            if isinstance(value, ClassName) and not value.known:
                raise RecipeError(
                    f"{self.where}, row {place + 1}: the label is {value.number}; expected a class of the data set."
                    f"{WITHHELD_HINT}"
                )
        return texts_of(
            [{**row, self.label: _as_text(row.get(self.label))} for row in rows], self.label, f"{self.where} (label)"
        )

    @property
    def where(self) -> str:
        """The task and its rows, as messages name them."""
        place = f", rows {self.rows!r}" if isinstance(self.rows, str) else ""
        return f"task {self.name!r}{place}"

    def digest(self) -> str:
        """Return a sha256 over the rows and how they are read, without the task's name and the rows' location.

        Raises: RecipeError where there are no rows or they cannot be read.
        """
        place = ("rows", "name", "base", "split", "config", "limit", "prompt_format")
        plain = {key: value for key, value in self.to_dict().items() if key not in place}
        text = json.dumps([plain, self.read()], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _number(self, row: Row, names: tuple[str, ...], count: int, place: int) -> int:
        where = f"{self.where}, row {place + 1}"
        value = self._label_of(row, place)
        if isinstance(value, str) and value in names:
            return names.index(value)
        number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
        if isinstance(value, ClassName):
            number = value.number if value == str(value.number) or self._uses_class_numbers(names) else None
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < count:
            return number
        if isinstance(value, ClassName) and not value.known:
            value = value.number
        listed = f", or one of {', '.join(names[:6])}{', …' if len(names) > 6 else ''}" if names else ""
        raise RecipeError(
            f"{where}: the label is {value!r}; expected a number from 0 to {count - 1}{listed}. Correct the row, or the "
            f"task's list of labels.{WITHHELD_HINT if value == -1 else ''}"
        )

    def _label_of(self, row: Row, place: int) -> Any:
        """Return the label of a row. Raises: RecipeError where there is none."""
        value = None if self.label is None else row.get(self.label)
        if value is None:
            keys = ", ".join(str(key) for key in row)
            raise RecipeError(
                f"{self.where}, row {place + 1}: there is no label {str(self.label)!r}; the row has the keys {keys}. Name the one "
                "that holds the label (label: KEY), or add it."
            )
        return value

    def _uses_class_numbers(self, names: tuple[str, ...]) -> bool:
        """Return whether a data set's class is the label of the same number, because nothing names the labels."""
        unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(names))
        return self.labels is None and (self.measure != "head" or unnamed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, without those that have their default; of rows in memory only their number."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if isinstance(self.rows, tuple):
            values["rows"] = f"{len(self.rows)} in memory"
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def is_task(given: Mapping[Any, Any]) -> bool:
    """Return whether a mapping has a key that a task may have."""
    return any(key in _KEYS for key in given)


def read_task(given: TaskSource, default_measure: str | None = None) -> Task:
    """Return a task from a file or a mapping, checked; a `Task` as it is. Its rows are not read yet.

    Args:
        given: the file, the mapping or the task.
        default_measure: the measure of a task that names none, where its keys leave several; None to refuse such a task.
    Raises: RecipeError naming the key and its line.
    """
    if isinstance(given, Task):
        return given
    if isinstance(given, Mapping):
        rows = given.get("rows")
        held = tuple(rows) if isinstance(rows, (list, tuple)) else None
        plain = {key: value for key, value in given.items() if held is None or key != "rows"}
        task = _make(Document(dump(_plain(plain)), "task", {}), Path(), default_measure)
        return task if held is None else replace(task, rows=_checked_rows(held, task))
    path = Path(str(given))
    if path.suffix in (".jsonl", ".csv"):
        raise RecipeError(
            f"task {str(given)!r} is a file of rows; expected a YAML or JSON file that says how they are read. Write one, with "
            f"rows: {path.name} and a measure."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise RecipeError(f"task {str(given)!r} cannot be read: {why}. Check the path and the file.") from None
    return _make(Document(text, str(given), {}), path.parent, default_measure)


def _plain(value: Any) -> Any:
    """Return a value with tuples as lists and paths as text, as YAML holds them."""
    try:
        return json.loads(json.dumps(value, default=str))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"task: {one_line(error)}. Expected plain keys and values.") from None


def _checked_rows(rows: tuple[Any, ...], task: Task) -> tuple[Row, ...]:
    """Return rows in memory as mappings; a row may be its text alone."""
    if not rows:
        raise RecipeError("task: rows is an empty list; expected at least one row. Give some, or a file.")
    made = tuple({task.text: row} if isinstance(row, str) else row for row in rows)
    for place, row in enumerate(made):
        if not isinstance(row, Mapping):
            raise RecipeError(f"task: row {place + 1} is {row!r}; expected keys with values, or a text.")
    return made


_KEYS = tuple(field.name for field in fields(Task))
_File: Any = create_model(  # a task's file: the fields of `Task`, each of which may be left out
    "TaskFile",
    __config__=STRICT,
    **{name: (hint, None) for name, hint in get_type_hints(Task, include_extras=True).items()},  # type: ignore[call-overload]
)


def _make(document: Document, folder: Path, default_measure: str | None) -> Task:
    """Return the task of a document; a relative path of its rows starts from `folder`."""
    file = document.read(_File, lambda path, key: unknown("key", key, _KEYS))
    given = {key: getattr(file, key) for key in file.model_fields_set}
    measure = given.get("measure") or _inferred(document, given, default_measure)
    if measure not in MEASURES:
        raise RecipeError(f"{document.at(('measure',))}: {unknown('measure', measure, MEASURES)}")
    if measure in LIST_MEASURES and measure not in given:
        raise RecipeError(
            f"{document.where}: measure '{measure}' needs {measure}, one for each label. Add {measure}: […]."
        )
    _check_lists(document, given, measure)
    rows = given.get("rows")
    if isinstance(rows, str) and Path(rows).suffix in FILES:
        given["rows"] = str(folder / rows)
    return Task(**{"name": _name(document.where, rows), **given, "measure": measure})


def _inferred(document: Document, values: Mapping[str, Any], default: str | None) -> str:
    """Return the only measure for which all keys of a task have a meaning, or the default among several.

    Raises: RecipeError where there is none, or more than one.
    """
    given = [key for key in values if key in MEASURES_BY_KEY]
    found = [measure for measure in MEASURES if all(measure in MEASURES_BY_KEY[key] for key in given)]
    if not found:
        keys = " and ".join(f"{key} ({', '.join(MEASURES_BY_KEY[key])})" for key in given)
        raise RecipeError(
            f"{document.where}: no measure is named, and the keys belong to different ones: {keys}. Name one "
            "(measure: …), and leave out the keys of the others."
        )
    if len(found) > 1:
        found = [measure for measure in found if measure not in LIST_MEASURES or measure in values]
    if len(found) > 1 and default in found:
        return default
    if len(found) > 1:
        raise RecipeError(
            f"{document.where}: no measure is named; expected one of {', '.join(found)}. Name it (measure: …). A task for distil "
            "needs none if the adapter's task_type is CAUSAL_LM or SEQ_CLS."
        )
    return found[0]


def _check_lists(document: Document, values: Mapping[str, Any], measure: str) -> None:
    """Refuse lists of different lengths and lists that the measure does not use."""
    for key in LIST_MEASURES:
        if key in values and key != measure:
            raise RecipeError(f"{document.at((key,))}: {key} has no meaning for measure '{measure}'. Leave it out.")
    counts = [len(values[key]) for key in ("labels", measure) if key in values and measure in LIST_MEASURES]
    if len(set(counts)) > 1:
        raise RecipeError(
            f"{document.at(('labels',))}: {counts[0]} labels for {counts[1]} {measure}. Give one for each."
        )


def _name(where: str, rows: Any) -> str:
    """Return a name for tables: that of the task's file, else of the rows' folder or data set."""
    if where != "task":
        return Path(where).stem
    if isinstance(rows, str):
        path = Path(rows)
        return path.parent.name if path.suffix and path.parent.name else path.stem
    return "task"


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value
