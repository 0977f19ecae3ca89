"""Loading: the class of the base model that an adapter was made for, and the lines of Python that put it on.

PEFT finds an adapter's modules by their full paths, so only the right class of the base will do: `encoder.layer.0` is a
path in `BertModel`, `bert.encoder.layer.0` one in every BERT with a head. With the wrong one PEFT stops, or loads nothing
and says so only in a warning. What tells the class, the surest first:

    auto_mapping    in which PEFT notes the class where it was told no task type, if all adapters that have one agree
    module paths    of diffusers' models, and of models without a head, which alone have such paths
    task type       of the adapters, if those that name one agree
    heads           that the adapter holds: whose tensors only one kind of task has
    base's config   its `architectures`; read from a folder or the Hub's cache, never fetched
    module paths    of language models

Where these leave several classes, none is named. transformers is not imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapters import sources
from ..errors import printable

PLACEHOLDER = "your/base-model"
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
ENDINGS = {  # of a class's name: the Auto class that gives it; a class with another ending is named itself
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForImageClassification": "AutoModelForImageClassification",
    "Model": "AutoModel",
}
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
    """What is known of an adapter and the base that it is for.

    Attributes:
        base: the base's name that is written; None for none.
        weights: where the base's weights were read from, if they were.
        tasks: the task types that the adapters name.
        mappings: what PEFT noted of the class, (class, module of Python), where it did.
        paths: of the adapted modules.
        heads: the task's heads that it holds, each with the shapes of its tensors by name.
        vocabulary: how many tokens the embeddings or the output have that it holds or adapts; None for unknown.
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
    """How an adapter is put on its base.

    Attributes:
        base: the base's name; None where it is not known.
        name: of the class that loads the base; empty where it cannot be told.
        why: what tells the class, or why nothing does.
        library: that has the class.
        options: further arguments of from_pretrained.
        vocabulary: the number of tokens that the base is resized to; None for its own.
    """

    base: str | None
    name: str
    why: str
    library: str = "transformers"
    options: Mapping[str, object] = field(default_factory=dict)
    vocabulary: int | None = None

    def lines(self, folder: str) -> list[str]:
        """Return the lines of Python that load the adapter from a folder; a comment stands for what is not known."""
        model = f"model = PeftModel.from_pretrained(base, {folder!r})"
        if not self.name:
            lines = [
                f"# The class of the base model cannot be told: {self.why}.",
                f"# base: {self.base or PLACEHOLDER}, loaded as it was for the training of the adapters.",
                "from peft import PeftModel",
                model,
            ]
            return [printable(line) for line in lines]
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        resized = [] if self.vocabulary is None else [f"base.resize_token_embeddings({self.vocabulary})"]
        return [
            f"from {self.library} import {self.name}; from peft import PeftModel",
            f"base = {self.name}.from_pretrained({self.base or PLACEHOLDER!r}{options})",
            *resized,
            model,
        ]


def find_loading(evidence: AdapterFacts) -> Loading:
    """Return how an adapter is put on its base, as far as the evidence tells."""
    config, part = _config(evidence)
    found = _class(evidence, config)
    if not found.name:
        return found
    if found.library == "diffusers":
        inside = _usual_part(evidence.paths) if part is None else part
        return replace(found, options={"subfolder": inside} if inside else {})
    options = {**({"subfolder": part} if part else {}), **_labels(evidence, config)}
    return replace(found, options=options, vocabulary=_vocabulary(evidence, config))


def _class(evidence: AdapterFacts, config: Mapping[str, Any]) -> Loading:
    """The class, by the first of the tests above that tells one, or why none does."""
    base, paths = evidence.base, evidence.paths
    architecture = _architecture(config)
    mapped = _mapped(evidence)
    if mapped is not None:
        return mapped
    if not architecture and _is_diffusers(paths):
        return _diffusers(evidence, config)
    task = evidence.tasks[0] if len(set(evidence.tasks)) == 1 else None
    headed = task in HEADED or bool(evidence.heads)
    if all(BARE.match(path) for path in paths):
        why = "its module paths are those of a model without a head"
        return Loading(base, "", f"{why}, and its task has one") if headed else Loading(base, "AutoModel", why)
    if headed:
        return _headed(evidence, task, architecture)
    return _headless(evidence, task, architecture, config)


def _mapped(evidence: AdapterFacts) -> Loading | None:
    """The class that PEFT noted."""
    noted = set(evidence.mappings)
    if len(noted) != 1:
        return None
    ((name, module),) = noted
    library = module.partition(".")[0]
    if library not in ("transformers", "diffusers") or not NAME.fullmatch(name):
        return None
    return Loading(evidence.base, name, "auto_mapping names it", library)


def _is_diffusers(paths: Iterable[str]) -> bool:
    return any(UNET.match(path) or DIFFUSERS.fullmatch(path) for path in paths)


def _usual_part(paths: Iterable[str]) -> str:
    """The folder in which pipelines of diffusers keep a model."""
    return "unet" if any(UNET.match(path) for path in paths) else "transformer"


def _diffusers(evidence: AdapterFacts, config: Mapping[str, Any]) -> Loading:
    """A class of diffusers, by the base's config, or a UNet by its paths."""
    name = config.get("_class_name")
    if isinstance(name, str) and NAME.fullmatch(name):
        return Loading(evidence.base, name, "the base's config names it", "diffusers")
    if any(UNET.match(path) for path in evidence.paths):
        return Loading(evidence.base, "UNet2DConditionModel", "module paths", "diffusers")
    why = "its module paths are those of a transformer of diffusers, and only the base's config.json says which"
    return Loading(evidence.base, "", why, "diffusers")


def _headed(evidence: AdapterFacts, task: str | None, architecture: str) -> Loading:
    """A class with a task's head: by the base's config, by the task type, or by the tensors of the head."""
    base, heads = evidence.base, evidence.heads
    own = architecture.endswith(("Classification", "QuestionAnswering"))
    if own and (task is None or architecture.endswith(("ForImageClassification", "ForAudioClassification"))):
        return _by_architecture(base, architecture)
    if task in HEADED:
        return Loading(base, TASKS[task], f"task_type {task}")
    if any(head.endswith("qa_outputs") for head in heads):
        return Loading(base, TASKS["QUESTION_ANS"], "its head is qa_outputs")
    inner = [name for tensors in heads.values() for name in tensors]
    if "out_proj.weight" in inner or any(head.endswith("pre_classifier") for head in heads):
        return Loading(base, TASKS["SEQ_CLS"], "its head has two layers")
    names = ", ".join(heads)
    return Loading(
        base, "", f"no task_type says what its head ({names}) is for, and several tasks have one of that name"
    )


def _headless(evidence: AdapterFacts, task: str | None, architecture: str, config: Mapping[str, Any]) -> Loading:
    """A class without a task's head: by the base's config where the module paths fit it, by paths, by the task type."""
    base, paths = evidence.base, evidence.paths
    causal = all(CAUSAL.match(path) for path in paths)
    bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    text_alone = causal and architecture.endswith(
        "ForConditionalGeneration"
    )  # a model of text and images, loaded as text
    inside = any(path.startswith(_prefixes(config)) for path in paths)
    if architecture and not (inside if bare else text_alone):
        return _by_architecture(base, architecture, config)
    if causal:
        return Loading(base, TASKS["CAUSAL_LM"], "module paths")
    if any(T5.match(path) for path in paths) and any(path.startswith("decoder.") for path in paths):
        return Loading(base, TASKS["SEQ_2_SEQ_LM"], "module paths")
    if task in TASKS:
        return Loading(base, TASKS[task], f"task_type {task}")
    config_says = (
        "its base's config.json does not fit its module paths" if config else "its base's config.json is not at hand"
    )
    return Loading(
        base,
        "",
        f"no task_type tells it, {config_says}, and models of several classes have such modules ({_first(paths)})",
    )


def _by_architecture(base: str | None, architecture: str, config: Mapping[str, Any] | None = None) -> Loading:
    """What loads the class that the base was saved as."""
    remote = (config or {}).get("auto_map")
    named = remote.items() if isinstance(remote, dict) else ()
    auto = next((str(key) for key, value in named if str(value).endswith(f".{architecture}")), "")
    name = (
        auto if NAME.fullmatch(auto) else next((ENDINGS[e] for e in ENDINGS if architecture.endswith(e)), architecture)
    )
    return Loading(base, name, f"the base's config names {architecture}")


def _architecture(config: Mapping[str, Any]) -> str:
    """The class of transformers that a base was saved as; empty for unknown."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    return first if isinstance(first, str) and NAME.fullmatch(first) else ""


def _prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands in front of a bare model's paths in the classes that have a head on it."""
    kind = str(config.get("model_type") or "model").replace("-", "_")
    return ("model.", "transformer.", "roberta.", f"{kind}.", f"{kind.replace('_', '')}.")


def _labels(evidence: AdapterFacts, config: Mapping[str, Any]) -> dict[str, object]:
    """The number of labels, where the base's config has another or is not known."""
    sizes = [
        tensors[name][0]
        for head, tensors in evidence.heads.items()
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


def _vocabulary(evidence: AdapterFacts, config: Mapping[str, Any]) -> int | None:
    """How many tokens the base must have, where it may have another number."""
    inner = config.get("text_config")
    own = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return None if own == evidence.vocabulary else evidence.vocabulary


def _config(evidence: AdapterFacts) -> tuple[dict[str, Any], str | None]:
    """(the base's config.json, the folder inside the base that it was found in); ({}, None) where it is not at hand."""
    parts = (_usual_part(evidence.paths), "") if _is_diffusers(evidence.paths) else ("", "text_encoder")
    for source in (evidence.base, evidence.weights):
        found = {part: _read(sources.local_file(source, f"{part}/config.json".lstrip("/"))) for part in parts if source}
        part = next((part for part in parts if found.get(part)), None)
        two = part == "text_encoder" and sources.local_file(str(source), "text_encoder_2/config.json") is not None
        if part is not None and not two:  # a pipeline with two text encoders does not say which
            return found[part], part if source == evidence.base else None
    return {}, None


def _read(path: Path | None) -> dict[str, Any]:
    """A config.json, if it is one of a model."""
    try:
        if path is None or path.stat().st_size > CONFIG_LIMIT:
            return {}
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) and {"architectures", "_class_name"} & set(config) else {}


def _first(paths: Sequence[str]) -> str:
    return paths[0] if paths else "none"
