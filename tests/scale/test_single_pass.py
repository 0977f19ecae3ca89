"""One pass that counts and votes gives the bytes of two, on every shape; and samples that are fair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ties_peft
from ties_peft.adapters.adapter import Adapter
from ties_peft.task_vectors.delta import Dense, LowRank
from ties_peft.task_vectors.kernels import backends as fast
from ties_peft.task_vectors.single_pass import SinglePass

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(fast, "WORTH", 0)
    for module in ("task_vectors.threshold", "merging.thresholds"):
        monkeypatch.setattr(f"ties_peft.{module}.SORTED_SIZE", 10)


@contextmanager
def passes(single: bool, **others: Callable[..., Any]) -> Iterator[list[int]]:
    """Merge in a single pass wherever it can be, or never; the list says how often that sufficed."""
    used: list[int] = []
    plain = SinglePass.result

    def result(self: SinglePass, *given: Any) -> Any:
        used.append(len(self.deltas))
        return plain(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ties_peft.task_vectors.single_pass.MOST", 99)
        patch.setattr(SinglePass, "suffices", lambda self, searches: single)
        patch.setattr(SinglePass, "most", lambda self, entries: entries)
        patch.setattr(SinglePass, "result", result)
        for name, other in others.items():
            patch.setattr(SinglePass, name, other)
        yield used


def adapters(kind: str, ranks: list[int], rows: int, columns: int) -> list[ties_peft.Adapter]:
    """LoRAs on one module, in memory: `smooth`, of many `repeated` magnitudes, with rows and adapters of `zeros`."""
    draw = torch.Generator().manual_seed(5)
    made = []
    for number, rank in enumerate(ranks):
        B, A = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
        if kind == "repeated":
            B, A = B.sign(), A.sign()
        if kind == "zeros":
            B, A = B * (number != 1), A * (torch.arange(columns) % 3 > 0)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["m"]}
        names = [f"base_model.model.m.lora_{side}.weight" for side in "BA"]
        made.append(Adapter.from_tensors(config, dict(zip(names, (B, A), strict=True))))
    return made


def tensors(merged: ties_peft.Merged) -> list[bytes]:
    return [merged.tensors.read(name).numpy().tobytes() for name in merged.tensors.names]


def told(merged: ties_peft.Merged) -> list[Any]:
    return [merged.report.conflict, *(line.kept for line in merged.report.adapters)]


ASKED: list[dict[str, Any]] = [
    {},
    {"weights": [1, -2, 0.5]},
    {"weights": [1, -2, 0.5], "normalize": False},
    {"weights": [3, 0.1, 0.7], "disjoint": "sum"},
    {"density": 0.5},
]


@pytest.mark.parametrize("kind", ["smooth", "repeated", "zeros"])
@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [
        (1, 1, [1]),
        (1, 300, [1, 1, 1]),
        (300, 1, [2, 1, 2]),
        (130, 61, [1, 1, 1]),
        (70, 256, [16] * 8),
        (37, 513, [7, 1, 30, 2, 9]),
        (67, 97, [1, 2, 3] * 11),
    ],
)
@pytest.mark.parametrize("tile", [450, 1 << 18])
def test_one_pass_gives_the_bytes_of_two(
    monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, columns: int, ranks: list[int], tile: int
) -> None:
    monkeypatch.setattr("ties_peft.task_vectors.tiles.TILE", tile)  # with 450, tails of rows and of columns
    given = adapters(kind, ranks, rows, columns)
    for asked in ASKED:
        own = {**asked, "weights": (asked["weights"] * len(ranks))[: len(ranks)]} if "weights" in asked else asked
        how = {"scope": "module", "rank": min(rows, columns, 16), **own}
        with passes(single=False) as never:
            two = ties_peft.merge(given, **how)
        with passes(single=True) as often:
            one = ties_peft.merge(given, **how)
        assert tensors(one) == tensors(two), asked
        assert told(one) == told(two), asked
        assert not never and (often or rows * columns <= 10)


@pytest.mark.parametrize("threads", [2, 3])
def test_a_single_pass_has_the_same_bytes_for_any_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    monkeypatch.setattr("ties_peft.task_vectors.tiles.TILE", 2000)
    given, before = adapters("repeated", [4] * 5, 90, 170), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with passes(single=True) as used:
            alone = ties_peft.merge(given, scope="module", rank=8)
            torch.set_num_threads(threads)
            together = ties_peft.merge(given, scope="module", rank=8)
    finally:
        torch.set_num_threads(before)
    assert used == [5, 5] and tensors(alone) == tensors(together)


@pytest.mark.parametrize("why", ["missed", "no room"])
def test_a_single_pass_that_does_not_suffice_changes_nothing(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    given = adapters("smooth", [4] * 3, 90, 170)
    with passes(single=False):
        two = ties_peft.merge(given, scope="module", rank=8)
    if why == "missed":
        monkeypatch.setattr("ties_peft.task_vectors.threshold.SIGMAS", 1e-3)
    others = {"most": lambda self, entries: 1} if why == "no room" else {}
    with passes(single=True, **others) as used:
        one = ties_peft.merge(given, scope="module", rank=8)
    assert not used and tensors(one) == tensors(two) and told(one) == told(two)


def test_a_glance_is_made_of_few_and_two_walks_of_many() -> None:
    seen: list[int] = []
    plain = SinglePass.result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SinglePass, "result", lambda self, *given: (seen.append(len(self.deltas)), plain(self, *given))[1]
        )
        for count in (3, 33):
            ties_peft.merge(adapters("smooth", [2] * count, 700, 800), scope="module", rank=4)
    assert seen == [3]


def test_over_the_only_module_both_scopes_are_one() -> None:
    given = adapters("smooth", [3] * 4, 60, 80)
    with passes(single=True) as used:
        both = [ties_peft.merge(given, scope=scope, rank=8) for scope in ("module", "adapter")]
    assert used == [4, 4] and tensors(both[0]) == tensors(both[1]) and told(both[0]) == told(both[1])


@pytest.mark.parametrize("asked", [{"elect": "count"}, {"disjoint": "max"}, {"elect": "none"}, {"method": "dare_ties"}])
def test_what_needs_more_than_a_glance_gets_it(asked: dict[str, Any]) -> None:
    given = adapters("smooth", [3] * 4, 60, 80)
    scope = {} if "method" in asked else {"scope": "module"}
    with passes(single=True) as used:
        ties_peft.merge(given, rank=8, **asked, **scope)
    assert not used


@pytest.mark.parametrize(("rows", "columns"), [(1, 5000), (5000, 1), (300, 500), (40, 3000)])
@pytest.mark.parametrize("count", [1, 700, 1 << 14])
def test_a_sample_is_of_the_entries_and_as_good_as_one_drawn_alone(rows: int, columns: int, count: int) -> None:
    draw = torch.Generator().manual_seed(2)
    gains = torch.randn(rows, 1, generator=draw).exp()
    delta = LowRank(torch.randn(rows, 3, generator=draw) * gains, torch.randn(3, columns, generator=draw))
    dense = delta.dense()
    for vector in (delta, Dense(dense)):
        shares = []
        for seed in range(30):
            drawn = vector.sample(count, np.random.default_rng(seed))
            assert torch.equal(drawn, vector.sample(count, np.random.default_rng(seed)))
            assert count <= len(drawn) <= count + 32**2
            shares.append(float((drawn.abs() > 1.0).double().mean()))
        if count < 100:
            nearest = (dense.reshape(-1, 1) - drawn).abs().amin(0)
            assert float(nearest.max()) < 1e-5
            continue
        share = float((dense.abs() > 1.0).double().mean())
        alone = (share * (1 - share) / count) ** 0.5
        assert abs(np.mean(shares) - share) < 4 * alone / 30**0.5
        assert np.std(shares) < 1.5 * alone


def test_whole_merges_glance_from_files(make_lora: Callable[..., Path]) -> None:
    shapes = {"layers.0.q": (37, 53), "layers.0.up": (130, 61)}
    paths = [make_lora(f"a{n}", rank=4, seed=n, shapes=shapes) for n in range(4)]
    with passes(single=True) as used:
        one = ties_peft.merge(paths, scope="module", rank=8)
    with passes(single=False):
        two = ties_peft.merge(paths, scope="module", rank=8)
    assert used == [4, 4] and tensors(one) == tensors(two)
