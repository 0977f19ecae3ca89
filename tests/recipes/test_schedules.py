"""Weights and densities that differ from module to module, as mergekit's users write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_hand
import numpy as np
import pytest

from ties_peft import MethodError, Recipe, RecipeError, merge
from ties_peft.merging.merge import merge_recipe
from ties_peft.merging.recipes.schedule import Schedule, count_layers

Make = Callable[..., Path]
DEEP = {f"model.layers.{layer}.{part}": (8, 6) for layer in range(5) for part in ("self_attn.q_proj", "mlp.up_proj")}
DEEP |= {"model.embed_proj": (8, 6)}


def at(value: Any, module: str, layers: int = 5, default: float = 1.0) -> float:
    return Schedule.read(value, "weight").at(module, layers, default)


def layer(number: int) -> str:
    return f"model.layers.{number}.mlp.up_proj"


def test_one_number_is_the_same_everywhere() -> None:
    assert {at(0.25, name) for name in DEEP} == {0.25}


def test_a_gradient_is_straight_between_its_points() -> None:
    assert [at([1.0, 0.5, 0.0], layer(n)) for n in range(5)] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert [at([0.0, 1.0], layer(n)) for n in range(5)] == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert [at([0.0, 1.0, 0.0], layer(n)) for n in range(5)] == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])
    assert [at([3.0], layer(n)) for n in range(5)] == [3.0] * 5


def test_a_gradient_outside_the_layers_reads_its_first_point() -> None:
    assert at([0.7, 0.1], "model.embed_tokens") == 0.7
    assert at([0.7, 0.1], "lm_head") == 0.7


def test_a_model_of_one_layer_reads_a_gradients_first_point() -> None:
    assert at([0.7, 0.1], "layers.0.q", layers=1) == 0.7


def test_the_layer_is_the_first_number_in_the_path() -> None:
    assert at([0.0, 1.0], "transformer.h.2.experts.4.w1") == 0.5
    assert at([0.0, 1.0], "h.4.attn") == 1.0


def test_layers_are_counted_from_zero_to_the_highest() -> None:
    assert count_layers(["layers.0.q", "layers.6.q", "embed"]) == 7


def test_the_first_condition_that_fits_wins() -> None:
    conditions = [{"filter": "up_proj", "value": 0.1}, {"filter": "mlp", "value": 0.2}, {"value": 0.3}]
    assert at(conditions, layer(0)) == 0.1
    assert at(conditions, "model.layers.0.mlp.down_proj") == 0.2
    assert at(conditions, "model.layers.0.self_attn.q_proj") == 0.3


def test_a_filter_is_plain_text_and_not_a_pattern() -> None:
    assert at([{"filter": "m.p", "value": 0.1}, {"value": 0.3}], layer(0)) == 0.3
    assert at([{"filter": "ers.0.m", "value": 0.1}, {"value": 0.3}], layer(0)) == 0.1
    assert at([{"filter": "*", "value": 0.1}, {"value": 0.3}], layer(0)) == 0.1


def test_a_condition_may_hold_a_gradient() -> None:
    value = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": [1.0, 0.0]}]
    assert at(value, layer(1)) == 0.25
    assert at(value, "model.layers.1.self_attn.q_proj") == 0.75


def test_where_no_filter_fits_the_default_holds() -> None:
    assert at([{"filter": "nowhere", "value": 0.1}], layer(0), default=0.6) == 0.6


def test_one_condition_needs_no_list() -> None:
    assert at({"filter": "mlp", "value": 0.1}, layer(0)) == 0.1


@pytest.mark.parametrize(
    "value",
    [
        "half", None, True, [], [True], [0.5, None], float("nan"), [float("inf")], 10**400, {}, [{}], [{"filter": "mlp"}],
        [{"value": [{"value": 1}]}], [{"value": 1, "filtre": "mlp"}], [{"filter": ["mlp"], "value": 1}], [0.5, {"value": 1}],
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_refused(value: Any) -> None:
    with pytest.raises(RecipeError, match=r"weight 1 is .*expected a finite number, .*over_layers"):
        Schedule.read(value, "weight 1")


GRADIENT = [1.0, 0.0]
FILTERS = [{"filter": "mlp", "value": 2.0}, {"filter": "embed", "value": -1.0}, {"value": [0.5, 1.5]}]


def filtered(name: str) -> float:
    number = int(name.split(".")[2]) if "layers" in name else 0
    return 2.0 if "mlp" in name else -1.0 if "embed" in name else 0.5 + number / 4


def weight_by_hand(adapter: int, name: str) -> float:
    number = int(name.split(".")[2]) if "layers" in name else 0
    return {0: 0.5, 1: 1 - number / 4, 2: filtered(name)}[adapter]


@pytest.fixture
def folders(make_lora: Make) -> list[Path]:
    return [make_lora(f"a{i}", rank=2 + i, seed=i, shapes=DEEP) for i in range(3)]


def test_weights_that_vary_in_a_sum(folders: list[Path]) -> None:
    merged = merge(folders, "task_arithmetic", weights=[0.5, GRADIENT, FILTERS], scale=1.0, rank="max")
    by_hand.assert_close(merged, by_hand.weighted_sum([by_hand.vectors(f) for f in folders], weight_by_hand))


def test_weights_that_vary_in_an_average_are_divided_by_their_sum_on_each_module(folders: list[Path]) -> None:
    merged = merge(folders, "average", weights=[0.5, GRADIENT, FILTERS[:1]], rank="max")

    def weight(adapter: int, name: str) -> float:
        return weight_by_hand(adapter, name) if adapter < 2 else 2.0 if "mlp" in name else 1.0

    total = by_hand.weighted_sum([by_hand.vectors(f) for f in folders], weight)
    by_hand.assert_close(merged, {name: v / sum(weight(i, name) for i in range(3)) for name, v in total.items()})


@pytest.mark.parametrize("scope", ["adapter", "module"])
def test_weights_that_vary_in_ties(folders: list[Path], scope: str) -> None:
    merged = merge(folders, weights=[0.5, GRADIENT, FILTERS], density=0.4, scope=scope, rank="max")
    expected = by_hand.ties([by_hand.vectors(f) for f in folders], weight_by_hand, lambda i, name: 0.4, scope)
    by_hand.assert_close(merged, expected)


@pytest.mark.parametrize("scope", ["adapter", "module"])
def test_densities_that_vary_in_ties(folders: list[Path], scope: str) -> None:
    def density(adapter: int, name: str) -> float:
        number = int(name.split(".")[2]) if "layers" in name else 0
        return {0: 0.3, 1: 0.8 - 0.1 * number, 2: 0.5 if "mlp" in name else 0.2}[adapter]

    chosen = (None, [0.8, 0.4], [{"filter": "mlp", "value": 0.5}, {"value": 0.2}])
    recipe = Recipe(tuple(map(str, folders)), densities=chosen, parameters={"density": 0.3, "scope": scope}, rank="max")
    expected = by_hand.ties([by_hand.vectors(f) for f in folders], lambda i, name: 1.0, density, scope)
    by_hand.assert_close(merge_recipe(recipe), expected)


def test_each_modules_own_density_cuts_as_many_entries(make_lora: Make) -> None:
    folder = make_lora("a", shapes=DEEP)
    merged = merge([folder], density=[{"filter": "mlp", "value": 0.29}, {"value": 0.5}], scope="module", rank="max")
    for name in merged.modules:
        kept = int((merged.delta(name).abs() > 1e-6).sum())
        assert kept == (13 if "mlp" in name else 24), name  # ⌊0.29·48⌋ and ⌊0.5·48⌋
    assert merged.report.adapters[0].kept == 5 * 13 + 6 * 24


def test_modules_of_equal_density_are_ranked_together(make_lora: Make) -> None:
    folder = make_lora("a", shapes=DEEP)
    merged = merge([folder], density=[{"filter": "mlp", "value": 0.29}, {"value": 0.5}], rank="max")
    counts = {name: int((merged.delta(name).abs() > 1e-6).sum()) for name in merged.modules}
    assert sum(count for name, count in counts.items() if "mlp" in name) == 69  # ⌊0.29·240⌋
    assert sum(count for name, count in counts.items() if "mlp" not in name) == 144  # ⌊0.5·288⌋
    assert len({counts[layer(n)] for n in range(5)}) > 1  # some modules keep more than others


def test_a_density_for_all_goes_to_every_adapter(folders: list[Path]) -> None:
    value = [{"filter": "mlp", "value": [0.8, 0.4]}, {"value": 0.1}]
    names = tuple(map(str, folders))
    in_python = merge(names, density=value, rank=8)
    each = merge_recipe(Recipe(names, densities=(value,) * 3, rank=8))
    assert by_hand.same_tensors(in_python, each)
    assert by_hand.same_tensors(in_python, merge_recipe(Recipe.from_yaml(in_python.recipe.to_yaml())))


def test_an_adapters_own_density_wins_and_the_general_one_fills_its_gaps(folders: list[Path]) -> None:
    names = tuple(map(str, folders))
    own = ([{"filter": "mlp", "value": 0.5}], None, 0.3)
    mixed = Recipe(names, densities=own, parameters={"density": [0.2, 0.6]}, rank=8)
    filled = ([{"filter": "mlp", "value": 0.5}, {"value": [0.2, 0.6]}], [0.2, 0.6], 0.3)
    assert by_hand.same_tensors(merge_recipe(mixed), merge_recipe(Recipe(names, densities=filled, rank=8)))


def test_where_no_filter_of_a_density_fits_the_default_holds(folders: list[Path]) -> None:
    names = tuple(map(str, folders))
    gaps = merge(names, density=[{"filter": "mlp", "value": 0.5}], rank=8)
    assert by_hand.same_tensors(gaps, merge(names, density=[{"filter": "mlp", "value": 0.5}, {"value": 0.2}], rank=8))


def test_equal_densities_of_all_adapters_are_that_density(folders: list[Path]) -> None:
    names = tuple(map(str, folders))
    each = merge_recipe(Recipe(names, densities=(0.3,) * 3, rank=8))
    assert by_hand.same_tensors(each, merge(names, density=0.3, rank=8))


def test_an_adapters_own_density_trims_it_where_the_method_trims_nothing(make_lora: Make) -> None:
    folder = make_lora("a")
    merged = merge_recipe(Recipe((str(folder),), densities=(0.25,), parameters={"density": 1.0}, rank="max"))
    by_hand.assert_close(merged, by_hand.trim(dict(sorted(by_hand.vectors(folder).items())), 0.25))
    assert merged.report.adapters[0].kept == (120 + 240 + 120) // 4


def test_an_adapters_own_density_keeps_as_many_of_equal_magnitudes(make_lora: Make) -> None:
    """Over more entries than are worked on at once."""
    from safetensors.torch import load_file, save_file

    file = make_lora("a", rank=1, alpha=1, shapes={"layers.0.q": (700, 512)}) / "adapter_model.safetensors"
    ones = {name: tensor.fill_(1.0) for name, tensor in load_file(file).items()}
    save_file(ones, file, metadata={"format": "pt"})
    other = make_lora("b", rank=1, shapes={"layers.0.q": (700, 512), "layers.0.k": (7, 5)})
    mute = [{"filter": "layers.0.q", "value": 0}, {"value": 1}]
    asked: dict[str, Any] = {"parameters": {"density": 1.0}, "rank": 64}
    alone = Recipe((str(file.parent),), densities=(0.6,), **asked)
    beside = Recipe((str(file.parent), str(other)), weights=(1, mute), densities=(0.6, None), **asked)
    for recipe in (alone, beside):
        merged = merge_recipe(recipe).delta("layers.0.q").round()
        assert int(merged.count_nonzero()) == 215040  # 0.6 · 700 · 512


def test_a_module_that_one_adapter_has_is_trimmed_by_its_own_density(make_lora: Make) -> None:
    one = make_lora("one", seed=1, shapes={"layers.0.q": (12, 10), "layers.1.q": (12, 10)})
    two = make_lora("two", seed=2, shapes={"layers.0.q": (12, 10)})
    recipe = Recipe((str(one), str(two)), densities=(0.5, None), parameters={"density": 1.0}, rank="max")
    vectors = [by_hand.vectors(one), by_hand.vectors(two)]
    expected = by_hand.ties(vectors, lambda i, name: 1.0, lambda i, name: (0.5, 1.0)[i])
    by_hand.assert_close(merge_recipe(recipe), expected)


def test_weight_0_on_some_modules_is_absence_there(make_lora: Make) -> None:
    first, second = make_lora("first", seed=1), make_lora("second", seed=2)
    part = make_lora("part", seed=2, shapes={"layers.0.q": (12, 10), "layers.0.up": (20, 12)})
    mute = [{"filter": "layers.1", "value": 0.0}, {"value": 1.0}]
    for asked in ({"density": 0.3}, {"density": 0.3, "scope": "module"}, {"space": "core"}, {"space": "knots"}):
        without = _without_layer(second, part)
        muted = merge([first, second], weights=[1, mute], rank="max", **asked)
        absent = merge([first, without], rank="max", **asked)
        by_hand.assert_close(muted, {name: absent.delta(name).numpy() for name in absent.modules})


def _without_layer(second: Path, part: Path) -> Path:
    """`part` with the tensors that `second` has of its modules."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(second / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}
    save_file(kept, part / "adapter_model.safetensors", metadata={"format": "pt"})
    return part


def test_an_adapter_that_weighs_nothing_on_all_its_modules_is_absent(make_lora: Make) -> None:
    whole = make_lora("whole", seed=1)
    upper = make_lora("upper", seed=2, shapes={"layers.0.up": (20, 12), "layers.0.more": (9, 9)})
    with pytest.warns(UserWarning, match="upper: left out of the merge, because the weight is 0"):
        merged = merge([whole, upper], weights=[1, [{"filter": "layers.1", "value": 1}, {"value": 0}]])
    assert by_hand.same_tensors(merged, merge([whole]))
    with pytest.raises(RecipeError, match="every weight is 0"):
        merge([upper], weights=[[{"filter": "layers.1", "value": 1}, {"value": 0}]])


def test_a_filter_that_fits_no_module_is_warned_of(make_lora: Make) -> None:
    folder = make_lora("a")
    with pytest.warns(UserWarning, match=r"no module's name contains mpl, so these filters have no effect"):
        merged = merge([folder], weights=[[{"filter": "mpl", "value": 3}, {"filter": "q", "value": 1}, {"value": 1}]])
    assert sum("mpl" in warning for warning in merged.report.warnings) == 1


def test_the_report_gives_the_mean_of_a_weight_that_varies(folders: list[Path]) -> None:
    merged = merge(folders[:2], weights=[1, GRADIENT])
    assert merged.report.adapters[1].weight == pytest.approx(np.mean([weight_by_hand(1, name) for name in DEEP]))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"density": {"over_layers": [0.5, 1.5]}}, "a density is 1.5; expected a share in"),
        ({"density": {"over_layers": [0.5, 0]}}, "a density is 0"),
        ({"densities": [[0.5, 1.5]]}, "a density is 1.5; expected a share in"),
        ({"density": ["half"]}, "density is \\['half'\\]; expected a finite number"),
        ({"method": "average", "density": {"over_layers": [0.5, 1.0]}}, "unknown parameter"),
        ({"method": "average", "densities": [0.5]}, "method 'average' has no density"),
        ({"scope": ["module"]}, "scope"),
    ],
)
def test_schedules_where_they_do_not_belong(make_lora: Make, asked: dict[str, Any], message: str) -> None:
    with pytest.raises((MethodError, RecipeError), match=message):
        merge([make_lora("a")], **asked)


def test_densities_must_be_one_per_adapter(make_lora: Make) -> None:
    with pytest.raises(RecipeError, match="2 densities for 1 adapters"):
        merge_recipe(Recipe((str(make_lora("a")),), densities=(0.5, 0.5)))
