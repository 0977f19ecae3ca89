"""One battery of contracts over every discovered method, in every space, on every kind of adapter.

A method, a space or a kind that is added is covered by being found. What a class claims of itself
(`random`, `ordered`, `entrywise`, its spaces and kinds) is held against what it does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from contracts.cells import (
    CELLS,
    EQUAL_RANKS,
    OFFERED,
    REFUSED,
    SAMPLES,
    Cell,
    distance,
    drawing_as,
    drawn_statistics,
    finite,
    in_other_factors,
    kind_named,
    negated,
    same_bytes,
    samples,
    tensors,
    with_tensors,
)
from sampling import covering

import ties_peft
from ties_peft import Adapter, MethodError, Recipe
from ties_peft.adapters.types import peft_types
from ties_peft.merging.merge import merge_recipe
from ties_peft.methods import method_classes
from ties_peft.spaces import spaces
from ties_peft.task_vectors import tiles

Test = TypeVar("Test", bound=Callable[..., None])
pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")


def of_cells(cells: Sequence[Cell]) -> Callable[[Test], Test]:
    """Run a test on cells that have every method, and every space of every kind, among them; on all with `-m slow`."""

    def mark(test: Test) -> Test:
        chosen = covering(cells, lambda cell: (cell.method, cell[1:]), seed=test.__name__)
        return pytest.mark.parametrize("cell", chosen, ids=str)(test)

    return mark


every_cell = of_cells(OFFERED)
every_method = pytest.mark.parametrize("method", method_classes())
RANDOM = {"dare", "dare_ties", "della", "della_linear"}
LEAST = 1e-9  # a density that keeps nothing
NO_LAW_OF_NEGATION = {"average": "it divides by Σw, not Σ|w|", "product": "its weights are powers"}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def with_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every adapter has whatever statistics a method needs."""
    monkeypatch.setattr(Adapter, "statistics", drawn_statistics)


# -- what is there, and what is not


def test_the_cells_are_all_there_are() -> None:
    written = {kind.output_name for kind in peft_types().values()}
    assert len(CELLS) == len(ties_peft.methods()) * len(spaces()) * len(written)
    assert {cell.method for cell in OFFERED} == set(method_classes()), "a method that no cell offers"
    assert {cell.space for cell in OFFERED} == set(spaces())
    assert written <= SAMPLES.keys(), f"contracts.cells.SAMPLES lacks {written - SAMPLES.keys()}"


@of_cells(REFUSED)
def test_a_cell_that_is_not_offered_is_refused_with_what_is(cell: Cell) -> None:
    """By name a space where it works, or where there is none a method for the kind; and none that does not."""
    with pytest.raises(MethodError) as caught:
        cell.merge(samples(cell.kind, (3, 3, 3)))
    message = str(caught.value)
    named = set(re.findall(r"\w+", message)) - {cell.method, cell.space}
    elsewhere = {own.space for own in OFFERED if (own.method, own.kind) == (cell.method, cell.kind)}
    fitting = {own.method for own in OFFERED if own.kind == cell.kind}
    assert "\n" not in message
    assert named & set(spaces()) == elsewhere & named, message
    assert named & elsewhere or fitting <= named, message


@every_method
def test_a_method_says_what_it_computes_what_holds_and_where_it_is_from(method: str) -> None:
    cls = method_classes()[method]
    (info,) = (info for info in ties_peft.methods() if info.name == method)
    text, _, rest = info.text.partition("Law:")
    law, _, source = rest.partition("Source:")
    assert info.summary.endswith(".")
    assert cls.chooses() or re.search(r"[τDu] +=|Σ wᵢ·τᵢ|λ·Σ|∏", text), "a formula"
    assert len(law.split()) > 4, "a law"
    assert re.search(r"\d{4}|our own|PEFT", source) and info.source, "a source"
    assert all(parameter.meaning for parameter in info.parameters)
    assert re.fullmatch(r"[a-z][a-z0-9_]*", method) and cls.name == method


# -- the contracts of a cell


@every_cell
def test_modules_shapes_and_numbers_are_whole(cell: Cell) -> None:
    adapters = cell.adapters
    merged = cell.plain
    shapes = {name: adapter.delta(name).shape for adapter in adapters for name in adapter.modules}
    assert {name: merged.delta(name).shape for name in merged.modules} == shapes
    assert merged.peft_type.name == cell.kind
    assert finite(merged) and any(bool(merged.delta(name).any()) for name in merged.modules)


@every_cell
def test_the_dtype_is_kept(cell: Cell) -> None:
    half = [with_tensors(adapter, lambda _, t: t.to(torch.bfloat16)) for adapter in cell.adapters]
    merged = cell.merge(half)
    assert {tensor.dtype for tensor in tensors(merged).values()} == {torch.bfloat16}
    assert finite(merged)
    assert {tensor.dtype for tensor in tensors(cell.plain).values()} == {torch.float32}


@every_cell
def test_the_same_bytes_each_time_and_on_any_number_of_threads(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 8)
    with threads(1):
        once = cell.merge()
    with threads(2):
        assert same_bytes(once, cell.merge())
        assert same_bytes(once, cell.merge())


@every_cell
def test_the_seed_matters_where_it_is_said_to_and_nowhere_else(cell: Cell) -> None:
    first, other = cell.plain, cell.merge(seed=1)
    assert same_bytes(first, other) != (cell.cls.name in RANDOM)
    assert distance(first, other) > 0.05 or cell.cls.name not in RANDOM


@every_cell
def test_any_tiling_gives_the_same(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cell.plain
    monkeypatch.setattr(tiles, "TILE", 7)
    assert distance(cell.merge(), whole) < 1e-5


@every_cell
def test_the_order_of_adapters_does_not_matter(cell: Cell) -> None:
    """Nor for a method that claims an order, where its parameters name none: the weights go with the adapters."""
    adapters, weights = cell.adapters, [1.0, -0.5, 2.0][: len(cell.adapters)]
    ahead = cell.merge(adapters, weights=weights)
    assert distance(cell.merge(adapters[::-1], weights=weights[::-1]), ahead) < 1e-3


@every_cell
def test_an_adapter_alone_a_pair_that_lacks_a_module_and_copies_are_finite(cell: Cell) -> None:
    first, second, *rest = cell.adapters
    for some in ([first], [second, (rest or [first])[0]], [first, first], [first, negated(first)]):
        assert finite(cell.merge(some, weights=[1.0, 0.5][: len(some)]))


@every_cell
def test_modules_of_one_entry_and_zeros_are_finite(cell: Cell) -> None:
    make, _ = SAMPLES[cell.kind]
    dots = [make(seed, 1, 0.5, ["layers.0.dot"]) for seed in (1, 2)]
    idle = with_tensors(cell.adapters[0], lambda name, t: t * 0 + ("ia3" in name))
    for some in (dots, dots[:1], [idle, cell.adapters[1]], [idle, idle], [idle]):
        assert finite(cell.merge(some))


@every_cell
def test_a_weight_of_zero_is_absence(cell: Cell) -> None:
    first, second, *_ = cell.adapters
    assert same_bytes(cell.merge([first, second], weights=[0, 1.5]), cell.merge([second], weights=[1.5]))


@every_cell
def test_the_scale_is_a_factor(cell: Cell) -> None:
    assert distance(cell.merge(scale=-2.5), cell.merge(scale=1.0), factor=-2.5) < 1e-4
    assert same_bytes(cell.plain, cell.merge(scale=cell.cls.default_scale))


@every_cell
def test_a_negative_weight_is_negation(cell: Cell) -> None:
    """Unlearning: the adapter of the opposite task vector is taken in; all weights negated negate the result."""
    if cell.method in NO_LAW_OF_NEGATION:
        pytest.skip(NO_LAW_OF_NEGATION[cell.method])
    adapters, weights = cell.adapters, [1.0, 0.7, 2.0][: len(cell.adapters)]
    ahead = cell.merge(weights=[-weights[0], *weights[1:]])
    assert distance(cell.merge(weights=[weights[0], *[-w for w in weights[1:]]]), ahead, factor=-1) < 1e-4
    opposite = drawing_as(negated(adapters[0]), adapters[0])
    assert distance(cell.merge([opposite, *adapters[1:]], weights=weights), ahead) < 1e-4


@every_cell
def test_weights_by_norm_are_those_of_the_task_vectors(cell: Cell) -> None:
    norms = [np.linalg.norm([float(a.delta(name).double().norm()) for name in a.modules]) for a in cell.adapters]
    weights = [float(np.mean(norms) / norm) for norm in norms]
    assert max(weights) > 1.2 * min(weights), "the samples differ"
    assert distance(cell.merge(weights="norm"), cell.merge(weights=weights)) < 1e-4


@of_cells([cell for cell in OFFERED if cell.has("density")])
def test_densities_of_almost_nothing_and_of_one(cell: Cell) -> None:
    nothing, everything = cell.merge(density=LEAST), cell.merge(density=1.0)
    assert finite(nothing) and finite(everything)
    sizes = [sum(float(m.delta(n).norm()) for n in m.modules) for m in (nothing, everything)]
    assert sizes[0] < sizes[1]
    assert same_bytes(everything, cell.merge(density=1.0, seed=1)), "nothing is left to chance"
    if cell.cls().trims() is not None or cell.cls.name in RANDOM:
        assert sizes[0] == 0


@every_cell
def test_a_recipe_makes_the_same_bytes(cell: Cell, folders: dict[str, list[Path]]) -> None:
    asked = {"density": 0.37} if cell.has("density") else {}
    weights = [1.5, -0.5, 2.0][: len(cell.adapters)]
    paths = folders[f"{cell.kind} {cell.adapters[1].ranks}"][: len(weights)]
    merged = cell.merge([Adapter.load(path) for path in paths], weights=weights, scale=0.7, seed=3, **asked)
    again = Recipe.from_yaml(merged.recipe.to_yaml())
    assert again == merged.recipe
    assert same_bytes(merge_recipe(again), merged)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The samples on disk, by kind and rank."""
    saved = {}
    for cell in OFFERED:
        key = f"{cell.kind} {cell.adapters[1].ranks}"
        if key not in saved:
            at = tmp_path_factory.mktemp(cell.kind)
            saved[key] = [adapter.save(at / str(n)) for n, adapter in enumerate(cell.adapters)]
    return saved


@pytest.mark.parametrize(("space", "kind"), sorted({cell[1:] for cell in OFFERED}))
def test_a_prepared_merge_is_the_merge(space: str, kind: str) -> None:
    cells = [cell for cell in OFFERED if cell[1:] == (space, kind)]
    prepared = {}
    for cell in cells:
        plan = prepared.setdefault(len(cell.adapters), ties_peft.prepare(cell.adapters, space))
        rank = {"rank": "max"} if kind_named(kind).has_rank else {}
        assert same_bytes(plan.merge(cell.method, **rank), cell.plain), cell.method


@pytest.mark.parametrize("space", spaces())
def test_a_prepared_merge_of_one_setting_after_another_is_the_merge(space: str) -> None:
    """By module, where it keeps magnitudes in order; many of them are equal."""
    adapters = [with_tensors(adapter, lambda _, t: (2 * t).round()) for adapter in samples("lora", EQUAL_RANKS)]
    plan = ties_peft.prepare(adapters, space)
    settings: list[dict[str, object]] = [{"density": density} for density in (0.5, 0.21, LEAST, 1.0)]
    settings += [{"weights": weights} for weights in ([3.0, 0.7, -1.0], [0.7, 3.0, 1.0], [1.0, 1.0, 0.0])]
    settings += [{"sign_from": adapters[1]}, {"density": 0.4}, *({"scope": scope} for scope in spaces()[space].scopes)]
    settings += [{"method": "dare+ties", "seed": seed} for seed in (0, 1)]
    settings += [
        {name: not field.default} for name, field in spaces()[space].model_fields.items() if field.default is True
    ]
    for asked in settings:
        given: dict[str, object] = {"scope": "module", "rank": "max", **asked}
        again, merged = plan.merge(**given), ties_peft.merge(adapters, space=space, **given)
        assert same_bytes(again, merged), asked
        assert again.report.to_dict() == merged.report.to_dict(), asked


# -- factors


@of_cells([cell for cell in OFFERED if cell.kind == "lora" and cell.space != "factors"])
def test_other_factors_are_the_same_adapter(cell: Cell) -> None:
    """(B·G, G⁻¹·A) merges to the same: by chance too, where the numbers are the same."""
    others = [drawing_as(in_other_factors(own, seed), own) for seed, own in enumerate(cell.adapters)]
    assert distance(cell.merge(others), cell.plain) < 1e-3


# -- two in a row


PAIRS = [
    *(f"{first}+{then}" for first, cls in method_classes().items() if cls.prepares() for then in method_classes()),
    *(f"{first}+{then}" for then, cls in method_classes().items() if cls.finishes() for first in method_classes()),
]


@pytest.mark.parametrize("pair", covering(sorted(set(PAIRS)), lambda pair: pair.split("+")))
def test_two_in_a_row_merge_or_are_refused(pair: str) -> None:
    """In core, where all can meet, if both are offered there; in delta entries and singular vectors do not."""
    first, then = (method_classes()[name] for name in pair.split("+"))
    adapters = samples("lora", (3, 3, 3))[:2]
    if "lora" not in first.kinds or "lora" not in then.kinds:
        with pytest.raises(MethodError, match="is not for LoRA adapters"):
            Cell(pair, "delta", "lora").merge(adapters)
        return
    if (first.spectral or then.spectral) and (first.entrywise or then.entrywise):
        together = "core" in first.spaces and "core" in then.spaces
        with pytest.raises(MethodError, match="--space core" if together else "Use one of them alone"):
            Cell(pair, "delta", "lora").merge(adapters)
        if not together:
            return
    space = "core" if {"core"} <= {*first.spaces} & {*then.spaces} else "delta"
    merged, other = (Cell(pair, space, "lora").merge(adapters, seed=seed) for seed in (0, 1))
    assert finite(merged)
    assert same_bytes(merged, other) != bool({first.name, then.name} & RANDOM)
