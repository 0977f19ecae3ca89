"""Fisher and RegMean: definitions in float64, laws, and statistics that are missing or of another adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn_statistics import attach, attach_drawn, deltas, fisher, normalized, regmean, regmean_in_span
from safetensors import safe_open
from safetensors.torch import save_file

import ties_peft
from ties_peft import Adapter, AdapterError, CompatibilityError
from ties_peft.adapters.statistics import Statistics

Make = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
MODULE = "layers.0.up"  # 20 × 12
WEIGHTS = [(1.0, 1.0, 1.0), (2.0, 0.5, 1.0), (1.0, -1.0, 0.5)]


@pytest.fixture
def three(make_lora: Make) -> list[Path]:
    return [make_lora("a"), make_lora("b", rank=2, seed=1), make_lora("c", rank=3, alpha=3, seed=2)]


def near(found: torch.Tensor, expected: np.ndarray[Any, Any], share: float = 1e-5) -> None:
    difference = np.linalg.norm(found.double().numpy() - expected)
    assert difference <= share * np.linalg.norm(expected), difference / np.linalg.norm(expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_fisher_is_its_definition(three: list[Path], weights: tuple[float, ...]) -> None:
    F = [attach_drawn(folder, "fisher", i)[MODULE] for i, folder in enumerate(three)]
    merged = ties_peft.merge(three, method="fisher", weights=weights, rank="max")
    near(merged.delta(MODULE), fisher(deltas(three, MODULE), weights, F))


def test_fisher_of_vectors_is_its_definition(make_ia3: Make) -> None:
    two = [make_ia3("a"), make_ia3("b", seed=1)]
    F = [attach_drawn(folder, "fisher", i)["layers.0.down"] for i, folder in enumerate(two)]
    merged = ties_peft.merge(two, method="fisher", weights=[1, 3])
    near(merged.delta("layers.0.down"), fisher(deltas(two, "layers.0.down"), [1, 3], F))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_normalized_fisher_is_its_definition(three: list[Path], weights: tuple[float, ...]) -> None:
    """The norm is over all modules, and differs between adapters."""
    drawn = [attach_drawn(folder, "fisher", i) for i, folder in enumerate(three)]
    scaled = [{name: 10.0**i * values for name, values in own.items()} for i, own in enumerate(drawn)]
    kept = [attach(folder, "fisher", own) for folder, own in zip(three, scaled, strict=True)]
    F = [normalized(own) for own in kept]
    for method in (ties_peft.merge, lambda adapters, **asked: ties_peft.prepare(adapters, "delta").merge(**asked)):
        merged = method(three, method="fisher", weights=weights, rank="max", normalize_fisher=True)
        for module in merged.modules:
            near(merged.delta(module), fisher(deltas(three, module), weights, [own[module] for own in F]))


def test_normalized_fisher_does_not_see_how_sharp_an_adapter_is_throughout(three: list[Path]) -> None:
    drawn = [attach_drawn(folder, "fisher", i) for i, folder in enumerate(three)]

    def both() -> list[torch.Tensor]:
        merges = [ties_peft.merge(three, "fisher", rank="max", normalize_fisher=value) for value in (True, False)]
        return [merged.delta(MODULE) for merged in merges]

    normal, plain = both()
    attach(three[1], "fisher", {name: 1000 * values for name, values in drawn[1].items()})
    normal_then, plain_then = both()
    near(normal_then, normal.double().numpy())
    assert float((plain_then - plain).norm() / plain.norm()) > 0.1


def test_normalized_fisher_of_an_adapter_on_which_nothing_depends_is_that_of_the_others(three: list[Path]) -> None:
    F = [attach_drawn(folder, "fisher", i) for i, folder in enumerate(three)]
    attach(three[2], "fisher", {name: np.zeros_like(values) for name, values in F[2].items()})
    merged = ties_peft.merge(three, "fisher", rank="max", normalize_fisher=True)
    expected = fisher(deltas(three[:2], MODULE), (1, 1), [normalized(own)[MODULE] for own in F[:2]])
    near(merged.delta(MODULE), expected)


def test_modules_under_new_names_keep_the_norm_of_their_statistics(make_lora: Make) -> None:
    folder = make_lora("a")
    own = normalized(attach_drawn(folder, "fisher", 0))
    renamed = Adapter.load(folder).renamed({MODULE: "model.up"})
    found = renamed.statistics("fisher")
    assert found is not None
    near(found.of_module("model.up").whole() / found.norm(renamed.modules), own[MODULE])  # type: ignore[union-attr]


def test_entries_on_which_nothing_depends_are_the_mean(three: list[Path]) -> None:
    F = [np.ones((20, 12)) * (np.arange(20) % 2)[:, None] * (i + 1) for i in range(3)]
    for folder, own in zip(three, F, strict=True):
        shapes = {name: module.shape for name, module in Adapter.load(folder).layout.items()}
        attach(folder, "fisher", {n: own if n == MODULE else np.zeros(s) for n, s in shapes.items()})
    merged = ties_peft.merge(three, method="fisher", rank="max")
    near(merged.delta(MODULE), fisher(deltas(three, MODULE), (1, 1, 1), F))
    near(merged.delta("layers.0.q"), np.mean(deltas(three, "layers.0.q"), axis=0))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("alpha", [0.9, 1.0, 0.0])
def test_regmean_is_its_definition(three: list[Path], weights: tuple[float, ...], alpha: float) -> None:
    G = [attach_drawn(folder, "gram", i)[MODULE] for i, folder in enumerate(three)]
    merged = ties_peft.merge(three, method="regmean", weights=weights, rank="max", off_diagonal=alpha)
    near(merged.delta(MODULE), regmean(deltas(three, MODULE), weights, G, alpha), 1e-4)


@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_regmean_in_the_span_is_its_definition(three: list[Path], alpha: float) -> None:
    G = [attach_drawn(folder, "gram", i)[MODULE] for i, folder in enumerate(three)]
    merged = ties_peft.merge(three, method="regmean", space="core", rank="max", off_diagonal=alpha)
    expected = regmean_in_span(deltas(three, MODULE), (1, 1, 1), G, alpha)
    near(merged.delta(MODULE), expected, 1e-4)
    full = regmean(deltas(three, MODULE), (1, 1, 1), G, alpha)
    assert np.linalg.norm(expected - full) > 1e-2 * np.linalg.norm(full)  # else the test says nothing


def test_span_and_full_agree_where_the_grams_keep_the_span_apart(three: list[Path]) -> None:
    """G = R·C·Rᵀ + N·E·Nᵀ for each adapter, R the rows of all A and N the rest."""
    _, s, vt = np.linalg.svd(np.concatenate(deltas(three, MODULE)), full_matrices=True)
    k = int((s > 1e-5 * s[0]).sum())
    R, N = vt[:k].T, vt[k:].T
    assert 0 < k < 12
    for seed, folder in enumerate(three):
        draw = np.random.default_rng(seed)
        C, E = (m @ m.T for m in (draw.standard_normal((k, k)), draw.standard_normal((12 - k, 12 - k))))
        shapes = {name: module.shape for name, module in Adapter.load(folder).layout.items()}
        gram = R @ C @ R.T + N @ E @ N.T
        attach(folder, "gram", {n: gram if n == MODULE else np.eye(s[1]) for n, s in shapes.items()})
    full, span = (
        ties_peft.merge(three, method="regmean", space=space, rank="max", off_diagonal=1.0).delta(MODULE)
        for space in ("delta", "core")
    )
    near(span, full.double().numpy(), 1e-3)


def test_inputs_too_few_to_tell_all_directions_give_the_least_norm(three: list[Path]) -> None:
    G = [attach_drawn(folder, "gram", i, rows=2)[MODULE] for i, folder in enumerate(three)]
    assert np.linalg.matrix_rank(sum(G), tol=1e-3, hermitian=True) == 6
    merged = ties_peft.merge(three, method="regmean", rank="max", off_diagonal=1.0)
    near(merged.delta(MODULE), regmean(deltas(three, MODULE), (1, 1, 1), G, 1.0), 1e-3)


def test_an_input_that_never_was_changes_nothing(three: list[Path]) -> None:
    G = [attach_drawn(folder, "gram", i)[MODULE] for i, folder in enumerate(three)]
    for gram, folder in zip(G, three, strict=True):
        gram[3], gram[:, 3] = 0, 0
        shapes = {name: module.shape for name, module in Adapter.load(folder).layout.items()}
        attach(folder, "gram", {n: gram if n == MODULE else np.zeros((s[1], s[1])) for n, s in shapes.items()})
    merged = ties_peft.merge(three, method="regmean", rank="max")
    near(merged.delta(MODULE), regmean(deltas(three, MODULE), (1, 1, 1), G), 1e-4)
    assert not merged.delta(MODULE)[:, 3].any()
    assert not merged.delta("layers.0.q").any()


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_laws(three: list[Path], method: str, kind: str) -> None:
    for i, folder in enumerate(three):
        attach_drawn(folder, kind, i)
    alone = ties_peft.merge(three[:1], method=method, weights=[3], rank="max")
    near(alone.delta(MODULE), deltas(three[:1], MODULE)[0])
    forth, back = (ties_peft.merge(order, method=method, rank="max") for order in (three, three[::-1]))
    near(forth.delta(MODULE), back.delta(MODULE).double().numpy())
    negated = ties_peft.merge(three, method=method, weights=[-1, -1, -1], rank="max")
    near(-negated.delta(MODULE), forth.delta(MODULE).double().numpy())
    again = ties_peft.prepare(three, space="delta").merge(method=method, rank="max")
    assert torch.equal(again.delta(MODULE), forth.delta(MODULE))
    for folder in three:
        attach_drawn(folder, kind, 7)
    near(ties_peft.merge(three, method=method, rank="max").delta(MODULE), np.mean(deltas(three, MODULE), axis=0))


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_a_module_that_one_adapter_lacks_is_the_others(make_lora: Make, method: str, kind: str) -> None:
    two = [make_lora("a"), make_lora("b", seed=1, shapes={"layers.0.q": (12, 10)})]
    for i, folder in enumerate(two):
        attach_drawn(folder, kind, i)
    merged = ties_peft.merge(two, method=method, rank="max")
    near(merged.delta(MODULE), deltas(two[:1], MODULE)[0])


def test_statistics_that_are_missing_end_in_one_message(three: list[Path]) -> None:
    attach_drawn(three[0], "gram", 0)
    with pytest.raises(CompatibilityError) as caught:
        ties_peft.merge(three, method="regmean")
    assert str(caught.value) == (
        f"method 'regmean' needs gram statistics beside every adapter, and 2 of 3 have none: {three[1]}, {three[2]}. "
        "Gather them once, with the base model and a few hundred rows of text: "
        f"ties-peft statistics {three[1]} --kind gram --task FILE."
    )


def test_statistics_of_another_adapter_are_refused(three: list[Path]) -> None:
    for i, folder in enumerate(three):
        attach_drawn(folder, "gram", i)
    shutil.copy(three[0] / "gram.safetensors", three[1] / "gram.safetensors")
    with pytest.raises(CompatibilityError, match="digest"):
        ties_peft.merge(three, method="regmean")


def test_statistics_of_what_an_adapter_was_before_are_refused(make_lora: Make) -> None:
    folder = make_lora("a")
    attach_drawn(folder, "fisher", 0)
    ties_peft.merge([folder], method="fisher")
    make_lora("a", alpha=9)  # only the lora scaling differs
    with pytest.raises(CompatibilityError, match="digest"):
        ties_peft.merge([folder], method="fisher")


@pytest.mark.parametrize("damage", ["half", "foreign", "text"])
def test_files_that_are_damaged_or_not_ours_are_refused(three: list[Path], damage: str) -> None:
    for i, folder in enumerate(three):
        attach_drawn(folder, "gram", i)
    path = three[0] / "gram.safetensors"
    if damage == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "foreign":
        save_file({MODULE: torch.eye(12)}, path)
    else:
        path.write_text("no tensors", encoding="utf-8")
    with pytest.raises(AdapterError, match=r"gram\.safetensors"):
        ties_peft.merge(three, method="regmean")


def test_statistics_without_one_of_the_modules_are_refused(make_lora: Make) -> None:
    adapter = Adapter.load(make_lora("a"))
    some = Statistics.make("gram", adapter.digest, {MODULE: torch.eye(12)}, 1)
    with pytest.raises(CompatibilityError, match=r"'layers.0.q': its gram statistics are missing; expected \[10, 10\]"):
        adapter.attach_statistics(some)


def test_equal_statistics_are_kept_once(make_lora: Make) -> None:
    folder = make_lora("a")
    attach(folder, "gram", {"layers.0.q": np.eye(10), "layers.1.q": np.eye(10), MODULE: np.eye(12)})
    with safe_open(folder / "gram.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["layers.0.q", MODULE]
    assert ties_peft.merge([folder], method="regmean").modules == ("layers.0.q", MODULE, "layers.1.q")


def test_a_result_with_statistics_beside_it_can_be_replaced(make_lora: Make, tmp_path: Path) -> None:
    out = ties_peft.merge([make_lora("a")]).save(tmp_path / "out")
    attach_drawn(out, "fisher", 0)
    ties_peft.merge([make_lora("a")]).save(out, force=True)
    assert not (out / "fisher.safetensors").exists()


def test_modules_under_new_names_keep_their_statistics(make_lora: Make) -> None:
    folder = make_lora("a")
    attach_drawn(folder, "gram", 0)
    own = Adapter.load(folder)
    renamed = own.renamed({MODULE: "model.up"})
    found = renamed.statistics("gram")
    assert found is not None
    assert torch.equal(found.of_module("model.up").whole(), own.statistics("gram").of_module(MODULE).whole())  # type: ignore[union-attr]
    near(ties_peft.merge([renamed], method="regmean", rank="max").delta("model.up"), own.delta(MODULE).double().numpy())
