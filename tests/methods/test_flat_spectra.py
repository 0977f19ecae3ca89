"""Methods whose results have a flat spectrum, and ranks that cut through equal singular values."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli.run_command import run
from conftest import PREFIX, SAMPLES, lora_config, write_adapter
from recipes.by_hand import same_tensors
from sampling import covering

import ties_peft
from ties_peft import Adapter
from ties_peft.methods import method_classes
from ties_peft.task_vectors import factorise
from ties_peft.task_vectors.delta import LowRank

FLAT = ("iso_c", "iso_cts", "flat_tsv", "boosting")
COMPOSITES = ("pico+iso_c", "pico+flat_tsv", "ties+iso_c", "ties+boosting", "iso_c+svc", "tsv+boosting")
SHAPE, RANK, COUNT = (160, 144), 16, 8
Make = Callable[..., Path]


def singular_values(matrix: Any) -> np.ndarray:
    return np.linalg.svd(np.asarray(matrix, dtype=np.float64), compute_uv=False)


def one(
    seed: int, decay: float = 0.85, rank: int = RANK, shape: tuple[int, int] = SHAPE
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config and the tensors of a LoRA whose singular values are decay⁰, decay¹, …"""
    draw = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(side, rank, generator=draw))[0] for side in shape)
    B = U * decay ** torch.arange(rank)
    tensors = {f"{PREFIX}q.lora_A.weight": V.T.contiguous(), f"{PREFIX}q.lora_B.weight": B.contiguous()}
    return lora_config({"q": shape}, rank, rank), tensors


@pytest.fixture(scope="module")
def eight() -> list[Adapter]:
    return [Adapter.from_tensors(*one(seed)) for seed in range(COUNT)]


def space_of(method: str) -> str:
    return "core" if "ties" in method else "delta"


def warned(adapters: Sequence[Any], *asked: Any, **more: Any) -> tuple[ties_peft.Merged, list[str]]:
    """A merge, and what its report warns of about its rank."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ties_peft.TiesPeftWarning)
        merged = ties_peft.merge(adapters, *asked, **more)
    return merged, [text for text in merged.report.warnings if "cuts" in text or "energy; a larger" in text]


# -- the default rank


@pytest.mark.parametrize("method", [*FLAT, *COMPOSITES])
def test_all_of_a_flat_spectrum_is_kept_by_default(eight: list[Adapter], method: str) -> None:
    """Before, 64 of its 128 directions were, an arbitrary half."""
    merged, cuts = warned(eight, method, space_of(method))
    assert (merged.report.rank, cuts) == (COUNT * RANK, [])
    assert merged.report.energy == pytest.approx(1, abs=1e-6)
    assert (singular_values(merged.delta("q")) > 1e-3).sum() > 100, "a trim takes some of them away"
    assert same_tensors(merged, warned(eight, method, space_of(method), rank="max")[0])


@pytest.mark.parametrize("method", ["ties", "tsv", "svc", "wudi", "task_arithmetic", "pico", "pico+tsv", "ties+svc"])
def test_rank_auto_is_64_for_other_methods(eight: list[Adapter], method: str) -> None:
    assert warned(eight, method, space_of(method))[0].report.rank == 64


def test_boosting_that_lifts_nothing_has_no_flat_spectrum(eight: list[Adapter]) -> None:
    assert warned(eight, "boosting", beta=1.0)[0].report.rank == 64


def test_what_is_compressed_first_is_cut_before_it_is_flat(eight: list[Adapter]) -> None:
    merged, cuts = warned(eight, "iso_c", "core", compress_first=True)
    assert (merged.report.rank, cuts) == (64, [])


@pytest.mark.parametrize("name", [n for n, cls in method_classes().items() if cls.spectral and n != "dual"])
def test_a_method_says_so_if_and_only_if_its_spectrum_is_flat(eight: list[Adapter], name: str) -> None:
    """The share of the energy beyond half of the directions, where that of the adapters themselves is 7 %."""
    own = singular_values(eight[0].delta("q"))[:RANK] ** 2
    assert own[RANK // 2 :].sum() / own.sum() < 0.08
    squares = singular_values(warned(eight, name, rank="max")[0].delta("q")) ** 2
    lost = squares[COUNT * RANK // 2 :].sum() / squares.sum()
    assert (lost > 1 / 3) == method_classes()[name]().has_flat_spectrum(), lost


def test_dual_has_a_flat_spectrum_where_the_module_is_much_larger_than_its_directions() -> None:
    """In a module of few dimensions, where 128 directions crowd, it is not flat: `dual` divides what they share."""
    large = [Adapter.from_tensors(*one(seed, shape=(1280, 1152))) for seed in range(COUNT)]
    squares = singular_values(warned(large, "dual", rank=COUNT * RANK)[0].delta("q")) ** 2
    assert squares[COUNT * RANK // 2 :].sum() / squares.sum() > 0.25
    assert method_classes()["dual"]().has_flat_spectrum()


def test_the_rank_is_no_more_than_the_modules_can_have(make_lora: Make) -> None:
    folders = [make_lora(f"a{seed}", seed=seed, shapes={"q": (12, 10)}) for seed in range(4)]
    assert warned(folders, "iso_c")[0].report.rank == 10


def test_task_vectors_whose_rank_nobody_chose_count_as_64_at_most() -> None:
    draw = torch.Generator().manual_seed(0)
    sides = {"hada_w1_a": (160, 12), "hada_w1_b": (12, 150), "hada_w2_a": (160, 12), "hada_w2_b": (12, 150)}
    config = {"peft_type": "LOHA", "r": 12, "alpha": 12, "target_modules": ["q"]}
    two = [
        Adapter.from_tensors(
            config, {f"{PREFIX}q.{name}": torch.randn(shape, generator=draw) for name, shape in sides.items()}
        )
        for _ in range(2)
    ]
    assert [adapter.layout["q"].rank for adapter in two] == [144, 144]
    merged, cuts = warned(two, "iso_c")
    assert merged.report.rank == 128
    assert len(cuts) == 1 and "rank 128 cuts the flat spectrum" in cuts[0] and "Give rank 150" in cuts[0]


def test_a_target_is_told_of_the_rank_that_it_needs(eight: list[Adapter]) -> None:
    report = warned(eight, "iso_c", target="vllm")[0].report
    assert any("--max-lora-rank 128" in text for text in report.warnings)


# -- every way to a merge


def test_prepared_merges_keep_all_of_it(eight: list[Adapter]) -> None:
    plan = ties_peft.prepare(eight, "core")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ties_peft.TiesPeftWarning)
        assert plan.merge("iso_c").report.rank == 128
        assert plan.merge("ties").report.rank == 64


def test_a_search_that_leaves_the_rank_to_auto_keeps_all_of_it(eight: list[Adapter]) -> None:
    found = ties_peft.search(
        eight, lambda adapter: float(adapter.delta("q").norm()), {"scale": [0.5, 1.0]}, 1,
        method="iso_c", rank="auto", controls=(),
    )  # fmt: skip
    assert found.adapter.report.rank == 128


def test_with_heads_and_on_the_command_line(tmp_path: Path) -> None:
    folders = []
    for seed in range(COUNT):
        config, tensors = one(seed)
        config["modules_to_save"] = ["head"]
        tensors[f"{PREFIX}head.weight"] = torch.full((2, 3), float(seed))
        folders.append(write_adapter(tmp_path / f"a{seed}", config, tensors))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ties_peft.TiesPeftWarning)
        assert ties_peft.merge(folders, "iso_c", heads="drop").report.rank == 128
    asked = ("--method", "iso_c", "--heads", "average", "--out", tmp_path / "out", "--json")
    assert json.loads(run("merge", *folders, *asked).out)["report"]["rank"] == 128
    outcome = run("merge", *folders, *asked, "--rank", "64", "--force")
    assert "warning: rank 64 cuts the flat spectrum that 'iso_c' makes: 50.0% of the merged energy" in outcome.err


def test_in_a_live_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.ModuleDict({"q": torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False)})
    folders = [write_adapter(tmp_path / f"a{seed}", *one(seed)) for seed in range(COUNT)]
    loaded = peft.PeftModel(model, peft.LoraConfig.from_pretrained(str(folders[0])), "a0")
    for seed, folder in enumerate(folders):
        loaded.load_adapter(str(folder), f"a{seed}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [f"a{seed}" for seed in range(COUNT)]
        assert ties_peft.add_merged_adapter(loaded, names, "all", method="iso_c").report.rank == 128


# -- the warnings


@pytest.mark.parametrize(("rank", "method"), covering(product([16, 64, 100], [*FLAT, *COMPOSITES]), lambda case: case))
def test_a_rank_that_cuts_a_flat_spectrum_is_warned_of_with_the_share_that_is_lost(
    eight: list[Adapter], method: str, rank: int
) -> None:
    squares = singular_values(warned(eight, method, space_of(method), rank="max")[0].delta("q")) ** 2
    lost = squares[rank:].sum() / squares.sum()
    _, cuts = warned(eight, method, space_of(method), rank=rank)
    assert len(cuts) == 1
    flat = next(name for name in reversed(method.split("+")) if name in FLAT)
    assert f"rank {rank} cuts the flat spectrum that '{flat}' makes: {lost:.1%} of the merged energy" in cuts[0]
    assert "Give rank 128" in cuts[0]


def test_equal_singular_values_are_found_whatever_the_method(tmp_path: Path) -> None:
    adapter = Adapter.from_tensors(*one(3, decay=1.0, rank=8))
    _, cuts = warned([adapter], "average", rank=6)
    assert len(cuts) == 1
    assert cuts[0].startswith("rank 6 cuts through equal singular values") and "25.0% of the merged energy" in cuts[0]
    assert warned([adapter], "average", rank=8)[1] == []


@pytest.mark.parametrize("decay", [0.999, 0.9])
def test_singular_values_that_are_merely_close_are_not_equal(decay: float) -> None:
    assert warned([Adapter.from_tensors(*one(3, decay=decay, rank=8))], "average", rank=6)[1] == []


@pytest.mark.parametrize(("rank", "method"), [(8, "ties"), (16, "average"), (28, "tsv")])
def test_the_samples_have_no_equal_singular_values(rank: int, method: str) -> None:
    folders = sorted((SAMPLES / "lora").iterdir())
    assert not any("equal" in text for text in warned(folders, method, rank=rank)[1])


# -- the measure


def known(rows: int, columns: int, values: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(side, len(values), generator=draw))[0] for side in (rows, columns))
    return U * torch.tensor(values), V.T.contiguous()


@pytest.mark.parametrize("shape", [(60, 50), (50, 60), (900, 700)], ids=str)
@pytest.mark.parametrize("factored", [True, False])
def test_the_edge_is_the_ratio_of_the_singular_values_beside_the_cut(shape: tuple[int, int], factored: bool) -> None:
    """By every road: the Gram matrix of the factors, of the smaller side, and subspace iteration."""
    B, A = known(*shape, [9.0, 6.0, 4.0, 4.0, 2.0, 1.0])
    for rank, ratio in ((1, 6 / 9), (2, 4 / 6), (3, 1.0), (4, 0.5), (5, 0.5), (6, 0.0), (20, 0.0)):
        found = factorise.compress(LowRank(B, A), rank) if factored else factorise.factorise(B @ A, rank)
        assert found.edge == pytest.approx(ratio, abs=1e-5), rank
        assert found.scaled(-3.0).edge == found.restored().edge == found.edge


def test_the_edge_of_a_matrix_of_zeros_is_0() -> None:
    assert factorise.factorise(torch.zeros(8, 6), 2).edge == 0
    assert factorise.compress(LowRank(torch.zeros(8, 3), torch.zeros(3, 6)), 2).edge == 0
