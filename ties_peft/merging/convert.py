"""Convert one adapter to LoRA, another rank, dtype or loader, as a merge of one adapter."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters.adapter import Adapter
from ..adapters.to_peft import ConversionOptions, open_as_peft
from .merge import make_recipe, run_plan
from .merged import Merged
from .options import Rank
from .plan import Progress, make_plan


def convert(
    adapter: str | Path | Adapter,
    rank: Rank | None = None,
    dtype: torch.dtype | str | None = None,
    target: str | None = None,
    device: str = "cpu",
    *,
    part: str | None = None,
    base: str | Path | None = None,
    modules: str | Path | None = None,
    alpha: float | None = None,
    base_model: str | None = None,
    heads: str = "error",
    progress: Progress | None = None,
) -> Merged:
    """Convert an adapter to another form, written as portably as a merge.

    Args:
        adapter: a folder, a file, a Hub id or an `Adapter`; a LoRA of diffusers, kohya, ComfyUI or MLX too.
        rank: of the output: a whole number, `max` or `auto`; by default the full rank, so that nothing is lost.
        dtype: of the tensors written; by default the adapter's own.
        target: the program that shall load it: `peft`, `vllm` or `llama.cpp` (see `targets`).
        device: where to compute.
        part: which part of a pipeline's LoRA: `unet`, `text_encoder`, …
        base: the base's weights: needed for an adapter whose task vectors depend on them (DoRA) and to recognise the
            modules of a kohya file; for other files the modules are checked against it.
        modules: a text file of module names, used instead of the base. A PEFT adapter is written under these names if
            transformers renamed its modules.
        alpha: lora_alpha, if a file that is not PEFT's does not contain it.
        base_model: the base's name to write; by default the adapter's.
        heads: what becomes of layers stored as a whole: `drop` leaves them out, for a target that loads none; see
            `ties_peft.merging.extra_tensors`.
        progress: called as progress(stage, done, of) while it works.
    Returns: the adapter, in memory, with a report of what the rank and the dtype lost.
    Raises: TiesPeftError.
    Law: apart from the loss that the report states, it computes the same function. It is the average of one adapter.
    """
    started = time.perf_counter()
    hints = ConversionOptions(
        part, None if base is None else str(base), None if modules is None else Path(modules), alpha, base_model
    )
    opened, remarks = (adapter, []) if isinstance(adapter, Adapter) else open_as_peft(str(adapter), hints)
    recipe = make_recipe(
        [opened],
        method="average",
        rank=rank if rank is not None else "max" if opened.peft_type.has_rank else "auto",
        dtype=dtype,
        base_model=base_model,
        base=None if opened.base_model is None else hints.base,
        target=target,
        heads=heads,
    )
    plan = make_plan(recipe, [opened], device)
    return run_plan(replace(plan, warnings=[*remarks, *plan.warnings]), recipe, started, None, progress)
