"""The methods that work entry by entry, against their definitions, PEFT and their laws."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import OLDER_PEFT, PREFIX, SHAPES, write_adapter
from methods.entrywise import EVERY, Vectors, count, defined, distance, merged_vectors, numbers, read, same
from peft.utils import merge_utils
from safetensors.numpy import load_file
from sampling import covering

import ties_peft
from ties_peft.merging.merge import merge_recipe
from ties_peft.task_vectors import tiles

Maker = Callable[..., Path]
VECTORS = {"layers.0.k": (12, False), "layers.0.down": (20, True), "layers.1.k": (12, False)}
WEIGHTS = [(1.0, 1.0, 1.0), (1.0, -0.5, 2.0)]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.errors.TiesPeftWarning")  # of twins, of unequal norms


def lora_set(make_lora: Maker) -> list[Path]:
    """Three LoRAs of unlike ranks and sizes, the last without one module."""
    fewer = {name: SHAPES[name] for name in ("layers.0.q", "layers.0.up")}
    return [
        make_lora("a", rank=4, seed=1, gain=0.05),
        make_lora("b", rank=3, seed=2, gain=0.1),
        make_lora("c", rank=5, seed=3, gain=0.05, shapes=fewer),
    ]


def ia3_set(make_ia3: Maker) -> list[Path]:
    """Three (IA)³, the last without one module."""
    fewer = {name: VECTORS[name] for name in ("layers.0.k", "layers.0.down")}
    return [make_ia3("a", seed=1), make_ia3("b", seed=2), make_ia3("c", seed=3, vectors=fewer)]


@pytest.fixture(params=["lora", "ia3"])
def adapters(request: pytest.FixtureRequest) -> list[Path]:
    return {"lora": lora_set, "ia3": ia3_set}[request.param](request.getfixturevalue(f"make_{request.param}"))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("cat", {}),
    ("magnitude_prune", {}),
    ("magnitude_prune", {"density": 0.3, "scope": "module", "scale": 1.0}),
    ("dare", {}),
    ("dare", {"density": 0.2, "seed": 7, "scale": 1.0}),
    ("dare_ties", {}),
    ("dare_ties", {"density": 0.3, "elect": "count", "disjoint": "sum", "seed": 3}),
    ("dare_ties", {"density": 0.3, "normalize": False}),
    ("della", {}),
    ("della", {"density": 0.4, "epsilon": 0.3, "disjoint": "max", "seed": 5}),
    ("della_linear", {}),
    ("della_linear", {"density": 0.5, "epsilon": 0.25, "seed": 2}),
    ("breadcrumbs", {}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.15, "scope": "module"}),
    ("breadcrumbs", {"density": 0.9, "gamma": 0.3}),
    ("breadcrumbs_ties", {}),
    ("breadcrumbs_ties", {"density": 0.4, "gamma": 0.1, "elect": "count", "disjoint": "sum"}),
    ("consensus", {}),
    ("consensus", {"threshold": 0.8, "agree": 1, "scale": 1.0}),
    ("emr", {}),
    ("sce", {}),
    ("sce", {"select_topk": 0.3}),
    ("pcb", {}),
    ("pcb", {"density": 0.3, "scale": 1.0}),
    ("pcb", {"density": 0.5, "clamp": 0.2}),
    ("pcb", {"density": 0.07, "clamp": 0.0}),
    ("pcb", {"density": 0.9, "scope": "module"}),
    ("pcb", {"density": 0.33, "clamp": 0.013, "scope": "module"}),
    ("pcb", {"density": 1.0}),
    ("ties", {}),
    ("ties", {"elect": "none"}),
    ("ties", {"elect": "none", "density": 1.0}),
    ("ties", {"elect": "none", "disjoint": "sum", "density": 0.4}),
    ("ties", {"elect": "none", "disjoint": "max", "density": 0.4}),
    ("ties", {"elect": "none", "normalize": False, "density": 0.4}),
    ("ties", {"disjoint": "mean_elected"}),
    ("ties", {"disjoint": "mean_elected", "normalize": False, "elect": "count"}),
    ("ties", {"disjoint": "mean_all"}),
    ("ties", {"disjoint": "mean_all", "density": 1.0}),
    ("ties", {"disjoint": "mean_elected", "density": 1.0, "elect": "none"}),
]


@pytest.mark.parametrize(
    ("adapters", "method", "asked", "weights"),
    covering(
        [(kind, *case, weights) for kind, case, weights in product(["lora", "ia3"], CASES, WEIGHTS)],
        lambda case: (repr(case[:3]), case[3]),
    ),
    indirect=["adapters"],
)
def test_a_merge_is_as_defined(
    adapters: list[Path], method: str, asked: dict[str, Any], weights: tuple[float, ...]
) -> None:
    seen = merged_vectors(adapters, method, weights=weights, **asked)
    assert distance(seen, defined(adapters, method, weights, **asked)) < 1e-4


@pytest.mark.parametrize(
    ("method", "asked", "weights"),
    [
        ("power_mean", {}, (1.0, 1.0, 1.0)),
        ("power_mean", {"p": 0.5, "scale": 1.0}, (1.0, -0.5, 2.0)),
        ("power_mean", {"p": 5}, (3.0, 0.2, 2.0)),
        ("product", {}, (1.0, 1.0, 1.0)),
        ("product", {"scale": 0.5}, (2.0, -1.0, 0.5)),
    ],
)
def test_the_methods_of_ia3_are_as_defined(
    make_ia3: Maker, method: str, asked: dict[str, Any], weights: tuple[float, ...]
) -> None:
    folders = ia3_set(make_ia3)
    seen = merged_vectors(folders, method, weights=weights, **asked)
    assert distance(seen, defined(folders, method, weights, **asked)) < 1e-4


# -- PEFT


def peft_merge(folders: Sequence[Path], merge: Callable[..., torch.Tensor], **asked: Any) -> Vectors:
    """PEFT's function on the deltas of each module."""
    stacks = [read(folder) for folder in folders]
    return {
        m: merge([torch.from_numpy(v[m]) for v in stacks], torch.ones(len(stacks)), **asked).numpy() for m in stacks[0]
    }


def whole_loras(make_lora: Maker) -> list[Path]:
    return [make_lora(f"w{n}", rank=4, seed=n) for n in range(3)]


def test_magnitude_prune_and_ties_are_pefts_with_scope_module_and_unit_weights(make_lora: Maker) -> None:
    folders = whole_loras(make_lora)
    seen = merged_vectors(folders, "magnitude_prune", density=0.3, scope="module", scale=1.0)
    assert distance(seen, peft_merge(folders, merge_utils.magnitude_prune, density=0.3)) < 1e-4
    for ours, theirs in (("mass", "total"), ("count", "frequency")):
        seen = merged_vectors(folders, "ties", density=0.3, scope="module", elect=ours)
        assert distance(seen, peft_merge(folders, merge_utils.ties, density=0.3, majority_sign_method=theirs)) < 1e-4


@pytest.mark.skipif(OLDER_PEFT, reason="this release of PEFT does not rescale what stays")
@pytest.mark.parametrize(("method", "theirs"), [("dare", "dare_linear"), ("dare_ties", "dare_ties")])
def test_dare_is_pefts_given_the_same_numbers(
    make_lora: Maker, monkeypatch: pytest.MonkeyPatch, method: str, theirs: str
) -> None:
    folders = whole_loras(make_lora)
    drawn = iter([numbers(folder, m, SHAPES[m]) for m in sorted(SHAPES) for folder in folders])
    monkeypatch.setattr(torch, "bernoulli", lambda p: (torch.from_numpy(next(drawn)) < p).double())
    expected = peft_merge(folders, getattr(merge_utils, theirs), density=0.3)
    assert distance(merged_vectors(folders, method, density=0.3, scale=1.0), expected) < 1e-4


def test_dare_keeps_as_many_as_peft_does(make_lora: Maker) -> None:
    folder = make_lora("wide", rank=2, shapes={"q": (200, 300)})
    torch.manual_seed(0)
    theirs = peft_merge([folder], merge_utils.dare_linear, density=0.3)["q"]
    ours = merged_vectors([folder], "dare", density=0.3, scale=1.0)["q"]
    shares = [float((np.abs(merged) > 1e-4).mean()) for merged in (ours, theirs)]
    assert shares == pytest.approx([0.3, 0.3], abs=4 * math.sqrt(0.21 / ours.size))


def test_in_factors_magnitude_prune_is_pefts_plain_one(make_lora: Maker) -> None:
    folders = [make_lora(f"f{n}", rank=4, alpha=4, seed=n) for n in range(3)]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    expected = {}
    for module in SHAPES:
        A, B = (
            merge_utils.magnitude_prune(
                [torch.from_numpy(t[f"{PREFIX}{module}.lora_{side}.weight"]) for t in tensors],
                torch.ones(3),
                density=0.4,
            )
            for side in "AB"
        )
        expected[module] = (B @ A).numpy()
    seen = merged_vectors(folders, "magnitude_prune", space="factors", density=0.4, scale=1.0)
    assert distance(seen, expected) < 1e-4


# -- laws


@pytest.mark.parametrize(
    ("method", "asked", "other", "otherwise"),
    [
        ("cat", {}, "task_arithmetic", {"scale": 1.0}),
        ("dare", {"density": 1.0}, "task_arithmetic", {}),
        ("dare", {"density": 1.0, "scale": 0.7}, "task_arithmetic", {"scale": 0.7}),
        ("magnitude_prune", {"density": 1.0}, "task_arithmetic", {}),
        ("della_linear", {"density": 1.0}, "task_arithmetic", {}),
        ("breadcrumbs", {"density": 1.0}, "task_arithmetic", {}),
        ("consensus", {"agree": 0}, "task_arithmetic", {}),
        ("dare_ties", {"density": 1.0}, "ties", {"density": 1.0}),
        ("della", {"density": 1.0}, "ties", {"density": 1.0}),
        ("della", {"density": 0.4, "epsilon": 0.0}, "dare_ties", {"density": 0.4}),
        ("della_linear", {"density": 0.4, "epsilon": 0.0}, "dare", {"density": 0.4}),
        ("breadcrumbs", {"gamma": 0.0}, "magnitude_prune", {}),
        ("breadcrumbs_ties", {"gamma": 0.0}, "ties", {}),
        ("emr", {}, "ties", {"density": 1.0, "disjoint": "max"}),
        ("ties", {"density": 1.0, "disjoint": "mean_all"}, "average", {}),
        ("ties", {"disjoint": "mean_all"}, "magnitude_prune", {"scale": 1 / 3}),
        ("dare+ties", {"dare.density": 0.4, "ties.density": 1.0}, "dare_ties", {"density": 0.4}),
        ("dare+task_arithmetic", {"density": 0.4}, "dare", {"density": 0.4}),
    ],
)
def test_methods_meet_where_they_should(
    adapters: list[Path], method: str, asked: dict[str, Any], other: str, otherwise: dict[str, Any]
) -> None:
    assert same(merged_vectors(adapters, method, **asked), merged_vectors(adapters, other, **otherwise))


def test_dare_before_ties_is_dare_ties_bit_for_bit(adapters: list[Path]) -> None:
    two = ties_peft.merge(adapters, method="dare+ties", seed=4, **{"dare.density": 0.3, "ties.density": 1.0})
    one = ties_peft.merge(adapters, method="dare_ties", seed=4, density=0.3)
    assert all(torch.equal(two.delta(name), one.delta(name)) for name in one.modules)


@pytest.mark.parametrize(
    ("method", "asked"), [("dare", {"density": 0.3}), ("della_linear", {"density": 0.4, "epsilon": 0.2})]
)
def test_the_expectation_over_seeds_is_the_sum(make_ia3: Maker, method: str, asked: dict[str, Any]) -> None:
    folder = make_ia3("long", seed=1, vectors={"k": (4000, False)})
    truth = read(folder)["k"]
    runs = [merged_vectors([folder], method, seed=seed, scale=1.0, **asked)["k"] / truth for seed in range(12)]
    for part in np.array_split(np.argsort(np.abs(truth)), 4):  # small entries as well as large ones
        ratios = np.stack(runs)[:, part]
        assert ratios.mean() == pytest.approx(1, abs=4.5 * ratios.std() / math.sqrt(ratios.size))


RANDOM = ["dare", "dare_ties", "della", "della_linear"]


@pytest.mark.parametrize("method", RANDOM)
def test_seeds_differ_and_repeat(adapters: list[Path], method: str) -> None:
    runs = [merged_vectors(adapters, method, seed=seed) for seed in (0, 1, 0)]
    assert distance(runs[0], runs[1]) > 0.1
    assert distance(runs[0], runs[2]) == 0


@pytest.mark.parametrize("method", EVERY)
def test_any_tiling_gives_the_same(adapters: list[Path], monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    whole = merged_vectors(adapters, method)
    monkeypatch.setattr(tiles, "TILE", 7)
    assert distance(merged_vectors(adapters, method), whole) < 1e-5


@pytest.mark.parametrize("method", EVERY)
def test_order_does_not_matter(adapters: list[Path], method: str) -> None:
    ahead = merged_vectors(adapters, method, weights=[1, 2, -0.5])
    assert distance(merged_vectors(adapters[::-1], method, weights=[-0.5, 2, 1]), ahead) < 1e-5


FULL = {"density": 1.0}
IDENTITIES: list[tuple[str, dict[str, Any]]] = [
    ("cat", {}),
    ("magnitude_prune", FULL),
    ("dare", FULL),
    ("dare_ties", FULL),
    ("della", FULL),
    ("della_linear", FULL),
    ("breadcrumbs", FULL),
    ("breadcrumbs_ties", FULL),
    ("sce", {}),
    ("sce", {"select_topk": 0.3}),
    ("consensus", {}),
    ("emr", {}),
    ("ties", FULL | {"elect": "none"}),
    ("ties", FULL | {"disjoint": "mean_elected"}),
    ("ties", FULL | {"disjoint": "mean_all"}),
]
DIVIDED = {"dare_ties", "della", "breadcrumbs_ties", "sce", "ties", "power_mean"}


@pytest.mark.parametrize(("method", "asked"), IDENTITIES)
def test_one_adapter_comes_back(adapters: list[Path], method: str, asked: dict[str, Any]) -> None:
    one, truth = adapters[:1], read(adapters[0])
    assert same(merged_vectors(one, method, scale=1.0, **asked), truth)
    weighted = -1.0 if method in DIVIDED else -2.5  # a mean divides by |w|
    expected = {m: weighted * v for m, v in truth.items()}
    assert same(merged_vectors(one, method, weights=[-2.5], scale=1.0, **asked), expected)


def test_one_ia3_comes_back_from_the_methods_of_its_own(make_ia3: Maker) -> None:
    folder = make_ia3("a", seed=1)
    for method in ("power_mean", "product"):
        assert same(merged_vectors([folder], method, scale=1.0), read(folder))
    stretched = {m: 1.5 * v for m, v in read(folder).items()}
    assert same(merged_vectors([folder], "power_mean"), stretched)
    assert same(
        merged_vectors([folder] * 2, "product", weights=[2, 1]), merged_vectors([folder], "product", weights=[3])
    )
    assert all(np.abs(v).max() < 1e-6 for v in merged_vectors([folder] * 2, "product", weights=[2, -2]).values())


@pytest.mark.parametrize("method", ["sce", "power_mean", "emr", "consensus", "pcb"])
def test_equal_adapters_agree(make_ia3: Maker, method: str) -> None:
    folders = [make_ia3(name, seed=1) for name in "ab"]
    asked = {"clamp": 0.0, "scope": "module"} if method == "pcb" else {}
    seen = merged_vectors(folders, method, scale=1.0, **asked)
    truth = read(folders[0])
    if method == "pcb":  # what is not dropped is the adapters' own; three modules of 12, 20 and 12: one or two each
        assert all(np.isclose(seen[m][seen[m] != 0], truth[m][seen[m] != 0]).all() for m in truth)
        assert all(np.count_nonzero(v) >= 1 for v in seen.values())
    else:
        assert same(seen, {m: (2 if method == "consensus" else 1) * v for m, v in truth.items()})


@pytest.mark.parametrize("method", ["sce", "power_mean", "emr", "consensus", "pcb", "dare_ties", "breadcrumbs_ties"])
def test_an_adapter_of_zeros_changes_nothing(make_ia3: Maker, tmp_path: Path, method: str) -> None:
    folders = [make_ia3(name, seed=seed) for seed, name in enumerate("ab")]
    config = json.loads((folders[0] / "adapter_config.json").read_text(encoding="utf-8"))
    ones = {n: torch.ones(t.shape) for n, t in load_file(folders[0] / "adapter_model.safetensors").items()}
    idle = write_adapter(tmp_path / "idle", config, ones)
    if method == "pcb":  # it counts the adapters; so compare with one that has nothing there
        assert all(np.isfinite(v).all() and v.any() for v in merged_vectors([*folders, idle], method).values())
    else:
        assert same(merged_vectors([*folders, idle], method), merged_vectors(folders, method))


@pytest.mark.parametrize("method", ["sce", "power_mean", "dare_ties", "breadcrumbs_ties", "della"])
def test_only_the_ratio_of_weights_counts_in_a_mean(make_ia3: Maker, method: str) -> None:
    folders = [make_ia3(name, seed=seed) for seed, name in enumerate("ab")]
    few = merged_vectors(folders, method, weights=[2, 1])
    assert same(few, merged_vectors(folders, method, weights=[10, 5]))


def test_breadcrumbs_drops_the_largest_and_reports_what_it_keeps(make_lora: Maker) -> None:
    folder = make_lora("a", seed=1)
    merged = ties_peft.merge([folder], method="breadcrumbs", density=0.25, gamma=0.1, rank="max")
    (line,) = merged.report.adapters
    assert (line.kept, line.entries) == (count(0.25, 480), 480)
    magnitudes = np.sort(np.concatenate([np.abs(v).reshape(-1) for v in read(folder).values()]))
    kept = max(float(merged.delta(name).abs().max()) for name in merged.modules) / 0.4
    assert kept == pytest.approx(magnitudes[-49], rel=1e-4)


def test_consensus_removes_what_one_adapter_alone_needs(make_ia3: Maker) -> None:
    folders = ia3_set(make_ia3)
    seen = merged_vectors(folders, "consensus", threshold=0.4, agree=2)
    values = np.stack([read(f)["layers.0.down"] for f in folders])
    needed = (np.abs(values) > 0.4 * np.abs(values.sum(0) - values)).sum(0)
    assert ((seen["layers.0.down"] != 0) == (needed >= 2)).all()
    assert set(needed) >= {1, 2}, "the sample shows both"
    fewer = {name: VECTORS[name] for name in ("layers.0.k", "layers.0.down")}
    alone = [folders[0], *(make_ia3(f"few{n}", seed=n, vectors=fewer) for n in (5, 6))]
    assert not merged_vectors(alone, "consensus")["layers.1.k"].any(), "one of three has this module"
    assert same(merged_vectors(folders, "consensus", agree=9), merged_vectors(folders, "consensus", agree=3))


def test_pcb_stays_within_the_adapters_own_range(adapters: list[Path]) -> None:
    seen = merged_vectors(adapters, "pcb", density=0.5, clamp=0.0, scale=1.0)
    own = [read(folder) for folder in adapters]
    for module, values in seen.items():
        held = np.stack([np.zeros_like(values), *(v[module] for v in own if module in v)])
        assert (values <= held.max(0) + 1e-5).all()
        assert (values >= held.min(0) - 1e-5).all()
    alone = merged_vectors(adapters[:1], "pcb", density=0.5, clamp=0.0, scale=1.0)
    for module, values in alone.items():
        kept = np.abs(values) > 1e-5
        assert values[kept] == pytest.approx(own[0][module][kept], rel=1e-3, abs=1e-5)
        assert np.count_nonzero(kept) == pytest.approx(0.5 * kept.size, abs=2)


def test_sce_of_equal_energies_is_the_election(make_ia3: Maker, tmp_path: Path) -> None:
    first = make_ia3("a", seed=1)
    config = json.loads((first / "adapter_config.json").read_text(encoding="utf-8"))
    turned = {n: 2 - torch.from_numpy(t).flip(0, 1) for n, t in load_file(first / "adapter_model.safetensors").items()}
    folders = [first, write_adapter(tmp_path / "turned", config, {n: t.contiguous() for n, t in turned.items()})]
    assert same(merged_vectors(folders, "sce"), merged_vectors(folders, "ties", density=1.0))


@pytest.mark.parametrize(
    ("method", "asked"),
    [
        ("sce", {}),
        ("emr", {}),
        ("dare_ties", {"density": 1.0}),
        ("ties", {"density": 1.0}),
        ("ties", {"density": 1.0, "elect": "count"}),
        ("ties", {"density": 1.0, "elect": "none", "disjoint": "max"}),
    ],
)
def test_a_tie_goes_to_plus(make_ia3: Maker, method: str, asked: dict[str, Any]) -> None:
    folder = make_ia3("a", seed=1)
    seen = merged_vectors([folder, folder], method, weights=[1, -1], **asked)
    assert same(seen, {module: np.abs(values) for module, values in read(folder).items()})


def test_a_density_may_be_set_for_each_adapter(make_ia3: Maker) -> None:
    folders = [make_ia3(name, seed=seed) for seed, name in enumerate("ab")]
    opened = [ties_peft.Adapter.load(folder) for folder in folders]
    for method, parameters in (
        ("dare", {}),
        ("della_linear", {}),
        ("breadcrumbs", {"gamma": 0.1}),
        ("magnitude_prune", {}),
    ):
        recipe = ties_peft.Recipe(
            adapters=tuple(map(str, folders)),
            method=method,
            scale=1.0,
            parameters={"density": 1.0, **parameters},
            densities=(0.25, None),
        )
        merged = merge_recipe(recipe, opened)
        alone = merged_vectors(folders[:1], method, density=0.25, scale=1.0, **parameters)
        expected = {m: alone[m] + v for m, v in read(folders[1]).items()}
        assert same({m: merged.delta(m).double().numpy() for m in merged.modules}, expected)
