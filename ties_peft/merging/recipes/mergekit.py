"""Convert mergekit's recipes, with the meaning that they have in mergekit.

A file is mergekit's if its `merge_method` is one of mergekit's, it lists what it merges under `models:`, and it contains
one of these, which a recipe of this package does not need:

    a key         base_model, out_dtype, tokenizer_source, tokenizer, chat_template
    a reference   base+lora
    a method      that only mergekit has: linear, dare_linear, nuslerp, …
    a parameter   that only mergekit has: int8_mask, rescale, …

A file with `adapters:` is never one. Parameters of this package (`rank`, `space`, `scope`, …) may be given in mergekit's
file too, and take precedence over what is converted. For a key that means something else here, or nothing, a note is made,
which starts with the key; what has no counterpart is refused.

Source: the meaning of the keys is that of mergekit 0.1.5 (Goddard et al., 2024, arXiv 2403.13257).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ...adapters.config_values import is_number
from ...errors import RecipeError
from ...methods import find_method, method_classes
from .schedule import Schedule
from .yaml_document import Document, Location

MERGEKIT_KEYS = ("base_model", "out_dtype", "tokenizer_source", "tokenizer", "chat_template")
IGNORED = ("tokenizer_source", "tokenizer", "chat_template")  # of the model as a whole
LAYER_TABLES = ("slices", "modules")  # which layers of which models stand where
FLAGS = {"filter_wise": False, "nuslerp_flatten": True, "nuslerp_row_wise": False}  # with the value that is followed
ONLY_MERGEKIT = ("int8_mask", "rescale", *FLAGS)
SUM = ("weight", "normalize", "rescale", "lambda", "int8_mask")


@dataclass(frozen=True)
class Counterpart:
    """The method of this package that does what one of mergekit's does.

    Attributes:
        method: its name here.
        takes: the parameters that it has in mergekit.
        numbers: more of them, which are one number for all adapters here, with mergekit's defaults.
        normalize, rescale: mergekit's defaults.
        settings: parameters that make it what it is in mergekit, each with what there is to say of it.
        elects: whether it elects signs, so that it can divide by the weights that agree.
        skips_base: whether mergekit lets the base model stand among the models and leaves it out.
        differs: what is not the same here, whatever the parameters.
    """

    method: str
    takes: tuple[str, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    normalize: bool = False
    rescale: bool = False
    elects: bool = False
    skips_base: bool = True
    differs: str = ""


_DROPPED = "mergekit brings what a random drop leaves to the L1 norm of before; here it is divided by its probability"
_ON_WEIGHTS = "mergekit turns whole weights; here what the adapters add to them is turned"
_PARALLEL = (
    "mergekit turns whole weights, which are nearly parallel, so that it gives nearly average with weights 1 − t and t; "
    "here what the adapters add to them is turned, its length going evenly from one norm to the other"
)
_FORM = (
    "mergekit, as there: unequal norms draw the direction to the longer task vector, and a negative weight takes t "
    "out of [0, 1] and negates nothing; form even turns evenly, and negates"
)
_ENERGIES = (
    "mergekit counts all adapters alike in a tensor where their mean squares sum to less than 1e-6, as is common; here "
    "their energies always count"
)
_OPPOSED = "where adapters oppose each other mergekit goes beyond the base; here it stops there"
_TRIMMED = (*SUM, "density")
_GAMMA, _EPSILON = {"gamma": 0.01}, {"epsilon": 0.15}
METHODS = {
    "linear": Counterpart("average", ("weight", "normalize"), normalize=True, skips_base=False),
    "task_arithmetic": Counterpart("task_arithmetic", SUM),
    "ties": Counterpart("ties", _TRIMMED, normalize=True, elects=True),
    "dare_linear": Counterpart("dare", _TRIMMED, rescale=True, differs=_DROPPED),
    "dare_ties": Counterpart("dare_ties", _TRIMMED, rescale=True, elects=True, differs=_DROPPED),
    "breadcrumbs": Counterpart("breadcrumbs", _TRIMMED, _GAMMA),
    "breadcrumbs_ties": Counterpart("breadcrumbs_ties", _TRIMMED, _GAMMA, elects=True),
    "della": Counterpart("della", _TRIMMED, _EPSILON, normalize=True, rescale=True, elects=True, differs=_DROPPED),
    "della_linear": Counterpart("della_linear", _TRIMMED, _EPSILON, rescale=True, differs=_DROPPED),
    "sce": Counterpart("sce", ("int8_mask",), {"select_topk": 1.0}, differs=_ENERGIES),
    "model_stock": Counterpart("model_stock", ("filter_wise",), differs=_OPPOSED),
    "karcher": Counterpart("karcher", (), {"max_iter": 10, "tol": 1e-5}, skips_base=False, differs=_ON_WEIGHTS),
    "slerp": Counterpart("slerp", ("t",), skips_base=False, differs=_PARALLEL),
    "nuslerp": Counterpart(
        "slerp",
        ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
        settings={"form": ("mergekit", _FORM)},
        skips_base=False,
    ),
}
NO_COUNTERPART = {
    "multislerp": "karcher is nearest to it",
    "passthrough": "it copies a model's layers",
    "nearswap": "it needs the base's weights",
    "arcee_fusion": "it needs the base's weights",
    "ram": "it is for updates that leave most weights alone, and an adapter's reaches all of them",
    "ramplus_tl": "it is for updates that leave most weights alone, and an adapter's reaches all of them",
}


PARAMETERS = frozenset(name for rule in METHODS.values() for name in (*rule.takes, *rule.numbers))


def is_recipe(values: Any) -> bool:
    """Return whether the values of a YAML file are a recipe of mergekit's, by the rule above."""
    if not isinstance(values, dict) or "adapters" in values:
        return False
    if any(key in values for key in LAYER_TABLES):
        return True
    method, models = values.get("merge_method"), values.get("models")
    if not isinstance(models, list) or method not in (*METHODS, *NO_COUNTERPART):
        return False
    entries: list[dict[Any, Any]] = [model if isinstance(model, dict) else {"model": model} for model in models]
    tables = [values.get("parameters"), *(entry.get("parameters") for entry in entries)]
    return (
        method not in method_classes()
        or any(key in values for key in MERGEKIT_KEYS)
        or any("+" in str(entry.get("model")) for entry in entries)
        or any(key in table for table in tables if isinstance(table, dict) for key in ONLY_MERGEKIT)
    )


def convert(document: Document) -> None:
    """Replace the values of mergekit's recipe by those of a recipe of this package, with notes.

    Raises: RecipeError naming the line, for what has no counterpart.
    """
    for key in LAYER_TABLES:
        if key in document.values:
            raise RecipeError(
                f"{document.at((key,))}: `{key}:` says which layers of which full models stand where, and full models are "
                "merged by mergekit itself. List the adapters under `models:`."
            )
    _Conversion(document).run()


def reference(text: str) -> tuple[str | None, str]:
    """Return the base (None without one) and the adapter of a reference such as `base+lora`.

    >>> reference("org/base@v1+org/lora@v2")
    ('org/base', 'org/lora@v2')
    """
    base, plus, adapter = text.partition("+")
    return (base.partition("@")[0], adapter) if plus else (None, text)


class _Conversion:
    """The conversion of one recipe, in place."""

    def __init__(self, document: Document) -> None:
        self.document, self.at = document, document.at
        self.top: dict[str, Any] = document.values
        self.name = str(self.top["merge_method"])
        self.notes: dict[str, None] = {}  # in their order, each once
        if self.name in NO_COUNTERPART:
            why = f"mergekit's '{self.name}' has no counterpart here: {NO_COUNTERPART[self.name]}"
            self.refuse(("merge_method",), why)
        self.rule = METHODS[self.name]
        self.method = self.rule.method
        self.fields = find_method(self.method).model_fields
        self.entries = [self.entry(place, value) for place, value in enumerate(self.top.pop("models"))]
        self.top["adapters"] = self.entries
        self.shared = self.table(("parameters",), self.top)

    def run(self) -> None:
        """Convert the recipe; each step depends on those before it."""
        if self.method != self.name:
            self.note("merge_method", f"mergekit's {self.name} is {self.method} here")
        if self.rule.differs:
            self.note("merge_method", self.rule.differs)
        if self.name == "nuslerp" and "base_model" not in self.top:
            self.note("merge_method", _ON_WEIGHTS)
        self.convert_top_keys()
        base = self.convert_base()
        self.split_references(base)
        self.drop_ignored_parameters()
        if self.name == "slerp":
            self.convert_slerp(base)
        self.check_flags()
        self.convert_weights()
        self.convert_trim()
        self.convert_scale()
        self.document.values = {**self.top, "merge_method": self.method, "notes": list(self.notes)}

    @property
    def tables(self) -> list[tuple[Location, dict[str, Any]]]:
        """The tables that hold parameters, each with its location."""
        own = [(("adapters", place, "parameters"), entry["parameters"]) for place, entry in enumerate(self.entries)]
        return [(("parameters",), self.shared), *own]

    def entry(self, place: int, value: Any) -> dict[str, Any]:
        """Return one of the models as a table whose `model` is a text."""
        entry = {"model": value} if isinstance(value, str) else value
        if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
            self.refuse(("adapters", place), f"expected `model:` with a path or Hub id, found {value!r}")
        self.table(("adapters", place, "parameters"), entry)
        return entry

    def table(self, path: Location, holder: dict[str, Any]) -> dict[str, Any]:
        """Return the `parameters` of a table; add an empty table if there is none."""
        if holder.get("parameters") is None:
            holder["parameters"] = {}
        if not isinstance(holder["parameters"], dict):
            self.refuse(path, f"expected keys with values, found {holder['parameters']!r}")
        found: dict[str, Any] = holder["parameters"]
        return found

    def convert_top_keys(self) -> None:
        """Convert the keys at the top of the recipe."""
        for key in IGNORED:
            if self.top.pop(key, None) is not None:
                self.note(key, "an adapter has no part in it, so it is left out")
        if "dtype" in self.top or "out_dtype" in self.top:
            self.note("dtype", "it is that of the tensors written; the arithmetic is in float32")
        written = self.top.pop("out_dtype", None)
        if written is not None:
            self.top["dtype"] = written

    def convert_base(self) -> str | None:
        """Return `base_model:` as it was given; remove it for slerp, where it names one of the models."""
        given = self.top.get("base_model")
        if not isinstance(given, str):
            return None
        if self.name == "slerp":
            del self.top["base_model"]
        elif "+" in given:
            self.refuse(("base_model",), f"{given!r} holds an adapter, and a merge starts from a plain base")
        else:
            self.top["base_model"] = given.partition("@")[0]
        return given

    def split_references(self, base: str | None) -> None:
        """Keep the adapter of each base+lora, and leave out the base model itself."""
        split = [reference(entry["model"]) for entry in self.entries]
        bases = {b for b, _ in split if b} | ({base.partition("@")[0]} if base and self.name != "slerp" else set())
        for place in range(len(split) - 1, -1, -1):
            own, adapter = split[place]
            self.entries[place]["model"] = adapter
            if own is None and adapter.partition("@")[0] in bases:
                self.leave_out(place, adapter)
        if any(b for b, _ in split):
            self.note("adapters", f"of base+lora the adapter is taken; named as base: {', '.join(sorted(bases))}")
        if "base_model" not in self.top and len(bases) == 1:
            (self.top["base_model"],) = bases

    def leave_out(self, place: int, name: str) -> None:
        """Leave the base model out of the adapters."""
        if not self.rule.skips_base:
            why = f"{name!r} is the base model, which counts in mergekit's '{self.name}' and is no adapter"
            self.refuse(("adapters", place), f"{why}. Leave it out, and lower the scale instead")
        self.document.drop("adapters", place)
        self.note("adapters", f"{name} is the base model itself, which adds nothing, so it is left out")

    def drop_ignored_parameters(self) -> None:
        """Leave out the parameters that mergekit's method does not have, and ignores."""
        for path, table in self.tables:
            for key in [
                key for key in table if key in PARAMETERS and key not in (*self.rule.takes, *self.rule.numbers)
            ]:
                del table[key]
                self.note(f"{path[0]}.{key}", f"mergekit's {self.name} has no {key}, so it is left out")

    def convert_slerp(self, base: str | None) -> None:
        """Convert slerp's t, which runs from `base_model` to the other model; where it varies it becomes the weights 1 − t and t."""
        names = [entry["model"] for entry in self.entries]
        start = reference(base)[1] if base else names[0]
        if start not in names:
            self.entries.insert(0, {"model": start, "parameters": {}})
        if len(self.entries) != 2:
            self.refuse(("adapters",), f"slerp turns one adapter into one other; these are {len(self.entries)}")
        t = self.take_common("t", lambda value: True, "")
        turn = Schedule.read(0.5 if t is None else t, f"{self.at(('parameters', 't'))}: t")
        forward, back = turn, turn.mapped(lambda value: 1 - value)
        if start == self.entries[1]["model"]:
            forward, back = back, forward
        if forward.constant:
            self.shared["t"] = forward.value
        else:
            self.entries[0]["parameters"]["weight"], self.entries[1]["parameters"]["weight"] = back.value, forward.value
            self.note("parameters.t", "where it varies it is written as the weights 1 − t and t")

    def check_flags(self) -> None:
        """Refuse parameters that are true or false where one of the two has no counterpart here."""
        if self.flag("int8_mask", False):
            self.note("parameters.int8_mask", "it saves memory in mergekit and nothing here, so it is left out")
        for key, plain in {**FLAGS, "rescale": self.rule.rescale}.items():
            if key in self.rule.takes and self.flag(key, plain) is not plain:
                asked = f"{key}: {str(not plain).lower()}"
                self.refuse(("parameters", key), f"{asked} has no counterpart in '{self.method}'. Leave it out")

    def convert_weights(self) -> None:
        """Write the weight for all adapters to each that has none, and as the default of each that has conditions."""
        general = self.shared.pop("weight", None)
        for place, entry in enumerate(self.entries if general is not None else []):
            own = entry["parameters"].get("weight", general)
            where = f"{self.at(('adapters', place, 'parameters', 'weight'))}: weight"
            entry["parameters"]["weight"] = Schedule.read(own, where).with_default(general).value

    def convert_trim(self) -> None:
        """Convert the density and the scope of the trim, and the numbers of the method."""
        if "density" in self.rule.takes:
            if any("density" not in table for _, table in self.tables[1:]) and "density" not in self.shared:
                self.note("parameters.density", "where none is given it is 1.0, as in mergekit")
            self.shared.setdefault("density", 1.0)
        if "scope" in self.fields and "scope" not in self.shared:
            self.shared["scope"] = "module"
            self.note("parameters.scope", "module, as mergekit cuts each tensor on its own")
        for key, (value, text) in self.rule.settings.items():
            if key not in self.shared:
                self.shared[key] = value
                self.note(f"parameters.{key}", text)
        for key, default in self.rule.numbers.items():
            found = self.take_common(key, is_number, "one number")
            self.shared[key] = default if found is None else found

    def convert_scale(self) -> None:
        """Convert λ and the division of the sum by the weights."""
        scale = self.take_common("lambda", is_number, "one number")
        divides = self.flag("normalize", self.rule.normalize)
        if divides and self.rule.elects and self.negative():
            self.note("parameters.normalize", "with negative weights mergekit divides by Σw, and here it is by Σ|w|")
        if self.name == "linear" and not divides:
            self.method = "task_arithmetic"
            self.note("parameters.normalize", "false, so a sum; mergekit multiplies the base by Σw as well")
        elif self.name == "task_arithmetic" and divides:
            self.method = "average"
            self.note("parameters.normalize", "true, so average")
        elif self.rule.elects and self.fields["disjoint"].default != ("mean" if divides else "sum"):
            self.shared.setdefault("disjoint", "mean" if divides else "sum")
            self.note("parameters.normalize", f"{str(divides).lower()}, so disjoint {self.shared['disjoint']}")
        elif divides and self.name != "linear" and not self.rule.elects:
            scale = (1.0 if scale is None else scale) / self.total_weight()
            self.note("parameters.normalize", f"true, so the sum is divided by Σw: scale {scale:g}")
        if scale is None and find_method(self.method).default_scale != 1:
            self.note("parameters.scale", "1.0, mergekit's lambda where none is given")
        self.shared.setdefault("scale", 1.0 if scale is None else scale)

    @property
    def weights(self) -> list[Any]:
        """The weight of each adapter."""
        return [entry["parameters"].get("weight", 1.0) for entry in self.entries]

    def negative(self) -> bool:
        """Return whether a weight is negative."""
        return any(number < 0 for weight in self.weights for number in Schedule.read(weight, "weight").numbers())

    def total_weight(self) -> float:
        """Return Σw; refuse weights that vary."""
        if not all(map(is_number, self.weights)) or sum(self.weights) == 0:
            why = "normalize: true needs weights that are numbers and do not sum to 0"
            self.refuse(("parameters", "normalize"), why)
        return float(sum(self.weights))

    def flag(self, key: str, default: bool) -> bool:
        """Return a parameter that is true or false."""
        found = self.take_common(key, lambda value: isinstance(value, bool), "true or false")
        return default if found is None else bool(found)

    def take_common(self, key: str, holds: Callable[[Any], bool], expected: str) -> Any:
        """Remove and return a parameter that has one value for all adapters here; None if it is not given."""
        found = [((*path, key), table.pop(key)) for path, table in self.tables if key in table]
        for path, value in found:
            if not holds(value):
                self.refuse(path, f"{key} is {value!r}; expected {expected} for all adapters")
            if value != found[0][1]:
                self.refuse(path, f"{key} differs between adapters; here it is one for all")
        return found[0][1] if found else None

    def note(self, key: str, text: str) -> None:
        """Add a note, unless the recipe has it already."""
        self.notes[f"{key}: {text}."] = None

    def refuse(self, path: Location, why: str) -> NoReturn:
        """Raise an error that names the line."""
        raise RecipeError(f"{self.at(path)}: {why}.")
