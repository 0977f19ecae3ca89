"""Measure the accuracy or loss of adapters on labelled rows, many adapters on one loaded base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..errors import RecipeError, warn_caller
from ..merging.plan import Progress
from ..merging.values import check_whole
from . import BATCH_SIZE
from .generation import Generation
from .language_models import Continuation
from .loaded_model import Bench, check_text_model
from .score import Score
from .scorers import Classification, Scorer, check_form, form_for
from .task import GENERATED, Task, TaskSource, read_task


def evaluate(
    adapter_or_model: Any,
    task: TaskSource,
    base: str | Path | None = None,
    device: str = "cpu",
    *,
    tokenizer: Any = None,
    bench: Bench | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
    dtype: torch.dtype | str | None = None,
) -> Score:
    """Return the accuracy or loss of one adapter, or model, on one task.

    Args:
        adapter_or_model: an adapter's folder or Hub id, an `Adapter` (also a merge in memory), a loaded transformers or
            PEFT model, or None for the bare base.
        task: a `Task`, the path of its YAML or JSON file, or a dict with the same keys; see `ties_peft.evaluation.task`.
        base: the base model's folder or Hub id; by default the task's, else the adapter's.
        device: where the model runs.
        tokenizer: of a loaded model; by default found by the model's name.
        bench: a loaded base model to use again, in place of `base`, `device` and `dtype`.
        batch_size: rows in a batch.
        progress: called as progress(stage, done, of).
        dtype: the precision in which the base is loaded, float32, bfloat16 or float16; None for what transformers
            chooses (that of the files since its version 5, float32 before). The score states it.
    Returns: the score, row by row; `Score.difference` compares two of them by their rows.
    Raises: TiesPeftError before the model is run, for rows without labels or with labels out of range, an adapter of
        another base, a measure that does not fit the model, and a head that neither the base nor the adapter has.
    """
    asked = read_task(task)
    if _is_model(adapter_or_model):
        bench = Bench(adapter_or_model, tokenizer or _tokenizer(adapter_or_model))
        adapter_or_model = None
    (line,) = evaluate_all([adapter_or_model], [asked], base, device, bench, batch_size, progress, dtype)
    return line[0]


def evaluate_all(
    adapters: Sequence[str | Path | Adapter | None],
    tasks: Sequence[TaskSource],
    base: str | Path | None = None,
    device: str = "cpu",
    bench: Bench | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
    dtype: torch.dtype | str | None = None,
) -> list[list[Score]]:
    """Return a list for each adapter, in order, with its scores on every task, in order.

    If tasks need several forms of the base, such as an encoder and a classifier, it is loaded in each form.

    Args: as `evaluate`; None among the adapters is the bare base.
    Raises: as `evaluate`, for any of the tasks, before the first is evaluated.
    Law: the scores are those of single calls of `evaluate`.
    """
    check_whole("batch_size", batch_size, 1)
    if bench is not None and dtype is not None:
        raise RecipeError("the model is loaded already, so dtype cannot be chosen. Leave dtype out.")
    asked = [read_task(task) for task in tasks]
    opened = [_open(adapter, base) for adapter in adapters]
    if not opened or not asked:
        raise RecipeError("there is nothing to evaluate. Give at least one adapter (or the base) and one task.")
    benches = [(bench, list(range(len(asked))))] if bench else _load_benches(opened, asked, base, device, dtype)
    for loaded, numbers in benches:
        for number in numbers:
            check_form(loaded, asked[number])
        for adapter in opened:
            loaded.check_all(adapter)
    groups = [
        (loaded, {number: make_scorer(loaded, asked[number]) for number in numbers}) for loaded, numbers in benches
    ]
    found: list[dict[int, Score]] = [{} for _ in opened]  # for each adapter, by the number of the task
    for loaded, scorers in groups:
        for scores, adapter in zip(found, opened, strict=True):
            with loaded.applied(adapter):
                scores |= {number: scorer.score(progress, batch_size) for number, scorer in scorers.items()}
    return [[scores[number] for number in range(len(asked))] for scores in found]


def make_scorer(bench: Bench, task: Task) -> Scorer:
    """Read, check and tokenize the rows of a task, once for all adapters.

    Raises: RecipeError where the rows or their labels are wrong, or where the measure does not fit the model.
    """
    check_form(bench, task)
    if task.measure in ("descriptions", "head"):
        return Classification(bench, task)
    return Generation(bench, task) if task.measure in GENERATED else Continuation(bench, task)


def find_base(adapters: Sequence[Adapter | None], tasks: Sequence[Task], base: str | Path | None = None) -> str:
    """Return the name of the base model: as given, else the tasks', else the adapters'.

    A warning names adapters with another base; `Bench.check` checks whether they fit.

    Raises: RecipeError where no base is named, or several are; CompatibilityError for a LoRA of an image model.
    """
    for adapter in adapters:
        if adapter is not None:
            check_text_model(adapter)
    named = {task.base for task in tasks if task.base}
    trained = {adapter.base_name for adapter in adapters if adapter is not None and adapter.base_name}
    found = {str(base)} if base is not None else named or trained
    if len(found) != 1:
        seen = f"several are named ({', '.join(sorted(found))})" if found else "none is named"
        raise RecipeError(f"one base model is needed, but {seen}. Name one: base: in the task, base=, or --base.")
    (chosen,) = found
    others = sorted(name for name in trained if Path(name).name != Path(chosen).name)
    if others:
        warn_caller([f"the base is {chosen!r}, but adapters name another one in their config: {', '.join(others)}."])
    return chosen


def load_bench(adapters: Sequence[Adapter], tasks: Sequence[Task], base: str | Path | None, device: str) -> Bench:
    """Load the base model in the one form that all tasks need, after their rows have been checked.

    Raises: RecipeError where the tasks need several forms, or where `find_base` or `Task.check_rows` does.
    """
    forms = {form_for(task) for task in tasks}
    if len(forms) > 1:
        raise RecipeError(
            f"the tasks need models of {len(forms)} forms ({', '.join(sorted(forms))}); expected one. Choose one measure for all."
        )
    chosen = find_base(adapters, tasks, base)
    for task in tasks:
        task.check_rows()
    return Bench.load(chosen, forms.pop(), device)


def _open(adapter: str | Path | Adapter | None, base: str | Path | None) -> Adapter | None:
    """Open an adapter; if the base is a folder, with the base's weights, which some PEFT types need."""
    if adapter is None or isinstance(adapter, Adapter):
        return adapter
    return Adapter.load(adapter, base=base if base is not None and Path(base).is_dir() else None)


def _load_benches(
    adapters: Sequence[Adapter | None],
    tasks: Sequence[Task],
    base: str | Path | None,
    device: str,
    dtype: torch.dtype | str | None,
) -> list[tuple[Bench, list[int]]]:
    """Load the base in each form that is needed, and return each with the numbers of its tasks."""
    chosen = find_base(adapters, tasks, base)
    for task in tasks:
        task.check_rows()
    forms: dict[str, list[int]] = {}
    for number, task in enumerate(tasks):
        forms.setdefault(form_for(task), []).append(number)
    return [(Bench.load(chosen, form, device, None, dtype), numbers) for form, numbers in forms.items()]


def _is_model(value: Any) -> bool:
    return hasattr(value, "forward") and hasattr(value, "config")


def _tokenizer(model: Any) -> Any:
    """Load the tokenizer of a loaded model, by the model's name."""
    from transformers import AutoTokenizer

    name = getattr(model.config, "_name_or_path", "") or ""
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception:
        raise RecipeError(
            f"the tokenizer of the loaded model cannot be found by the model's name ({name!r}). Give it: tokenizer=…"
        ) from None
