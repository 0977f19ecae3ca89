"""Evaluate adapters on tasks of lm-evaluation-harness, by their names there, such as hellaswag.

The harness reads the rows and computes the metrics; the model comes from this package. It needs the extra `harness`.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..errors import RecipeError, error_text
from ..merging.plan import Progress
from . import BATCH_SIZE
from .evaluate import find_base
from .loaded_model import LANGUAGE, Bench


def harness(
    adapters: Sequence[str | Path | Adapter | None],
    tasks: Sequence[str],
    base: str | Path | None = None,
    device: str = "cpu",
    *,
    include_path: str | Path | None = None,
    bench: Bench | None = None,
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
    dtype: torch.dtype | str | None = None,
    **settings: Any,
) -> list[dict[str, dict[str, float]]]:
    """Evaluate adapters on tasks of lm-evaluation-harness, with one loaded base for all of them.

    Args:
        adapters: folders, Hub ids or `Adapter`s, a merge in memory too; None is the bare base.
        tasks: names of tasks or groups of the harness.
        base: the base model, causal or sequence-to-sequence; by default the adapters'.
        device: where the model runs.
        include_path: a folder with your own task files for the harness.
        bench: a loaded base to use again, in place of `base`, `device` and `dtype`.
        batch_size: requests in a batch.
        progress: called as progress(stage, done, of).
        dtype: the precision in which the base is loaded, as of `evaluate`.
        settings: other arguments of `lm_eval.simple_evaluate`, such as limit or num_fewshot.
    Returns: for each adapter, in order, {task: {"metric,filter": value}} as the harness returns it, without texts.
    Raises: TiesPeftError before the model is loaded, for a missing harness, an unknown task or no base; before it is run,
        for an adapter that does not fit.
    """
    lm_eval, manager = _import_harness(include_path)
    _check_tasks(manager, tasks)
    opened = [a if a is None or isinstance(a, Adapter) else Adapter.load(a) for a in adapters]
    if not opened:
        raise RecipeError("there is nothing to evaluate. Name at least one adapter, or the base.")
    loaded = bench or Bench.load(find_base(opened, [], base), LANGUAGE, device, None, dtype)
    if loaded.form not in ("causal", "seq2seq"):
        raise RecipeError(
            f"'{loaded.base}' is loaded as {loaded.form}; expected a causal or sequence-to-sequence model, which are those that "
            "lm-evaluation-harness evaluates. Choose such a base."
        )
    for adapter in opened:
        loaded.check_all(adapter)
    results = []
    for place, adapter in enumerate(opened):
        with loaded.applied(adapter):
            done = _run_tasks(lm_eval, loaded, batch_size, tasks=list(tasks), task_manager=manager, **settings)
        results.append({task: _numbers(values) for task, values in done["results"].items()})
        if progress is not None:
            progress("harness", place + 1, len(opened))
    return results


def _import_harness(include_path: str | Path | None) -> tuple[Any, Any]:
    """Import the harness and list its tasks."""
    try:
        import lm_eval  # type: ignore[import-not-found]
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"the tasks of lm-evaluation-harness need the module {str(error.name)!r}, which is not installed. Install the extra "
            "`harness`: pip install 'ties-peft[harness]'."
        ) from None
    if include_path is not None and not Path(include_path).is_dir():
        raise RecipeError(f"{str(include_path)!r} is not a folder. Give one with task files of the harness.")
    return lm_eval, TaskManager(include_path=None if include_path is None else str(include_path))


def _check_tasks(manager: Any, tasks: Sequence[str]) -> None:
    if isinstance(tasks, str) or not tasks:
        raise RecipeError(
            f"the harness's tasks are {tasks!r}; expected a list of at least one name, such as ['hellaswag']."
        )
    for name in tasks:
        if not manager.match_tasks([name]):
            near = ", ".join(get_close_matches(str(name), manager.all_tasks, n=5, cutoff=0.5))
            raise RecipeError(
                f"lm-evaluation-harness has no task {str(name)!r}{f'; the most similar are {near}' if near else ''}. "
                "`lm_eval ls tasks` lists all; name a folder with your own by include_path (--harness-path)."
            )


def _run_tasks(lm_eval: Any, bench: Bench, batch_size: int, **settings: Any) -> Any:
    """Return the results of the harness for the model with the adapter that is applied."""
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

    backend = "seq2seq" if bench.form == "seq2seq" else "causal"
    try:
        model = HFLM(pretrained=bench.model, tokenizer=bench.tokenizer, backend=backend, batch_size=batch_size)
        return lm_eval.simple_evaluate(model=model, batch_size=batch_size, log_samples=False, **settings)
    except Exception as error:  # its own errors, the data sets' and the network's
        raise RecipeError(
            f"lm-evaluation-harness stopped on '{bench.base}' ({error_text(error)}). Check the network, because its tasks "
            "load their rows from the Hub, and that the tokenizer has a token that begins or ends a text."
        ) from error


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in key
    }
