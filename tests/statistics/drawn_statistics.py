"""Statistics made by hand, and the definitions that use them in float64 NumPy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from ties_peft import Adapter
from ties_peft.adapters.statistics import Statistics

Array = np.ndarray
Make = Callable[..., Path]


def deltas(folders: Sequence[Path], module: str) -> list[Array]:
    return [Adapter.load(folder).delta(module).double().numpy() for folder in folders]


def attach_drawn(folder: Path, kind: str, seed: int, rows: int = 40) -> dict[str, Array]:
    """Random statistics, written beside an adapter; they are given back in float64 as they stand in the file."""
    adapter = Adapter.load(folder)
    draw = np.random.default_rng(seed)
    tensors = {}
    for name, module in adapter.layout.items():
        if kind == "fisher":
            tensors[name] = draw.standard_normal(module.shape) ** 2
        else:
            x = draw.standard_normal((rows, module.shape[1])) @ draw.standard_normal((module.shape[1],) * 2)
            tensors[name] = x.T @ x / rows
    return attach(folder, kind, tensors)


def attach(folder: Path, kind: str, tensors: Mapping[str, Array]) -> dict[str, Array]:
    single = {name: torch.from_numpy(np.asarray(value)).float() for name, value in tensors.items()}
    Statistics.make(kind, Adapter.load(folder).digest, single, 40).save(folder)
    return {name: value.double().numpy() for name, value in single.items()}


def fisher(vectors: Sequence[Array], weights: Sequence[float], F: Sequence[Array]) -> Array:
    above = sum(f * w * v for f, w, v in zip(F, weights, vectors, strict=True))
    below = sum(f * abs(w) for f, w in zip(F, weights, strict=True))
    plain = sum(w * v for w, v in zip(weights, vectors, strict=True)) / sum(map(abs, weights))
    return np.where(below > 0, above / np.where(below > 0, below, 1), plain)


def normalized(statistics: Mapping[str, Array]) -> dict[str, Array]:
    """Divided by the norm over all modules of the adapter."""
    norm = np.sqrt(sum(np.sum(values**2) for values in statistics.values()))
    return {name: values / norm for name, values in statistics.items()}


def scaled(gram: Array, alpha: float) -> Array:
    return alpha * gram + (1 - alpha) * np.diag(np.diag(gram))


def regmean(vectors: Sequence[Array], weights: Sequence[float], G: Sequence[Array], alpha: float = 0.9) -> Array:
    G = [scaled(g, alpha) for g in G]
    wanted = sum(w * v @ g for v, w, g in zip(vectors, weights, G, strict=True))
    total = sum(abs(w) * g for w, g in zip(weights, G, strict=True))
    return wanted @ np.linalg.pinv(total, rcond=1e-5, hermitian=True)


def regmean_in_span(
    vectors: Sequence[Array], weights: Sequence[float], G: Sequence[Array], alpha: float = 0.9
) -> Array:
    """The best matrix M·Rᵀ, R a basis of all rows, by the normal equations of the restricted problem."""
    _, s, vt = np.linalg.svd(np.concatenate(vectors), full_matrices=False)
    R = vt[s > 1e-5 * s[0]].T
    G = [scaled(g, alpha) for g in G]
    wanted = sum(w * v @ g @ R for v, w, g in zip(vectors, weights, G, strict=True))
    total = sum(abs(w) * R.T @ g @ R for w, g in zip(weights, G, strict=True))
    return np.linalg.solve(total.T, wanted.T).T @ R.T
