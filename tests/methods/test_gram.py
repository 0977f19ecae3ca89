"""Methods that need inner products alone, against their definitions on vectors in float64 NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ties_peft
from ties_peft.task_vectors.delta import LowRank

Array = np.ndarray
Maker = Callable[..., Path]
PREFIX = "base_model.model."
SPACES = ("delta", "core", "knots")
METHODS = ("slerp", "karcher", "model_stock")


def vectors(folder: Path) -> dict[str, Array]:
    """Every module's task vector, flat, in float64."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = {
        k.removeprefix(PREFIX): t.double().numpy() for k, t in load_file(folder / "adapter_model.safetensors").items()
    }
    if config["peft_type"] == "IA3":
        return {key.removesuffix(".ia3_l"): tensor.ravel() - 1 for key, tensor in tensors.items()}
    names = {key.split(".lora_")[0] for key in tensors}
    scaling = config["lora_alpha"] / config["r"]
    return {n: (scaling * tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"]).ravel() for n in names}


def merged(folders: Sequence[Path], method: str, space: str = "delta", **asked: Any) -> dict[str, Array]:
    result = ties_peft.merge(list(folders), method=method, space=space, **asked)
    return {name: result.delta(name).double().numpy().ravel() for name in result.modules}


def stacked(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, list[Array]]:
    """w·τ of all adapters, by module; zeros where an adapter lacks it."""
    found = [vectors(folder) for folder in folders]
    sizes = {name: len(own) for tau in found for name, own in tau.items()}
    return {
        n: [w * tau.get(n, np.zeros(size)) for w, tau in zip(weights, found, strict=True)] for n, size in sizes.items()
    }


def relative_error(seen: dict[str, Array], wanted: dict[str, Array]) -> float:
    assert seen.keys() == wanted.keys()
    return max(float(np.linalg.norm(seen[n] - wanted[n]) / max(np.linalg.norm(wanted[n]), 1e-30)) for n in wanted)


# definitions


def slerp(first: Array, second: Array, t: float) -> Array:
    a, b = np.linalg.norm(first), np.linalg.norm(second)
    if a == 0 or b == 0:
        return (1 - t) * first + t * second
    u, v = first / a, second / b
    rest = v - (u @ v) * u
    angle = np.arctan2(np.linalg.norm(rest), u @ v)
    if np.sin(angle) < 1e-6:
        return (1 - t) * first + t * second
    return ((1 - t) * a + t * b) * (np.cos(t * angle) * u + np.sin(t * angle) * rest / np.linalg.norm(rest))


def karcher(taus: Sequence[Array], weights: Sequence[float]) -> Array:
    """By many small steps down the weighted squared angles."""
    there = [(abs(w), tau / np.linalg.norm(tau)) for w, tau in zip(weights, taus, strict=True) if np.any(tau)]
    u = sum(w * unit for w, unit in there)
    u = u / np.linalg.norm(u)
    for _ in range(3000):
        slope = np.zeros_like(u)
        for w, unit in there:
            along = np.clip(unit @ u, -1, 1)
            rest = unit - along * u
            size = np.linalg.norm(rest)
            slope += w * (np.arctan2(size, along) / size * rest if size > 1e-12 else 0)
        u = u + 0.1 * slope / sum(w for w, _ in there)
        u = u / np.linalg.norm(u)
    return sum(np.linalg.norm(tau) for tau in taus) / np.abs(weights).sum() * u


def model_stock(taus: Sequence[Array], weights: Sequence[float]) -> Array:
    units = [tau / np.linalg.norm(tau) for tau in taus if np.any(tau)]
    n = len(units)
    pairs = [units[i] @ units[j] for i in range(n) for j in range(i)]
    c = max(float(np.mean(pairs)), 0) if pairs else 1
    return n * c / (1 + (n - 1) * c) * sum(taus) / np.abs(weights).sum()


@pytest.fixture(params=["lora", "ia3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def adapters(kind: str, make_lora: Maker, make_ia3: Maker) -> list[Path]:
    """Three of mixed ranks and norms, of which the last lacks a module."""
    if kind == "ia3":
        fewer = {"layers.0.k": (12, False), "layers.0.down": (20, True)}
        return [make_ia3("a", seed=1), make_ia3("b", seed=2), make_ia3("c", seed=5, vectors=fewer)]
    lean = {"layers.0.q": (12, 10), "layers.0.up": (20, 12)}
    return [
        make_lora("a", rank=4, alpha=8, seed=1),
        make_lora("b", rank=2, alpha=1, seed=2, gain=3),
        make_lora("c", rank=3, alpha=3, seed=7, shapes=lean),
    ]


def spaces(kind: str) -> tuple[str, ...]:
    return SPACES if kind == "lora" else ("delta",)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, -1.0, 0.5)], ids=str)
def test_karcher_and_model_stock_are_their_definitions(
    kind: str, adapters: list[Path], weights: tuple[float, ...]
) -> None:
    for method, definition in (("karcher", karcher), ("model_stock", model_stock)):
        asked = {"max_iter": 500, "tol": 1e-9} if method == "karcher" else {}
        wanted = {name: definition(taus, weights) for name, taus in stacked(adapters, weights).items()}
        for space in spaces(kind):
            assert relative_error(merged(adapters, method, space, weights=weights, **asked), wanted) < 1e-4


def test_karcher_needs_few_steps(kind: str, adapters: list[Path]) -> None:
    wanted = {name: karcher(taus, (1.0, 1.0, 1.0)) for name, taus in stacked(adapters, (1.0, 1.0, 1.0)).items()}
    assert relative_error(merged(adapters, "karcher"), wanted) < 1e-3


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, -0.5)], ids=str)
def test_slerp_is_its_definition(kind: str, adapters: list[Path], t: float, weights: tuple[float, float]) -> None:
    wanted = {name: slerp(*taus, t) for name, taus in stacked(adapters[:2], weights).items()}
    for space in spaces(kind):
        assert relative_error(merged(adapters[:2], "slerp", space, weights=weights, t=t), wanted) < 1e-4


def test_slerp_goes_as_far_as_the_weights_say(kind: str, adapters: list[Path]) -> None:
    pair = adapters[1:]
    wanted = {name: slerp(*taus, 0.75) for name, taus in stacked(pair, (1, -1)).items()}
    for weights in ((1.0, -3.0), (5.0, -15.0)):
        assert relative_error(merged(pair, "slerp", weights=weights), wanted) < 1e-4
    both = adapters[:2]
    assert relative_error(merged(both[::-1], "slerp", t=0.25), merged(both, "slerp", t=0.75)) < 1e-5


def test_slerp_is_for_two(adapters: list[Path]) -> None:
    with pytest.raises(ties_peft.TiesPeftError, match=r"is for two adapters; these are 3\. Use karcher"):
        ties_peft.merge(adapters, method="slerp")


def test_karcher_of_two_is_halfway_and_has_the_mean_norm(kind: str, adapters: list[Path]) -> None:
    pair = adapters[:2]
    assert relative_error(merged(pair, "karcher", tol=1e-9), merged(pair, "slerp", t=0.5)) < 1e-4
    for name, own in merged(adapters[:2], "karcher").items():
        assert np.isclose(np.linalg.norm(own), np.mean([np.linalg.norm(vectors(a)[name]) for a in pair]), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_direction_is_kept(kind: str, adapters: list[Path], make_lora: Maker, make_ia3: Maker, method: str) -> None:
    first = adapters[0]
    wanted = vectors(first)
    assert relative_error(merged([first], method), wanted) < 1e-5
    assert relative_error(merged([first], method, weights=[-3.0]), {n: -own for n, own in wanted.items()}) < 1e-5
    assert relative_error(merged([first, first], method), wanted) < 1e-5
    if kind == "lora":
        longer = make_lora("longer", rank=4, alpha=24, seed=1)
        assert relative_error(merged([first, longer], method), {n: 2 * own for n, own in wanted.items()}) < 1e-5


def test_directions_that_oppose_have_no_mean(kind: str, adapters: list[Path]) -> None:
    first = adapters[0]
    for method in METHODS:
        result = merged([first, first], method, weights=[1.0, -1.0])
        assert all(np.linalg.norm(own) < 1e-6 for own in result.values())


@pytest.mark.parametrize("method", ["karcher", "model_stock"])
def test_only_the_ratio_of_weights_and_no_order_matters(adapters: list[Path], method: str) -> None:
    wanted = merged(adapters, method, weights=[2.0, 1.0, 3.0])
    assert relative_error(merged(adapters, method, weights=[10.0, 5.0, 15.0]), wanted) < 1e-5
    assert relative_error(merged(adapters[::-1], method, weights=[3.0, 1.0, 2.0]), wanted) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_multiplied_out(make_lora: Maker, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def refuse(*_: Any) -> torch.Tensor:
        raise AssertionError("multiplied out")

    folders = [make_lora("a", rank=4, seed=1), make_lora("b", rank=2, seed=2)]
    monkeypatch.setattr(LowRank, "dense", refuse)
    monkeypatch.setattr(LowRank, "rows", refuse)
    assert ties_peft.merge(folders, method=method, rank="max").report.rank == 6
