"""Find the class of the base model that an adapter belongs to, and the lines of Python that load the adapter on it.

PEFT finds an adapter's modules by their full paths, so the base must be of the right class: `encoder.layer.0` is a path in
`BertModel`, `bert.encoder.layer.0` one in every BERT with a head. With a wrong class PEFT raises an error, or loads nothing
and only warns. The class is taken from these sources, the most reliable first:

    auto_mapping    written by PEFT if it was given no task type; all adapters that have one must agree
    module paths    that only models of diffusers or models without a head have
    task type       of the adapters, if those that name one agree
    heads           of the adapter, if only one task has such tensors
    base's config   its `architectures`; read from a folder or the Hub's cache, never downloaded
    module paths    of language models

If several classes remain, none is named. transformers is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..adapters import sources
from ..adapters.config_values import read_object
from ..adapters.extra_tensors import HEADED
from ..errors import printable

PLACEHOLDER = "your/base-model"
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
ENDINGS = {  # of a class's name: the Auto class that gives it; a class with another ending is named itself
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "Model": "AutoModel",
}
CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
UNET = re.compile(r"(down_blocks|mid_block|up_blocks)\.")
DIFFUSERS = re.compile(r"(.+\.)?to_(q|k|v|out\.0)$")  # the attention of diffusers' models alone has these names
BARE = re.compile(
    r"(encoder\.layer|layers|h|layer)\.\d+\.|transformer\.layer\.\d+\.(attention\.\w+_lin|ffn\.)|encoder\.albert_layer_groups\."
)
T5 = re.compile(r"(encoder|decoder)\.block\.\d+\.")
CAUSAL = re.compile(
    r"model\.layers\.\d+\.|transformer\.(h|blocks)\.\d+\.|gpt_neox\.layers\.\d+\.|backbone\.layers\.\d+\."
)
VOCABULARY = re.compile(r"(.+\.)?(embed_tokens|wte|word_embeddings|embed_in|embed_out|shared|tok_embeddings|lm_head)")
LABELS = ("weight", "out_proj.weight")  # of a head: the tensor whose rows are the labels
CONFIG_LIMIT = 1 << 20  # bytes; no model's config.json has as many


@dataclass(frozen=True)
class AdapterFacts:
    """What is known of an adapter and its base.

    Attributes:
        base: the base's name in the result; None for none.
        weights: where the base's weights were read from, if they were.
        tasks: the task types that the adapters name.
        mappings: (class, Python module) of each `auto_mapping` that PEFT wrote.
        paths: of the adapted modules.
        heads: of the task, each with the shapes of its tensors by name.
        vocabulary: the number of tokens of the embeddings or the output that it has or adapts; None if unknown.
    """

    base: str | None
    weights: str | None = None
    tasks: tuple[str, ...] = ()
    mappings: tuple[tuple[str, str], ...] = ()
    paths: tuple[str, ...] = ()
    heads: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    vocabulary: int | None = None


@dataclass(frozen=True)
class Loading:
    """How an adapter is loaded on its base.

    Attributes:
        base: the base's name; None if it is not known.
        name: of the class that loads the base; empty if it is not known.
        why: how the class was found, or why not.
        library: that has the class.
        options: further arguments of from_pretrained.
        vocabulary: the number of tokens that the base must be resized to; None for its own.
    """

    base: str | None
    name: str
    why: str
    library: str = "transformers"
    options: Mapping[str, object] = field(default_factory=dict)
    vocabulary: int | None = None

    def lines(self, folder: str) -> list[str]:
        """Return the lines of Python that load the adapter from a folder; a comment states what is not known."""
        model = f"model = PeftModel.from_pretrained(base, {folder!r})"
        if not self.name:
            return [
                printable(f"# The class of the base model is not known: {self.why}."),
                printable(f"# base: {self.base or PLACEHOLDER}, loaded as for the training of the adapters."),
                "from peft import PeftModel",
                model,
            ]
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        resized = [] if self.vocabulary is None else [f"base.resize_token_embeddings({self.vocabulary})"]
        return [
            f"from {self.library} import {self.name}; from peft import PeftModel",
            f"base = {self.name}.from_pretrained({self.base or PLACEHOLDER!r}{options})",
            *resized,
            model,
        ]


def find_loading(facts: AdapterFacts) -> Loading:
    """Return how an adapter is loaded on its base, as far as the facts tell."""
    config, part = _config(facts)
    found = replace(_class(facts, config), base=facts.base)
    if not found.name:
        return found
    if found.library == "diffusers":
        inside = _usual_part(facts.paths) if part is None else part
        return replace(found, options={"subfolder": inside} if inside else {})
    options = {**({"subfolder": part} if part else {}), **_labels(facts, config)}
    return replace(found, options=options, vocabulary=_vocabulary(facts, config))


def is_causal_lm(facts: AdapterFacts) -> bool:
    """Return whether adapters are those of a causal language model: by their task types, or if they name none by the class."""
    if facts.tasks:
        return set(facts.tasks) == {"CAUSAL_LM"}
    return find_loading(facts).name.endswith(CAUSAL_CLASSES)


def _class(facts: AdapterFacts, config: Mapping[str, Any]) -> Loading:
    """Return the class by the first source above that names one, or why none does."""
    paths, architecture = facts.paths, _architecture(config)
    mapped = _mapped(facts)
    if mapped is not None:
        return mapped
    if not architecture and _is_diffusers(paths):
        return _diffusers(paths, config)
    task = facts.tasks[0] if len(set(facts.tasks)) == 1 else None
    headed = task in HEADED or bool(facts.heads)
    if all(BARE.match(path) for path in paths):
        why = "its module paths are those of a model without a head"
        return _found("", f"{why}, and its task has one") if headed else _found("AutoModel", why)
    if headed:
        return _headed(facts.heads, task, architecture)
    return _headless(paths, task, architecture, config)


def _found(name: str, why: str, library: str = "transformers") -> Loading:
    """Return how the base is loaded by a class; an empty name if it is not known."""
    return Loading(None, name, why, library)


def _mapped(facts: AdapterFacts) -> Loading | None:
    """Return the class that PEFT wrote."""
    if len(noted := set(facts.mappings)) != 1:
        return None
    name, module = noted.pop()
    library = module.partition(".")[0]
    known = library in ("transformers", "diffusers") and NAME.fullmatch(name)
    return _found(name, "auto_mapping names it", library) if known else None


def _is_diffusers(paths: Iterable[str]) -> bool:
    return any(UNET.match(path) or DIFFUSERS.fullmatch(path) for path in paths)


def _usual_part(paths: Iterable[str]) -> str:
    """Return the folder in which pipelines of diffusers store such a model."""
    return "unet" if any(UNET.match(path) for path in paths) else "transformer"


def _diffusers(paths: Sequence[str], config: Mapping[str, Any]) -> Loading:
    """Return a class of diffusers by the base's config, or a UNet by its paths."""
    name = config.get("_class_name")
    if isinstance(name, str) and NAME.fullmatch(name):
        return _found(name, "the base's config names it", "diffusers")
    if any(UNET.match(path) for path in paths):
        return _found("UNet2DConditionModel", "module paths", "diffusers")
    why = "its module paths are those of a transformer of diffusers, and only the base's config.json says which"
    return _found("", why, "diffusers")


def _headed(heads: Mapping[str, Mapping[str, Any]], task: str | None, architecture: str) -> Loading:
    """Return a class with a head by the base's config, the task type or the tensors of the head."""
    own = architecture.endswith(("Classification", "QuestionAnswering"))
    if own and (task is None or architecture.endswith(("ForImageClassification", "ForAudioClassification"))):
        return _by_architecture(architecture)
    if task in HEADED:
        return _found(TASKS[task], f"task_type {task}")
    if any(head.endswith("qa_outputs") for head in heads):
        return _found(TASKS["QUESTION_ANS"], "its head is qa_outputs")
    inner = [name for tensors in heads.values() for name in tensors]
    if "out_proj.weight" in inner or any(head.endswith("pre_classifier") for head in heads):
        return _found(TASKS["SEQ_CLS"], "its head has two layers")
    names = ", ".join(heads)
    return _found("", f"no task_type says what its head ({names}) is for, and several tasks have a head of that name")


def _headless(paths: Sequence[str], task: str | None, architecture: str, config: Mapping[str, Any]) -> Loading:
    """Return a class without a task's head by the base's config if the paths fit it, by the paths, or by the task type."""
    causal = all(CAUSAL.match(path) for path in paths)
    bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    multimodal = architecture.endswith("ForConditionalGeneration")  # of text and images; loaded as text if causal
    inside = any(path.startswith(_prefixes(config)) for path in paths)
    if architecture and not (inside if bare else causal and multimodal):
        return _by_architecture(architecture, config)
    if causal:
        return _found(TASKS["CAUSAL_LM"], "module paths")
    if any(T5.match(path) for path in paths) and any(path.startswith("decoder.") for path in paths):
        return _found(TASKS["SEQ_2_SEQ_LM"], "module paths")
    if task in TASKS:
        return _found(TASKS[task], f"task_type {task}")
    said = "does not fit its module paths" if config else "is not at hand"
    return _found(
        "",
        f"no task_type tells it, its base's config.json {said}, and models of several classes have such modules "
        f"({paths[0] if paths else 'none'})",
    )


def _by_architecture(architecture: str, config: Mapping[str, Any] = MappingProxyType({})) -> Loading:
    """Return what loads the class that the base was saved as."""
    remote = config.get("auto_map")
    named = remote.items() if isinstance(remote, dict) else ()
    auto = next((str(key) for key, value in named if str(value).endswith(f".{architecture}")), "")
    known = next((name for end, name in ENDINGS.items() if architecture.endswith(end)), architecture)
    return _found(auto if NAME.fullmatch(auto) else known, f"the base's config names {architecture}")


def _architecture(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that a base was saved as; empty if unknown."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and NAME.fullmatch(first) else ""


def _prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the prefixes that a model's paths have in classes with a head."""
    model_type = str(config.get("model_type") or "model").replace("-", "_")
    return ("model.", "transformer.", "roberta.", f"{model_type}.", f"{model_type.replace('_', '')}.")


def _labels(facts: AdapterFacts, config: Mapping[str, Any]) -> dict[str, object]:
    """Return the number of labels as an option, if the base's config has another one or is not known."""
    sizes = [
        tensors[name][0]
        for head, tensors in facts.heads.items()
        for name in LABELS
        if name in tensors and tensors[name] and not head.endswith("pre_classifier")
    ]
    if not sizes:
        return {}
    named = config.get("id2label")
    own = len(named) if isinstance(named, dict) else config.get("num_labels", 2)
    if config and own == sizes[0]:
        return {}
    headed = not config or _architecture(config).endswith(("Classification", "QuestionAnswering"))
    return {"num_labels": sizes[0], **({"ignore_mismatched_sizes": True} if headed else {})}  # the adapter has the head


def _vocabulary(facts: AdapterFacts, config: Mapping[str, Any]) -> int | None:
    """Return how many tokens the base must have, if it may have another number."""
    inner = config.get("text_config")
    own = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return None if own == facts.vocabulary else facts.vocabulary


def _config(facts: AdapterFacts) -> tuple[dict[str, Any], str | None]:
    """Return the base's config.json and the folder of the base that contains it; ({}, None) if it is not at hand.

    Of a pipeline with two text encoders none is taken, because nothing says which of them is the base.
    """
    parts = (_usual_part(facts.paths), "") if _is_diffusers(facts.paths) else ("", "text_encoder")
    for source in filter(None, (facts.base, facts.weights)):
        for part in parts:
            config = _read(sources.local_file(source, f"{part}/config.json".lstrip("/")))
            if (
                config
                and part == "text_encoder"
                and sources.local_file(source, "text_encoder_2/config.json") is not None
            ):
                break
            if config:
                return config, part if source == facts.base else None
    return {}, None


def _read(path: Path | None) -> dict[str, Any]:
    """Return a config.json if it belongs to a model, else {}."""
    try:
        if path is None or path.stat().st_size > CONFIG_LIMIT:
            return {}
        config = read_object(path)
    except (OSError, ValueError):
        return {}
    return config if {"architectures", "_class_name"} & set(config) else {}
