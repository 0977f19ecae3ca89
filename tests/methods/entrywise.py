"""The methods that work entry by entry, defined in NumPy and float64 from the words of their papers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from conftest import PREFIX
from safetensors.numpy import load_file

import ties_peft
from ties_peft.task_vectors.random_numbers import stream_key, uniform

Array = np.ndarray[Any, np.dtype[np.float64]]
Vectors = dict[str, Array]
SUMS = {"dare", "della_linear", "breadcrumbs", "magnitude_prune", "consensus"}
SCALES = dict.fromkeys(SUMS, 0.4) | {"pcb": 1.2, "power_mean": 1.5}


def read(folder: Path) -> Vectors:
    """An adapter's task vectors: α/r·B·A, or l − 1."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {
        n.removeprefix(PREFIX): t.astype(np.float64) for n, t in load_file(folder / "adapter_model.safetensors").items()
    }
    if config["peft_type"] == "IA3":
        return {name.removesuffix(".ia3_l"): t.reshape(-1) - 1 for name, t in sorted(tensors.items())}
    names = sorted({name.split(".lora_")[0] for name in tensors})
    scaling = config["lora_alpha"] / config["r"]
    return {n: scaling * tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}


def merged_vectors(folders: Sequence[Path], method: str, **asked: Any) -> Vectors:
    """What ties_peft makes of them, at full rank."""
    kind = ties_peft.Adapter.load(folders[0]).peft_type
    merged = ties_peft.merge(folders, method=method, rank="max" if kind.has_rank else "auto", **asked)
    return {name: merged.delta(name).numpy().astype(np.float64) for name in merged.modules}


def numbers(folder: Path, module: str, shape: tuple[int, ...], seed: int = 0, part: int = 0) -> Array:
    """The uniform numbers that an adapter's entries are given."""
    digest = ties_peft.Adapter.load(folder).digest
    return uniform(stream_key(seed, module, part, digest), 0, shape).numpy().astype(np.float64)


def distance(seen: Vectors, expected: Vectors) -> float:
    """The largest relative error over the modules."""
    assert sorted(seen) == sorted(expected)
    norms = [(np.linalg.norm(seen[m] - expected[m]), np.linalg.norm(expected[m])) for m in expected]
    errors = [error / norm if norm else error for error, norm in norms]
    assert np.isfinite(errors).all()
    return float(max(errors))


def same(first: Vectors, second: Vectors) -> bool:
    return distance(first, second) < 1e-5


# -- the definitions: of task vectors already weighted, in a stack (N, …) for each module


def count(share: float, entries: int) -> int:
    return math.floor(round(share * entries, 9))


def keep_ranks(vectors: Vectors, scope: str, first: Callable[[int], int], last: Callable[[int], int]) -> Vectors:
    """The entries whose magnitudes rank from first(n) to last(n) − 1, counted from 0, the largest."""
    kept: Vectors = {}
    for group in [[m] for m in sorted(vectors)] if scope == "module" else [sorted(vectors)]:
        flat = np.concatenate([np.abs(vectors[m]).reshape(-1) for m in group])
        rank = np.empty(flat.size, dtype=int)
        rank[np.argsort(-flat, kind="stable")] = np.arange(flat.size)
        band = (rank >= first(flat.size)) & (rank < last(flat.size))
        for m in group:
            mine, band = np.split(band, [vectors[m].size])
            kept[m] = vectors[m] * mine.reshape(vectors[m].shape)
    return kept


def trimmed(vectors: Vectors, density: float = 0.2, scope: str = "adapter") -> Vectors:
    return keep_ranks(vectors, scope, lambda n: 0, lambda n: count(density, n))


def band(vectors: Vectors, density: float = 0.2, gamma: float = 0.01, scope: str = "adapter") -> Vectors:
    def top(n: int) -> int:
        return min(count(gamma, n), n - count(density, n))

    return keep_ranks(vectors, scope, top, lambda n: top(n) + count(density, n))


def row_probability(values: Array, density: float, epsilon: float) -> Array:
    """MagPrune: p rises with the rank of the magnitude within a row, from density − ε to density + ε."""
    rows = np.abs(values).reshape(1, -1) if values.ndim == 1 else np.abs(values)
    p = np.empty_like(rows)
    for row, out in zip(rows, p, strict=True):
        for rank, place in enumerate(np.argsort(row, kind="stable")):
            out[place] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
    return p.reshape(values.shape)


def signs(stack: Array, by: str = "mass") -> Array:
    votes = stack if by == "mass" else np.sign(stack)
    return np.where(votes.sum(0) >= 0, 1.0, -1.0)


def safe(top: Array, bottom: Array) -> Array:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom != 0)


def disjoint(stack: Array, w: Array, elect: str = "mass", how: str = "mean", normalize: bool = True) -> Array:
    """TIES' election and merge, its ablations included."""
    agree = (stack != 0) if elect == "none" else np.sign(stack) == signs(stack, elect)
    divisor = np.abs(w) if normalize else np.ones(len(w))
    if how == "mean_all":
        return stack.sum(0) / divisor.sum()
    kept = np.where(agree, stack, 0.0)
    if how == "max":
        return np.take_along_axis(kept, np.abs(kept).argmax(0)[None], 0)[0]
    if how == "sum":
        return kept.sum(0)
    if how == "mean_elected":
        return kept.sum(0) / divisor.sum()
    return safe(kept.sum(0), np.tensordot(divisor, agree.astype(np.float64), 1))


def plain_sum(stack: Array, w: Array) -> Array:
    return stack.sum(0)


def consensus(stack: Array, w: Array, threshold: float = 0.4, agree: int = 2) -> Array:
    total = stack.sum(0)
    masks = np.abs(stack) > threshold * np.abs(total - stack)
    return total * (masks.sum(0) >= agree)


def emr(stack: Array, w: Array) -> Array:
    sign = signs(stack)
    return sign * np.max(np.where(np.sign(stack) == sign, np.abs(stack), 0.0), axis=0)


def sce(stack: Array, w: Array, select_topk: float = 1.0) -> Array:
    if select_topk < 1:
        variance = stack.var(0).reshape(-1)
        chosen = np.zeros(variance.size, dtype=bool)
        chosen[np.argsort(-variance, kind="stable")[: count(select_topk, np.count_nonzero(variance))]] = True
        stack = stack * chosen.reshape(stack.shape[1:])
    energy = (stack**2).reshape(len(stack), -1).mean(1)
    share = energy / energy.sum()
    agree = np.sign(stack) == signs(stack)
    return safe(np.tensordot(share, stack * agree, 1), np.tensordot(share * np.abs(w), agree.astype(np.float64), 1))


def minmax(values: Array, low: float, high: float) -> Array:
    """Of values that lie between; where all are the same, 1 if they are positive."""
    return (values - low) / (high - low) if high > low else ((values >= high) & (values > 0)).astype(np.float64)


def index(share: float, entries: int) -> int:
    """⌊share·n⌋, of the decimal that was written."""
    return math.floor(Fraction(str(share)) * entries)


def pcb(
    vectors: Sequence[Vectors],
    w: Array,
    density: float | Sequence[float] = 0.1,
    clamp: float = 0.0001,
    scope: str = "adapter",
) -> Vectors:
    """Du et al.: every rank is an index into the values of one adapter (or of its module), sorted upwards."""
    modules = {m: values.shape for own in vectors for m, values in own.items()}
    total = {m: sum((own[m] for own in vectors if m in own), start=np.zeros(modules[m])) for m in modules}
    above, below = ({m: np.zeros(shape) for m, shape in modules.items()} for _ in range(2))
    densities = [density] * len(vectors) if isinstance(density, float) else density
    for own, weight, kept in zip(vectors, w, densities, strict=True):
        for group in [[m] for m in own] if scope == "module" else [list(own)]:
            x = np.concatenate([own[m].reshape(-1) for m in group])
            n, magnitudes = len(x), np.sort(np.abs(x))
            low, high = magnitudes[index(clamp, n)], magnitudes[max(0, n - math.ceil(Fraction(str(clamp)) * n) - 1)]
            size = np.minimum(np.maximum(np.abs(x), low), high)
            score = np.exp(len(vectors) * minmax(size, low, high) ** 2)
            score *= np.tanh(x * np.concatenate([total[m].reshape(-1) for m in group]))
            floor = np.sort(score)[n - math.ceil(Fraction(str(kept)) * n)]
            share = minmax(np.maximum(score, floor), floor, score.max())
            ends = np.cumsum([own[m].size for m in group])[:-1]
            for m, c, value in zip(
                group, np.split(share, ends), np.split(share * np.sign(x) * size, ends), strict=True
            ):
                above[m] += value.reshape(modules[m])
                below[m] += abs(weight) * c.reshape(modules[m])
    return {m: safe(above[m], below[m]) for m in modules}


def power_mean(stack: Array, w: Array, p: float = 2.0) -> Array:
    return safe((stack * np.abs(stack) ** p).sum(0), np.tensordot(np.abs(w), np.abs(stack) ** p, 1))


def product(stack: Array, w: Array) -> Array:
    return np.prod([(1 + x / v) ** v for x, v in zip(stack, w, strict=True)], axis=0) - 1


COMBINE: dict[str, Callable[..., Array]] = {
    "cat": plain_sum,
    "magnitude_prune": plain_sum,
    "dare": plain_sum,
    "della_linear": plain_sum,
    "breadcrumbs": plain_sum,
    "ties": disjoint,
    "dare_ties": disjoint,
    "della": disjoint,
    "breadcrumbs_ties": disjoint,
    "consensus": consensus,
    "emr": emr,
    "sce": sce,
    "power_mean": power_mean,
    "product": product,
}
OVER_ADAPTERS = {"pcb": pcb}  # of whole adapters, not module by module
EVERY = sorted({*COMBINE, *OVER_ADAPTERS} - {"power_mean", "product"})
SPARSIFY = {"magnitude_prune": trimmed, "ties": trimmed, "breadcrumbs": band, "breadcrumbs_ties": band}


def sparse(method: str, vectors: Vectors, folder: Path, asked: dict[str, Any]) -> Vectors:
    """What a method's first step leaves of one adapter's weighted task vectors; it takes its parameters out of `asked`."""
    if method in SPARSIFY:
        own = {k: asked.pop(k) for k in ("density", "gamma", "scope") if k in asked}
        return SPARSIFY[method](vectors, **own)
    if not method.startswith(("dare", "della")):
        return vectors
    seed = asked.pop("seed", 0)
    density = asked.pop("density", 0.5 if method.startswith("dare") else 0.7)
    epsilon = 0.0 if method.startswith("dare") else asked.pop("epsilon", 0.07)
    left = {}
    for module, values in vectors.items():
        p = row_probability(values, density, epsilon)
        left[module] = np.where(numbers(folder, module, values.shape, seed) < p, values / p, 0.0)
    return left


def defined(folders: Sequence[Path], method: str, weights: Sequence[float], **asked: Any) -> Vectors:
    """The definition of a merge with its default scale."""
    scale = asked.pop("scale", SCALES.get(method, 1.0))
    left: list[Vectors] = []
    for folder, weight in zip(folders, weights, strict=True):
        rest = dict(asked)
        left.append(sparse(method, {m: weight * v for m, v in read(folder).items()}, folder, rest))
    own = {"how" if k == "disjoint" else k: v for k, v in rest.items()}
    if method in OVER_ADAPTERS:
        return {m: scale * v for m, v in OVER_ADAPTERS[method](left, np.array(weights), **own).items()}
    shapes = {module: values.shape for vectors in left for module, values in vectors.items()}
    stacks = {m: np.stack([v.get(m, np.zeros(shape)) for v in left]) for m, shape in shapes.items()}
    return {m: scale * COMBINE[method](stack, np.array(weights), **own) for m, stack in stacks.items()}
