"""The laws of a merge, on whatever adapters hypothesis thinks of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PREFIX, lora_config, lora_tensors
from hypothesis import assume, given
from hypothesis import strategies as st
from laws.strategies import (
    SHAPES,
    adapters,
    alike,
    equal_ranks,
    groups,
    ia3,
    integer_lora,
    integer_loras,
    law,
    loras,
    merged,
    methods,
    percents,
    positive,
    scopes,
    seeds,
    signed,
    tensors,
    ties,
    vectors,
    with_tensors,
    zeroed,
)
from oracles import definition
from oracles.definition import Vectors

from ties_peft import Adapter, TiesPeftError, merge

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
WEIGHTS = [1.0, -2.0, 0.5]
Asked = dict[str, Any]


def assert_same(first: Adapter, second: Adapter, factor: float = 1.0, within: float = 1e-4) -> None:
    """first = factor · second, module by module."""
    assert first.modules == second.modules
    for module in first.modules:
        expected = factor * second.delta(module)
        assert torch.dist(first.delta(module), expected) <= within * expected.norm() + 1e-6, module


def assert_is(adapter: Adapter, expected: Vectors) -> None:
    assert list(adapter.modules) == sorted(expected)
    for module, vector in expected.items():
        assert np.allclose(adapter.delta(module).numpy(), vector, rtol=1e-4, atol=1e-4), module


@contextmanager
def small_tiles(entries: int = 16, sample: int | None = None) -> Iterator[None]:
    """Tiles of so few entries, and thresholds guessed from so small a sample."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ties_peft.task_vectors.tiles.TILE", entries)
        if sample is not None:
            patch.setattr("ties_peft.merging.thresholds.SAMPLE_SIZES", (sample, sample))
            patch.setattr("ties_peft.task_vectors.threshold.SIGMAS", 0.5)
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


untrimmed_ties = ties.map(lambda asked: {**asked, "density": 1})
mean_ties = ties.map(lambda asked: {**asked, "disjoint": "mean"})


@law
@given(adapters, untrimmed_ties | st.sampled_from([{"method": "average"}, {"method": "task_arithmetic", "scale": 1}]))
def test_one_adapter_comes_back(adapter: Adapter, asked: Asked) -> None:
    assert_same(merged([adapter], **asked), adapter, within=1e-6)
    assert_same(merge([adapter], **asked), adapter, within=1e-6)


@law
@given(st.integers(1, 5), seeds, signed)
def test_one_adapter_comes_back_in_space_factors_whatever_its_weight(rank: int, seed: int, weight: float) -> None:
    adapter = Adapter.from_tensors(lora_config(SHAPES, rank, alpha=-3), lora_tensors(SHAPES, rank, seed))
    result = merged([adapter], space="factors", density=1, weights=[weight])
    assert_same(result, adapter, factor=np.sign(weight), within=1e-5)


@law
@given(equal_ranks(), st.permutations(WEIGHTS), percents)
def test_space_factors_merges_a_and_b_apart(members: list[Adapter], weights: list[float], percent: int) -> None:
    weights = weights[: len(members)]
    result = merged(members, space="factors", weights=weights, density=percent / 100)
    for module in result.modules:
        parts = [definition.lora_parts(a.config, tensors(a, np.float64), module) for a in members]
        expected = definition.ties_in_factors(parts, weights, percent / 100)
        assert np.allclose(result.delta(module).numpy(), expected, rtol=1e-4, atol=1e-4)


@law
@given(adapters, mean_ties, positive)
def test_a_single_positive_weight_does_not_matter(adapter: Adapter, asked: Asked, weight: float) -> None:
    assert_same(merged([adapter], weights=[weight], **asked), merged([adapter], **asked))


@law
@given(adapters, ties, positive)
def test_a_single_negative_weight_negates(adapter: Adapter, asked: Asked, weight: float) -> None:
    negated = merged([adapter], weights=[-weight], **asked)
    assert_same(negated, merged([adapter], weights=[weight], **asked), factor=-1)


@law
@given(groups, methods, st.data())
def test_order_does_not_matter(members: list[Adapter], asked: Asked, data: st.DataObject) -> None:
    weights = data.draw(st.lists(positive, min_size=len(members), max_size=len(members)))
    order = data.draw(st.permutations(range(len(members))))
    moved = merged([members[i] for i in order], weights=[weights[i] for i in order], **asked)
    assert_same(merged(members, weights=weights, **asked), moved)


@law
@given(groups, mean_ties | st.just({"method": "average"}), signed, positive)
def test_only_the_ratio_of_weights_matters(members: list[Adapter], asked: Asked, third: float, fourth: float) -> None:
    weights = [2, 1, third, fourth][: len(members)]
    assume(abs(sum(weights)) > 0.1)
    assert_same(merged(members, weights=[5 * w for w in weights], **asked), merged(members, weights=weights, **asked))


@law
@given(groups, ties, st.data())
def test_an_adapter_of_zeros_equals_an_absent_one(members: list[Adapter], asked: Asked, data: st.DataObject) -> None:
    more, weights = list(members), [1.0] * len(members)
    place, untrained = data.draw(st.integers(0, len(members))), zeroed(data.draw(st.sampled_from(members)))
    more.insert(place, untrained)
    weights.insert(place, data.draw(signed))
    assert_same(merged(more, weights=weights, **asked), merged(members, **asked))


@law
@given(groups, methods, st.permutations([torch.float16, torch.float32]))
def test_weight_zero_is_as_absent(members: list[Adapter], asked: Asked, dtypes: list[torch.dtype]) -> None:
    there, absent = [in_dtype(adapter, dtypes[0]) for adapter in members], in_dtype(members[0], dtypes[1])
    alone, beside = merge(there, **asked), merge([*there, absent], weights=[1] * len(there) + [0], **asked)
    assert beside.config == alone.config
    assert_equal_bytes(beside, alone)


def in_dtype(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    return with_tensors(adapter, {name: tensor.to(dtype) for name, tensor in tensors(adapter).items()})


@law
@given(groups, methods, st.sampled_from([-1.5, 0.0, 0.25, 3.0]))
def test_scale_is_linear(members: list[Adapter], asked: Asked, scale: float) -> None:
    assert_same(merged(members, scale=scale, **asked), merged(members, scale=1.0, **asked), factor=scale)


@law
@given(groups)
def test_task_arithmetic_over_n_is_the_average(members: list[Adapter]) -> None:
    assert_same(merged(members, method="task_arithmetic", scale=1 / len(members)), merged(members, method="average"))


@law
@given(alike, st.lists(positive, min_size=3, max_size=3))
def test_ties_of_adapters_that_agree_is_their_average(members: list[Adapter], weights: list[float]) -> None:
    agreeing, weights = [agreeable(adapter) for adapter in members], weights[: len(members)]
    average = merged(agreeing, method="average", weights=weights)
    assert_same(merged(agreeing, method="ties", density=1, weights=weights), average)


def agreeable(adapter: Adapter) -> Adapter:
    """The adapter with no negative entry in its task vector."""
    untouched = 0 if adapter.peft_type.has_rank else 1
    return with_tensors(adapter, {n: untouched + (t - untouched).abs() for n, t in tensors(adapter).items()})


@law
@given(st.lists(loras(), min_size=1, max_size=3), methods, seeds, st.sampled_from([1e-3, 1.0, 1e3]))
def test_another_factoring_is_the_same_adapter(members: list[Adapter], asked: Asked, seed: int, gain: float) -> None:
    regauged = [gauged(adapter, seed, gain) for adapter in members]
    assert_same(merged(regauged, **asked), merged(members, **asked))


def gauged(adapter: Adapter, seed: int, gain: float) -> Adapter:
    """(B·G, G⁻¹·A) for a random G on every module."""
    generator, found = torch.Generator().manual_seed(seed), tensors(adapter)
    for module, layout in adapter.layout.items():
        Q = torch.linalg.qr(torch.randn(layout.rank, layout.rank, generator=generator, dtype=torch.float64)).Q
        G = gain * Q * torch.linspace(0.5, 2, layout.rank)
        a, b = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")
        found[a] = (torch.linalg.inv(G) @ found[a].double()).float()
        found[b] = (found[b].double() @ G).float()
    return with_tensors(adapter, found)


@law
@given(integer_loras, percents, scopes, st.sampled_from([16, None]))
def test_equal_magnitudes_are_trimmed_by_position(
    adapter: Adapter, percent: int, scope: str, sample: int | None
) -> None:
    with small_tiles(sample=sample):
        result = merged([adapter], density=percent / 100, scope=scope)
    assert_is(result, definition.trim(vectors(adapter), percent / 100, scope))


@law
@given(seeds, percents, scopes)
def test_equal_magnitudes_of_an_ia3_are_trimmed_by_position(seed: int, percent: int, scope: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = {"layers.0.k": 40, "layers.0.down": 23, "layers.1.k": 40}
    adapter = ia3({name: torch.randint(-3, 4, (n,), generator=generator) / 8 for name, n in lengths.items()})
    with small_tiles(sample=4):
        result = merged([adapter], density=percent / 100, scope=scope)
    assert_is(result, definition.trim(vectors(adapter), percent / 100, scope))


@law
@given(st.lists(integer_loras, min_size=2, max_size=3), st.permutations(WEIGHTS), ties)
def test_sums_of_exactly_zero_are_elected_as_defined(
    members: list[Adapter], weights: list[float], asked: Asked
) -> None:
    weights = weights[: len(members)]
    rules = {"density": asked["density"], "scope": asked["scope"], "disjoint": asked["disjoint"]}
    expected = definition.ties([vectors(a) for a in members], weights, elect_by=asked["elect"], **rules)
    with small_tiles():
        assert_is(merged(members, weights=weights, **asked), expected)


@pytest.mark.parametrize("scope", ["adapter", "module"])
def test_equal_magnitudes_are_trimmed_by_position_where_tiles_are_many(scope: str) -> None:
    shapes = {"k": (31, 40), "q": (700, 660)}
    members = [integer_lora(shapes, seed) for seed in range(2)]
    expected = definition.ties([vectors(adapter) for adapter in members], [1, 2], density=0.29, scope=scope)
    assert_is(merged(members, weights=[1, 2], density=0.29, scope=scope), expected)


def test_exactly_as_many_as_asked_are_kept_where_tiles_are_many() -> None:
    shapes = {"q": (700, 660)}
    adapter = Adapter.from_tensors(lora_config(shapes, 4, alpha=4), lora_tensors(shapes, 4, seed=0))
    kept = merged([adapter], density=0.2).delta("q").abs()
    assert int((kept > 1e-3 * kept.max()).sum()) == 700 * 660 // 5


@law
@given(groups, ties)
def test_a_trim_that_keeps_nothing_writes_zeros(members: list[Adapter], asked: Asked) -> None:
    result = merged(members, **{**asked, "density": 1e-5})
    assert [line.kept for line in result.report.adapters] == [0] * len(members)
    assert not any(result.delta(module).any() for module in result.modules)
    assert set(result.modules) == {module for adapter in members for module in adapter.modules}


@law
@given(groups, ties)
def test_many_tiles_make_what_one_makes(members: list[Adapter], asked: Asked) -> None:
    with small_tiles():
        many = merged(members, **asked)
    assert_same(many, merged(members, **asked))


def assert_equal_bytes(first: Adapter, second: Adapter) -> None:
    ours, theirs = tensors(first), tensors(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.numpy().tobytes() == theirs[name].numpy().tobytes(), name


@law
@given(groups, methods)
def test_the_same_bytes_each_time_and_for_any_number_of_threads(members: list[Adapter], asked: Asked) -> None:
    with small_tiles():
        with threads(1):
            once = merge(members, **asked)
        with threads(2):
            assert_equal_bytes(merge(members, **asked), once)
            assert_equal_bytes(merge(members, **asked), once)


@pytest.mark.parametrize("asked", [{}, {"method": "average"}])
def test_the_same_bytes_for_any_number_of_threads_where_the_sides_are_large(asked: Asked) -> None:
    shapes = {"q": (700, 660)}
    members = [
        Adapter.from_tensors(lora_config(shapes, 4, alpha=4), lora_tensors(shapes, 4, seed)) for seed in range(3)
    ]
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(merge(members, rank=6, **asked))
    assert_equal_bytes(*results)


@law
@given(st.lists(loras(), min_size=1, max_size=3), methods, st.sampled_from(["sign_from", "base", "default"]))
def test_an_adapters_name_does_not_matter(members: list[Adapter], asked: Asked, name: str) -> None:
    named = [Adapter.from_tensors(dict(members[0].config), tensors(members[0]), name), *members[1:]]
    assert_equal_bytes(merge(named, **asked), merge(members, **asked))


def test_signs_of_another_rank_are_refused_in_space_factors() -> None:
    member, giver = (
        Adapter.from_tensors(lora_config(SHAPES, r, alpha=4), lora_tensors(SHAPES, r, seed=r)) for r in (2, 3)
    )
    with pytest.raises(TiesPeftError, match="rank"):
        merge([member], space="factors", density=0.5, sign_from=giver)
