"""Hypothesis strategies: small adapters in memory, and merges that can be asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from conftest import PREFIX, Shapes, lora_config, lora_tensors
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from oracles import definition
from oracles.definition import Vectors
from torch import Tensor

from ties_peft import Adapter, Merged, merge

law = settings(
    max_examples=15, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)

SHAPES = {"layers.0.q": (6, 5), "layers.0.up": (9, 6), "layers.1.q": (6, 5), "lm_head": (11, 5)}
LENGTHS = {"layers.0.k": 7, "layers.0.down": 9, "layers.1.k": 7}
RSLORA = {"use_rslora": True}
PATTERNS = {"rank_pattern": {"up": 3, r"1\.q": 1}, "alpha_pattern": {"layers.0.q": 5, "q": 2}}

INTEGER_SHAPES = {"layers.0.q": (12, 10), "layers.0.up": (7, 12), "layers.1.q": (12, 10)}

seeds = st.integers(0, 2**16)
percents = st.integers(1, 100)
scopes = st.sampled_from(["adapter", "module"])
positive = st.sampled_from([1e-3, 0.3, 1.0, 2.0, 7.0, 1e3])
signed = st.sampled_from([-2.0, -0.5, 0.7, 1.0, 3.0])


@st.composite
def loras(draw: st.DrawFn, whole: bool = False) -> Adapter:
    """A LoRA on some of the modules, the first always among them; on all of them if `whole`."""
    first, *others = SHAPES
    chosen = [first, *(others if whole else draw(st.lists(st.sampled_from(others), unique=True)))]
    shapes, rank = {name: SHAPES[name] for name in chosen}, draw(st.integers(1, 5))
    extra = draw(st.sampled_from([{}, RSLORA, PATTERNS, RSLORA | PATTERNS]))
    tensors = lora_tensors(shapes, rank, draw(seeds), rank_pattern=extra.get("rank_pattern"))
    return Adapter.from_tensors(lora_config(shapes, rank, draw(st.sampled_from([0.5, 4, 12])), **extra), tensors)


@st.composite
def ia3s(draw: st.DrawFn, whole: bool = False) -> Adapter:
    """An (IA)³ on some of the modules, as `loras`."""
    first, *others = LENGTHS
    chosen = [first, *(others if whole else draw(st.lists(st.sampled_from(others), unique=True)))]
    generator = torch.Generator().manual_seed(draw(seeds))
    return ia3({name: torch.randn(LENGTHS[name], generator=generator) for name in chosen})


def ia3(vectors: Mapping[str, Tensor]) -> Adapter:
    """An (IA)³ adapter with these task vectors; `down` is feed-forward."""
    shapes = {name: (1, -1) if name.endswith("down") else (-1, 1) for name in vectors}
    tensors = {f"{PREFIX}{name}.ia3_l": 1 + vector.reshape(shapes[name]) for name, vector in vectors.items()}
    return Adapter.from_tensors({"peft_type": "IA3"}, tensors)


@st.composite
def equal_ranks(draw: st.DrawFn) -> list[Adapter]:
    """LoRAs on all modules, of one rank and any lora scaling, no two of them the same."""
    scalings = draw(st.lists(st.tuples(st.sampled_from([-3.0, 1.0, 6.0]), st.booleans()), min_size=2, max_size=3))
    return [
        Adapter.from_tensors(lora_config(SHAPES, 3, alpha, use_rslora=rslora), lora_tensors(SHAPES, 3, seed))
        for seed, (alpha, rslora) in enumerate(scalings)
    ]


def integer_lora(shapes: Shapes, seed: int) -> Adapter:
    """A LoRA whose task vector holds a few small integers, each of them many times."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randint(-2, 3, tensor.shape, generator=generator).float()
        for name, tensor in lora_tensors(shapes, rank=2, seed=0).items()
    }
    return Adapter.from_tensors(lora_config(shapes, rank=2, alpha=2), tensors)


integer_loras = st.builds(integer_lora, st.just(INTEGER_SHAPES), seeds)
adapters = loras() | ia3s()
groups = st.lists(loras(), min_size=2, max_size=4) | st.lists(ia3s(), min_size=2, max_size=4)
alike = st.lists(loras(whole=True), min_size=2, max_size=3) | st.lists(ia3s(whole=True), min_size=2, max_size=3)
ties = st.fixed_dictionaries(
    {
        "method": st.just("ties"),
        "density": st.just(1.0) | percents.map(lambda percent: percent / 100),
        "scope": scopes,
        "elect": st.sampled_from(["mass", "count"]),
        "disjoint": st.sampled_from(["mean", "sum", "max"]),
    }
)
methods = ties | st.sampled_from([{"method": "average"}, {"method": "task_arithmetic"}])


def merged(members: list[Adapter], **asked: Any) -> Merged:
    """A merge at full rank, where the kind has one."""
    return merge(members, **({"rank": "max"} if members[0].peft_type.has_rank else {}), **asked)


def vectors(adapter: Adapter) -> Vectors:
    """The task vectors by the definition."""
    return definition.task_vectors(adapter.config, tensors(adapter, np.float64))


def tensors(adapter: Adapter, dtype: Any = None) -> dict[str, Any]:
    """An adapter's tensors by name, as NumPy arrays where a dtype is given."""
    found = {name: adapter.tensors.read(name) for name in adapter.tensors.names}
    return found if dtype is None else {name: tensor.numpy().astype(dtype) for name, tensor in found.items()}


def with_tensors(adapter: Adapter, changed: Mapping[str, Tensor]) -> Adapter:
    """The adapter with some tensors in place of its own."""
    return Adapter.from_tensors(dict(adapter.config), {**tensors(adapter), **changed})


def zeroed(adapter: Adapter) -> Adapter:
    """The adapter as it was before training: B = 0, l = 1."""
    untrained = {"lora_B.weight": torch.zeros_like, "ia3_l": torch.ones_like}
    return with_tensors(
        adapter,
        {n: fresh(t) for n, t in tensors(adapter).items() for end, fresh in untrained.items() if n.endswith(end)},
    )
