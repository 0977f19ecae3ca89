"""Controls: what a search has to beat before it has found anything.

    base            no adapter at all
    mean            every adapter with weight 1/N
    best single     the one adapter that does best on the same examples
    random weights  the best of as many drawn weights as the search made trials
    random adapters the same search over adapters of the same shapes and norms whose directions are drawn
    trained         a new LoRA, trained on the same examples alone

The last but one is the test of whether the adapters matter, or just so many numbers to turn: over a thousand
adapters found in the wild it did as well as the adapters (arXiv 2602.12323).
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

BESIDE = ("modules_to_save", "trainable_token_indices", "bias")  # what a config says of tensors beside the modules


def simple_recipes(recipe: Recipe) -> dict[str, list[Recipe]]:
    """Recipes of the controls that are one merge each, by name: weighted sums of task vectors, at the recipe's rank."""
    count = len(recipe.adapters)
    plain = replace(recipe, method="task_arithmetic", parameters={}, densities=None, scale=1.0, space="delta")
    single = [tuple(float(i == j) for i in range(count)) for j in range(count)]
    return {
        BASE: [replace(plain, weights=(1.0,) * count, scale=0.0)],
        MEAN: [replace(plain, weights=(1.0 / count,) * count)],
        SINGLE: [replace(plain, weights=weights) for weights in single],
    }


def random_settings(tuning: Tuning, count: int, seed: int) -> list[dict[str, Any]]:
    """Settings drawn evenly over the domains."""
    import numpy as np

    draw = np.random.default_rng([seed, 1])
    made = []
    for _ in range(count):
        setting: dict[str, Any] = {}
        for name, domain in tuning.domains.items():
            setting[name] = domain.value_at(float(draw.random()))
        made.append(setting)
    return made


def random_adapter(adapter: Adapter, seed: int) -> Adapter:
    """One with the same modules, ranks and norms, whose numbers are drawn from a normal distribution.

    It is written as a LoRA or (IA)³, whatever kind `adapter` is of; what it trains beside its modules, such as a head,
    comes along as it is.

    Law: every module's task vector has the norm that it has in `adapter`.
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
        **{name: adapter.config[name] for name in BESIDE if name in adapter.config},
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
    """One with the modules, ranks and head of another that does nothing yet: A drawn, B zero; l = 1 for (IA)³."""
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
