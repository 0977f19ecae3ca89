"""What a report says is left of each adapter, against the definition in NumPy and against weights that PEFT merged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import OLDER_PEFT, lora_config, lora_tensors, write_adapter
from oracles import definition
from peft_types.matrix import KINDS, save
from peft_types.models import ARCHITECTURES, make
from torch import Tensor, nn

import ties_peft
from ties_peft.analysis.inspection import inspect
from ties_peft.task_vectors.delta import Dense, LowRank, inner

pytestmark = pytest.mark.filterwarnings("ignore")
Make = Callable[..., Path]
Figures = list[tuple[float, float, float]]
Q, UP, SECOND = "layers.0.q", "layers.0.up", "layers.1.q"
SIZES = {Q: (12, 10), UP: (20, 12), SECOND: (12, 10)}


def shapes(*modules: str) -> dict[str, tuple[int, int]]:
    return {module: SIZES[module] for module in modules}


@pytest.fixture
def loras(make_lora: Make) -> list[Path]:
    """Unequal norms, mixed ranks and lora scalings; one lacks a module."""
    return [
        make_lora("a", rank=4, alpha=8, seed=1, gain=0.1),
        make_lora("b", rank=8, alpha=4, seed=2),
        make_lora("c", rank=3, alpha=2, seed=3, shapes=shapes(UP, SECOND), use_rslora=True),
    ]


@pytest.fixture
def ia3s(make_ia3: Make) -> list[Path]:
    k, down, second = {"layers.0.k": (12, False)}, {"layers.0.down": (20, True)}, {"layers.1.k": (12, False)}
    return [make_ia3(f"i{seed}", seed=seed, vectors=v) for seed, v in enumerate([k | down | second, k, k | second])]


def reported(report: ties_peft.Report) -> Figures:
    return [(line.projection, line.cosine, line.others) for line in report.adapters]


def defined(folder: Path, sources: list[Path]) -> Figures:
    merged = definition.read(folder)
    return [definition.retention(merged, definition.read(source)) for source in sources]


def assert_as_defined(merged: ties_peft.Merged, sources: list[Path], folder: Path) -> None:
    merged.save(folder, force=True)
    assert np.array(reported(merged.report)) == pytest.approx(np.array(defined(folder, sources)), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"weights": [2.5, -0.75, 0.5], "scale": 0.7},
        {"weights": "norm", "rank": 2},
        {"dtype": "float16", "rank": 3, "restore_norm": True},
        {"dtype": "bfloat16", "method": "task_arithmetic"},
        {"method": "average", "rank": "max"},
        {"method": "dare_ties", "density": 0.5, "seed": 3},
        {"space": "core"},
        {"space": "knots", "scope": "module"},
        {"method": "tsv"},
        {"method": "pico+iso_c", "space": "core", "rank": 5},
    ],
    ids=str,
)
def test_loras(loras: list[Path], tmp_path: Path, asked: dict[str, Any]) -> None:
    assert_as_defined(ties_peft.merge(loras, **asked), loras, tmp_path / "out")


def test_loras_in_space_factors(make_lora: Make, tmp_path: Path) -> None:
    sources = [make_lora("a", seed=1), make_lora("b", seed=2, alpha=1)]
    assert_as_defined(ties_peft.merge(sources, space="factors"), sources, tmp_path / "out")


@pytest.mark.parametrize(
    "asked",
    [{}, {"weights": [1, -2, 3]}, {"dtype": "bfloat16"}, {"method": "task_arithmetic"}, {"method": "emr"}],
    ids=str,
)
def test_ia3s(ia3s: list[Path], tmp_path: Path, asked: dict[str, Any]) -> None:
    assert_as_defined(ties_peft.merge(ia3s, **asked), ia3s, tmp_path / "out")


@pytest.mark.parametrize("folders", ["loras", "ia3s"])
def test_a_module_with_a_weight_of_0_counts_in_the_adapters_norm(
    folders: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Its own task vector is the whole one, whatever the weights leave out."""
    sources = request.getfixturevalue(folders)
    weights = [[{"filter": "layers.0", "value": 0.0}, {"value": 1.0}], 1.0, 0.5]
    merged = ties_peft.merge(sources, weights=weights)
    assert_as_defined(merged, sources, tmp_path / "out")
    rows = definition.matrix([definition.read(source) for source in sources])
    norms = np.linalg.norm(rows, axis=1)
    assert [line.norm for line in merged.report.adapters] == pytest.approx(norms, rel=1e-5)
    assert np.array(merged.report.cosines) == pytest.approx(rows @ rows.T / np.outer(norms, norms), abs=1e-5)


def test_a_module_on_which_every_weight_is_0(loras: list[Path], tmp_path: Path) -> None:
    off = [{"filter": "layers.0.q", "value": 0.0}, {"value": 1.0}]
    merged = ties_peft.merge(loras, weights=[off] * 3)
    assert not merged.delta(Q).any()
    assert_as_defined(merged, loras, tmp_path / "out")


def test_more_adapters_than_pairs_are_kept_of(tmp_path: Path, make_lora: Make) -> None:
    sources = [make_lora(f"a{seed}", rank=2, seed=seed, shapes=shapes(Q, UP)) for seed in range(66)]
    weights = [1.0, [{"filter": "up", "value": 0.0}, {"value": 1.0}], *[0.5] * 64]
    merged = ties_peft.merge(sources, weights=weights)
    assert merged.report.cosines is None
    assert_as_defined(merged, sources, tmp_path / "out")


def test_prepared_merges(loras: list[Path], tmp_path: Path) -> None:
    plan = ties_peft.prepare(loras, space="core")
    for asked in ({}, {"method": "task_arithmetic", "weights": [1, 2, 0.5]}, {"density": 0.7, "dtype": "float16"}):
        assert_as_defined(plan.merge(**asked), loras, tmp_path / "out")


def test_a_live_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    live = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["0", "1"]), adapter_name="first")
    live.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=9, target_modules=["1"]))
    torch.manual_seed(0)
    for name, parameter in live.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    merged = ties_peft.add_merged_adapter(live, ["first", "second"], "merged")
    live.save_pretrained(tmp_path)
    figures = defined(tmp_path / "merged", [tmp_path / "first", tmp_path / "second"])
    assert np.array(reported(merged.report)) == pytest.approx(np.array(figures), rel=1e-5)


@pytest.mark.parametrize("folders", ["loras", "ia3s"])
def test_one_adapter_is_all_there(folders: str, request: pytest.FixtureRequest) -> None:
    report = ties_peft.merge(request.getfixturevalue(folders)[:1], density=1).report
    assert reported(report)[0] == pytest.approx((1, 1, 0), abs=1e-6)


# Every type of adapter against PEFT: ⟨W′ − W, W″ − W⟩ over all parameters, whatever form a task vector has.


def moved(base: nn.Module, folder: Path) -> Tensor:
    """What PEFT's own merge_and_unload changes of all the base's parameters, in float64."""
    model = peft.PeftModel.from_pretrained(deepcopy(base).double(), folder, autocast_adapter_dtype=False).double()
    after = dict(model.merge_and_unload().named_parameters())
    return torch.cat([(after[name] - p.double()).flatten() for name, p in base.named_parameters()]).detach()


def by_weights(base: nn.Module, folder: Path, sources: list[Path]) -> Figures:
    tau, found = moved(base, folder), []
    for source in sources:
        one = moved(base, source)
        projection = tau @ one / (one @ one)
        others = (tau - projection * one).norm() / one.norm()
        found.append((float(projection), float(tau @ one / tau.norm() / one.norm()), float(others)))
    return found


FAST = ("LoRA", "LoRA, bias on lora_B", "LoRA on embeddings", "LoRA on experts", "DoRA", "LoKr")
ON = {"LoRA on experts": "Mixtral", "LoRA, bias on lora_B": "BERT"}  # which have such layers
CELLS = [(kind, ON.get(kind, "Llama")) for kind in KINDS if kind != "(IA)³"]
CELLS += [("LoRA", "GPT-2"), ("LoRA", "ResNet"), ("DoRA", "ResNet"), ("LoHa, Tucker", "ResNet")]


@pytest.mark.parametrize(
    ("kind", "name"), [cell if cell[0] in FAST else pytest.param(*cell, marks=pytest.mark.slow) for cell in CELLS]
)
def test_every_type_against_weights_that_peft_merged(kind: str, name: str, tmp_path: Path) -> None:
    base, config = make(name), KINDS[kind](ARCHITECTURES[name])
    if config is None and OLDER_PEFT:
        pytest.skip("this release of PEFT has no such type")
    assert config is not None and save(name, config, tmp_path / "a") is None
    plain = peft.LoraConfig(r=2, lora_alpha=1, target_modules=ARCHITECTURES[name].targets[:2])
    assert save(name, plain, tmp_path / "b") is None
    base.save_pretrained(tmp_path / "base")
    sources = [tmp_path / "a", tmp_path / "b"]
    merged = ties_peft.merge(sources, density=0.5, rank=4, dtype="bfloat16", base=tmp_path / "base")
    merged.save(tmp_path / "out")
    figures = by_weights(base, tmp_path / "out", sources)
    assert np.array(reported(merged.report)) == pytest.approx(np.array(figures), rel=1e-4, abs=1e-5)


# Where a figure has no value, and where it is shown


@pytest.fixture
def silent(tmp_path: Path) -> Path:
    """A LoRA whose B is zero."""
    tensors = lora_tensors(shapes(Q, UP), rank=2, seed=5)
    tensors = {key: t * 0 if "lora_B" in key else t for key, t in tensors.items()}
    return write_adapter(tmp_path / "silent", lora_config(shapes(Q, UP), rank=2, alpha=2), tensors)


def test_an_adapter_of_zeros_has_no_figures(loras: list[Path], silent: Path, tmp_path: Path) -> None:
    merged = ties_peft.merge([loras[0], silent])
    merged.save(tmp_path / "out")
    (_, line) = merged.report.adapters
    assert (line.projection, line.cosine, line.others) == (None, None, None)
    assert defined(tmp_path / "out", loras[:1]) == [pytest.approx(reported(merged.report)[0], rel=1e-5)]
    saved = json.loads((tmp_path / "out" / "provenance.json").read_text(encoding="utf-8"))
    assert saved["report"]["adapters"][1]["projection"] is None
    assert any("silent" in text and "0 everywhere" in text for text in merged.report.warnings)


def test_a_merge_of_zeros_has_no_cosine(loras: list[Path]) -> None:
    report = ties_peft.merge(loras, density=1e-4).report
    assert reported(report) == [(0.0, None, 0.0)] * 3


def test_factors_and_a_matrix_have_the_inner_product_of_their_entries() -> None:
    draw = torch.Generator().manual_seed(0)
    B, A, matrix = (torch.randn(*size, generator=draw) for size in ((2500, 3), (3, 40), (2500, 40)))
    wanted = float(((B.double() @ A.double()) * matrix.double()).sum())
    assert inner(LowRank(B, A), Dense(matrix)) == pytest.approx(wanted, rel=1e-12)
    assert inner(Dense(matrix), LowRank(B, A)) == pytest.approx(wanted, rel=1e-12)


def rows(report: ties_peft.Report) -> list[list[str]]:
    """The printed table of the inputs, a list of cells for each line."""
    return [line.split() for line in str(report).splitlines()[1 : 2 + len(report.adapters)]]


def test_the_report_prints_projections(loras: list[Path]) -> None:
    report = ties_peft.merge(loras, "ties").report
    head, *lines = rows(report)
    place = head.index("projection") + 1  # an adapter's number and its name stand under one heading
    assert [float(line[place]) for line in lines] == [round(own.projection or 0, 3) for own in report.adapters]
    assert "kept" not in head and "keeps 20.0% of the entries" in str(report)


def test_the_report_prints_what_the_trim_keeps_of_each_where_that_differs(make_ia3: Make) -> None:
    sources = [make_ia3("x", vectors={"k": (10, False)}), make_ia3("y", vectors={"k": (10, False), "v": (3, False)})]
    head, *lines = rows(ties_peft.merge(sources, density=0.5).report)
    place = head.index("trim") + 1
    assert [line[place] for line in lines] == ["50.0%", f"{6 / 13:.1%}"]
    assert "trim" not in rows(ties_peft.merge(sources, "average").report)[0]


def test_card_and_provenance_hold_all_three(loras: list[Path], tmp_path: Path) -> None:
    merged = ties_peft.merge(loras)
    merged.save(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").splitlines()
    head = next(line for line in card if line.startswith("| adapter"))
    start = head.split(" | ").index("projection")
    saved = json.loads((tmp_path / "out" / "provenance.json").read_text(encoding="utf-8"))["report"]["adapters"]
    for line, own, wanted in zip(merged.report.adapters, saved, reported(merged.report), strict=True):
        assert tuple(own[key] for key in ("projection", "cosine", "others")) == wanted
        shown = next(text for text in card if text.startswith(f"| {line.name} "))
        assert shown.split(" | ")[start : start + 3] == [f"{value:.3f}" for value in wanted]


# What is warned of

NORMS = {"a": 2.98, "b": 4.01, "c": 1.03, "d": 8.06}
WIDE = {"layers.0.q": (64, 48), "layers.0.up": (96, 64)}


def of_norms(make_lora: Make, norms: Mapping[str, float]) -> list[Path]:
    """Random LoRAs of these norms."""
    folders = []
    for seed, (name, norm) in enumerate(norms.items()):
        plain = make_lora(name, seed=seed, shapes=WIDE)
        length = np.linalg.norm(definition.matrix([definition.read(plain)]))
        folders.append(make_lora(name, seed=seed, shapes=WIDE, gain=norm / length))
    return folders


def said(merged: ties_peft.Merged, words: str) -> list[str]:
    return [text for text in merged.report.warnings if words in text]


def test_an_adapter_of_which_little_is_left_is_named(make_lora: Make) -> None:
    merged = ties_peft.merge(of_norms(make_lora, NORMS), "ties")
    assert [line.norm for line in merged.report.adapters] == pytest.approx(list(NORMS.values()), rel=1e-5)
    figures = {line.name: line.projection for line in merged.report.adapters}
    assert figures["c"] is not None and figures["c"] < 0.15
    (text,) = said(merged, "little is left")
    assert f"c ({figures['c']:.3f})" in text and "--weights norm" in text
    (text,) = said(merged, "norms differ")
    assert "7.8-fold" in text and "d (8.06)" in text and "c (1.03)" in text


@pytest.mark.parametrize(("ratio", "warned"), [(2.5, False), (3.0, True), (9.0, True)])
def test_norms_are_warned_of_from_about_threefold_on(make_lora: Make, ratio: float, warned: bool) -> None:
    folders = of_norms(make_lora, {"small": 1.0, "large": ratio})
    assert bool(said(ties_peft.merge(folders), "norms differ")) == warned
    seen = inspect([str(folder) for folder in folders])
    assert any("norms differ" in text for text in seen.warnings) == warned
    assert not said(ties_peft.merge(folders, weights="norm"), "norms differ")
    assert not said(ties_peft.merge(folders, weights=[ratio, 1]), "norms differ")


@pytest.mark.parametrize(
    ("asked", "elects"),
    [
        ({}, False),
        ({"method": "task_arithmetic"}, False),
        ({"method": "iso_c"}, False),
        ({"method": "ties"}, True),
        ({"method": "dare_ties"}, True),
        ({"method": "ties", "elect": "none"}, False),
        ({"method": "ties", "disjoint": "mean_all"}, False),
    ],
)
def test_only_a_method_that_elects_signs_is_said_to_lose_the_small_one_by_them(
    make_lora: Make, asked: dict[str, str], elects: bool
) -> None:
    folders = of_norms(make_lora, {"small": 1.0, "large": 9.2})
    merged = ties_peft.merge(folders, **asked)  # type: ignore[arg-type]
    (text,) = said(merged, "norms differ 9.2-fold")
    assert ("elects signs" in text) == elects and "--weights norm" in text and "task_arithmetic" not in text
    if not asked:  # by the default the small one keeps as much of itself as the large one
        small, large = (line.projection for line in merged.report.adapters)
        assert small > 0.8 * large  # type: ignore[operator]
    (seen,) = [text for text in inspect([str(folder) for folder in folders]).warnings if "norms differ" in text]
    assert "9.2-fold" in seen and "elects signs" not in seen


def test_what_is_advised_where_little_is_left_leaves_more(make_lora: Make) -> None:
    folders = of_norms(make_lora, NORMS)
    (text,) = said(ties_peft.merge(folders, "ties"), "little is left")
    assert "method that adds" not in text and "task_arithmetic" not in text
    assert (
        "(--scale, scale=…)" in text and 'cat adds the task vectors whole, at rank max (--rank max, rank="max")' in text
    )
    merged = ties_peft.merge(folders, "cat", rank="max")
    taken = sum(definition.matrix([definition.read(folder) for folder in folders]))
    assert (
        merged.report.norm == pytest.approx(float(np.linalg.norm(taken)), rel=1e-5) and merged.report.energy > 1 - 1e-6
    )
    assert not said(merged, "little is left")


def test_an_adapter_of_zeros_has_no_part_in_the_ratio_of_norms(make_lora: Make) -> None:
    merged = ties_peft.merge([*of_norms(make_lora, {"a": 1.0, "b": 2.0}), make_lora("zero", shapes=WIDE, gain=0)])
    assert said(merged, "0 everywhere") and not said(merged, "norms differ")


def test_where_little_is_left_of_all_the_scale_is_what_to_change(make_lora: Make) -> None:
    folders = of_norms(make_lora, dict.fromkeys("abcdefgh", 1.0))
    (text,) = said(ties_peft.merge(folders, "average"), "little is left")
    assert all(f"{name} (" in text for name in "abcdefgh") and "Raise the scale, which is 1" in text
    assert not said(ties_peft.merge(folders, "task_arithmetic"), "little is left")


def test_what_was_asked_for_is_not_warned_of(make_lora: Make) -> None:
    """A negative weight takes an adapter away, and of one adapter alone the energy tells what the rank lost."""
    folders = of_norms(make_lora, {"a": 1.0, "b": 1.0})
    negated = ties_peft.merge(folders, "task_arithmetic", weights=[1, -1])
    assert negated.report.adapters[1].projection < 0  # type: ignore[operator]
    assert not said(negated, "little is left")
    assert not said(ties_peft.merge(folders[:1], scale=0.1), "little is left")
