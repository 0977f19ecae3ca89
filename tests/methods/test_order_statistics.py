"""Order statistics over whole adapters: exact on values of either sign, in any tiling, by any number of processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from methods.entrywise import defined, distance, merged_vectors

import ties_peft
from ties_peft.merging.merge import merge_recipe
from ties_peft.methods import method_classes, register
from ties_peft.methods.base import OrderStatistics, TaskVectors
from ties_peft.methods.pcb import Pcb
from ties_peft.task_vectors import order_statistics, tiles
from ties_peft.task_vectors.delta import Dense
from ties_peft.task_vectors.order_statistics import find_order_statistics
from ties_peft.task_vectors.tiles import ThreadPool

Maker = Callable[..., Path]
SIZES = (1, 40, 333)  # of the parts of a group
RANKS = (1, 2, 3, 7, 100, 187, 300, 373, 374)


def drawn(seed: int) -> list[torch.Tensor]:
    """Parts of a group: large and tiny values of both signs, zeros of both signs, and many that are equal."""
    draw = np.random.default_rng(seed)
    parts = []
    for size in SIZES:
        values = draw.standard_normal(size) * 10.0 ** draw.integers(-44, 38, size)
        values[draw.random(size) < 0.2] = 0.25
        values[draw.random(size) < 0.1] = -0.0
        parts.append(torch.from_numpy(values.astype(np.float32)))
    return parts


def raw_values(task_vectors: TaskVectors) -> Iterator[torch.Tensor]:
    return task_vectors.stream()


def iterate(groups: dict[str, list[torch.Tensor]], places: Sequence[int]) -> Callable[[], Any]:
    names = list(groups)
    parts = [TaskVectors([Dense(own[place]) for own in groups.values()], [1.0] * len(names)) for place in places]
    return lambda: [(part, names) for part in parts]


def ranked(group: list[torch.Tensor]) -> tuple[float, ...]:
    values = np.sort(torch.cat(group).numpy())[::-1]
    return tuple(float(values[rank - 1]) for rank in RANKS)


@pytest.fixture
def groups() -> dict[str, list[torch.Tensor]]:
    return {name: drawn(seed) for seed, name in enumerate("abc")}


WANTED = OrderStatistics(raw_values, lambda entries, density: RANKS, "adapter")


@pytest.mark.parametrize("together", [1, 2, 64])
@pytest.mark.parametrize("threads", [1, 3])
def test_order_statistics_are_those_of_the_sorted_values(
    groups: dict[str, list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch, threads: int, together: int
) -> None:
    monkeypatch.setattr(tiles, "TILE", 13)
    monkeypatch.setattr(order_statistics, "TOGETHER", together)
    pool = ThreadPool(threads)
    found = find_order_statistics([WANTED], iterate(groups, range(3)), dict.fromkeys(groups, 1.0), pool)
    pool.close()
    assert found == {name: ranked(group) for name, group in groups.items()}


def test_a_later_ranking_sees_the_order_statistics_of_those_before_it_and_ranks_hang_on_entries_and_density() -> None:
    values = {"x": [torch.tensor([1.0, -3.0, 2.0])], "y": [torch.tensor([5.0, 4.0, -6.0])]}
    largest = OrderStatistics(raw_values, lambda entries, density: (1,), "adapter")
    away = OrderStatistics(
        lambda vectors: (
            values.sub_(own[0]) for values, own in zip(vectors.stream(), vectors.order_statistics, strict=True)
        ),
        lambda entries, density: (round(entries * density),),
        "adapter",
    )
    found = find_order_statistics([largest, away], iterate(values, [0]), {"x": 1.0, "y": 1 / 3}, ThreadPool(1))
    assert found == {"x": (2.0, -5.0), "y": (5.0, 0.0)}


def test_processes_that_share_the_parts_find_the_same(groups: dict[str, list[torch.Tensor]]) -> None:
    """Two of them, of which the second has one part, meet at every gathering."""
    shared: dict[int, Any] = {}
    barrier = Barrier(2, timeout=60)

    def run(number: int) -> Any:
        def gather(own: Any) -> list[Any]:
            shared[number] = own
            barrier.wait()
            both = [shared[0], shared[1]]
            barrier.wait()
            return both

        mine = iterate(groups, [0, 2] if number == 0 else [1])
        return find_order_statistics([WANTED], mine, dict.fromkeys(groups, 1.0), ThreadPool(1), gather)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2)))
    assert found == [{name: ranked(group) for name, group in groups.items()}] * 2


HEADED = {"layers.0.q": (12, 10), "layers.0.up": (20, 12), "lm_head": (60, 12)}


def test_pcb_ranks_a_head_as_large_as_the_vocabulary_apart_and_says_so(make_lora: Maker) -> None:
    plain = {name: HEADED[name] for name in list(HEADED)[:2]}
    with_head = [make_lora(f"h{n}", rank=3, seed=n, shapes=HEADED) for n in range(2)]
    without = [make_lora(f"p{n}", rank=3, seed=n, shapes=plain) for n in range(2)]
    with pytest.warns(ties_peft.TiesPeftWarning, match="trimmed.*lm_head"):
        seen = merged_vectors(with_head, "pcb", density=0.3)
    expected = defined(with_head, "pcb", [1.0, 1.0], density=0.3, scope="module")["lm_head"]
    assert distance({"lm_head": seen.pop("lm_head")}, {"lm_head": expected}) < 1e-4
    assert distance(seen, merged_vectors(without, "pcb", density=0.3)) < 1e-4


def test_pcbs_density_may_be_set_for_each_adapter(make_lora: Maker) -> None:
    folders = [make_lora(f"d{n}", rank=3, seed=n) for n in range(2)]
    recipe = ties_peft.Recipe(tuple(map(str, folders)), method="pcb", rank="max", densities=(0.2, 0.6))
    merged = merge_recipe(recipe)
    seen = {name: merged.delta(name).double().numpy() for name in merged.modules}
    assert distance(seen, defined(folders, "pcb", [1.0, 1.0], density=(0.2, 0.6))) < 1e-4


@pytest.mark.parametrize("scope", ["adapter", "module"])
def test_a_subclass_of_pcb_with_a_merge_of_its_own_is_given_the_order_statistics_too(
    make_lora: Maker, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    """It is handed whole modules; the one entry that counts is known by its bits."""
    monkeypatch.setattr(sys.modules["ties_peft.methods"], "_REGISTERED", {})
    monkeypatch.setattr(tiles, "TILE", 13)

    class Mine(Pcb):
        """A test."""

        name: ClassVar[str] = "mine"

        def merge(self, task_vectors: TaskVectors) -> Any:
            assert task_vectors.tile is None
            return super().merge(task_vectors)

    register(Mine)
    folders = [make_lora(f"s{n}", rank=3, seed=n) for n in range(2)]
    for density in (1e-9, 0.3):
        asked = {"density": density, "scope": scope}
        assert (
            distance(merged_vectors(folders, "mine", scale=1.2, **asked), merged_vectors(folders, "pcb", **asked))
            < 1e-6
        )
    method_classes.cache_clear()
