"""Controls: the adapters that the result of a search is compared with.

    base            no adapter at all
    mean            every adapter with weight 1/N
    best single     the one adapter that scores best on the same examples
    random weights  the best of as many random settings as the search has trials; named `random settings` where other
                    parameters than the weights are tuned
    random adapters the same search over adapters of the same shapes and norms with random directions
    trained         a new adapter, trained on the same examples alone

`random adapters` shows how much of the score comes from fitting parameters to the examples, whatever the adapters hold:
over a thousand public adapters it did as well as the search over the adapters themselves (arXiv 2602.12323).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.types import output_type
from ..merging.recipes.recipe import Recipe
from ..task_vectors.delta import Delta, Dense, LowRank, norm
from ..task_vectors.random_numbers import stream_key
from . import BASE, MEAN, SINGLE
from .tuning import Tuning

EXTRA_TENSOR_KEYS = ("modules_to_save", "trainable_token_indices", "bias")  # keys of a config about extra tensors


def simple_recipes(recipe: Recipe) -> dict[str, list[Recipe]]:
    """Return the recipes of the controls without trials, by name: weighted sums at the rank of a recipe."""
    count = len(recipe.adapters)
    plain = replace(recipe, method="task_arithmetic", parameters={}, densities=None, scale=1.0, space="delta")
    single = [tuple(float(i == j) for i in range(count)) for j in range(count)]
    return {
        BASE: [replace(plain, weights=(1.0,) * count, scale=0.0)],
        MEAN: [replace(plain, weights=(1.0 / count,) * count)],
        SINGLE: [replace(plain, weights=weights) for weights in single],
    }


def random_settings(tuning: Tuning, count: int, seed: int) -> list[dict[str, Any]]:
    """Return settings drawn uniformly from the domains."""
    import numpy as np

    random = np.random.default_rng([seed, 1])
    return [
        {name: domain.value_at(float(random.random())) for name, domain in tuning.domains.items()} for _ in range(count)
    ]


def random_adapter(adapter: Adapter, seed: int) -> Adapter:
    """Return an adapter with the modules, ranks and norms of another, and normally distributed factors.

    It is a LoRA or (IA)³, whatever the PEFT type of `adapter` is, and has its extra tensors, such as a head.

    Law: the task vector of every module has the norm that it has in `adapter`.
    """
    kind = output_type(adapter.peft_type)
    tensors: dict[str, Tensor] = {}
    for name, module in sorted(adapter.layout.items()):
        delta = adapter.read(name)
        drawn = _drawn(delta, stream_key(seed, name, 0, adapter.digest))
        length = norm(drawn)
        tensors |= kind.pack(module, drawn.scaled(norm(delta) / length if length else 0.0), module.rank)
    tensors |= {name: adapter.tensors.read(name) for name in adapter.extra_keys}
    rank = max(module.rank for module in adapter.layout.values())
    config = {
        **{name: adapter.config[name] for name in EXTRA_TENSOR_KEYS if name in adapter.config},
        "peft_type": kind.config_name,
        "base_model_name_or_path": adapter.base_name,
        **kind.config(list(adapter.layout.values()), rank),
        "rank_pattern": {},
        "alpha_pattern": {name: module.rank for name, module in adapter.layout.items() if module.rank != rank},
    }
    return Adapter.from_tensors(config, tensors, f"random, as {adapter.label}")


def _drawn(delta: Delta, stream: int) -> Delta:
    generator = torch.Generator().manual_seed(stream % 2**63)
    if isinstance(delta, LowRank):
        B, A = (torch.randn(part.shape, generator=generator) for part in (delta.B, delta.A))
        return LowRank(B, A)
    return Dense(torch.randn(tuple(delta.shape), generator=generator))


def new_adapter(like: Adapter, seed: int) -> Adapter:
    """Return an untrained adapter with the modules, ranks and head of another: A random, B zero; l = 1 for (IA)³."""
    drawn = random_adapter(like, seed)
    tensors = {name: drawn.tensors.read(name) for name in drawn.tensors.names}
    for name, tensor in tensors.items():
        if name in like.extra_keys:
            continue
        if like.peft_type.has_rank and name.endswith("lora_B.weight"):
            tensor.zero_()
        elif not like.peft_type.has_rank:
            tensor.fill_(1.0)
    return Adapter.from_tensors(drawn.config, tensors, "a new adapter")
