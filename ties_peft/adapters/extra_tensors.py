"""Extra tensors: the tensors in an adapter's file that belong to no adapted module, and the role of each.

    role    example of a name                              what it is
    layer   classifier.weight, classifier.dense.bias       a layer trained as a whole (modules_to_save, a task's head)
    plain   lm_head.weight that no modules_to_save names   a layer that PEFT writes into the base model, as it does with
                                                           embeddings whose vocabulary was resized
    bias    …q_proj.base_layer.bias, …k_proj.bias          a bias of the base (bias="lora_only", "all")
    base    lm_head.base_layer.weight                      the base's own weight under an adapted module, which PEFT
                                                           saves for embed_tokens and lm_head
    tokens  …token_adapter.trainable_tokens_delta          rows of an embedding; the config says which
    none    ….modules_to_save.…, ….original_module.…       unused copies of another tensor of the file and of the
                                                           untrained layer; PEFT reads neither

The roles follow from the names, because the config is less reliable: a file may hold a head although modules_to_save is
null, the entry `classifier` also matches `pre_classifier` (PEFT compares endings), and an entry may match nothing. Only two
things are read from the config: at which paths whole layers begin, and which rows were trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import AdapterError, some
from .contents import PREFIX, Contents

HEADS = ("classifier", "score", "qa_outputs")  # PEFT adds these to modules_to_save for the task types in HEADED
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
LAYER, PLAIN, BIAS, BASE, TOKENS = "layer", "plain", "bias", "base", "tokens"
UNDER, COPY, UNTRAINED = ".base_layer.", ".modules_to_save.", ".original_module."
WRAPPER = "token_adapter"
ROWS = f".{WRAPPER}.trainable_tokens_delta"
INTEGER_DTYPES = frozenset(
    {"int64", "I64", "int32", "I32", "uint8", "U8", "bool", "BOOL"}
)  # such as a layer's counters

ADAPTER_PARAMETERS = {  # by a part of their names; one that no PEFT type claims is of a form that cannot be merged
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
    """One tensor of an adapter's file that belongs to no adapted module.

    Attributes:
        module: the path in the base model of the layer that it belongs to.
        tensor: its name inside that layer: weight, dense.bias.
        role: layer, plain, bias, base or tokens; see the top of this file.
        key: its name in the file.
        shape: of the tensor.
        rows: for role tokens the ids of the tokens whose rows it holds, else empty.
    """

    module: str
    tensor: str
    role: str
    key: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()

    @property
    def size(self) -> str:
        """Its name and shape in messages: `weight 2 × 16`."""
        if self.role == TOKENS:
            return f"rows {shape_text(self.shape)} for the tokens {some(self.rows, 6)}"
        return f"{self.tensor} {shape_text(self.shape)}"


def check_extra_tensors(keys: Sequence[str], contents: Contents) -> None:
    """Refuse parameters of adapters that no PEFT type claims, and names that PEFT does not read.

    Args:
        keys, contents: as in `read_extra_tensors`.
    Raises: AdapterError, also in the cases of `read_extra_tensors`.
    """
    unclaimed = [(key, what) for key in keys for part, what in ADAPTER_PARAMETERS.items() if f".{part}" in key]
    if unclaimed:
        found = list(dict.fromkeys(key for key, _ in unclaimed))
        raise AdapterError(
            f"adapter '{contents.label}' holds {len(found)} tensor(s) of {unclaimed[0][1]}, which ties_peft cannot merge yet: "
            f"{some(map(repr, found))}. Leaving them out would change what the adapter does; train or save the adapter "
            "without them, or leave it out."
        )
    unprefixed = [key for key in keys if not key.startswith(PREFIX)]
    if unprefixed:
        raise AdapterError(
            f"adapter '{contents.label}' holds {len(unprefixed)} tensor(s) whose names do not start with '{PREFIX}', as PEFT's do: "
            f"{some(map(repr, unprefixed))}. Save the adapter with PEFT, or rename them."
        )
    read_extra_tensors(keys, contents, whole_layer_names([contents.config]))


def unused_copies(keys: Iterable[str]) -> list[str]:
    """Return the tensors that repeat another or hold an untrained layer, sorted; PEFT reads none of them."""
    known = set(keys)
    return sorted(key for key in known if UNTRAINED in key or (COPY in key and key.replace(COPY, ".") in known))


def whole_layer_names(configs: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the endings of the paths of whole layers by some configs' modules_to_save, those of heads included."""
    named = {str(entry) for config in configs for entry in _texts(config.get("modules_to_save"))}
    return (*HEADS, *sorted(named - set(HEADS)))


def read_extra_tensors(keys: Sequence[str], contents: Contents, starts: Sequence[str]) -> list[ExtraTensor]:
    """Find the role of each of an adapter's extra tensors; unused copies are left out.

    Args:
        keys: the names of the extra tensors.
        contents: of the adapter.
        starts: from `whole_layer_names`.
    Raises: AdapterError if the config does not say which tokens were trained, or two tensors have the same place.
    """
    unused = set(unused_copies(keys))
    paths = {key: key[len(PREFIX) :].replace(COPY, ".") for key in keys if key not in unused}
    with_weight = {_parent(path) for path in paths.values() if "bias" not in path}  # layers saved with their weight
    found: dict[tuple[str, str], ExtraTensor] = {}
    for key, path in paths.items():
        extra = _extra_tensor(key, path, with_weight, starts, contents)
        first = found.setdefault((extra.module, extra.tensor), extra)
        if first is not extra:
            raise AdapterError(
                f"adapter '{contents.label}' holds two tensors with the same place in the base model, {some(map(repr, [first.key, key]))}. Leave one of them out."
            )
    return list(found.values())


def _extra_tensor(key: str, path: str, with_weight: set[str], starts: Sequence[str], contents: Contents) -> ExtraTensor:
    shape = contents.tensors.info(key).shape
    if path.endswith(ROWS):
        module = path.removesuffix(ROWS)
        return ExtraTensor(module, ROWS[1:], TOKENS, key, shape, _trained(module, shape, contents))
    if UNDER in path:
        plain = path.replace(f".{WRAPPER}", "").replace(UNDER, ".")
        role = BIAS if "bias" in plain else BASE
        return ExtraTensor(_parent(plain), plain.rpartition(".")[2], role, key, shape)
    start = _start(path, starts)
    if start is not None and any(f"{layer}.".startswith(f"{start}.") for layer in with_weight):
        return ExtraTensor(start, path[len(start) + 1 :], LAYER, key, shape)
    role = BIAS if "bias" in path and _parent(path) not in with_weight else PLAIN
    return ExtraTensor(_parent(path) or path, path.rpartition(".")[2], role, key, shape)


def _trained(module: str, shape: tuple[int, ...], contents: Contents) -> tuple[int, ...]:
    """Return the ids of the tokens whose rows of an embedding an adapter holds."""
    given = contents.config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((ids for name, ids in given.items() if name and module.endswith(str(name))), None)
    if not isinstance(given, list) or not all(isinstance(i, int) for i in given) or len(given) != (*shape, 0)[0]:
        raise AdapterError(
            f"adapter '{contents.label}' holds {shape_text(shape)} numbers for trained tokens of {module!r}, and "
            f"trainable_token_indices in adapter_config.json is {given!r}; expected the id of each row's "
            "token. Correct the config, or save the adapter again."
        )
    return tuple(given)


def _start(path: str, starts: Sequence[str]) -> str | None:
    """Return the path of the whole layer that a tensor belongs to: as in PEFT, the shortest with one of the endings."""
    parts = path.split(".")[:-1]
    fronts = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next((front for front in fronts if front.endswith(tuple(starts))), None)


def missing_layers(config: Mapping[str, Any], extra: Sequence[ExtraTensor]) -> list[str]:
    """Return a sentence for each kind of whole layer that a config asks for and the file does not hold."""
    roles = {one.role for one in extra}
    named = {"modules_to_save": LAYER, "trainable_token_indices": TOKENS}
    return [
        f"its config asks for {key} {config[key]!r}, but its file holds no such tensor."
        for key, role in named.items()
        if config.get(key) and role not in roles
    ]


def is_head(module: str) -> bool:
    """Return whether PEFT takes a layer for a task's head."""
    return module.endswith(HEADS)


def describe_extra_tensors(extra: Sequence[ExtraTensor], unused: int = 0) -> list[str]:
    """Describe an adapter's extra tensors: a phrase for each layer, and one for all biases.

    Args:
        extra: of one adapter.
        unused: the number of unused copies beside them.
    """
    found: dict[str, list[ExtraTensor]] = {}
    for one in extra:
        if one.role != BIAS:
            found.setdefault(one.module, []).append(one)
    lines = [f"{module} ({', '.join(one.size for one in own)})" for module, own in found.items()]
    biases = [one for one in extra if one.role == BIAS]
    lines += [f"{len(biases)} bias{'es' * (len(biases) != 1)}"] if biases else []
    return lines + ([f"{unused} unused cop{'ies' if unused != 1 else 'y'} of whole layers"] if unused else [])


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape as messages show it: `2 × 16`."""
    return " × ".join(map(str, shape)) or "one number"


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _texts(value: Any) -> list[str]:
    """Return a config's list of strings; a single string counts as a list of one, anything else as an empty list."""
    found = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [entry for entry in found if isinstance(entry, str) and entry]
