"""Merge adapters that are loaded in a PeftModel into a further adapter of that model.

The table lists what PEFT's names for `combination_type` stand for here, each with λ = 1 (PEFT has none). Arguments that are
given beside such a name take precedence over it.

    cat                  cat at rank max: Σ wΔ, exact
    svd                  task_arithmetic: Σ wΔ at svd_rank
    ties_svd             ties in space `delta`
    dare_linear_svd      dare in space `delta`
    dare_ties_svd        dare_ties in space `delta`
    magnitude_prune_svd  magnitude_prune in space `delta`
    ties, dare_linear, dare_ties, magnitude_prune
                         the same methods in space `factors`: on A and B separately, which needs equal ranks
    linear               task_arithmetic at rank max: Σ wΔ, exact. Not as in PEFT, which multiplies
                         Σ√w·B by Σ√w·A and so adds cross terms Bᵢ·Aⱼ that no adapter has

All but the last do the same as in PEFT, with these differences:

- Rank: `svd_rank`, by default the largest r of the adapters, as in PEFT. The report states the energy kept;
  `rank="auto"` keeps more.
- Trims rank magnitudes in each module (scope `module`), as in PEFT. The density has a default.
- `majority_sign_method`: `total` is elect `mass`, `frequency` is elect `count`.
- Weights: in the ties family PEFT elects signs on unweighted values and divides by the count. Here the
  weights are applied first: the election uses w·τ, and the mean divides by Σ|w|. With weights of 1 the results are
  equal (in space `factors` with equal lora scalings, which PEFT's election does not use either).
- Random masks depend on `seed`; in PEFT on PyTorch's generator.
- One adapter alone is merged by the rule that was asked for; PEFT uses `linear`.
- The new adapter has a config of its own. PEFT copies the first adapter's, whose rsLoRA, excluded
  modules or initialisation (PiSSA changes the base weights) then make the result wrong.
- For (IA)³ PEFT has none of these names and adds Σ w·l. Here all of them work on l − 1 in space `delta`: weights (1, 1)
  do not double the activations, and l = 1 in a module that an adapter lacks.

These are errors here and not in PEFT: a name that is taken, too few weights, a parameter that the rule lacks, a density
above 1, DoRA and other types whose task vectors depend on the base weights, a base model with merged adapters, and a name
such as `self_attn`, with which PEFT would save other adapters without tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..errors import RecipeError, unknown
from ..methods.aliases import COMBINATION_TYPES, LARGEST
from .merge import make_recipe, merge_recipe
from .merged import Merged
from .options import DEVICE, Options, Rank, options_in
from .peft_model import add, check_names, check_state, find_tuner, open_loaded
from .plan import Progress
from .recipes.recipe import Recipe

ELECTIONS = {"total": "mass", "frequency": "count"}  # PEFT's majority_sign_method


def add_merged_adapter(
    peft_model: Any,
    adapters: Sequence[str],
    adapter_name: str,
    weights: Sequence[Any] | str | None = None,
    method: str | None = None,
    combination_type: str | None = None,
    space: str | None = None,
    density: Any = None,
    scale: float | str | None = None,
    rank: Rank | None = None,
    svd_rank: int | None = None,
    majority_sign_method: str | None = None,
    seed: int = Options.seed,
    device: str = DEVICE,
    dtype: torch.dtype | str | None = None,
    *,
    densities: Sequence[Any] | None = None,
    restore_norm: bool = False,
    progress: Progress | None = None,
    **parameters: Any,
) -> Merged:
    """Merge adapters that are loaded in a PEFT model, as `ties_peft.merge` does, and add the result to the model.

    The base weights, the other adapters, the active adapter, gradient flags, train or eval mode and
    PyTorch's random state stay as they are; the new adapter is frozen and waits for `set_adapter`.

    Args:
        peft_model: a PeftModel (or LoraModel, IA3Model), unmerged; on any device, in any dtype.
        adapters: names in the model; `sign_from` may be one too.
        adapter_name: of the new adapter; must be free.
        weights, space, density, densities, scale, seed, device, restore_norm, progress, **parameters: as in
            `merge`. The lora scaling is the one in force in each layer, also after `set_scale`.
        method or combination_type: ours (by default that of `merge`), or PEFT's name for one (the table above).
        rank or svd_rank: of the new adapter.
        majority_sign_method: PEFT's name for `elect`: total (mass) or frequency (count).
        dtype: of the new tensors; by default that of the adapters, float32 if they differ.
    Returns: the merged adapter, with its report and recipe; `.save` writes it with its provenance.
    Raises: TiesPeftError; the model is then as it was.
    Law: the same tensors as saving the adapters and `ties_peft.merge` on the folders (`set_scale` apart).
    """
    given = options_in(locals())
    tuner = find_tuner(peft_model)
    check_names(tuner, adapters, adapter_name)
    check_state(tuner)
    opened = [open_loaded(tuner, name) for name in adapters]
    given |= {"rank": _rank(rank, svd_rank)}
    given["parameters"] = {"density": density, **_elect_parameter(majority_sign_method, parameters), **parameters}
    recipe = make_recipe(opened, allow_disjoint=True, **_translate(combination_type, given, opened))
    merged = merge_recipe(_with_signs(recipe, tuner), opened, device, progress)
    merged.recipe = recipe
    add(tuner, adapter_name, merged, adapters)
    return merged


def _elect_parameter(majority_sign_method: str | None, parameters: Mapping[str, Any]) -> dict[str, str]:
    """Return PEFT's `majority_sign_method` as the parameter `elect`."""
    if majority_sign_method is None:
        return {}
    if "elect" in parameters:
        raise RecipeError("elect and majority_sign_method are the same. Give one of them.")
    if majority_sign_method not in ELECTIONS:
        raise RecipeError(unknown("majority_sign_method", str(majority_sign_method), ELECTIONS))
    return {"elect": ELECTIONS[majority_sign_method]}


def _rank(rank: Rank | None, svd_rank: int | None) -> Rank | None:
    if rank is not None and svd_rank is not None:
        raise RecipeError("rank and svd_rank are the same. Give one of them.")
    return svd_rank if rank is None else rank


def _translate(combination_type: str | None, given: Mapping[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Return the options of the merge: what was given, else what PEFT's name stands for."""
    asked = {key: value for key, value in given.items() if value is not None}
    parameters = {key: value for key, value in given["parameters"].items() if value is not None}
    if combination_type is None:
        return {**asked, "parameters": parameters}
    if "method" in asked:
        raise RecipeError("method and combination_type both name a rule. Give one of them.")
    if combination_type not in COMBINATION_TYPES:
        raise RecipeError(unknown("combination_type", str(combination_type), COMBINATION_TYPES))
    meaning = COMBINATION_TYPES[combination_type]
    rank = max(adapter.ranks[-1] for adapter in adapters) if meaning.rank == LARGEST else meaning.rank
    meant = {"method": meaning.method, "space": meaning.space, "scale": 1.0, "rank": rank}
    if not all(adapter.peft_type.has_rank for adapter in adapters):  # (IA)³ has neither a rank nor an A and a B
        meant |= {"space": "delta", "rank": "auto"}
    return {**meant, **asked, "parameters": {**meaning.parameters, **parameters}}


def _with_signs(recipe: Recipe, tuner: Any) -> Recipe:
    """Return the recipe with the loaded adapter in place of its name in `sign_from`."""
    parameters = dict(recipe.parameters)
    for key, value in recipe.parameters.items():
        if key.rpartition(".")[2] == "sign_from" and isinstance(value, str) and value in tuner.peft_config:
            parameters[key] = open_loaded(tuner, value)
    return replace(recipe, parameters=parameters)
