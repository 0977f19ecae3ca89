"""Convert one adapter to LoRA, another rank, dtype or loader, as a merge of one adapter; open one of any known format."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters import IMAGE_TARGETS, recognise, sources
from ..adapters.adapter import Adapter
from ..adapters.contents import PREFIX
from ..adapters.module_names import accepted_names
from ..adapters.placement import ConversionOptions, base_names, not_in_base, renaming_remark
from ..adapters.to_peft import by_module, read_as_peft
from ..adapters.types.base import CONV, LINEAR
from ..errors import AdapterError, RecipeError
from .merge import make_recipe, run_plan
from .merged import Merged
from .options import Rank
from .pipeline import named_part, stored_alpha
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
        target: the program that shall load it: `peft`, `vllm`, `llama.cpp` (see `targets`), or for LoRAs of image models
            `diffusers` or `kohya`, whose one file holds all parts.
        device: where to compute.
        part: which part of a pipeline's LoRA: `unet`, `text_encoder`, …; for a PEFT adapter that is written for an image
            target, the part that it is of.
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
        Between the formats of image models and PEFT's, with neither a rank nor a dtype, the tensors stay the same bits.
    """
    started = time.perf_counter()
    hints = ConversionOptions(
        part, None if base is None else str(base), None if modules is None else Path(modules), alpha, base_model
    )
    all_parts = target in IMAGE_TARGETS
    opened, remarks = (adapter, []) if isinstance(adapter, Adapter) else open_as_peft(str(adapter), hints, all_parts)
    if all_parts and part is not None and opened.origin is None:
        opened = named_part(opened, part)
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
    origin = opened.origin
    remarks = [*remarks, *(origin.description if origin is not None else ())]
    assumed = origin.assumptions if origin is not None else ()
    warnings = [*remarks, *(warning for warning in plan.warnings if warning not in assumed)]
    made = run_plan(replace(plan, warnings=warnings), started, None, progress)
    return as_stored(made, plan.members[0].adapter, rank is None and dtype is None)


def open_as_peft(source: str, options: ConversionOptions, all_parts: bool = False) -> tuple[Adapter, list[str]]:
    """Open an adapter of any known format; return it as PEFT's, and remarks on what was converted.

    Args:
        source: a folder, a file or a Hub id.
        options: of the user.
        all_parts: as in `read_as_peft`.
    Raises: AdapterError if it is no adapter, or cannot be converted exactly; RecipeError for options that do not apply to it.
    """
    files = sources.find_files(source)
    config = recognise.read_config(files.folder, source)
    file = recognise.recognise(files, config, source)
    if file is None or (file.format.name == "PEFT" and config is not None):
        given = [name for name in ("part", "alpha") if getattr(options, name) is not None]
        if given and not (all_parts and given == ["part"]):
            flags = ", ".join(f"--{name} ({name}=…)" for name in given)
            raise RecipeError(f"{flags} is for files that are not PEFT's, and '{source}' is. Leave it out.")
        return _rename_modules(Adapter.load(source, base=options.base), options, source)
    if not file.is_plain:
        recognise.refuse_file(file, config, source)
    converted = read_as_peft(file, config, options, source, all_parts)
    return Adapter(converted.config, converted.tensors, source, origin=converted.origin), []


def _rename_modules(adapter: Adapter, options: ConversionOptions, label: str) -> tuple[Adapter, list[str]]:
    """Return an adapter in PEFT's format under the names that --modules lists, if it was given, and a remark on new names."""
    if options.modules is None:
        return adapter, []
    known = base_names(options, None) or []
    names = accepted_names(known, exactly=True)
    paths = {name: m.path if name.startswith(m.path) else name for name, m in adapter.layout.items()}
    missing = [path for path in paths.values() if path not in names]
    if missing:
        raise AdapterError(not_in_base(label, missing, len(adapter.layout), known))
    renamed = {path: names[path] for path in paths.values() if names[path] != path}
    inside = {name: renamed[path] + name[len(path) :] for name, path in paths.items() if path in renamed}
    return (adapter.renamed(renamed | inside) if renamed else adapter), renaming_remark(renamed)


def as_stored(made: Merged, adapter: Adapter, unchanged: bool) -> Merged:
    """Return a conversion from or to a format of image models with the adapter's own factors, bit for bit.

    Args:
        made: the conversion.
        adapter: that was converted, under the names of the result.
        unchanged: whether neither another rank nor another dtype was asked for.
    Returns: `made` itself where its factors are computed: for another rank or dtype, for other types than LoRA, and for
        PEFT's format, which is written with one rank and one alpha, where the modules have several.
    """
    plain = all(one.layer_type in (LINEAR, CONV) and not one.base_tensors for one in adapter.layout.values())
    if not unchanged or adapter.peft_type.name != "lora" or not plain or (adapter.origin is None and not made.pipeline):
        return made
    alphas = {name: stored_alpha(module) for name, module in adapter.layout.items()}
    if made.pipeline is None and (len(adapter.ranks) > 1 or len(set(alphas.values())) > 1):
        return made
    tensors = {
        f"{PREFIX}{name}.lora_{side}.weight": adapter.tensors.read(key)
        for name, module in adapter.layout.items()
        for side, key in zip("AB", module.keys, strict=True)
    }
    rank = max(adapter.ranks)
    config = {**made.config, "r": rank, **by_module(alphas)}
    report = replace(made.report, rank=rank, rounding=0.0)
    return Merged(
        config, tensors, report, made.recipe, made.loading, made.tokenizer_files, made.pipeline, compress=False
    )
