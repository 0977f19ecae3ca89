"""Train the sample adapters: `python adapters/train.py --data DIR [--only lora/sst2 ...]`.

Six tasks, LoRA and (IA)3 for each, and one multitask adapter of each type, over the frozen base of
`minilm.py`. The epoch that is best on the validation rows is kept; the accuracies in the card are
those of the saved half-precision file on the test rows.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import minilm
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
LORA_TARGETS = ["query", "key", "value", "intermediate.dense", "output.dense"]
IA3_FEEDFORWARD = r".*layer\.\d+\.output\.dense"
IA3_TARGETS = rf".*self\.(key|value)|{IA3_FEEDFORWARD}"
RANKS = {"banking77": 16, "multitask": 16}  # 8 elsewhere: real sets have mixed ranks


@dataclass(frozen=True)
class Job:
    """One adapter to train."""

    kind: str
    name: str
    epochs: int
    learning_rate: float
    batch: int = 32
    rows: int = 4000  # of each task an epoch sees, drawn anew for every epoch

    @property
    def tasks(self) -> tuple[str, ...]:
        return minilm.TASKS if self.name == "multitask" else (self.name,)

    @property
    def folder(self) -> Path:
        parts = ("multitask", self.kind) if self.name == "multitask" else (self.kind, self.name)
        return HERE.joinpath(*parts)

    @property
    def seed(self) -> int:
        """Each adapter starts from its own initialisation."""
        return sum(ord(c) * (i + 1) for i, c in enumerate(f"{self.kind}/{self.name}"))

    def config(self) -> Any:
        if self.kind == "ia3":
            return IA3Config(
                task_type="FEATURE_EXTRACTION", target_modules=IA3_TARGETS, feedforward_modules=IA3_FEEDFORWARD
            )
        rank = RANKS.get(self.name, 8)
        return LoraConfig(
            task_type="FEATURE_EXTRACTION", r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, lora_dropout=0.0
        )


JOBS = [
    *(Job("lora", task, epochs=3, learning_rate=1e-3) for task in minilm.TASKS),
    *(Job("ia3", task, epochs=4, learning_rate=1e-2) for task in minilm.TASKS),
    Job("lora", "multitask", epochs=2, learning_rate=1e-3, rows=2500),
    Job("ia3", "multitask", epochs=2, learning_rate=1e-2, rows=2500),
]


def epoch_batches(train: dict[str, minilm.Rows], size: int, most: int) -> list[tuple[str, list[int]]]:
    """One pass over at most so many rows of every task: each batch from one task and of similar lengths, the batches shuffled."""
    steps = []
    for task, rows in train.items():
        order = random.sample(range(len(rows.texts)), min(most, len(rows.texts)))
        for start in range(0, len(order), size * 8):  # sort within pools, so that batches stay random
            pool = sorted(order[start : start + size * 8], key=lambda i: len(rows.texts[i]))
            steps += [(task, pool[at : at + size]) for at in range(0, len(pool), size)]
    random.shuffle(steps)
    return steps


def rate(step: int, total: int) -> float:
    """A short warm-up, then a cosine down to nothing."""
    warm = max(1, total // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


def mean_accuracy(model: Any, tokenizer: Any, heads: dict[str, torch.Tensor], split: dict[str, minilm.Rows]) -> float:
    scores = [minilm.accuracy(model, tokenizer, heads[task], rows) for task, rows in split.items()]
    return sum(scores) / len(scores)


def fit(job: Job, model: Any, tokenizer: Any, heads: dict[str, torch.Tensor], data: Path) -> dict[str, torch.Tensor]:
    """Train, and return the tensors of the epoch that was best on the validation rows."""
    validation = {task: minilm.read_rows(task, "validation", data, 300) for task in job.tasks}
    best, kept, epoch = -1.0, {}, 0
    for ends_epoch in steps(job, model, tokenizer, heads, data):
        if not ends_epoch:
            continue
        epoch += 1
        score = mean_accuracy(model.eval(), tokenizer, heads, validation)
        print(f"{job.kind}/{job.name} epoch {epoch}: validation {score:.2f}", flush=True)
        if score > best:
            best, kept = score, {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    return kept


def steps(job: Job, model: Any, tokenizer: Any, heads: dict[str, torch.Tensor], data: Path) -> Iterator[bool]:
    """Train one step at a time; each yields whether it was the last of an epoch."""
    train = {task: minilm.read_rows(task, "train", data) for task in job.tasks}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0)
    total = job.epochs * len(epoch_batches(train, job.batch, job.rows))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total))
    for _ in range(job.epochs):
        model.train()
        batches = epoch_batches(train, job.batch, job.rows)
        for number, (task, chosen) in enumerate(batches, 1):
            rows = train[task]
            logits = (
                minilm.TEMPERATURE * minilm.encode(model, tokenizer, [rows.texts[i] for i in chosen]) @ heads[task].T
            )
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([rows.labels[i] for i in chosen]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            yield number == len(batches)


def card(job: Job, before: dict[str, float], after: dict[str, float], data: Path) -> str:
    """The adapter's README."""
    source = lambda task: json.loads((data / task / "task.json").read_text(encoding="utf-8"))  # noqa: E731
    sources = "\n".join(f"- {task}: {source(task)['source']} ({source(task)['license']})" for task in job.tasks)
    table = "\n".join(f"| {task} | {before[task]:.1f} | {after[task]:.1f} |" for task in job.tasks)
    what = {"lora": "LoRA", "ia3": "(IA)3"}[job.kind]
    return f"""---
base_model: {minilm.BASE}
library_name: peft
license: apache-2.0
tags: [{job.kind}, sample]
---
# {what} for {job.name}

A sample adapter of `ties_peft`, trained by `adapters/train.py` ({job.epochs} epochs of up to {job.rows} train rows a task, batches of
{job.batch}, AdamW, learning rate {job.learning_rate:g}, warm-up then cosine, seed {job.seed}; the best epoch on 300 validation rows a
task was kept). Heads are frozen embeddings of label descriptions (`adapters/minilm.py`). Weights are float16.

Accuracy in percent on the test rows (the saved file):

| task | base | with this adapter |
|---|---|---|
{table}

Data:
{sources}
"""


def save(job: Job, model: Any, kept: dict[str, torch.Tensor]) -> None:
    """The half-precision file and a config that names the base as the Hub does."""
    job.folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = minilm.BASE
    config.inference_mode = True
    config.save_pretrained(job.folder)
    half = {name: tensor.half().contiguous() for name, tensor in kept.items()}
    save_file(half, job.folder / "adapter_model.safetensors", metadata={"format": "pt"})


def run(job: Job, data: Path) -> None:
    """Train, save, reload the saved file, judge it, write its card."""
    start = time.time()
    torch.manual_seed(job.seed)
    random.seed(job.seed)
    base, tokenizer = minilm.load_base()
    heads = minilm.make_heads(base, tokenizer, job.tasks, data)
    test = {task: minilm.read_rows(task, "test", data) for task in job.tasks}
    before = {task: minilm.accuracy(base, tokenizer, heads[task], rows) for task, rows in test.items()}
    model = get_peft_model(base, job.config())
    save(job, model, fit(job, model, tokenizer, heads, data))
    again = PeftModel.from_pretrained(minilm.load_base()[0], job.folder).eval()
    after = {task: minilm.accuracy(again, tokenizer, heads[task], rows) for task, rows in test.items()}
    (job.folder / "README.md").write_text(card(job, before, after, data), encoding="utf-8")
    size = sum(t.numel() for t in load_file(job.folder / "adapter_model.safetensors").values())
    print(f"{job.kind}/{job.name}: {size} numbers, {time.time() - start:.0f} s", before, after, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with one sub-folder a task")
    parser.add_argument("--only", nargs="*", help="names such as lora/sst2 (default: all)")
    chosen = parser.parse_args()
    for job in JOBS:
        if not chosen.only or f"{job.kind}/{job.name}" in chosen.only:
            run(job, chosen.data)


if __name__ == "__main__":
    main()
