"""An analysis of any size with drawn numbers, whose page is as large as a real one's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import ties_peft
from ties_peft.analysis.figures import Measured
from ties_peft.analysis.method_figures import MethodResult
from ties_peft.analysis.module_places import module_places

LLAMA_KINDS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LLAMA_MODULES = [f"model.layers.{layer}.{kind}" for layer in range(32) for kind in LLAMA_KINDS]  # of Llama-3-8B


def large_analysis(
    names: Sequence[str],
    modules: Sequence[str] = LLAMA_MODULES,
    methods: Sequence[str] = ("ties", "task_arithmetic", "iso_c", "tsv"),
    ranks: int = 64,
) -> ties_peft.Analysis:
    """All adapters have all modules, and every figure is drawn at random."""
    draw = np.random.default_rng(0)
    measured = Measured(len(modules), len(names))
    measured.has[:] = True
    for key, value in vars(measured).items():
        if isinstance(value, np.ndarray) and value.dtype == float:
            setattr(measured, key, draw.uniform(0.5, 1, value.shape))
    measured.rank[:] = 16
    return ties_peft.Analysis(
        names=list(names),
        sources=[f"organisation/{name}" for name in names],
        kind="LoRA",
        density=0.2,
        counted=1.0,
        modules=list(modules),
        shapes=[(4096, 4096)] * len(modules),
        places=module_places(modules),
        measured=measured,
        methods=[_result(method, ranks, (len(modules), len(names)), draw) for method in methods],
    )


def _result(method: str, rank: int, shape: tuple[int, int], draw: np.random.Generator) -> MethodResult:
    modules, adapters = shape
    return MethodResult(
        method=method,
        used=method,
        space="delta",
        scale=1.0,
        rank=rank,
        energy=0.9,
        energies=np.sort(draw.uniform(size=rank)),
        projection=list(draw.uniform(size=adapters)),
        cosine=list(draw.uniform(size=adapters)),
        others=list(draw.uniform(size=adapters)),
        module_projections=draw.uniform(-1, 1, shape),
        module_cosines=draw.uniform(-1, 1, shape),
        norms=draw.uniform(size=modules),
    )
