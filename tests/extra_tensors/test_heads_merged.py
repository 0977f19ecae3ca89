"""Whole layers merged as task vectors, against NumPy in float64 and by laws; with hand-made adapters and bases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PREFIX, lora_config, lora_tensors, write_adapter
from safetensors.torch import save_file
from torch import Tensor

import ties_peft
from ties_peft import Adapter, Recipe, cli
from ties_peft.merging.merge import merge_recipe

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
SHAPES = {"layers.0.q": (12, 10), "lm_head": (9, 12)}
HEAD, NORM = "score.weight", "layers.0.norm.weight"
Tensors = dict[str, Tensor]
Hold = Callable[..., str]
OTHERS = "hoose another policy for them: --heads error, drop, keep=NAME, average (heads=… in Python)."


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ORIGIN = {HEAD: drawn(100, 5, 7), NORM: drawn(101, 12), "lm_head.weight": drawn(102, 9, 12)}


@pytest.fixture
def hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hold:
    """hold(name, {tensor: values}, seed=…, **config) → a LoRA that holds whole tensors; beside it lies a base."""
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    save_file(ORIGIN, "base/model.safetensors")

    def make(name: str, extra: Tensors, seed: int = 0, **config: Any) -> str:
        tensors = lora_tensors(SHAPES, 4, seed) | {PREFIX + key: tensor for key, tensor in extra.items()}
        write_adapter(tmp_path / name, lora_config(SHAPES, 4, 8, **config), tensors)
        return name

    return make


def merge(folders: list[str], method: str = "ties", **asked: Any) -> ties_peft.Merged:
    return ties_peft.merge(folders, method, **{"heads": "merge", "base": "base", **asked})


def whole(merged: Adapter) -> Tensors:
    return {key.removeprefix(PREFIX): merged.tensors.read(key) for key in merged.extra_keys}


def refusal(folders: list[str], method: str = "ties", **asked: Any) -> str:
    with pytest.raises(ties_peft.TiesPeftError) as caught:
        merge(folders, method, **asked)
    return str(caught.value)


def tau(tensor: Tensor, name: str = HEAD) -> np.ndarray:
    return tensor.double().numpy() - ORIGIN[name].double().numpy()


def cut(vector: np.ndarray, keep: int) -> np.ndarray:
    order = np.argsort(-np.abs(vector).ravel(), kind="stable")[:keep]
    kept = np.zeros(vector.size)
    kept[order] = vector.ravel()[order]
    return kept.reshape(vector.shape)


# Oracles


@pytest.mark.parametrize(("density", "keep"), [(0.2, 7), (0.5, 17), (1.0, 35)])
def test_ties_is_trim_elect_mean_of_what_each_head_changed(hold: Hold, density: float, keep: int) -> None:
    heads, weights = [drawn(1, 5, 7), drawn(2, 5, 7)], [1.0, 0.7]
    folders = [hold(f"a{i}", {HEAD: head}, seed=i) for i, head in enumerate(heads)]
    merged = merge(folders, density=density, weights=weights, scale=0.8)
    trimmed = [cut(w * tau(head), keep) for w, head in zip(weights, heads, strict=True)]
    elected = np.sign(sum(trimmed))
    agree = [(np.sign(x) == elected) & (x != 0) for x in trimmed]
    total = sum(np.where(a, x, 0) for a, x in zip(agree, trimmed, strict=True))
    share = sum(np.where(a, w, 0) for a, w in zip(agree, weights, strict=True))
    expected = ORIGIN[HEAD].double().numpy() + 0.8 * np.divide(total, share, where=share > 0, out=np.zeros((5, 7)))
    np.testing.assert_allclose(whole(merged)[HEAD].double().numpy(), expected, atol=1e-6)


def test_task_arithmetic_adds_what_each_changed(hold: Hold) -> None:
    heads, weights = [drawn(1, 5, 7), drawn(2, 5, 7)], [1.5, -0.4]
    folders = [hold(f"a{i}", {HEAD: head}, seed=i) for i, head in enumerate(heads)]
    found = whole(merge(folders, "task_arithmetic", weights=weights, scale=0.6))[HEAD]
    expected = ORIGIN[HEAD].double().numpy() + 0.6 * sum(w * tau(head) for w, head in zip(weights, heads, strict=True))
    np.testing.assert_allclose(found.double().numpy(), expected, atol=1e-6)


def test_a_tensor_of_many_tiles_keeps_exactly_as_many_as_asked(hold: Hold) -> None:
    """Whole numbers give many equal magnitudes: the first in order stay, over the tiles' borders too."""
    steps = torch.randint(-3, 4, (700, 800), generator=torch.Generator().manual_seed(3)).float()
    save_file({HEAD: torch.zeros(700, 800)}, "base/model.safetensors")
    found = whole(merge([hold("a", {HEAD: steps})], density=0.4, scale=1))[HEAD]
    np.testing.assert_array_equal(found.numpy(), cut(steps.numpy(), 224_000))


# Laws


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "average"])
def test_one_adapter_alone_comes_back(hold: Hold, method: str) -> None:
    own = {HEAD: drawn(1, 5, 7), NORM: drawn(2, 12)}
    merged = merge([hold("a", own)], method, scale=1, **({"density": 1} if method == "ties" else {}))
    assert whole(merged).keys() == own.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(whole(merged)[name], tensor, atol=5e-7, rtol=0)
    assert [line.fate for line in merged.report.riders] == ["merged", "merged"]


def test_one_that_lacks_a_tensor_counts_as_one_that_left_it_as_it_was(hold: Hold) -> None:
    own = {HEAD: drawn(1, 5, 7)}
    lacking = merge([hold("a", own), hold("b", {}, seed=1)], "average")
    equal = merge(["a", hold("b", {HEAD: ORIGIN[HEAD]}, seed=1)], "average")
    expected = ORIGIN[HEAD].double().numpy() + tau(own[HEAD]) / 2
    for merged in (lacking, equal):
        np.testing.assert_allclose(whole(merged)[HEAD].double().numpy(), expected, atol=1e-6)
    disjoint = merge(["a", hold("b", {}, seed=1)], density=1, scale=1)
    torch.testing.assert_close(whole(disjoint)[HEAD], own[HEAD], atol=5e-7, rtol=0)


def test_an_adapter_of_weight_0_is_absent_on_one_layer_or_on_all(hold: Hold) -> None:
    folders = [hold(f"a{i}", {HEAD: drawn(i, 5, 7)}, seed=i) for i in range(2)]
    alone = whole(merge(folders[:1], density=1, scale=1))[HEAD]
    for none in (0, [{"filter": "score", "value": 0}, {"value": 1}]):
        assert torch.equal(whole(merge(folders, density=1, scale=1, weights=[1, none]))[HEAD], alone)


def test_a_layers_tensors_are_merged_one_by_one(hold: Hold) -> None:
    """One adapter holds weight and bias, the other the weight alone: the bias has one task vector."""
    base = {"layers.0.norm.weight": torch.ones(3), "layers.0.norm.bias": torch.ones(3)}
    save_file(base, "base/model.safetensors")
    a = hold("a", {"layers.0.norm.weight": torch.full((3,), 3.0)})
    b = hold("b", {name: tensor + 1 for name, tensor in base.items()}, seed=1)
    found = whole(merge([a, b], "task_arithmetic", scale=1))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "layers.0.norm.weight": [4.0] * 3,
        "layers.0.norm.bias": [2.0] * 3,
    }


def test_what_all_hold_alike_is_kept(hold: Hold) -> None:
    same = {HEAD: drawn(1, 5, 7)}
    merged = merge([hold("a", same), hold("b", same, seed=1)], "task_arithmetic", scale=3)
    assert torch.equal(whole(merged)[HEAD], same[HEAD]) and merged.report.riders[0].fate == "identical"
    merged = merge(["a", "b", hold("c", {}, seed=2)], "task_arithmetic", scale=3)
    assert merged.report.riders[0].fate == "merged"  # c left it as it was


def test_the_dtype_is_that_of_the_inputs_or_the_one_asked_for(hold: Hold) -> None:
    folders = [hold(f"a{i}", {HEAD: drawn(i, 5, 7).bfloat16()}, seed=i) for i in range(2)]
    assert whole(merge(folders))[HEAD].dtype == torch.bfloat16
    assert whole(merge(folders, dtype="float16"))[HEAD].dtype == torch.float16


def test_the_same_bytes_for_any_number_of_threads(hold: Hold) -> None:
    folders = [hold(f"a{i}", {HEAD: drawn(i, 700, 800)}, seed=i) for i in range(2)]
    save_file({HEAD: drawn(9, 700, 800)}, "base/model.safetensors")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(whole(merge(folders, "dare_ties", density=0.5))[HEAD])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    assert not torch.equal(found[0], whole(merge(folders, "dare_ties", density=0.5, seed=1))[HEAD])


def test_a_density_of_ones_own(hold: Hold) -> None:
    head = drawn(1, 5, 7)
    recipe = Recipe(
        adapters=(hold("a", {HEAD: head}),), method="ties", densities=(0.4,), scale=1.0, base="base", heads="merge"
    )
    expected = ORIGIN[HEAD].double().numpy() + cut(tau(head), 14)
    np.testing.assert_allclose(whole(merge_recipe(recipe))[HEAD].double().numpy(), expected, atol=1e-6)


# Refusals


def test_it_needs_a_base(hold: Hold) -> None:
    told = refusal([hold("a", {HEAD: drawn(1, 5, 7)})], base=None)
    assert (
        told.startswith("heads is 'merge', but no base model is given") and "--base" in told and told.endswith(OTHERS)
    )


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("tsv", "'tsv' does not merge whole tensors: it is for the weights of layers."),
        ("iso_c", "'iso_c' does not merge whole tensors: it is for the weights of layers."),
        ("dare+ties", "'dare+ties' does not merge whole tensors: it is several methods in a row."),
    ],
)
def test_methods_that_do_not_take_vectors(hold: Hold, method: str, why: str) -> None:
    folders = [hold(f"a{i}", {HEAD: drawn(i, 5, 7)}, seed=i) for i in range(2)]
    told = refusal(folders, method)
    assert why in told and told.endswith(OTHERS)


def test_signs_of_an_adapter(hold: Hold) -> None:
    folders = [hold(f"a{i}", {HEAD: drawn(i, 5, 7)}, seed=i) for i in range(2)]
    assert "it takes its signs from an adapter" in refusal(folders, sign_from="a0")


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        ({"v.weight": torch.ones(3, 2)}, {}, "a has weight 3 × 2; base model 'base' has no tensor 'v.weight'"),
        ({HEAD: torch.ones(6, 7)}, {}, "a has weight 6 × 7; base model 'base' has 'score.weight' 5 × 7"),
        (
            {HEAD: torch.ones(5, 7)},
            {HEAD: torch.ones(6, 7)},
            "a has weight 5 × 7, b has weight 6 × 7; the shapes differ",
        ),
        (
            {"score.seen": torch.tensor(1)},
            {"score.seen": torch.tensor(2)},
            "a has seen one number, b has seen one number; whole numbers are no task vector",
        ),
    ],
)
def test_layers_that_cannot_be_merged(hold: Hold, one: Tensors, other: Tensors, why: str) -> None:
    told = refusal([hold("a", one), hold("b", other, seed=1)])
    assert told.startswith("heads is 'merge', but 1 whole layer(s) cannot be merged as task vectors:\n")
    assert f": {why}\n" in told and told.endswith(OTHERS)


def test_rows_of_tokens(hold: Hold) -> None:
    name, asked = "embed.token_adapter.trainable_tokens_delta", {"trainable_token_indices": {"embed": [3, 5]}}
    folders = [hold(f"a{i}", {name: drawn(i, 2, 4)}, seed=i, **asked) for i in range(2)]
    assert "rows of trained tokens are no whole tensor" in refusal(folders)
    merged = merge([folders[0], hold("b", {}, seed=1)])
    assert [line.fate for line in merged.report.riders] == ["only"]


# The base's own


@pytest.mark.parametrize("policy", ["error", "average", "merge"])
def test_an_unchanged_copy_of_the_bases_weight_is_left_out_and_said(hold: Hold, policy: str) -> None:
    own = {"lm_head.base_layer.weight": ORIGIN["lm_head.weight"]}
    folders = [hold("a", own), hold("b", own, seed=1)]
    merged = merge(folders, heads=policy)
    assert whole(merged) == {} and [line.fate for line in merged.report.riders] == ["unchanged"]
    assert any("left out, unchanged in a, b; the base's own is used." in text for text in merged.report.warnings)
    kept = ties_peft.merge(folders)
    assert list(whole(kept)) == ["lm_head.base_layer.weight"]


def test_a_copy_that_changed_in_one_is_not_left_out(hold: Hold) -> None:
    own = {"lm_head.base_layer.weight": ORIGIN["lm_head.weight"]}
    changed = {"lm_head.base_layer.weight": ORIGIN["lm_head.weight"] + 1}
    merged = merge([hold("a", own), hold("b", changed, seed=1)], density=1, scale=1)
    assert [line.fate for line in merged.report.riders] == ["merged"]
    torch.testing.assert_close(whole(merged)["lm_head.base_layer.weight"], ORIGIN["lm_head.weight"] + 1)


# Where it is said


def test_the_command_line_and_the_recipe(
    hold: Hold, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [hold(f"a{i}", {HEAD: drawn(i, 5, 7)}, seed=i) for i in range(2)]
    for more in (["--dry-run"], ["--out", "out"]):
        monkeypatch.setattr(
            "sys.argv",
            ["ties-peft", "merge", *folders, "--method", "ties", "--heads", "merge", "--base", "base", *more],
        )
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code
        assert "score: merged as task vectors of a0, a1" in capsys.readouterr().out
    written = whole(Adapter.load("out"))[HEAD]
    assert torch.equal(written, whole(merge(folders))[HEAD])
    assert torch.equal(written, whole(merge_recipe(Recipe.from_file("out/recipe.yaml")))[HEAD])


def test_adapters_that_are_open_already(hold: Hold) -> None:
    folder = hold("a", {HEAD: drawn(1, 5, 7)})
    expected = whole(merge([folder]))[HEAD]
    assert torch.equal(
        whole(ties_peft.merge([Adapter.load(folder)], "ties", base="base", heads="merge"))[HEAD], expected
    )
    assert torch.equal(
        whole(ties_peft.merge([Adapter.load(folder, base="base")], "ties", heads="merge"))[HEAD], expected
    )


@pytest.mark.parametrize("heads", ["merge", "drop"])
def test_adapters_opened_with_two_bases_are_refused(hold: Hold, heads: str) -> None:
    """Whichever came first would decide what the task vectors are."""
    folders = [hold("a", {HEAD: drawn(1, 5, 7)}), hold("b", {HEAD: drawn(2, 5, 7)}, seed=1)]
    Path("other").mkdir()
    save_file({name: tensor + 1 for name, tensor in ORIGIN.items()}, "other/model.safetensors")
    opened = [Adapter.load(folder, base=base) for folder, base in zip(folders, ("base", "other"), strict=True)]
    with pytest.raises(ties_peft.CompatibilityError, match=r"2 base models:\n  a: base\n  b: other\n"):
        ties_peft.merge(opened, heads=heads)
    same = [Adapter.load(folder, base="base") for folder in folders]  # two objects, one base
    assert ties_peft.merge(same, heads=heads).report is not None


def test_what_a_base_ties_is_said_to_be_tied(hold: Hold) -> None:
    folders = [hold("a", {"cls.decoder.weight": drawn(1, 5, 7)}), hold("b", {}, seed=1)]
    assert "has no tensor 'cls.decoder.weight', as where a head is tied to the embeddings" in refusal(folders)


def test_a_prepared_merge_knows_the_base_too(hold: Hold) -> None:
    folders = [hold("a", {HEAD: drawn(1, 5, 7)}), hold("b", {HEAD: drawn(2, 5, 7)}, seed=1)]
    prepared = ties_peft.prepare(folders, "delta", heads="merge", base="base").merge("ties", density=0.5)
    plain = merge(folders, density=0.5)
    assert prepared.recipe == plain.recipe and prepared.recipe.base == "base"
    assert prepared.digest == plain.digest
    assert torch.equal(whole(prepared)[HEAD], whole(plain)[HEAD])


@pytest.mark.parametrize("method", ["consensus", "pcb", "sce"])
def test_lacking_a_tensor_is_leaving_it_as_it_was(hold: Hold, method: str) -> None:
    """Also where a rule counts the adapters."""
    folders = [hold(f"a{i}", {HEAD: drawn(i, 5, 7)}, seed=i) for i in range(2)]
    lacking = merge([*folders, hold("none", {}, seed=2)], method)
    equal = merge([*folders, hold("none", {HEAD: ORIGIN[HEAD]}, seed=2)], method)
    torch.testing.assert_close(whole(lacking)[HEAD], whole(equal)[HEAD], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["karcher", "model_stock"])
def test_a_negative_weight_alone_negates(hold: Hold, method: str) -> None:
    found = whole(merge([hold("a", {HEAD: drawn(1, 5, 7)})], method, weights=[-2], scale=1))[HEAD]
    torch.testing.assert_close(found, 2 * ORIGIN[HEAD] - drawn(1, 5, 7), atol=1e-5, rtol=0)


def test_every_tensor_has_draws_of_its_own(hold: Hold) -> None:
    """Two tensors of one layer and one shape lose other entries to the mask."""
    names = [f"layers.0.norm.{name}" for name in ("weight", "bias")]
    save_file({name: torch.zeros(64) for name in names}, "base/model.safetensors")
    found = whole(merge([hold("a", {name: torch.ones(64) for name in names})], "dare", density=0.5))
    assert not torch.equal(*((found[name] == 0) for name in names))


def test_a_head_that_equals_the_bases_own_is_kept(hold: Hold) -> None:
    """Only the copies that PEFT makes of itself are left out."""
    merged = merge([hold("a", {HEAD: ORIGIN[HEAD]})], heads="error")
    assert torch.equal(whole(merged)[HEAD], ORIGIN[HEAD])


def test_a_base_of_whole_numbers_is_no_origin(hold: Hold) -> None:
    folder = hold("a", {HEAD: drawn(1, 5, 7)})
    save_file({HEAD: torch.ones(5, 7, dtype=torch.int8)}, "base/model.safetensors")
    assert "has 'score.weight' in I8, no float" in refusal([folder])
