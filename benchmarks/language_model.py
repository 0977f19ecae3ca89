"""The part of `compare.py` for LoRAs of a causal language model, of six different tasks.

Merges run in processes of their own, because they take longer than scoring. Each result is scored on validation rows and on
test rows, row by row, and stored in a log from which the tables are made. Settings are chosen on validation rows.

The share of a task is, for classification, the accuracy in percent of the own adapter's; for generation, the part of the
gap between the base's and the own adapter's loss per token that is closed, in percent. `six` is the mean over the tasks.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import multiprocessing
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import FOURTH_ROOT_N, ROOT_N, Setting, pack, unpack
from causal import SPLITS, TEXT, CausalJudge, Factors, Key, Scored, factors_of, read_rows
from judge import paired
from peft_formulas import COMBINATIONS, merge_as_peft
from records import Record, Records
from torch import Tensor

import smollm2  # isort: skip

import ties_peft

REFERENCE = Setting("ties")
PUBLISHED = (  # also merged for subsets of the adapters
    REFERENCE,
    Setting("auto"),
    Setting("iso_c"),
    Setting("iso_c", scale=1.3),
    Setting("flat_tsv"),
    Setting("flat_tsv", scale=0.7),
    Setting("ties", space="core"),
    Setting("tsv", scale=FOURTH_ROOT_N),
    Setting("tsv", scale=1.0),
    Setting("average"),
    Setting("task_arithmetic", scale=ROOT_N),
    Setting("peft_ties"),
    Setting("pico+ties", space="core"),
    Setting("dare_ties"),
)
FULL = (  # for all six
    *PUBLISHED,
    *(Setting("dual", scale=scale) for scale in (0.8, 1.2)),
    *(Setting("dual", extra={"flatten": flatten}) for flatten in (0.0, 0.5, 1.0)),
    Setting("tsv", scale=0.4),
    Setting("tsv", scale=ROOT_N),
    Setting("task_arithmetic", scale=0.3),
    Setting("task_arithmetic", scale=0.4),
    Setting("peft_linear"),
    Setting("ties", scale=0.5),
    Setting("ties", space="knots"),
    Setting("iso_cts"),
    Setting("boosting"),
    Setting("boosting", scale=0.4),
    Setting("consensus"),
    Setting("consensus", space="core"),
    Setting("karcher"),
    Setting("sce"),
    Setting("model_stock"),
    Setting("wudi"),
)
FURTHER = (  # for all six, last
    *(Setting(name, rank=rank) for name in ("auto", "iso_c", "flat_tsv") for rank in (16, 8)),
    *(Setting("tsv", scale=FOURTH_ROOT_N, rank=rank) for rank in (16, 8)),
    *(Setting("ties", space="core", rank=rank) for rank in (16, 8)),
    Setting("iso_c", scale=0.7),
    Setting("iso_c", extra={"weights": "norm"}),
    Setting("ties", space="core", scale=0.7),
    Setting("ties", space="core", extra={"density": 1}),
    Setting("ties", rank=8, extra={"scope": "module"}),  # PEFT's ties_svd at the largest input's rank
    Setting("dare_ties", space="core"),
    Setting("magnitude_prune"),
    Setting("breadcrumbs_ties"),
    Setting("pico"),
    Setting("svc"),
    Setting("emr"),
    Setting("pcb"),
    Setting("lego"),
)
SEED = 15  # of the subsets
SUBSETS = 5  # of each size
WAITING = 2  # merges per process that may wait in memory until they are scored
ROOM = 4 << 30  # bytes of memory for them


@dataclass(frozen=True)
class Asked:
    """The options of the command line.

    Attributes:
        data, base, adapters: folders; base None for that of the samples.
        rows: the largest number of each task and split.
        device: that scores.
        tf32: whether a GPU may multiply with 10 bits of mantissa, which is twice as fast.
        processes: the number that merge.
        seconds: the time after which no new result is awaited; None for no limit.
        log: a file with one JSON object a line; None to keep nothing.
        methods: of the merges; empty for all.
        splits: whose rows are scored.
    """

    data: Path
    base: str | None
    adapters: Path
    rows: int
    device: str = "cpu"
    tf32: bool = False
    processes: int = 1
    seconds: float | None = None
    log: Path | None = None
    methods: tuple[str, ...] = ()
    splits: tuple[str, ...] = SPLITS


@dataclass(frozen=True)
class Job:
    """One merge: the tasks whose adapters are merged, and the setting."""

    tasks: tuple[str, ...]
    setting: Setting

    @property
    def name(self) -> list[Any]:
        """The key of the merge in the log."""
        return [list(self.tasks), self.setting.label, self.setting.space, self.setting.rank]


def subsets(seed: int = SEED) -> dict[int, list[tuple[str, ...]]]:
    """Return pairs, from random orders of the tasks cut into pairs, and the fours that the pairs leave."""
    draw, pairs = random.Random(seed), []
    while len(pairs) < SUBSETS:
        order = draw.sample(smollm2.TASKS, len(smollm2.TASKS))
        cut = [frozenset(order[at : at + 2]) for at in range(0, len(order), 2)]
        pairs += [pair for pair in cut if pair not in pairs]
    taken = [tuple(task for task in smollm2.TASKS if task in pair) for pair in pairs[:SUBSETS]]
    return {2: taken, 4: [tuple(task for task in smollm2.TASKS if task not in pair) for pair in taken]}


def jobs() -> Iterator[Job]:
    """Yield the merges, the most important first."""
    yield from (Job(smollm2.TASKS, setting) for setting in FULL)
    yield from (Job(tasks, setting) for setting in PUBLISHED for sets in subsets().values() for tasks in sets)
    yield from (Job(smollm2.TASKS, setting) for setting in FURTHER)


def is_known(setting: Setting) -> bool:
    """Return whether this version of the package has the method, or each of those in a row."""
    known = {method.name for method in ties_peft.methods()} | set(COMBINATIONS)
    return set(setting.method.split("+")) <= known


def work(job: Job, adapters: Path, folder: Path) -> dict[str, Any]:
    """Merge in a process of its own, write the result to a folder, and return facts about it, or the error."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    paths = [adapters / task for task in job.tasks]
    try:
        if job.setting.method in COMBINATIONS:
            started = time.process_time()
            merged = merge_as_peft(paths, job.setting.method)
            facts = {"rank": max(merged.ranks), "seconds": time.process_time() - started}
        else:
            result, seconds = job.setting.merge("lora", paths)
            merged, facts = result, {"rank": result.report.rank, "seconds": seconds, "energy": result.report.energy}
        merged.save(folder)
    except Exception as error:  # of any kind: it is reported, and the other merges continue
        return {"error": f"{type(error).__name__}: {error}"}
    return facts


def memory_folder() -> Path | None:
    """Return a folder in memory with room for the merges that wait; None if there is none."""
    folder = Path("/dev/shm")
    return folder if folder.is_dir() and shutil.disk_usage(folder).free > ROOM else None


class Measurements:
    """The scores of the base, the adapters and their merges, with a log.

    The base model is loaded when something has to be scored. So tables are made from a complete log without it.

    Args:
        asked: the options.
        report: prints a message.
    """

    def __init__(self, asked: Asked, report: Callable[[str], None]) -> None:
        self.asked, self.report = asked, report
        self.deadline = time.monotonic() + (float("inf") if asked.seconds is None else asked.seconds)
        self.records = Records(asked.log)

    @functools.cached_property
    def judge(self) -> CausalJudge:
        """The base model with the rows."""
        torch.backends.cuda.matmul.allow_tf32 = self.asked.tf32
        base, tokenizer = smollm2.load_base(self.asked.base, self.asked.device)
        rows = read_rows(self.asked.data, tokenizer, self.asked.rows)
        if ("test", TEXT) not in rows:
            self.report(f"{self.asked.data / TEXT} does not exist, so there is no perplexity of text of no task")
        return CausalJudge(base, rows)

    def get(self, name: Sequence[Any]) -> Record | None:
        """Return the record of a name; None if there is none."""
        return self.records.get("lm", self.asked.rows, *name)

    def add(self, name: Sequence[Any], record: Mapping[str, Any]) -> None:
        """Store a record under a name."""
        self.records.add(record, "lm", self.asked.rows, *name)

    def score(self, factors: Factors, tasks: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Return the scores of some tasks on the splits that are asked for, as they are stored."""
        keys: list[Key] = [key for key in self.judge.rows if key[0] in self.asked.splits and key[1] in set(tasks)]
        found: dict[str, dict[str, Any]] = {split: {} for split in self.asked.splits}
        for (split, task), scored in self.judge.score(factors, keys).items():
            found[split][task] = compact(scored)
        return found

    def find_references(self, versions: Mapping[str, str]) -> None:
        """Score the base, the own adapters and the one that was trained on all tasks, unless the log has the scores."""
        if self.get(["base"]) is None:
            tokens = {
                split: {
                    task: [len(one.completion) for one in rows.examples]
                    for (of, task), rows in self.judge.rows.items()
                    if of == split and rows.choices is None
                }
                for split in SPLITS
            }
            device = torch.cuda.get_device_name() if self.asked.device.startswith("cuda") else self.asked.device
            about = {"scored on": device, "precision": "tf32" if self.asked.tf32 else "float32", **versions}
            self.add(["base"], {"about": about, "tokens": tokens, "scores": self.score({}, [*smollm2.TASKS, TEXT])})
        for name in (*smollm2.TASKS, "multitask"):
            if self.get([name]) is None:
                factors = factors_of(ties_peft.Adapter.load(self.asked.adapters / name))
                tasks = smollm2.TASKS if name == "multitask" else (name,)
                self.add([name], {"scores": self.score(factors, [*tasks, TEXT])})

    def find_merges(self, versions: Mapping[str, str]) -> None:
        """Merge and score what the log lacks, until the time is over."""
        unknown = dict.fromkeys(one.setting.method for one in jobs() if not is_known(one.setting))
        for method in unknown:
            self.report(f"{method}: this version has no such method; skipped")
        wanted = [one for one in jobs() if not self.asked.methods or one.setting.method in self.asked.methods]
        todo = [one for one in wanted if is_known(one.setting) and self.get(one.name) is None]
        if time.monotonic() >= self.deadline or not todo:
            return
        with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
            context = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(self.asked.processes, mp_context=context)
            try:
                self._merge_and_score(pool, iter(todo), Path(folder), versions)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                for child in multiprocessing.active_children():
                    child.terminate()
                    child.join()

    def _merge_and_score(
        self,
        pool: concurrent.futures.Executor,
        todo: Iterator[Job],
        folder: Path,
        versions: Mapping[str, str],
    ) -> None:
        """Merge in the processes of a pool, and score each result here."""
        running: dict[concurrent.futures.Future[dict[str, Any]], tuple[Job, Path]] = {}
        numbers = itertools.count()

        def submit() -> None:
            job = next(todo, None)
            if job is not None:
                target = folder / str(next(numbers))
                running[pool.submit(work, job, self.asked.adapters, target)] = (job, target)

        for _ in range(WAITING * self.asked.processes):
            submit()
        self.find_references(versions)  # while the first merges run
        while running and time.monotonic() < self.deadline:
            left = None if self.deadline == float("inf") else self.deadline - time.monotonic()
            concurrent.futures.wait(running, left, concurrent.futures.FIRST_COMPLETED)
            first = next((future for future in running if future.done()), None)  # the most important one that is done
            if first is not None:
                job, target = running.pop(first)
                submit()
                self._score_and_store(job, first.result(), target)

    def _score_and_store(self, job: Job, facts: dict[str, Any], folder: Path) -> None:
        """Score one result and store the scores."""
        label = f"{job.setting.label} ({job.setting.space}, rank {job.setting.rank}, N = {len(job.tasks)})"
        if "error" in facts:
            self.report(f"{label}: {facts['error']}")
            return
        factors = factors_of(ties_peft.Adapter.load(folder))
        tasks = [*job.tasks, TEXT] if len(job.tasks) == len(smollm2.TASKS) else job.tasks
        self.add(job.name, {**facts, "scores": self.score(factors, tasks)})
        shutil.rmtree(folder)


def compact(scored: Scored) -> dict[str, Any]:
    """Return scores as they are stored: one character or one short number per row."""
    if scored.right is not None:
        return {"right": pack(scored.right), "loss": round(float(scored.losses.mean()), 4)}
    return {"losses": [round(loss, 3) for loss in scored.losses.tolist()]}


class Shares:
    """Turns scores into shares, by the scores of the base and of the own adapters on one split.

    Args:
        base, own: by task, the scores of the base and of the task's own adapter.
        tokens: by task, the number in each row's completion, for tasks that are scored by the loss.
    """

    def __init__(self, base: Mapping[str, Any], own: Mapping[str, Any], tokens: Mapping[str, Sequence[int]]) -> None:
        self.base, self.own = base, own
        self.tokens = {task: torch.tensor(counts, dtype=torch.float64) for task, counts in tokens.items()}

    def rows(self, task: str, found: Mapping[str, Any]) -> Tensor:
        """Return one number per row, in percent, whose mean is the task's share.

        A loss per token is a ratio of two sums, so the numbers are its linear terms. Their variance over the rows, and that
        of the difference of two results' numbers, gives the standard error. The scores of the base and of the own
        adapters count as exact.
        """
        if "right" in found:
            return 100 * unpack(found["right"]).double() / unpack(self.own[task]["right"]).double().mean()
        base, own, loss = (
            torch.tensor(one["losses"], dtype=torch.float64) for one in (self.base[task], self.own[task], found)
        )
        closed = 100 * (base - loss) * len(base) / (base - own).sum()
        relative = self.tokens[task] / self.tokens[task].mean()
        return closed - closed.mean() * (relative - 1)

    def shares(self, found: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, float]:
        """Return each task's share in percent."""
        return {task: float(self.rows(task, found[task]).mean()) for task in tasks}

    def base_shares(self, tasks: Iterable[str]) -> dict[str, float]:
        """Return the shares of the base: 0 for generation."""
        return self.shares(self.base, tasks)

    def perplexity(self, found: Mapping[str, Any]) -> float | None:
        """Return the perplexity per token of text of no task; None if it was not scored."""
        if TEXT not in found:
            return None
        return float((torch.tensor(found[TEXT]["losses"]).double().sum() / self.tokens[TEXT].sum()).exp())

    def difference(
        self, sets: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], tasks: Sequence[Sequence[str]]
    ) -> tuple[float, float]:
        """Return the difference a − b of two results' mean shares, in points, and its paired standard error.

        Args:
            sets: the scores (a, b) on each set of tasks.
            tasks: of each set.
        """
        rows = [
            tuple({task: self.rows(task, one[task]) / 100 for task in chosen} for one in both)
            for both, chosen in zip(sets, tasks, strict=True)
        ]
        return paired([(a, b) for a, b in rows])


def required(log: Measurements, name: str) -> Record:
    """Return the record of a reference, which must be there."""
    record = log.get([name])
    assert record is not None, f"the log has no scores of {name}"
    return record


def shares_of(log: Measurements, split: str) -> Shares:
    """Return the shares of one split."""
    base = required(log, "base")
    own = {task: required(log, task)["scores"][split][task] for task in smollm2.TASKS}
    return Shares(base["scores"][split], own, base["tokens"][split])


def line(
    label: str, record: Mapping[str, Any], split: str, shares: Shares, against: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return one row of the table of all six adapters."""
    found = record["scores"][split]
    each = shares.shares(found, smollm2.TASKS)
    lowest = shares.base_shares(smollm2.TASKS)
    row: dict[str, Any] = {
        "method": label,
        "space": record.get("space", ""),
        "rank": record.get("rank"),
        "classification": _mean(each[task] for task in smollm2.CLASSIFICATION),
        "generation": _mean(each[task] for task in smollm2.GENERATION),
        "six": _mean(each.values()),
        "worst": round(min(each.values()), 2),
        "below base": sum(each[task] < lowest[task] for task in smollm2.TASKS),
    }
    if against is not None:
        difference, error = shares.difference([(found, against)], [smollm2.TASKS])
        row |= {"difference": round(difference, 2), "error": round(error, 2)}
    row |= {task: round(share, 1) for task, share in each.items()}
    perplexity = shares.perplexity(found)
    row |= {} if perplexity is None else {"text": round(perplexity, 2)}
    return row | {key: round(record[key], 3) for key in ("seconds", "energy") if record.get(key) is not None}


def whole(log: Measurements, split: str) -> list[dict[str, Any]]:
    """Return the table of all six adapters: the references, then every setting in the log."""
    shares = shares_of(log, split)
    reference = log.get(Job(smollm2.TASKS, REFERENCE).name)
    against = reference["scores"][split] if reference else None
    own = {"scores": {split: shares.own}}
    records = {"base": log.get(["base"]), "own adapters": own, "multitask-trained": log.get(["multitask"])}
    rows = [line(label, record, split, shares, against) for label, record in records.items() if record]
    texts = [shares.perplexity(required(log, task)["scores"][split]) for task in smollm2.TASKS]
    rows[1] |= {"text": round(sum(texts) / len(texts), 2)} if None not in texts else {}
    for setting in (*FULL, *FURTHER):
        record = log.get(Job(smollm2.TASKS, setting).name)
        if record and split in record["scores"]:
            rows.append(line(setting.label, {**record, "space": setting.space}, split, shares, against))
    return rows


def by_size(log: Measurements, split: str) -> list[dict[str, Any]]:
    """Return the table by number of adapters: mean share, worst task of any set, and the difference from TIES."""
    shares = shares_of(log, split)
    rows = []
    for setting in PUBLISHED:
        row: dict[str, Any] = {"method": setting.label, "space": setting.space}
        for size, sets in {**subsets(), len(smollm2.TASKS): [smollm2.TASKS]}.items():
            records = [
                (tasks, log.get(Job(tasks, setting).name), log.get(Job(tasks, REFERENCE).name)) for tasks in sets
            ]
            both = [
                (tasks, one["scores"][split], other["scores"][split])
                for tasks, one, other in records
                if one and other and split in one["scores"] and split in other["scores"]
            ]
            if not both:
                continue
            each = [shares.shares(found, tasks) for tasks, found, _ in both]
            difference, error = shares.difference([(a, b) for _, a, b in both], [tasks for tasks, _, _ in both])
            row |= {
                f"N = {size}": _mean(_mean(one.values()) for one in each),
                f"worst, N = {size}": round(min(min(one.values()) for one in each), 2),
                f"difference, N = {size}": round(difference, 2),
                f"error, N = {size}": round(error, 2),
            }
            row |= {} if len(both) == len(sets) else {f"sets, N = {size}": len(both)}
        if len(row) > 2:
            rows.append(row)
    return rows


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return round(sum(numbers) / len(numbers), 2)


def tables(asked: Asked, versions: Mapping[str, str], report: Callable[[str], None]) -> dict[str, Any]:
    """Merge and score what the log lacks, and return the tables of both splits with what they depend on."""
    log = Measurements(asked, report)
    log.find_merges(versions)
    if log.get(["base"]) is None:
        log.find_references(versions)
    result: dict[str, Any] = {
        "rows": asked.rows,
        **required(log, "base")["about"],
        "subsets": {str(size): [list(tasks) for tasks in sets] for size, sets in subsets().items()},
        "seed of the subsets": SEED,
    }
    for split in SPLITS:
        result[split] = {"six": whole(log, split), "by number of adapters": by_size(log, split)}
    return result
