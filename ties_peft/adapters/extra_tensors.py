"""Riders: the tensors in an adapter's file that belong to no module, told apart by their names.

    classifier.weight, classifier.dense.bias      a whole layer that was trained (modules_to_save, a task's head)
    lm_head.weight that no modules_to_save names  a whole layer that PEFT writes into the base, as it
                                                  does with embeddings whose vocabulary was resized
    …q_proj.base_layer.bias, …k_proj.bias         a bias of the base (bias="lora_only", "all")
    lm_head.base_layer.weight                     the base's own weight under an adapted module, which PEFT
                                                  adds for embed_tokens and lm_head
    …token_adapter.trainable_tokens_delta         rows of an embedding; which, stands in the config
    ….modules_to_save.…, ….original_module.…      copies: of what stands there plainly, and of the
                                                  untrained layer; PEFT reads neither

The config says less than the tensors do: a head may ride with modules_to_save null, `classifier` also
means `pre_classifier` (PEFT compares endings), and an entry may match nothing. So it is asked for two
things alone, where a whole layer begins, and which rows the trained tokens are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import AdapterError
from .tensors import TensorSource
from .types.base import PREFIX

HEADS = ("classifier", "score", "qa_outputs")  # PEFT adds these to modules_to_save by itself, by task
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # the tasks for which it does
LAYER, PLAIN, BIAS, BASE, TOKENS = "layer", "plain", "bias", "base", "tokens"
UNDER, COPY, UNTRAINED = ".base_layer.", ".modules_to_save.", ".original_module."
WRAPPER = "token_adapter"
ROWS = f".{WRAPPER}.trainable_tokens_delta"
WHOLE_NUMBERS = frozenset({"int64", "I64", "int32", "I32", "uint8", "U8", "bool", "BOOL"})  # such as a layer's counters

PARAMETERS = {  # of adapters, by a part of their names: what is of no module here is of a form that cannot be merged
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_": "LoRA on embeddings",
    "lora_B.bias": "a bias on lora_B",
    "lora_": "a LoRA of an unknown form",
    "ia3_l": "an (IA)³ of an unknown form",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "vera_": "VeRA",
    "oft_": "OFT",
}


@dataclass(frozen=True)
class ExtraTensor:
    """One tensor that rides along.

    Attributes:
        module: the path in the base model of the layer that it belongs to.
        tensor: its name inside that layer: weight, dense.bias.
        role: layer, plain, bias, base or tokens; see above.
        key: its name in the file.
        shape: of the tensor.
        rows: the token ids that its rows are for; empty but for form tokens.
    """

    module: str
    tensor: str
    role: str
    key: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()

    @property
    def size(self) -> str:
        """Its name and shape as messages give them: `weight 2 × 16`."""
        if self.role == TOKENS:
            ids = ", ".join(map(str, self.rows[:6])) + (", …" if len(self.rows) > 6 else "")
            return f"rows {shape_text(self.shape)} for the tokens {ids}"
        return f"{self.tensor} {shape_text(self.shape)}"


TensorsByAdapter = Mapping[
    int, Mapping[str, ExtraTensor]
]  # for each adapter that holds a layer, by its place, its tensors by name


class Holder(Protocol):
    """What is asked of an adapter that holds riders."""

    tensors: TensorSource

    @property
    def digest(self) -> str:
        """Of its task vectors."""


def check_extra_tensors(keys: Sequence[str], config: Mapping[str, Any], tensors: TensorSource, label: str) -> None:
    """Refuse what is no whole tensor: parameters of adapters that no kind claims, and names that PEFT does not read.

    Args:
        keys, config, tensors, label: as in `read_extra_tensors`.
    Raises: AdapterError, that of `read_extra_tensors` too.
    """
    parts = [(key, next((part for part in PARAMETERS if f".{part}" in key), None)) for key in keys]
    what = next((PARAMETERS[part] for _, part in parts if part is not None), None)
    if what is not None:
        found = [key for key, part in parts if part is not None]
        raise AdapterError(
            f"adapter '{label}' holds {len(found)} tensor(s) of {what}, which ties_peft cannot merge yet: "
            f"{_some(found)}. Leaving them out would change what the adapter does; train or save it without, or leave "
            "the adapter out."
        )
    strange = [key for key in keys if not key.startswith(PREFIX)]
    if strange:
        raise AdapterError(
            f"adapter '{label}' holds {len(strange)} tensor(s) whose names do not start with '{PREFIX}', as PEFT's do: "
            f"{_some(strange)}. Save the adapter with PEFT, or rename them."
        )
    read_extra_tensors(keys, config, tensors, whole_layer_names([config]), label)


def unused_copies(keys: Iterable[str]) -> list[str]:
    """The riders that only repeat another, or hold the untrained layer; PEFT reads none of them."""
    known = set(keys)
    return sorted(key for key in known if UNTRAINED in key or (COPY in key and key.replace(COPY, ".") in known))


def whole_layer_names(configs: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """The endings of paths at which some configs say that whole layers begin, PEFT's own for heads included."""
    named = {str(entry) for config in configs for entry in _texts(config.get("modules_to_save"))}
    return (*HEADS, *sorted(named - set(HEADS)))


def read_extra_tensors(
    keys: Sequence[str], config: Mapping[str, Any], tensors: TensorSource, starts: Sequence[str], label: str
) -> list[ExtraTensor]:
    """What each of an adapter's riders is; copies left out.

    Args:
        keys: of the riders.
        config: adapter_config.json.
        tensors: where they are.
        starts: from `entries`.
        label: how messages name the adapter.
    Raises: AdapterError where the config does not say which tokens were trained, or two tensors are for one place.
    """
    idle = set(unused_copies(keys))
    paths = {key: key[len(PREFIX) :].replace(COPY, ".") for key in keys if key not in idle}
    weighty = {_parent(path) for path in paths.values() if "bias" not in path}  # layers that are there whole
    found: dict[tuple[str, str], ExtraTensor] = {}
    for key, path in paths.items():
        rider = _rider(key, path, weighty, starts, config, tensors, label)
        twin = found.setdefault((rider.module, rider.tensor), rider)
        if twin is not rider:
            raise AdapterError(
                f"adapter '{label}' holds two tensors for one place, {_some([twin.key, key])}. Leave one of them out."
            )
    return list(found.values())


def _rider(
    key: str,
    path: str,
    weighty: set[str],
    starts: Sequence[str],
    config: Mapping[str, Any],
    tensors: TensorSource,
    label: str,
) -> ExtraTensor:
    shape = tensors.info(key).shape
    if path.endswith(ROWS):
        module = path.removesuffix(ROWS)
        return ExtraTensor(module, ROWS[1:], TOKENS, key, shape, _trained(module, shape, config, label))
    if UNDER in path:
        plain = path.replace(f".{WRAPPER}", "").replace(UNDER, ".")
        form = BIAS if "bias" in plain else BASE
        return ExtraTensor(_parent(plain), plain.rpartition(".")[2], form, key, shape)
    start = _start(path, starts)
    if start is not None and any(f"{layer}.".startswith(f"{start}.") for layer in weighty):
        return ExtraTensor(start, path[len(start) + 1 :], LAYER, key, shape)
    form = BIAS if "bias" in path and _parent(path) not in weighty else PLAIN
    return ExtraTensor(_parent(path) or path, path.rpartition(".")[2], form, key, shape)


def _trained(module: str, shape: tuple[int, ...], config: Mapping[str, Any], label: str) -> tuple[int, ...]:
    """The ids of the tokens whose rows an adapter holds."""
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if name and module.endswith(str(name))), None)
    if not isinstance(given, list) or not all(isinstance(i, int) for i in given) or len(given) != (*shape, 0)[0]:
        raise AdapterError(
            f"adapter '{label}' holds {shape_text(shape)} numbers for trained tokens of {module!r}, and "
            f"trainable_token_indices in adapter_config.json is {given!r}; expected the id of each row's "
            "token. Mend the config, or save the adapter again."
        )
    return tuple(given)


def _start(path: str, starts: Sequence[str]) -> str | None:
    """The path of the whole layer that a tensor lies in: the shortest that ends as an entry does, as in PEFT."""
    parts = path.split(".")[:-1]
    fronts = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((front for front in fronts if front.endswith(tuple(starts))), None)


def missing_layers(config: Mapping[str, Any], riders: Sequence[ExtraTensor]) -> list[str]:
    """What a config says is saved whole, and is not there, in words."""
    forms = {rider.role for rider in riders}
    named = {"modules_to_save": LAYER, "trainable_token_indices": TOKENS}
    return [
        f"its config asks for {key} {config[key]!r}, but its file holds no such tensor."
        for key, form in named.items()
        if config.get(key) and form not in forms
    ]


def is_head(module: str) -> bool:
    """Whether a whole layer is one that PEFT takes for a task's head."""
    return module.endswith(HEADS)


def describe_extra_tensors(riders: Sequence[ExtraTensor], idle: int = 0) -> list[str]:
    """What rides along, a phrase for each layer, the biases together.

    Args:
        riders: of one adapter.
        idle: how many copies there are beside them.
    """
    found: dict[str, list[ExtraTensor]] = {}
    for rider in riders:
        if rider.role != BIAS:
            found.setdefault(rider.module, []).append(rider)
    lines = [f"{module} ({', '.join(r.size for r in own)})" for module, own in found.items()]
    biases = [rider for rider in riders if rider.role == BIAS]
    lines += [f"{len(biases)} bias{'es' * (len(biases) != 1)}"] if biases else []
    return lines + ([f"{idle} unused cop{'ies' if idle != 1 else 'y'} of whole layers"] if idle else [])


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as messages give it."""
    return " × ".join(map(str, shape)) or "one number"


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _texts(value: Any) -> list[str]:
    """A config's list of texts; one text is taken for a list of it, anything else for none."""
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [entry for entry in found if isinstance(entry, str) and entry]


def _some(keys: Sequence[str]) -> str:
    return ", ".join(f"{key!r}" for key in keys[:4]) + (", …" if len(keys) > 4 else "")
