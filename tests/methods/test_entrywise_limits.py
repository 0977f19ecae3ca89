"""The methods that work entry by entry, at their limits: one entry, zeros, tiny values, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PREFIX, lora_tensors, write_adapter
from methods.entrywise import COMBINE, EVERY, OVER_ADAPTERS, SCALES, defined, distance, merged_vectors, read, same
from sampling import covering

import ties_peft
from ties_peft.errors import MethodError
from ties_peft.merging.merge import merge_recipe
from ties_peft.task_vectors import tiles

Maker = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")  # of twins, of norms of 0


def tiny_adapters(tmp_path: Path, value: float, kind: str) -> list[Path]:
    """Two adapters of one module that has one entry, both of the same value."""
    folders = []
    for name in "ab":
        if kind == "ia3":
            config: dict[str, Any] = {"peft_type": "IA3", "target_modules": ["k"], "feedforward_modules": []}
            tensors = {f"{PREFIX}k.ia3_l": torch.full((1, 1), 1 + value)}
        else:
            config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["k"]}
            tensors = lora_tensors({"k": (1, 1)}, 1, 0)
            tensors = {n: torch.full_like(t, value if "_B" in n else 1.0) for n, t in tensors.items()}
        folders.append(write_adapter(tmp_path / name, config | {"base_model_name_or_path": "org/base"}, tensors))
    return folders


ODD = [("lora", name) for name in EVERY] + [("ia3", name) for name in (*EVERY, "power_mean", "product")]


@pytest.mark.parametrize(
    ("kind", "method", "value"),
    covering([(*odd, value) for odd, value in product(ODD, [0.0, 0.3, -1.0, 1e-20])], lambda case: (case[:2], case[2])),
)
def test_one_entry_zeros_and_tiny_values_stay_finite(tmp_path: Path, method: str, value: float, kind: str) -> None:
    folders = tiny_adapters(tmp_path, value, kind)
    (info,) = (info for info in ties_peft.methods() if info.name == method)
    has_density = any(parameter.name == "density" for parameter in info.parameters)
    for asked in ({}, {"density": 1.0}, {"density": 1e-6}) if has_density else ({},):
        for some in (folders, folders[:1]):
            merged = ties_peft.merge(some, method=method, **asked)
            assert bool(merged.delta("k").isfinite().all())
            assert float(merged.delta("k").abs().max()) <= 1e7 * abs(value)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "breadcrumbs"])
def test_equal_magnitudes_are_cut_by_position_where_one_adapter_is_thinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    config = {"peft_type": "IA3", "target_modules": ["k"], "feedforward_modules": [], "base_model_name_or_path": "b"}
    folder = write_adapter(tmp_path / "a", config, {f"{PREFIX}k.ia3_l": torch.full((20, 1), 1.5)})
    parameters = {"density": 1.0, **({"gamma": 0.0} if method == "breadcrumbs" else {})}
    recipe = ties_peft.Recipe(
        adapters=(str(folder),), method=method, scale=1.0, parameters=parameters, densities=(0.5,)
    )
    monkeypatch.setattr(tiles, "TILE", 7)
    merged = merge_recipe(recipe, [ties_peft.Adapter.load(folder)])
    assert merged.delta("k").tolist() == [0.5] * 10 + [0.0] * 10


def test_product_refuses_roots_of_negative_entries_and_inverses_of_zero(tmp_path: Path) -> None:
    folders = tiny_adapters(tmp_path, -2.0, "ia3")  # l = −1
    assert merged_vectors(folders, "product")["k"] == pytest.approx(0.0)  # (−1)·(−1) − 1
    assert merged_vectors(folders, "product", weights=[2, 1])["k"] == pytest.approx(-2.0)
    with pytest.raises(MethodError, match="root of a negative entry"):
        ties_peft.merge(folders, method="product", weights=[0.5, 1])
    gone = tiny_adapters(tmp_path, -1.0, "ia3")  # l = 0
    with pytest.raises(MethodError, match="inverse of 0"):
        ties_peft.merge(gone, method="product", weights=[-1, 1])


def test_methods_of_ia3_refuse_lora(make_lora: Maker) -> None:
    for method in ("power_mean", "product"):
        with pytest.raises(MethodError, match="not for LoRA"):
            ties_peft.merge([make_lora("a")], method=method)


def test_signs_need_an_election(make_ia3: Maker) -> None:
    adapters = [make_ia3(name, seed=seed) for seed, name in enumerate("ab")]
    for asked in ({"elect": "none"}, {"disjoint": "mean_all"}):
        with pytest.raises(MethodError, match="sign_from"):
            ties_peft.merge(adapters, method="ties", sign_from=adapters[0], **asked)


def test_every_method_here_says_what_it_is() -> None:
    infos = {info.name: info for info in ties_peft.methods()}
    for method in {*COMBINE, *OVER_ADAPTERS}:
        info = infos[method]
        assert info.summary.endswith("."), method
        assert "Law:" in info.text, method
        assert "Source:" in info.text, method
        assert all(parameter.meaning for parameter in info.parameters), method
        assert info.default_scale == SCALES.get(method, 1.0), method


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("ties", {}),
        ("magnitude_prune", {}),
        ("breadcrumbs", {"gamma": 0.1}),
        ("breadcrumbs_ties", {"gamma": 0.1, "scope": "module"}),
        ("dare", {}),
        ("dare_ties", {}),
        ("della", {"epsilon": 0.2}),
        ("della_linear", {"epsilon": 0.2}),
        ("pcb", {}),
    ],
)
def test_one_adapter_that_is_thinned_has_more_than_its_rank(
    make_lora: Maker, method: str, asked: dict[str, Any]
) -> None:
    folder = make_lora("a", seed=1)
    seen = merged_vectors([folder], method, weights=[-2.0], density=0.4, **asked)
    assert distance(seen, defined([folder], method, [-2.0], density=0.4, **asked)) < 1e-4


@pytest.mark.parametrize("method", ["magnitude_prune", "dare", "della_linear", "breadcrumbs"])
def test_a_sum_of_which_nothing_is_dropped_is_exact_at_the_sum_of_the_ranks(make_lora: Maker, method: str) -> None:
    folders = [make_lora("a", rank=2, seed=1), make_lora("b", rank=3, seed=2)]
    report = ties_peft.merge(folders, method=method, density=1.0, rank="max").report
    assert (report.rank, report.energy) == (5, pytest.approx(1.0, abs=1e-6))


@pytest.mark.parametrize("method", ["ties", "dare_ties", "della", "breadcrumbs_ties"])
def test_a_mean_over_the_number_keeps_a_single_weight(make_lora: Maker, method: str) -> None:
    folder = make_lora("a", seed=1)
    seen = merged_vectors([folder], method, weights=[-2.5], density=1.0, normalize=False)
    assert same(seen, {name: -2.5 * vector for name, vector in read(folder).items()})


def test_signs_from_another_decide_over_a_single_adapter(make_lora: Maker) -> None:
    folder, giver = make_lora("a", seed=1), make_lora("b", seed=2)
    seen = merged_vectors([folder], "ties", density=1.0, sign_from=str(giver))
    own, signs = read(folder), read(giver)
    assert same(seen, {name: own[name] * (own[name] * signs[name] > 0) for name in own})


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("ties", {"density": 1.0, "elect": "none", "disjoint": "sum"}),
        ("ties", {"density": 1.0, "elect": "none", "disjoint": "mean_elected", "normalize": False}),
        ("ties", {"density": 1.0, "disjoint": "mean_all", "normalize": False}),
        ("breadcrumbs_ties", {"density": 0.4, "gamma": 0.1, "scope": "module", "normalize": False}),
    ],
)
def test_sums_and_means_over_the_number_are_as_defined(make_lora: Maker, method: str, asked: dict[str, Any]) -> None:
    folders, weights = [make_lora(name, seed=seed) for seed, name in enumerate("ab")], [2.0, -0.5]
    assert (
        distance(merged_vectors(folders, method, weights=weights, **asked), defined(folders, method, weights, **asked))
        < 1e-4
    )


def test_a_large_power_of_small_entries_stays_in_range(make_ia3: Maker) -> None:
    folders = [make_ia3(name, seed=seed) for seed, name in enumerate("ab")]
    small = [{name: vector * 1.0 for name, vector in read(folder).items()} for folder in folders]
    seen = merged_vectors(folders, "power_mean", p=64, scale=1.0)
    for name, vector in seen.items():
        first, second = small[0][name], small[1][name]
        larger, other = (abs(first) > abs(second)), abs(first) / abs(second)
        clear = (other > 1.5) | (other < 1 / 1.5)  # the power leaves the other next to nothing
        assert vector[clear] == pytest.approx((larger * first + ~larger * second)[clear], rel=1e-4, abs=1e-6)


def test_an_entry_of_zero_needs_nothing(tmp_path: Path) -> None:
    """With threshold 0 whoever has an entry needs it; consensus asks for two."""
    config = {"peft_type": "IA3", "target_modules": ["k"], "feedforward_modules": [], "base_model_name_or_path": "b"}
    values = ([0.5, 0.5, 0.0], [0.0, 0.25, 0.0])
    folders = [
        write_adapter(tmp_path / str(n), config, {f"{PREFIX}k.ia3_l": 1 + torch.tensor(own).reshape(-1, 1)})
        for n, own in enumerate(values)
    ]
    assert merged_vectors(folders, "consensus", threshold=0.0, scale=1.0)["k"].tolist() == [0.0, 0.75, 0.0]
