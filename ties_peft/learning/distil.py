"""Distil several adapters into one: merge them, then fit the merged adapter to their predictions on unlabelled rows.

The adapters, each run on the base model, are the teachers; the adapter that is fitted is the student. The teachers'
predictions are all that is learnt from, so no labels are needed, and LoRA and (IA)³ may be mixed. Without text, rows of
random tokens are used, mixed with words of the labels' descriptions where a task has them.

Source: the loss is that of Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015), at
temperature 1. No paper is known that distils a merge into one adapter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import sources
from ..adapters.adapter import Adapter
from ..adapters.config_values import is_number
from ..errors import GivenWarnings, RecipeError, unknown
from ..evaluation.loaded_model import Bench
from ..merging.card import shared_licence
from ..merging.merged import Merged, versions
from ..merging.plan import Progress
from ..merging.values import check_whole, output_dtype
from ..task_vectors.tiles import threads_fixed
from . import ANSWER_TOKENS, BATCH_SIZE, FITS
from .checkpoint import Checkpoint
from .distil_warnings import request_warnings, result_warnings, row_warnings
from .distilled import BASE_KIND, Distilled, DistilReport, TeacherResult
from .estimate import Estimate, estimate, print_estimate
from .fitting import Fit, FitOptions, split_rows
from .module_outputs import better_start, has_closed_form, run_teachers, write_rows
from .start import make_start
from .student import FACTORS, Student
from .teacher_specs import (
    AnswerOptions,
    TeacherSpec,
    make_base_teacher,
    make_teachers,
    open_bench,
    read_teacher_specs,
)
from .teachers import Teacher

RATES = {"factors": 0.01, "gains": 0.1, "vectors": 0.05}  # of learning, chosen on held-out rows of the samples
PASSES, RANDOM_PASSES = 8, 2  # over rows of text; over rows of random tokens, of which there are as many as asked for
MIN_STEPS, MAX_STEPS = 120, 1200
CLOSED_FORM_SHARE = 0.5  # of the steps: a fit that may start from the closed form needs fewer


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
    weights: Sequence[float] | None = None,
    batch_size: int = BATCH_SIZE,
    threads: int = 1,
    state: str | Path | None = None,
    base_model: str | None = None,
    progress: Progress | None = None,
    on_estimate: Callable[[Estimate], None] | None = None,
    count: int | None = None,
    answers: str | None = None,
    answer_tokens: int = ANSWER_TOKENS,
    keep_base: Sequence[str] | str | Path | int | None = None,
    keep_weight: float = 1.0,
    precision: torch.dtype | str | None = None,
) -> Distilled:
    """Return one adapter that imitates several, fitted on unlabelled rows, on rows that they write or on random tokens.

    Args:
        adapters: folders, Hub ids or `Adapter`s for one base model; LoRA and (IA)³ may be mixed.
        start: where the fit starts: an adapter, or the arguments of a merge as a dict ({"method": "ties",
            "density": 0.2}). By default it is a merge by `tsv` at scale 0.6 and the rank, its norm restored; for gains a
            merge by `flat_tsv`, for (IA)³ by `power_mean`. For LoRAs of a causal model it is the first of these or the
            closed form of `module_outputs`, whichever diverges less on the held-out rows; the closed form is tried where
            its Gram matrices take at most 2 GiB.
        rows: the rows that the adapters read: a list of texts; the path of a .jsonl, .csv or .txt file; a data set on the
            Hub, `org/name`; a number of rows of random tokens; or "generated": each adapter of a causal model writes
            `count` rows itself, in the form of its task's `prompt_format` or `template` (without a task in no given form,
            so that less of the adapter is kept). Any of these is for every adapter. To give each adapter its own rows, pass
            a mapping from adapters (by path, name or object), or a list in their order, `[["text", …], "b.txt", 400]`, where
            a list of one entry is for all. So `["text", …]` is one list of texts for all adapters, and `["a.txt", "b.txt"]`
            a file for each. A list of as many texts as adapters is refused, because it could mean either. By default the
            rows are those of `tasks`, else 800 rows of random tokens, half of them from the task's `descriptions` if it has
            any. Of a file or a data set the column is read that the task names, else `text`, or `prompt` where there is no
            `text`.
        rank: of the result; by default the largest of the adapters', for gains Σrᵢ. (IA)³ has none.
        seed: of the batches, the choice of held-out rows and the random tokens.
        device: where the model runs.
        dtype: of the tensors written; by default that of the adapters, float32 if they differ.
        tasks: one for every adapter, or one for each, in the same forms as `rows`. A task says how predictions are read
            (see `Task`); its labels are not used, except as `answers`. Encoders need a task with `descriptions`; sequence
            classifiers and causal models need none. For a causal model the text in the template is the prompt, or, with
            `label: null`, plain text. If a task's `choices` begin with different tokens, the distribution over them is
            matched at the first position of the answer as well.
        base: the base model; by default the tasks', else the adapters'.
        bench: a loaded base model to use again.
        kind: `lora` or `ia3`, of the result; by default LoRA if any adapter is one.
        fit: `factors` (A and B), or `gains`, one number for each direction of the start. (IA)³ fits its vectors.
        steps: the largest number; by default eight passes over rows of text and two over random ones, 120 to 1200 steps;
            half of that for LoRAs of a causal model, where the start is better.
        weights: how much each adapter counts in the fit and on the held-out rows, in order. Only their ratios matter, and
            all must be above 0. By default all are equal. The merge that the fit starts from has weights of its own.
        batch_size: rows in a step.
        threads: of torch's operations on the CPU. The bytes of the result depend on this number, and not on the number
            that torch is set to. More than one can make a large model faster.
        state: a folder in which the state is saved, so that the work can be stopped and resumed.
        base_model: the base's name to write; by default the adapters'.
        progress: called as progress(stage, done, of).
        on_estimate: called with an `Estimate` of time and memory before the teachers run, but after they have written
            their rows; by default the estimate is printed on standard error if it is 10 seconds or more.
        count: the number of rows that each adapter writes, with rows "generated"; 100 by default.
        answers: to the prompts of a causal model: "teachers", sampled from each adapter at temperature 1; "given", the
            labels of the rows, each followed by the model's end token; "none". With answers only their tokens are matched;
            without, all tokens of the rows. By default "teachers", but "none" for plain text, which a task with
            `label: null` marks, and for random tokens. Texts without a task may be prompts or plain text: the adapters
            answer them, and the tokens of both are matched.
        answer_tokens: the largest number in an answer that an adapter writes.
        keep_base: rows, in any form that is for every adapter, on which the result shall predict what the bare base
            predicts; for causal models.
        keep_weight: the weight of these rows, beside the adapters' weights.
        precision: in which the base is loaded, float32, bfloat16 or float16; by default what transformers chooses. The
            fitted parameters are float32. A CPU without instructions for bfloat16 is slower in it than in float32.
    Returns: the adapter, with its `report` and `recipe`.
    Raises: TiesPeftError before any long work.
    Laws: on the held-out rows the result is never worse than the start, which is returned where no step improved it. On
        a CPU the same arguments on the same machine give the same bytes, whether the work was stopped and resumed or not,
        and whatever number of threads torch is set to; afterwards torch has that number again.
    """
    started = time.perf_counter()
    _check_options(fit, seed, {"batch_size": batch_size, "threads": threads, "rank": rank, "steps": steps})
    answering, warnings = AnswerOptions(answers, answer_tokens, seed), GivenWarnings()
    report_progress = progress or (lambda stage, done, of: None)
    specs = read_teacher_specs(adapters, rows, tasks, count, answers)
    shares = _check_weights(weights, len(specs)) + _check_keep_weight(keep_base, keep_weight)
    written = output_dtype(dtype, [spec.adapter for spec in specs])
    loaded = open_bench(specs, base, device, bench, precision)
    with threads_fixed(threads), _frozen_base(loaded):
        merged, origin = make_start([spec.adapter for spec in specs], loaded, start, kind, fit, rank, base_model)
        teachers = make_teachers(specs, loaded, answering)
        teachers += [] if keep_base is None else [make_base_teacher(keep_base, loaded, answering)]
        warnings.give(request_warnings(specs, teachers))
        student = Student(merged, loaded, fit, seed)
        closed_form = start is None and has_closed_form(student, teachers)
        taken = steps or _default_steps(specs, teachers, batch_size, CLOSED_FORM_SHARE if closed_form else 1.0)
        options = FitOptions(taken, RATES[student.fit], batch_size, seed, threads, shares)
        checkpoint = Checkpoint(state, _facts(teachers, student, options, written))
        write_rows(teachers, checkpoint, report_progress)
        warnings.give(row_warnings(teachers))
        done, solved = _imitate(student, teachers, options, checkpoint, closed_form, on_estimate, report_progress)
        origin = "the closed form of the modules' outputs" if solved else origin
        outcome = _Outcome(done, written)
        report = outcome.report(specs, merged, origin, warnings, time.perf_counter() - started)
    recipe = _recipe(specs, done, merged, written)
    return Distilled(merged.config, outcome.tensors, report, recipe, merged.loading, _folders(specs))


def _check_options(fit: str, seed: int, counts: Mapping[str, int | None]) -> None:
    """Raise RecipeError for an unknown fit, for a seed below 0, and for a count below 1."""
    if fit not in FITS:
        raise RecipeError(unknown("fit", str(fit), FITS))
    check_whole("seed", seed, 0)
    for name, value in counts.items():
        if value is not None:
            check_whole(name, value, 1)


def _imitate(
    student: Student,
    teachers: Sequence[Teacher],
    options: FitOptions,
    checkpoint: Checkpoint,
    closed_form: bool,
    on_estimate: Callable[[Estimate], None] | None,
    progress: Progress,
) -> tuple[Fit, bool]:
    """Let the teachers predict, and fit the student; return the fit, and whether it started with the closed form."""
    (on_estimate or print_estimate)(estimate(Fit(student, teachers, options), closed_form))
    solved = False
    if closed_form:
        student, solved = better_start(student, teachers, options, checkpoint, progress)
    else:
        run_teachers(teachers, checkpoint, progress)
    done = Fit(student, teachers, options)
    done.run(checkpoint, progress)
    return done, solved


class _Outcome:
    """The result of a fit: the fitted adapter, or the start if that is better on the held-out rows.

    Both are measured as they are written, in the dtype of the result.

    Args:
        done: the fit.
        dtype: of the tensors written.

    Attributes:
        improved: whether the result is the fitted adapter.
        tensors: of the result.
        before, after: (divergence, agreement) for each teacher, of the start and of the result.
    """

    def __init__(self, done: Fit, dtype: torch.dtype) -> None:
        self.done, self.dtype = done, dtype
        self.parts = split_rows(done.teachers, done.options.seed)
        start = done.student.start
        fitted = done.student.tensors(dtype)
        self.tensors = {name: start.tensors.read(name).to(dtype).contiguous() for name in start.tensors.names}
        self.before = self.after = self._measure(self.tensors)
        measured = self._measure(fitted)
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in fitted.values())
        self.improved = finite and self._mean(measured) < self._mean(self.before)
        if self.improved:
            self.tensors, self.after = fitted, measured

    def report(
        self, specs: Sequence[TeacherSpec], start: Merged, origin: str, warnings: GivenWarnings, seconds: float
    ) -> DistilReport:
        """Return the report, and give the warnings of the result; `origin` says how the start was made."""
        done = self.done
        best_step, _ = min(done.history, key=lambda entry: entry[1])
        results = self._results()
        warnings.give(result_warnings(specs, done.teachers, results, self.improved))
        licence, note = shared_licence([(spec.name, spec.adapter.folder) for spec in specs])
        return DistilReport(
            kind=start.peft_type.title,
            rank=start.report.rank,
            fit=done.student.fit,
            base=done.student.bench.base,
            start=origin,
            steps=done.step,
            of=done.options.steps,
            kept=best_step if self.improved else 0,
            licence=licence,
            licence_note=note,
            rate=done.rate,
            retries=done.retries,
            history=done.history,
            lessons=results,
            warnings=warnings.texts,
            improved=self.improved,
            dtype=str(self.dtype).removeprefix("torch."),
            seconds=seconds,
        )

    def _results(self) -> list[TeacherResult]:
        return [
            TeacherResult(
                name=teacher.name,
                digest=teacher.adapter_digest,
                kind=teacher.adapter.peft_type.title if teacher.adapter else BASE_KIND,
                origin=teacher.origin,
                rows=len(learnt),
                held=len(held),
                divergence=(first[0], last[0]),
                agreement=(first[1], last[1]),
                page=sources.hub_url(teacher.adapter.source) if teacher.adapter else None,
                kept_probability=teacher.kept_probability,
                weight=weight,
                matched=teacher.matched,
                written=teacher.count_written(),
            )
            for teacher, weight, (learnt, held), first, last in zip(
                self.done.teachers, self.done.options.weights, self.parts, self.before, self.after, strict=True
            )
        ]

    def _mean(self, measured: Sequence[tuple[float, float]]) -> float:
        """Return the weighted mean of the divergences."""
        shares = self.done.options.shares(len(measured))
        return sum(share * divergence for share, (divergence, _) in zip(shares, measured, strict=True)) / len(measured)

    def _measure(self, tensors: dict[str, Tensor]) -> list[tuple[float, float]]:
        """Return (divergence, agreement) for each teacher, of an adapter with these tensors."""
        student = self.done.student
        with student.bench.applied(Adapter.from_tensors(student.start.config, tensors)):
            return [teacher.measure(held) for teacher, (_, held) in zip(self.done.teachers, self.parts, strict=True)]


def _folders(specs: Sequence[TeacherSpec]) -> list[Path]:
    """Return the folders on this machine that the adapters were read from."""
    named = [spec.adapter.source for spec in specs if spec.adapter.source is not None]
    return [path for path in map(sources.local_path, named) if path is not None]


def _recipe(specs: Sequence[TeacherSpec], done: Fit, start: Merged, dtype: torch.dtype) -> dict[str, Any]:
    """Return what was asked, as plain values."""
    entries = [
        {
            "adapter": spec.adapter.source or "in memory",
            "rows": f"{len(teacher.sequences)}, {spec.rows.origin}",
            **({"task": spec.task.to_dict()} if spec.task is not None else {}),
        }
        for spec, teacher in zip(specs, done.teachers, strict=False)  # a last teacher may be the base
    ]
    kept = done.teachers[len(specs) :]
    return {
        "adapters": entries,
        **({"keep_base": f"{len(kept[0].sequences)}, {kept[0].origin}"} if kept else {}),
        "start": start.recipe.to_dict(),
        "base": done.student.bench.base,
        "fit": done.student.fit,
        **asdict(done.options),
        "dtype": str(dtype).removeprefix("torch."),
    }


@contextmanager
def _frozen_base(bench: Bench) -> Iterator[None]:
    """Compute no gradients of the model's own parameters, within a `with` block."""
    flags = [(parameter, parameter.requires_grad) for parameter in bench.model.parameters()]
    bench.model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _default_steps(specs: Sequence[TeacherSpec], teachers: Sequence[Teacher], batch: int, share: float = 1.0) -> int:
    """Return the steps of some passes over the rows, from `MIN_STEPS` to `MAX_STEPS`, or a share of that."""
    passes = [RANDOM_PASSES if spec.rows.texts is None and not spec.rows.generated else PASSES for spec in specs]
    passes += [PASSES] * (len(teachers) - len(specs))  # a last teacher may be the base
    rows = sum(count * len(teacher.sequences) for count, teacher in zip(passes, teachers, strict=True))
    return math.ceil(share * min(MAX_STEPS, max(MIN_STEPS, math.ceil(rows / batch))))


def _facts(teachers: Sequence[Teacher], student: Student, options: FitOptions, dtype: torch.dtype) -> dict[str, Any]:
    """Return everything that the result depends on, except the machine."""
    return {
        "teachers": [teacher.digest for teacher in teachers],
        "start": student.start.digest,
        "fit": student.fit,
        "options": asdict(options),
        "base": student.bench.base,
        "dtype": [str(dtype), str(next(iter(student.bench.model.parameters())).dtype)],
        "device": student.bench.device.type,
        "versions": versions(),
    }


def _check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return a weight for each adapter.

    Raises: RecipeError for another number of weights, and for one that is not above 0.
    """
    if isinstance(weights, str):
        raise RecipeError(f"weights is {weights!r}; expected a list with a number for each adapter, or None.")
    found = (1.0,) * count if weights is None else tuple(weights)
    if len(found) != count:
        raise RecipeError(f"{len(found)} weights for {count} adapters. Give one for each, in their order.")
    wrong = [weight for weight in found if not is_number(weight) or not 0 < weight < math.inf]
    if wrong:
        raise RecipeError(
            f"a weight is {wrong[0]!r}; expected a number above 0. Leave out adapters that should not count."
        )
    return tuple(map(float, found))


def _check_keep_weight(keep_base: Any, weight: float) -> tuple[float, ...]:
    """Return the weight of the rows of `keep_base`; none where there are no such rows.

    Raises: RecipeError for a weight that is not above 0, or that has no rows.
    """
    if keep_base is not None:
        return _check_weights([weight], 1)
    if weight != 1:
        raise RecipeError(
            f"keep_weight is {weight!r}, the weight of the rows of keep_base, which is not given. Leave it out, or give both."
        )
    return ()
