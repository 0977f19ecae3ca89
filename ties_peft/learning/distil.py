"""Distil: merge, then let the one merged adapter imitate each source adapter on rows without labels.

The predictions of the sources are the only teacher. So no label is needed, kinds may be mixed, and where
there is no text either, rows of random tokens of the vocabulary serve, mixed with words of the labels'
descriptions where a task has those. The base model is needed.

Source: the loss is that of Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network
(2015), at temperature 1. For distilling a merge into one adapter none is known.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import sources
from ..adapters.adapter import Adapter
from ..errors import RecipeError, unknown, warn_caller
from ..evaluation.loaded_model import Bench
from ..evaluation.scorers import Progress
from ..merging.card import shared_licence
from ..merging.loading import Loading
from ..merging.merged import Merged, versions
from ..merging.values import check_whole, output_dtype
from ..task_vectors.tiles import threads_fixed
from . import BATCH_SIZE, FITS
from .checkpoint import Checkpoint
from .distilled import Distilled, DistilReport, TeacherResult
from .fitting import FitOptions, FitState, split_rows
from .fitting import fit as fit_student
from .start import make_start
from .student import FACTORS, Student
from .teacher_specs import TeacherSpec, make_teachers, open_bench, read_teacher_specs
from .teachers import Teacher

RATES = {"factors": 0.01, "gains": 0.1, "vectors": 0.05}  # found on the sample adapters, on rows held back
PASSES, RANDOM_PASSES = 8, 2  # over rows of text, and over random ones, which never run out
MIN_STEPS, MAX_STEPS = 120, 1200  # steps


def distil(
    adapters: Sequence[str | Path | Adapter],
    start: str | Path | Adapter | Mapping[str, Any] | None = None,
    rows: Mapping[Any, Any] | Sequence[Any] | str | int | None = None,
    rank: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    tasks: Mapping[Any, Any] | Sequence[Any] | None = None,
    base: str | Path | None = None,
    bench: Bench | None = None,
    kind: str | None = None,
    fit: str = FACTORS,
    steps: int | None = None,
    batch_size: int = BATCH_SIZE,
    threads: int = 1,
    state: str | Path | None = None,
    base_model: str | None = None,
    progress: Progress | None = None,
) -> Distilled:
    """One adapter that imitates several, on rows without labels or on none at all.

    Args:
        adapters: folders, Hub ids or `Adapter`s for one base model; LoRA and (IA)³ may be mixed.
        start: what the student begins as: an adapter, or the arguments of a merge as a dict
            ({"method": "ties", "density": 0.2}); by default `tsv` at scale 0.6 and the rank, its norm
            restored (`flat_tsv` for gains, `power_mean` for (IA)³).
        rows: what the adapters read. One of these is for every adapter: a list of texts; the path of a .jsonl, .csv or
            .txt file; a data set on the Hub, `org/name`; a number of random-token rows. One for each adapter is a
            mapping from adapters (by path, name or the object), or a list in their order: `[["text", …], "b.txt", 400]`;
            a list of one is for all. So `["text", …]` is a list of texts for all, `["a.txt", "b.txt"]` a file for
            each; as many texts as adapters are refused, since each could be for one of them.
            By default the rows of `tasks`, and where they have none 800 random-token rows for each; half of their
            tokens come from the task's `descriptions`, where it has those.
        rank: of the result; by default the largest of the adapters', for gains Σrᵢ. (IA)³ has none.
        seed: of batches, held-back rows and random tokens.
        device: where the model runs.
        dtype: of the tensors written; by default that of the adapters, float32 if they differ.
        tasks: one for every adapter, or one for each likewise: how its predictions are read (see `Task`); their labels
            are not looked at. Encoders need `descriptions`; a sequence-classification head and a causal
            model, whose next tokens are matched, need none.
        base: the base model; by default the tasks', else the adapters'.
        bench: a loaded base to use again.
        kind: `lora` or `ia3`, of the result; LoRA as soon as one adapter is.
        fit: `factors` (A and B), or `gains`, one number for each direction of the start; (IA)³ fits its
            vectors.
        steps: at most; by default eight passes over rows of text and two over random ones, 120 to 1200 steps.
        batch_size: rows in a step.
        threads: of an operation of torch on the CPU. The bytes depend on this number, and so not on the number that
            torch would use; more than one can make a large model faster.
        state: a folder in which the work is kept, so that it can be stopped and go on.
        base_model: the base's name to write; by default the adapters'.
        progress: called as progress(stage, done, of).
    Returns: the adapter, with its `report` and `recipe`.
    Raises: TiesPeftError before any long work.
    Laws: on the held-back rows it is never worse than its start, which is given back where nothing
        better was found. On a CPU the same arguments on the same machine give the same bytes, stopped in between or
        not, whatever number of threads torch is set to: `threads` holds here, and the number before it afterwards.
    """
    started = time.perf_counter()
    _check(fit, rank, steps, batch_size, seed, threads)
    specs = read_teacher_specs(adapters, rows, tasks)
    written = output_dtype(dtype, [spec.adapter for spec in specs])
    here = open_bench(specs, base, device, bench)
    with threads_fixed(threads), _frozen_base(here):
        beginning, told = make_start([t.adapter for t in specs], here, start, kind, fit, rank, base_model)
        teachers = make_teachers(specs, here, seed)
        student = Student(beginning, here, fit, seed)
        wanted = steps or _default_steps(specs, teachers, batch_size)
        options = FitOptions(wanted, RATES[student.fit], batch_size, seed, threads)
        checkpoint = Checkpoint(state, _fingerprint(teachers, student, options, written))
        tell = progress or (lambda stage, done, of: None)
        _run_teachers(teachers, checkpoint, tell)
        done = fit_student(student, teachers, options, checkpoint, tell)
        outcome = _Outcome(student, teachers, options, done, written, told)
        return outcome.result(specs, beginning.loading, time.perf_counter() - started)


class _Outcome:
    """What a fit came to: the better of its start and its best, as they are written."""

    def __init__(
        self,
        student: Student,
        teachers: Sequence[Teacher],
        options: FitOptions,
        done: FitState,
        dtype: torch.dtype,
        told: str,
    ) -> None:
        self.student, self.teachers, self.options, self.done, self.dtype, self.told = (
            student,
            teachers,
            options,
            done,
            dtype,
            told,
        )
        self.parts = split_rows(teachers, options.seed)
        self.fitted = student.tensors(dtype)
        start = student.start
        self.start = {name: start.tensors.read(name).to(dtype).contiguous() for name in start.tensors.names}

    def result(self, specs: Sequence[TeacherSpec], loading: Loading, seconds: float) -> Distilled:
        before, after = self._measure(self.start), self._measure(self.fitted)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in self.fitted.values())
        improved = finite and sum(d for d, _ in after) < sum(d for d, _ in before)
        lines = [
            TeacherResult(
                name=teacher.name,
                digest=teacher.adapter.digest,
                kind=teacher.adapter.peft_type.title,
                origin=teacher.origin,
                rows=len(learnt),
                held=len(held),
                divergence=(first[0], last[0]),
                agreement=(first[1], last[1]),
                page=sources.hub_url(teacher.adapter.source),
            )
            for teacher, (learnt, held), first, last in zip(
                self.teachers, self.parts, before, after if improved else before, strict=True
            )
        ]
        report = self._report(lines, improved, seconds)
        warn_caller(report.warnings)
        folders = [sources.local_path(t.adapter.source) for t in specs if t.adapter.source is not None]
        return Distilled(
            self.student.start.config,
            self.fitted if improved else self.start,
            report,
            self._recipe(specs),
            loading,
            [folder for folder in folders if folder is not None],
        )

    def _report(self, lines: list[TeacherResult], improved: bool, seconds: float) -> DistilReport:
        done, start = self.done, self.student.start
        kept = min(done.history, key=lambda entry: entry[1])[0] if improved else 0
        warnings = []
        if not improved:
            warnings.append(
                "no step made the adapter better on the rows held back, so the result is the start itself. More rows, "
                "or rows nearer to the adapters' tasks, may help."
            )
        if self.student.bench.form == "classifier" and any(teacher.adapter.extra_keys for teacher in self.teachers):
            warnings.append(
                "each adapter was imitated under its own head, and the result has none: put the head of the task at hand "
                "on the base."
            )
        licence, note = shared_licence([(teacher.name, teacher.adapter.folder) for teacher in self.teachers])
        return DistilReport(
            kind=start.peft_type.title,
            rank=start.report.rank if isinstance(start, Merged) else None,
            fit=self.student.fit,
            base=self.student.bench.base,
            start=self.told,
            steps=done.step,
            of=self.options.steps,
            kept=kept,
            licence=licence,
            licence_note=note,
            rate=done.rate,
            retries=done.retries,
            history=done.history,
            lessons=lines,
            warnings=warnings,
            improved=improved,
            dtype=str(self.dtype).removeprefix("torch."),
            seconds=seconds,
        )

    def _measure(self, tensors: dict[str, Tensor]) -> list[tuple[float, float]]:
        """(divergence, agreement) of each teacher, of an adapter as it is written."""
        with self.student.bench.applied(Adapter.from_tensors(self.student.start.config, tensors)):
            return [teacher.measure(held) for teacher, (_, held) in zip(self.teachers, self.parts, strict=True)]

    def _recipe(self, specs: Sequence[TeacherSpec]) -> dict[str, Any]:
        """What was asked, as plain values."""
        entries = [
            {
                "adapter": spec.adapter.source or "in memory",
                "rows": f"{len(teacher.sequences)}, {spec.origin}",
                **({"task": spec.task.to_dict()} if spec.task is not None else {}),
            }
            for spec, teacher in zip(specs, self.teachers, strict=True)
        ]
        start = self.student.start
        return {
            "adapters": entries,
            "start": start.recipe.to_dict() if isinstance(start, Merged) else self.told,
            "base": self.student.bench.base,
            "fit": self.student.fit,
            **asdict(self.options),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@contextmanager
def _frozen_base(bench: Bench) -> Iterator[None]:
    """The model without a gradient of its own."""
    flags = [(parameter, parameter.requires_grad) for parameter in bench.model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _run_teachers(teachers: Sequence[Teacher], checkpoint: Checkpoint, tell: Progress) -> None:
    """Run every teacher once, or take what an earlier run kept of it."""
    for number, teacher in enumerate(teachers):
        found = checkpoint.read(f"teacher {number}")
        predictions = teacher.predict() if found is None else found[0]
        if found is None:
            checkpoint.write(f"teacher {number}", predictions, {})
        teacher.set_predictions(predictions)
        tell("teachers", number + 1, len(teachers))


def _default_steps(specs: Sequence[TeacherSpec], teachers: Sequence[Teacher], batch: int) -> int:
    """Some passes over the rows, within bounds."""
    passes = [RANDOM_PASSES if spec.texts is None else PASSES for spec in specs]
    rows = sum(often * len(teacher.sequences) for often, teacher in zip(passes, teachers, strict=True))
    return min(MAX_STEPS, max(MIN_STEPS, math.ceil(rows / batch)))


def _fingerprint(teachers: Sequence[Teacher], student: Student, options: FitOptions, dtype: torch.dtype) -> str:
    """A sha256 over everything that the result depends on, but for the machine."""
    facts = {
        "lessons": [teacher.digest for teacher in teachers],
        "start": student.start.digest,
        "fit": student.fit,
        "options": asdict(options),
        "base": student.bench.base,
        "dtype": [str(dtype), str(next(iter(student.bench.model.parameters())).dtype)],
        "device": student.bench.device.type,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _check(fit: str, rank: int | None, steps: int | None, batch: int, seed: int, threads: int) -> None:
    """Refuse numbers out of range."""
    if fit not in FITS:
        raise RecipeError(unknown("fit", str(fit), FITS))
    check_whole("batch_size", batch, 1)
    check_whole("seed", seed, 0)
    check_whole("threads", threads, 1)
    for name, value in (("rank", rank), ("steps", steps)):
        if value is not None:
            check_whole(name, value, 1)
