"""Where mergekit has a method, its kernels on the dense deltas, with what differs in meaning evened out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PREFIX, SHAPES, write_adapter
from methods.entrywise import Vectors, distance, numbers, read, row_probability

import ties_peft

merge_methods = pytest.importorskip("mergekit.merge_methods", reason="mergekit is not installed (0.1.5 was compared)")

Maker = Callable[..., Path]
WEIGHTS = (1.0, 2.0, 0.5)


@pytest.fixture
def folders(make_lora: Maker) -> list[Path]:
    return [make_lora(f"m{n}", rank=4, seed=n) for n in range(3)]


def mergekit_merge(
    folders: Sequence[Path], method: str, weights: Sequence[float] | None = WEIGHTS, **asked: Any
) -> Vectors:
    """mergekit's merge of the deltas over a base of zeros."""
    stacks = [read(folder) for folder in folders]
    if weights is not None:
        asked["weight"] = list(weights)
    merged = {}
    for module in stacks[0]:
        deltas = [torch.from_numpy(vectors[module]) for vectors in stacks]
        inputs = [torch.zeros_like(deltas[0]), *deltas]
        merged[module] = merge_methods.merge_tensors(inputs, method, parameters=asked, base_index=0).numpy()
    return merged


def own_merge(folders: Sequence[Path], method: str, **asked: Any) -> Vectors:
    merged = ties_peft.merge(folders, method=method, rank="max", **{"weights": WEIGHTS, "scale": 1.0, **asked})
    return {name: merged.delta(name).double().numpy() for name in merged.modules}


def use_same_random_numbers(folders: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.bernoulli draws, module by module, what ties_peft gives the same entries."""
    drawn = iter([numbers(folder, module, SHAPES[module]) for module in sorted(SHAPES) for folder in folders])
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.from_numpy(next(drawn)) < p).to(p.dtype))


@pytest.mark.parametrize(
    ("method", "asked", "parameters"),
    [
        ("task_arithmetic", {}, {}),
        ("ties", {"density": 0.3, "scope": "module"}, {"density": 0.3}),
        ("ties", {"density": 0.3, "scope": "module", "disjoint": "sum"}, {"density": 0.3, "normalize": False}),
        ("breadcrumbs", {"density": 0.3, "gamma": 0.1, "scope": "module"}, {"density": 0.3, "gamma": 0.1}),
        ("breadcrumbs", {"density": 0.95, "gamma": 0.1, "scope": "module"}, {"density": 0.95, "gamma": 0.1}),
        (
            "breadcrumbs_ties",
            {"density": 0.3, "gamma": 0.1, "scope": "module", "disjoint": "sum"},
            {"density": 0.3, "gamma": 0.1},
        ),
        (
            "breadcrumbs_ties",
            {"density": 0.3, "gamma": 0.1, "scope": "module"},
            {"density": 0.3, "gamma": 0.1, "normalize": True},
        ),
    ],
)
def test_sparse_sums_and_elections_agree(
    folders: list[Path], method: str, asked: dict[str, Any], parameters: dict[str, Any]
) -> None:
    assert distance(own_merge(folders, method, **asked), mergekit_merge(folders, method, **parameters)) < 1e-5


@pytest.mark.parametrize(
    ("method", "name", "asked", "parameters"),
    [
        ("dare", "dare_linear", {}, {}),
        ("dare_ties", "dare_ties", {"disjoint": "sum"}, {}),
        ("dare_ties", "dare_ties", {}, {"normalize": True}),
    ],
)
def test_dare_agrees_but_for_the_rescaling(
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    name: str,
    asked: dict[str, Any],
    parameters: dict[str, Any],
) -> None:
    use_same_random_numbers(folders, monkeypatch)
    expected = mergekit_merge(folders, name, density=0.3, rescale=False, **parameters)
    assert distance(own_merge(folders, method, density=0.3, **asked), {m: v / 0.3 for m, v in expected.items()}) < 1e-5


def test_dares_rescaling_is_near_mergekits_in_large_tensors(make_lora: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, module = make_lora("wide", rank=4, shapes={"q": (300, 400)}), "q"
    drawn = torch.from_numpy(numbers(folder, module, (300, 400)))
    monkeypatch.setattr(torch, "bernoulli", lambda p: (drawn < p).to(p.dtype))
    expected = mergekit_merge([folder], "dare_linear", [1.0], density=0.3)[module]
    seen = own_merge([folder], "dare", density=0.3, weights=[1.0])[module]
    kept = np.abs(expected) > 1e-4
    assert np.median(seen[kept] / expected[kept]) == pytest.approx(1, abs=0.02)


def test_della_drops_the_same_entries_and_divides_each_by_its_own_probability(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {module: np.zeros(shape) for module, shape in SHAPES.items()}
    for folder, weight in zip(folders, WEIGHTS, strict=True):  # one at a time: each has its own probabilities
        use_same_random_numbers([folder], monkeypatch)
        kept = mergekit_merge([folder], "della_linear", [weight], density=0.5, epsilon=0.2, rescale=False)
        for module, values in read(folder).items():
            expected[module] += kept[module] / row_probability(values, 0.5, 0.2)
    assert distance(own_merge(folders, "della_linear", density=0.5, epsilon=0.2), expected) < 1e-5


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_sce_agrees_with_unit_weights(folders: list[Path], share: float) -> None:
    seen = own_merge(folders, "sce", select_topk=share, weights=None)
    assert distance(seen, mergekit_merge(folders, "sce", None, select_topk=share)) < 1e-5


def test_ties_with_negative_weights_differs_by_the_divisor(folders: list[Path]) -> None:
    weights = (1.0, -0.5, 2.0)
    seen = own_merge(folders, "ties", density=0.3, scope="module", disjoint="sum", weights=weights)
    assert distance(seen, mergekit_merge(folders, "ties", weights, density=0.3, normalize=False)) < 1e-5
    seen = own_merge(folders, "ties", density=0.3, scope="module", weights=weights)
    assert distance(seen, mergekit_merge(folders, "ties", weights, density=0.3)) > 0.1  # Σw there, Σ|w| here


def of_deltas(folders: Sequence[Path], method: str, base: bool = False, **asked: Any) -> Vectors:
    """mergekit's merge of the deltas as they are, or over a base of zeros."""
    stacks = [read(folder) for folder in folders]
    merged = {}
    for module in stacks[0]:
        deltas = [torch.from_numpy(vectors[module]) for vectors in stacks]
        inputs = [torch.zeros_like(deltas[0]), *deltas] if base else deltas
        where = {"base_index": 0} if base or method == "slerp" else {}
        merged[module] = merge_methods.merge_tensors(inputs, method, parameters=asked, **where).numpy()
    return merged


def test_linear_is_the_average(folders: list[Path]) -> None:
    assert distance(own_merge(folders, "average"), of_deltas(folders, "linear", weight=list(WEIGHTS))) < 1e-5


def test_karcher_agrees_on_the_deltas(folders: list[Path]) -> None:
    seen = own_merge(folders, "karcher", weights=None, max_iter=100, tol=1e-9)
    assert distance(seen, of_deltas(folders, "karcher", max_iter=100, tol=1e-9)) < 1e-4


def test_model_stock_agrees_where_adapters_do_not_oppose(make_lora: Maker) -> None:
    """Copies of one adapter with noise; below an agreement of 0 ours stops."""
    folders = [make_lora(f"m{n}", rank=4, seed=n) for n in range(2)]
    folders.append(make_lora("again", rank=4, alpha=12, seed=0))
    agreements = {m: np.mean([cosine(a[m], b[m]) for a, b in pairs([read(f) for f in folders])]) for m in SHAPES}
    assert min(agreements.values()) > 0.05
    seen = own_merge(folders, "model_stock", weights=None)
    assert distance(seen, of_deltas(folders, "model_stock", base=True)) < 1e-5


def pairs(own: Sequence[Vectors]) -> list[tuple[Vectors, Vectors]]:
    return [(own[i], own[j]) for i in range(len(own)) for j in range(i)]


def cosine(first: Any, second: Any) -> float:
    return float((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_agrees_in_direction_and_in_length_where_the_norms_are_equal(folders: list[Path], t: float) -> None:
    seen, pair = own_merge(folders[:2], "slerp", t=t, weights=None), [read(folder) for folder in folders[:2]]
    for module in SHAPES:
        norms = [float(np.linalg.norm(vectors[module])) for vectors in pair]
        units = [torch.from_numpy(v[module] / norm) for v, norm in zip(pair, norms, strict=True)]
        turned = merge_methods.merge_tensors(units, "slerp", parameters={"t": t}, base_index=0).numpy()
        length = (1 - t) * norms[0] + t * norms[1]
        assert np.linalg.norm(seen[module] - length * turned) < 1e-4 * length
        share = merge_methods.merge_tensors(units, "nuslerp", parameters={"weight": [1 - t, t]}).numpy()
        assert np.linalg.norm(seen[module] - length * share) < 1e-4 * length


UNEQUAL = [(1.0, 3.0), (2.0, -0.5), (-1.0, 3.0), (1.0, -1.0)]


def degrees(first: Any, second: Any) -> float:
    return float(np.degrees(np.arccos(cosine(first, second))))


@pytest.mark.parametrize("weights", UNEQUAL)
def test_slerps_form_mergekit_is_nuslerp_for_unequal_norms_and_negative_weights(
    make_lora: Maker, weights: tuple[float, float]
) -> None:
    pair = [make_lora("short", rank=4, seed=0), make_lora("long", rank=4, seed=1, gain=6.0)]
    expected = of_deltas(pair, "nuslerp", base=True, weight=list(weights))
    assert distance(own_merge(pair, "slerp", form="mergekit", weights=weights), expected) < 1e-5
    assert distance(own_merge(pair, "slerp", weights=weights), expected) > 0.1


def test_a_module_of_one_alone_is_met_by_zero_at_right_angles_as_in_nuslerp(make_lora: Maker) -> None:
    pair = [make_lora("a", rank=4), make_lora("b", rank=4, seed=1, shapes={"layers.0.q": SHAPES["layers.0.q"]})]
    first, second = map(read, pair)
    whole = {m: (v, second.get(m, np.zeros_like(v))) for m, v in first.items()}
    expected = {
        m: merge_methods.merge_tensors(
            [torch.zeros(v.shape, dtype=torch.float64), *map(torch.from_numpy, (v, w))],
            "nuslerp",
            parameters={"weight": [1.0, 3.0]},
            base_index=0,
        ).numpy()
        for m, (v, w) in whole.items()
    }
    assert distance(own_merge(pair, "slerp", form="mergekit", weights=(1.0, 3.0)), expected) < 1e-5


def test_slerps_forms_at_right_angles_and_norms_of_one_to_six(tmp_path: Path) -> None:
    pair = []
    for place, length in ((0, 1.0), (1, 6.0)):
        A, B = torch.zeros(1, 2), torch.full((1, 1), length)
        A[0, place] = 1
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"], "base_model_name_or_path": "b"}
        tensors = {f"{PREFIX}q.lora_A.weight": A, f"{PREFIX}q.lora_B.weight": B}
        pair.append(write_adapter(tmp_path / str(place), config, tensors))
    longer = np.array([[0.0, 1.0]])
    seen = {form: own_merge(pair, "slerp", form=form, weights=None)["q"] for form in ("even", "mergekit")}
    assert degrees(seen["even"], longer) == pytest.approx(45, abs=0.01)
    assert degrees(seen["mergekit"], longer) == pytest.approx(9.46, abs=0.01)
    assert np.linalg.norm(seen["even"]) == pytest.approx(3.5, rel=1e-5)
    assert np.linalg.norm(seen["mergekit"]) == pytest.approx(np.sqrt(37 / 2), rel=1e-5)


def test_mergekits_slerp_of_whole_weights_is_nearly_the_average(folders: list[Path]) -> None:
    pair = [read(folder) for folder in folders[:2]]
    average = own_merge(folders[:2], "average", weights=(0.7, 0.3))
    turned = own_merge(folders[:2], "slerp", t=0.3, weights=None)
    for module, shape in SHAPES.items():
        weight = 1000 * np.random.default_rng(0).standard_normal(shape)
        inputs = [torch.from_numpy(weight + vectors[module]) for vectors in pair]
        merged = merge_methods.merge_tensors(inputs, "slerp", parameters={"t": 0.3}, base_index=0).numpy() - weight
        length = np.linalg.norm(merged)
        assert np.linalg.norm(merged - average[module]) < 1e-4 * length
        assert np.linalg.norm(merged - turned[module]) > 0.05 * length


def test_mergekits_sce_ignores_the_energies_of_small_updates(make_lora: Maker) -> None:
    """Its rule for a sum of mean squares under 1e-6; ours does not depend on the length of the task vectors."""
    asked = {"rank": 4, "alpha": 4}
    pairs = {
        gain: [make_lora(f"{gain} {n}", **asked, seed=n, gain=gain * (1 + 2 * n)) for n in range(2)]
        for gain in (1.0, 1e-5)
    }
    large, small = (of_deltas(pair, "sce", base=True) for pair in pairs.values())
    assert max(sum(np.mean(read(f)[m] ** 2) for f in pairs[1e-5]) for m in SHAPES) < 1e-6
    assert distance({m: 1e-5 * v for m, v in large.items()}, small) > 0.1
    for gain, pair in pairs.items():
        seen = own_merge(pair, "sce", weights=None)
        assert distance(seen, {m: gain * v for m, v in large.items()}) < 1e-5
    alike = own_merge(pairs[1e-5], "ties", weights=None, density=1.0)
    assert distance(alike, small) < 1e-5


def test_della_drops_and_elects_the_same(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With epsilon next to nothing every entry is divided by one probability, there by none."""
    use_same_random_numbers(folders, monkeypatch)
    expected = mergekit_merge(folders, "della", density=0.5, epsilon=1e-9, rescale=False)
    seen = own_merge(folders, "della", density=0.5, epsilon=1e-9)
    assert distance(seen, {m: v / 0.5 for m, v in expected.items()}) < 1e-5
