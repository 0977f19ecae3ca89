"""The design's definitions in NumPy and float64, written from its words and not from the package.

A task vector is a `Vectors`: module → s·B·A, (out, in), for LoRA, or l − 1, (k,), for (IA)³.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file  # NumPy's has no bfloat16

Array = np.ndarray[Any, np.dtype[np.float64]]
Vectors = dict[str, Array]
PREFIX = "base_model.model."


def read(folder: Path) -> Vectors:
    """The task vectors in an adapter's folder."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {key: t.double().numpy() for key, t in load_file(folder / "adapter_model.safetensors").items()}
    return task_vectors(config, tensors)


def task_vectors(config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Vectors:
    """Every module's task vector, sorted by module."""
    modules = sorted({re.sub(r"\.(lora_[AB]\.weight|ia3_l)$", "", key.removeprefix(PREFIX)) for key in tensors})
    if config["peft_type"] == "IA3":
        return {module: tensors[f"{PREFIX}{module}.ia3_l"].reshape(-1) - 1 for module in modules}
    parts = {module: lora_parts(config, tensors, module) for module in modules}
    return {module: scaling * (B @ A) for module, (scaling, B, A) in parts.items()}


def lora_parts(config: Mapping[str, Any], tensors: Mapping[str, Array], module: str) -> tuple[float, Array, Array]:
    """(the lora scaling s, B, A) of one module."""
    rank = by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    A, B = (tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
    assert A.shape[0] == B.shape[1] == rank
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), B, A


def by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """PEFT's rule: the first pattern that matches the whole path, or its end after a dot."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", module)), otherwise)


def kept_count(density: float, entries: int) -> int:
    """⌊density·n⌋, density as the decimal that was written."""
    return math.floor(Decimal(str(density)) * entries)


def trim_groups(vectors: Vectors, scope: str) -> list[list[str]]:
    """The modules ranked together: all but a vocabulary's, or each on its own."""
    modules = sorted(vectors)
    if scope == "module":
        return [[module] for module in modules]
    apart = [[module] for module in modules if module.endswith("lm_head")]
    return [[module for module in modules if [module] not in apart], *apart]


def trim(vectors: Vectors, density: float, scope: str) -> Vectors:
    """The largest magnitudes of every group; of equal ones the first by module and row-major position."""
    trimmed: Vectors = {}
    for group in trim_groups(vectors, scope):
        magnitudes = np.concatenate([np.abs(vectors[module]).reshape(-1) for module in group])
        keep = np.zeros(magnitudes.size, dtype=bool)
        keep[np.argsort(-magnitudes, kind="stable")[: kept_count(density, magnitudes.size)]] = True
        for module in group:
            mask, keep = np.split(keep, [vectors[module].size])
            trimmed[module] = np.where(mask.reshape(vectors[module].shape), vectors[module], 0.0)
    return trimmed


def elect(stack: Array, by: str) -> Array:
    """+1 or −1 for every entry; a sum of zero goes to +."""
    votes = stack if by == "mass" else np.sign(stack)
    return np.where(votes.sum(0) >= 0, 1.0, -1.0)


def disjoint_merge(stack: Array, weights: Sequence[float], signs: Array, by: str, normalize: bool) -> Array:
    """The entries that agree with the sign: their sum, the largest of them, or the sum over Σ|w| (or their number)."""
    agrees = np.sign(stack) == signs
    agreeing = np.where(agrees, stack, 0.0)
    if by == "max":
        return np.abs(agreeing).max(0) * signs
    if by == "sum":
        return agreeing.sum(0)
    divisor_weight = np.abs(weights) if normalize else np.ones(len(stack))
    divisor = np.tensordot(divisor_weight, agrees.astype(np.float64), axes=1)
    return np.divide(agreeing.sum(0), divisor, out=np.zeros(stack.shape[1:]), where=divisor > 0)


def ties(
    adapters: Sequence[Vectors],
    weights: Sequence[float],
    density: float = 0.2,
    scope: str = "adapter",
    elect_by: str = "mass",
    disjoint: str = "mean",
    normalize: bool = True,
    sign_from: Vectors | None = None,
    scale: float = 1.0,
) -> Vectors:
    """λ · the disjoint merge of the trimmed w·τ."""
    adapters, weights = present(adapters, weights)
    merged: Vectors = {}
    for module, stack in stacks(trim_all(adapters, weights, density, scope)).items():
        signs = elect(stack, elect_by)
        given = (sign_from or {}).get(module, np.zeros(signs.shape))
        signs = np.where(given != 0, np.sign(given), signs)
        merged[module] = scale * disjoint_merge(stack, weights, signs, disjoint, normalize)
    return merged


def ties_in_factors(members: Sequence[tuple[float, Array, Array]], weights: Sequence[float], density: float) -> Array:
    """One module's (s, B, A): √|s|·B and sign(ws)·√|s|·A, each merged on its own by the weights √|w|, multiplied."""
    factors = [
        {"B": math.sqrt(abs(s)) * B, "A": math.copysign(math.sqrt(abs(s)), w * s) * A}
        for w, (s, B, A) in zip(weights, members, strict=True)
    ]
    merged = ties(factors, [math.sqrt(abs(w)) for w in weights], density, scope="module")
    return merged["B"] @ merged["A"]


def trim_all(adapters: Sequence[Vectors], weights: Sequence[float], density: float, scope: str) -> list[Vectors]:
    """trim(w·τ) of every adapter."""
    weighted = ({m: w * v for m, v in a.items()} for w, a in zip(weights, adapters, strict=True))
    return [trim(vectors, density, scope) for vectors in weighted]


def present(adapters: Sequence[Vectors], weights: Sequence[float]) -> tuple[list[Vectors], list[float]]:
    """What is left without the adapters of weight 0."""
    pairs = [(a, w) for a, w in zip(adapters, weights, strict=True) if w != 0]
    return [a for a, _ in pairs], [w for _, w in pairs]


def task_arithmetic(adapters: Sequence[Vectors], weights: Sequence[float], scale: float = 0.4) -> Vectors:
    """λ · Σ wτ."""
    adapters, weights = present(adapters, weights)
    return {module: scale * np.tensordot(weights, stack, axes=1) for module, stack in stacks(adapters).items()}


def average(adapters: Sequence[Vectors], weights: Sequence[float], scale: float = 1.0) -> Vectors:
    """λ · Σ wτ / Σ w, over all adapters, also those that lack a module."""
    return task_arithmetic(adapters, weights, scale / sum(weights))


def stacks(adapters: Sequence[Vectors]) -> Vectors:
    """All adapters' task vectors of each module, zero where one lacks it: module → (N, …)."""
    shapes = {module: vector.shape for adapter in adapters for module, vector in adapter.items()}
    return {m: np.stack([a.get(m, np.zeros(shape)) for a in adapters]) for m, shape in sorted(shapes.items())}


def matrix(adapters: Sequence[Vectors]) -> Array:
    """Every adapter's whole task vector as a row, over the union of their modules."""
    return np.concatenate([stack.reshape(len(stack), -1) for stack in stacks(adapters).values()], axis=1)


def conflict(adapters: Sequence[Vectors]) -> float:
    """Of the entries that are not zero in two adapters or more, the share in which signs differ."""
    rows = matrix(adapters)
    both = (rows > 0).any(0) & (rows < 0).any(0)
    return float(both.sum() / ((rows != 0).sum(0) >= 2).sum())


def energies(matrix: Array, rank: int) -> tuple[float, float]:
    """(the squared singular values that `rank` keeps, all of them), each as a sum."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return float(squares[:rank].sum()), float(squares.sum())


def retention(merged: Vectors, own: Vectors) -> tuple[float, float, float]:
    """(projection, cosine, others) of one adapter in a merged one."""
    tau, one = matrix([merged, own])
    projection = tau @ one / (one @ one)
    others = np.linalg.norm(tau - projection * one) / np.linalg.norm(one)
    return projection, tau @ one / np.linalg.norm(tau) / np.linalg.norm(one), others
