"""Task vectors and merges written out in NumPy, float64, from the documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from conftest import PREFIX
from safetensors.numpy import load_file

from ties_peft import Adapter

Vectors = dict[str, np.ndarray]
Chooser = Callable[[int, str], float]  # (adapter, module) → a number


def vectors(folder: Path) -> Vectors:
    """alpha/r · B·A, or l − 1, of every module of an adapter's folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {
        name: values.astype(np.float64) for name, values in load_file(folder / "adapter_model.safetensors").items()
    }
    if config["peft_type"] == "IA3":
        return {name[len(PREFIX) : -len(".ia3_l")]: values.reshape(-1) - 1 for name, values in tensors.items()}
    names = [name[len(PREFIX) : -len(".lora_A.weight")] for name in tensors if name.endswith(".lora_A.weight")]
    return {name: _delta(tensors, name, config["lora_alpha"]) for name in names}


def _delta(tensors: Vectors, name: str, alpha: float) -> np.ndarray:
    A, B = tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"]
    return alpha / len(A) * B @ A


def trim(values: Vectors, density: float) -> Vectors:
    """All but the ⌊density·n⌋ largest magnitudes, over all the modules given, set to zero."""
    flat = np.concatenate([v.reshape(-1) for v in values.values()])
    keep = int(Fraction(repr(density)) * len(flat))
    order = np.argsort(-np.abs(flat), kind="stable")
    flat[order[keep:]] = 0
    places = np.cumsum([v.size for v in values.values()])[:-1]
    return {name: part.reshape(values[name].shape) for name, part in zip(values, np.split(flat, places), strict=True)}


def trim_groups(values: Vectors, density: Callable[[str], float], scope: str) -> Vectors:
    """Each module on its own, or those of equal density together."""
    groups: dict[object, Vectors] = {}
    for name, vector in sorted(values.items()):
        groups.setdefault(name if scope == "module" else density(name), {})[name] = vector
    return {name: v for group in groups.values() for name, v in trim(group, density(next(iter(group)))).items()}


def ties(adapters: Sequence[Vectors], weight: Chooser, density: Chooser, scope: str = "adapter") -> Vectors:
    """Weigh, trim, elect by mass, divide by the agreeing |w|; weight 0 is as absent."""
    kept = []
    for i, values in enumerate(adapters):
        weighed = {name: weight(i, name) * vector for name, vector in values.items() if weight(i, name) != 0}
        kept.append(trim_groups(weighed, lambda name, i=i: density(i, name), scope))
    result = {}
    for name in sorted({name for values in adapters for name in values}):
        shape = next(values[name] for values in adapters if name in values).shape
        held = [(abs(weight(i, name)), values[name]) for i, values in enumerate(kept) if name in values]
        sign = np.where(sum((x for _, x in held), np.zeros(shape)) >= 0, 1.0, -1.0)
        agree = [(w, x * (np.sign(x) == sign), np.sign(x) == sign) for w, x in held]
        divisor_weight = sum((w * mask for w, _, mask in agree), np.zeros(shape))
        result[name] = sum((x for _, x, _ in agree), np.zeros(shape)) / np.where(divisor_weight == 0, 1, divisor_weight)
    return result


def weighted_sum(adapters: Sequence[Vectors], weight: Chooser) -> Vectors:
    """Σ w·τ of each module."""
    names = sorted({name for values in adapters for name in values})
    return {
        name: sum(weight(i, name) * values[name] for i, values in enumerate(adapters) if name in values)
        for name in names
    }


def assert_close(merged: Adapter, expected: Vectors, tolerance: float = 2e-5) -> None:
    """The merged adapter has these task vectors, up to float32."""
    assert set(merged.modules) == set(expected)
    for name, vector in expected.items():
        size = max(float(np.abs(vector).max()), 1e-6)
        assert np.abs(merged.delta(name).numpy() - vector).max() <= tolerance * size, name


def same_tensors(first: Adapter, second: Adapter) -> bool:
    """Whether two adapters hold the same bytes."""
    names = first.tensors.names
    return sorted(names) == sorted(second.tensors.names) and all(
        bool((first.tensors.read(name) == second.tensors.read(name)).all()) for name in names
    )


def assert_close_to(values: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    """Equal up to float32."""
    assert np.abs(values - expected).max() <= tolerance * max(float(np.abs(expected).max()), 1e-6)
