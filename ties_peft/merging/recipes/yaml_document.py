"""Read YAML into pydantic models, with the line of every key for messages.

YAML 1.2's short exponents are read as numbers: in YAML 1.1, which PyYAML implements, 1e-3 is a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from ...errors import RecipeError, TiesPeftError, one_line

MAX_NODES = 100_000  # more than any recipe has; a few lines of aliases to aliases make billions
Location = tuple[Any, ...]  # the keys and numbers that lead to a value, as pydantic's `loc`
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument", "invalid_key")  # pydantic's types of error for a key
T = TypeVar("T")


def expecting(
    expected: str, accepts: Callable[[Any], bool] = lambda value: True, nested: bool = False
) -> WrapValidator:
    """Return the validator of a field whose faults are told as `KEY is VALUE; expected EXPECTED`.

    Args:
        expected: the values that the field takes, in words.
        accepts: whether a value of its type is one of them.
        nested: whether a fault inside the value has a text and a location of its own.
    """
    fault = PydanticCustomError("expecting", "{expected}", {"expected": expected})

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            checked = handler(value)
        except ValidationError as error:
            if nested and any(one["loc"] for one in error.errors()):
                raise
            raise fault from None
        if not accepts(checked):
            raise fault
        return checked

    return WrapValidator(check)


class Loader(yaml.SafeLoader):
    """Reads plain values."""


class Dumper(yaml.SafeDumper):
    """Writes plain values."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


class Document:
    """The values of a YAML text, and the line of each.

    Args:
        text: YAML.
        where: how messages name it.
        synonyms: words that stand for others; both have the line.

    Attributes:
        values: as plain Python values.

    Raises: RecipeError naming the line, where it is not YAML or a key stands twice.
    """

    def __init__(self, text: str, where: str, synonyms: Mapping[str, str]) -> None:
        self.where = where
        self._synonyms = synonyms
        self._lines: dict[Location, int] = {}
        try:
            loader = Loader(text)
            node = loader.get_single_node()
            if node is not None:
                self._walk(node, ())
            self.values: Any = None if node is None else loader.construct_document(node)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f", line {mark.line + 1}" if mark else ""
            problem = str(getattr(error, "problem", None) or error)
            raise RecipeError(f"{where}{line}: not YAML ({problem}).") from None
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{where}: not YAML that can be read ({one_line(error)}).") from None

    def at(self, path: Location) -> str:
        """Return the file and the line of a key, or of what holds it."""
        return f"{self.where}, line {self._line(path)}"

    @contextmanager
    def naming(self, *path: Any) -> Iterator[None]:
        """Put the file and the line of a key before the text of an error."""
        try:
            yield
        except TiesPeftError as error:
            raise type(error)(f"{self.at(path)}: {error}") from None

    def _line(self, path: Location) -> int:
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def read(self, model: type[T], unknown_key: Callable[[Location, str], str]) -> T:
        """Return the values as a pydantic model.

        Args:
            model: whose fields are declared with `expecting`.
            unknown_key: gives the text on an unknown key, from the location of its table and the key.
        Raises: RecipeError naming the line.
        """
        try:
            return TypeAdapter(model).validate_python(self.values)
        except ValidationError as error:
            faults = error.errors(include_url=False)
        fault = min(faults, key=lambda one: (self._line(one["loc"]), one["type"] not in UNKNOWN))
        path = tuple(part for part in fault["loc"] if part != "[key]")
        if fault["type"] in UNKNOWN:
            raise RecipeError(f"{self.at(path)}: {unknown_key(path[:-1], str(path[-1]))}")
        if fault["type"] == "twice":
            raise RecipeError(f"{self.at((*path, fault['ctx']['key']))}: {fault['msg']}")
        last = path[-1] if path else "the file"
        name = f"entry {last + 1}" if isinstance(last, int) else last
        expected = fault["msg"] if fault["type"] == "expecting" else "keys with values"
        seen = "empty" if self.values is None else repr(fault["input"])
        raise RecipeError(f"{self.at(path)}: {name} is {seen}; expected {expected}.")

    def drop(self, key: str, number: int) -> None:
        """Remove an entry from a list at the top; the entries after it keep their lines."""
        del self.values[key][number]
        self._lines = {
            (path[0], path[1] - 1, *path[2:]) if path[0] == key and len(path) > 1 and path[1] > number else path: line
            for path, line in self._lines.items()
            if path[:2] != (key, number)
        }

    def _walk(self, node: yaml.Node, path: Location) -> None:
        """Note the line, from 1, of each key and list entry."""
        if len(self._lines) > MAX_NODES:
            raise RecipeError(f"{self.where} is larger than any recipe, or refers to itself. Write it out.")
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else None
                line = key.start_mark.line + 1
                if name in seen and name is not None:
                    raise RecipeError(f"{self.where}, line {line}: {name!r} stands there twice. Keep one of them.")
                seen.add(name)
                self._lines.pop((*path, name), None)  # that of a synonym
                self._note((*path, name), line, value)
                if str(name) in self._synonyms:
                    self._note((*path, self._synonyms[str(name)]), line, value)
        elif isinstance(node, yaml.SequenceNode):
            for number, value in enumerate(node.value):
                self._note((*path, number), value.start_mark.line + 1, value)

    def _note(self, path: Location, line: int, value: yaml.Node) -> None:
        self._lines.setdefault(path, line)
        self._walk(value, path)


def parse(text: str) -> Any:
    """Return the value of a short YAML text, such as one on a command line; the text itself where it is not YAML."""
    try:
        return yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def dump(values: Any) -> str:
    """Return plain values as YAML that `Document` reads back."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)
