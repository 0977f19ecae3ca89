"""A subclass's own `merge` is what runs: for every method that has a faster way, on every path and at every size."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import PREFIX
from contracts.cells import EQUAL_RANKS, OFFERED, Cell, drawn_statistics, samples, tensors, with_tensors
from oracles import definition
from safetensors.torch import load_file, save_file
from sampling import covering
from torch import Tensor

import ties_peft
from ties_peft import Adapter
from ties_peft.methods import Method, TaskVectors, method_classes, register
from ties_peft.methods.base import Trim
from ties_peft.methods.ties import Ties
from ties_peft.task_vectors.delta import Delta
from ties_peft.task_vectors.kernels import backends as fast

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
NAME = "overridden"
MERGING = [name for name, cls in method_classes().items() if not cls.chooses()]  # those that choose another never merge
TRIMMING = [name for name in MERGING if method_classes()[name]().trims() is not None]
CELLS = [cell for cell in OFFERED if not cell.cls.chooses()]
Rule = Callable[[Any, TaskVectors], Tensor | Delta]


@pytest.fixture(autouse=True)
def every_fast_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is done from a certain size on is done at once: compiled kernels, tiles."""
    pytest.importorskip("numba")
    monkeypatch.setattr(fast, "MIN_ENTRIES", 0)
    monkeypatch.setattr("ties_peft.task_vectors.tiles.TILE", 7)
    for module in ("task_vectors.threshold", "merging.thresholds"):
        monkeypatch.setattr(f"ties_peft.{module}.SORTED_SIZE", 10)
    monkeypatch.setattr(Adapter, "statistics", drawn_statistics)
    monkeypatch.setattr(sys.modules["ties_peft.methods"], "_REGISTERED", {})
    yield
    method_classes.cache_clear()


def overridden(cls: type[Method], rule: Rule, **own: Any) -> type[Method]:
    """A registered subclass of a method whose `merge` is another one."""
    body = {"name": NAME, "source": "a test", "__doc__": "A test.", "merge": rule, **own}
    body["__annotations__"] = {"name": ClassVar[str], "source": ClassVar[str], **dict.fromkeys(own, ClassVar[bool])}
    body["__module__"] = __name__
    return register(type("Overridden", (cls,), body))


def summed(self: Method, task_vectors: TaskVectors) -> Delta:
    """Σ (i + 1)·wᵢ·τᵢ, in factors."""
    return task_vectors.sum([float(place + 1) for place in range(len(task_vectors))])


def counted(self: Method, task_vectors: TaskVectors) -> Tensor:
    """The same, vector by vector."""
    return sum((place * values for place, values in enumerate(task_vectors, 1)), torch.zeros(task_vectors.shape))


def counted_trimmed(self: Any, task_vectors: TaskVectors) -> Tensor:
    """Σ (i + 1)·trim(wᵢ·τᵢ), vector by vector."""
    return counted(self, task_vectors.trim(self.density, self.scope))


def counted_in_tiles(self: Any, task_vectors: TaskVectors) -> Delta:
    """The same, some rows at a time."""
    return task_vectors.trim(self.density, self.scope).by_tiles(lambda tile: counted(self, tile))


def levelled(self: Any, task_vectors: TaskVectors) -> Tensor:
    """Σ (i + 1)·trim(wᵢ·τᵢ)/‖trim(wᵢ·τᵢ)‖: of a whole module, not entry by entry."""
    kept = list(task_vectors.trim(self.density, self.scope))
    return sum(
        (place * own / own.norm().clamp_min(1e-9) for place, own in enumerate(kept, 1)), torch.zeros(task_vectors.shape)
    )


def vectors(adapter: Adapter) -> definition.Vectors:
    """Its task vectors, in float64, by NumPy."""
    return definition.task_vectors(adapter.config, {n: t.double().numpy() for n, t in tensors(adapter).items()})


def sum_of(adapters: Sequence[Adapter], weights: Sequence[float], space: str) -> definition.Vectors:
    """`counted` by definition: of the task vectors, and in `factors` of the A and of the B."""
    if space != "factors":
        parts = [
            {n: place * w * v for n, v in vectors(a).items()}
            for place, (a, w) in enumerate(zip(adapters, weights, strict=True), 1)
        ]
        return {name: stack.sum(0) for name, stack in definition.stacks(parts).items()}
    sides: dict[str, list[Any]] = {}
    for place, (adapter, weight) in enumerate(zip(adapters, weights, strict=True), 1):
        held = {n: t.double().numpy() for n, t in tensors(adapter).items()}
        for name in adapter.modules:
            scaling, B, A = definition.lora_parts(adapter.config, held, name)
            root = np.sqrt(abs(weight * scaling))
            sides.setdefault(name, []).append((place * root * B, place * np.copysign(root, weight * scaling) * A))
    return {name: sum(B for B, _ in own) @ sum(A for _, A in own) for name, own in sides.items()}


def assert_close(merged: Adapter, expected: definition.Vectors) -> None:
    assert list(merged.modules) == sorted(expected)
    for name, wanted in expected.items():
        np.testing.assert_allclose(
            merged.delta(name).numpy(), wanted, rtol=1e-3, atol=1e-4 * (1 + np.abs(wanted).max())
        )


def scopes(cell: Cell) -> list[dict[str, str]]:
    found = [
        scope for scope in ("adapter", "module") if cell.has("scope") and (cell.space, scope) != ("factors", "adapter")
    ]
    return [{"scope": scope} for scope in found] or [{}]


def alone(adapter: Adapter) -> Adapter:
    """One module of it, over which both scopes rank the same entries."""
    name = adapter.modules[1]
    held = {key: tensor for key, tensor in tensors(adapter).items() if f"{name}." in key}
    return Adapter.from_tensors({**adapter.config, "target_modules": [name], **_ahead(adapter, name)}, held)


def _ahead(adapter: Adapter, name: str) -> dict[str, list[str]]:
    known = adapter.config.get("feedforward_modules")
    return {} if known is None else {"feedforward_modules": [own for own in known if own == name]}


@pytest.mark.parametrize(
    ("cell", "rule"),
    covering(
        itertools.product(CELLS, [summed, counted]), lambda case: (case[0].method, (case[0][1:], case[1])), "merge"
    ),
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_every_method_in_every_space_and_scope(cell: Cell, rule: Rule) -> None:
    weights = [2.0, 1.0, 0.5] if cell.cls().check([2.0, -1.0], cell.space) else [2.0, -1.0, 0.5]
    overridden(cell.cls, rule)
    for adapters in (cell.adapters, [alone(adapter) for adapter in cell.adapters]):
        own = weights[: len(adapters)]
        expected = sum_of(adapters, own, cell.space)
        for scope in scopes(cell):
            mine = Cell(NAME, cell.space, cell.kind)
            assert_close(mine.merge(adapters, weights=own, scale=1.0, **scope), expected)


def repeated(kind: str) -> list[Adapter]:
    """Samples of which many magnitudes are equal, so that a trim decides by position."""
    if kind == "lora":
        return [with_tensors(adapter, lambda _, t: t.sign()) for adapter in samples("lora", EQUAL_RANKS)]
    return [with_tensors(adapter, lambda _, t: (4 * t).round() / 4) for adapter in samples("ia3", EQUAL_RANKS)]


@pytest.mark.parametrize(
    ("rule", "name", "kind"),
    covering(
        itertools.product([counted_trimmed, counted_in_tiles, levelled], TRIMMING, ["lora", "ia3"]),
        lambda case: (case[1], case[::2]),
    ),
)
def test_what_a_subclass_trims_is_exactly_what_the_method_trims(name: str, kind: str, rule: Rule) -> None:
    """Also where the rule needs a module whole, while its cuts were found tile by tile."""
    overridden(method_classes()[name], rule, trims=one_cut)
    weights, adapters = [2.0, -1.0, 0.5], repeated(kind)
    for scope in ("adapter", "module"):
        merged = ties_peft.merge(
            adapters,
            NAME,
            weights=weights,
            scale=1.0,
            density=0.41,
            scope=scope,
            **({"rank": "max"} if kind == "lora" else {}),
        )
        kept = definition.trim_all([vectors(adapter) for adapter in adapters], weights, 0.41, scope)
        parts = [
            {n: place * v / (max(np.linalg.norm(v), 1e-9) if rule is levelled else 1.0) for n, v in own.items()}
            for place, own in enumerate(kept, 1)
        ]
        assert_close(merged, {n: stack.sum(0) for n, stack in definition.stacks(parts).items()})


def one_cut(self: Any) -> Trim:
    return Trim((self.density,), self.scope)


@pytest.mark.parametrize("scope", ["adapter", "module"])
def test_a_trim_that_was_not_declared(scope: str) -> None:
    """Over a module it is found as it is asked for; over the adapter it cannot be any more, and is refused."""

    def half(self: Any, task_vectors: TaskVectors) -> Delta:
        kept = task_vectors.trim(0.5, self.scope)
        return kept.disjoint_merge(kept.elect())

    overridden(Ties, half)
    adapters, weights = repeated("lora"), [2.0, -1.0, 0.5]

    if scope == "adapter":
        with pytest.raises(ties_peft.MethodError, match="has to be declared"):
            ties_peft.merge(adapters, NAME, density=0.3, scope=scope, rank="max")
    else:
        merged = ties_peft.merge(adapters, NAME, weights=weights, density=0.3, scope=scope, rank="max")
        assert_close(merged, definition.ties([vectors(a) for a in adapters], weights, 0.5, scope))


@pytest.mark.parametrize("name", MERGING)
def test_one_put_in_the_place_of_a_methods_own_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = method_classes()[name]
    kind = "lora" if "lora" in cls.kinds else "ia3"
    plain = cls.merge

    def doubled(self: Any, task_vectors: TaskVectors) -> Tensor | Delta:
        merged = plain(self, task_vectors)
        return merged * 2 if isinstance(merged, Tensor) else merged.scaled(2.0)

    adapters = samples(kind, EQUAL_RANKS)[:2]
    scope = {"scope": "module"} if "scope" in cls.model_fields else {}
    before = ties_peft.merge(adapters, name, **scope)
    monkeypatch.setattr(cls, "merge", doubled)
    after = ties_peft.merge(adapters, name, **scope)
    assert_close(after, {module: 2 * before.delta(module).double().numpy() for module in before.modules})


@pytest.mark.parametrize("cell", covering(CELLS, lambda cell: (cell.method, cell[1:]), "adds"), ids=str)
def test_one_that_adds_to_the_methods_own(cell: Cell) -> None:
    """It calls the one that it overrides, which finds what it is used to: whole or by rows, trimmed exactly."""
    cls = cell.cls

    def doubled(self: Any, task_vectors: TaskVectors) -> Tensor | Delta:
        merged = cls.merge(self, task_vectors)
        return merged * 2 if isinstance(merged, Tensor) else merged.scaled(2.0)

    own, factor = {"seed": 3, "scale": 1.0}, 4 if cell.space == "factors" else 2  # A and B each
    for scope in scopes(cell):
        before = cell.merge(**own, **scope)
        overridden(cls, doubled)
        after = Cell(NAME, cell.space, cell.kind).merge(**own, **scope)
        assert_close(after, {name: factor * before.delta(name).double().numpy() for name in before.modules})


def test_a_prepared_merge_runs_it_too() -> None:
    overridden(Ties, counted)
    adapters, weights = samples("lora", EQUAL_RANKS), [2.0, -1.0, 0.5]
    merged = ties_peft.prepare(adapters, space="delta").merge(NAME, weights=weights, scope="module", rank="max")
    assert_close(merged, sum_of(adapters, weights, "delta"))


@pytest.mark.parametrize(
    ("scope", "name"), covering(itertools.product(["adapter", "module"], TRIMMING), lambda case: case)
)
def test_whole_layers_are_merged_by_it_too(
    make_lora: Callable[..., Path], tmp_path: Path, name: str, scope: str
) -> None:
    """A head as a task vector, trimmed on its own; many of its magnitudes are equal."""
    overridden(method_classes()[name], levelled, trims=one_cut)
    draw, key = torch.Generator().manual_seed(5), "score.weight"
    origin = torch.randint(-9, 10, (5, 7), generator=draw).float()  # whole numbers: what is added comes back exactly
    (tmp_path / "base").mkdir()
    save_file({key: origin}, tmp_path / "base/model.safetensors")
    heads = [torch.randint(-3, 4, (5, 7), generator=draw).float() for _ in range(3)]
    folders, weights = [], [2.0, -1.0, 0.5]
    for place, head in enumerate(heads):
        folders.append(make_lora(f"a{place}", seed=place))
        own = load_file(folders[-1] / "adapter_model.safetensors") | {f"{PREFIX}{key}": origin + head}
        save_file(own, folders[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
    asked = {"weights": weights, "density": 0.41, "scope": scope, "scale": 1.0}
    merged = ties_peft.merge(folders, NAME, heads="merge", base=tmp_path / "base", **asked)
    kept = [
        definition.trim({key: w * h.double().numpy()}, 0.41, "module")[key] for w, h in zip(weights, heads, strict=True)
    ]
    expected = origin.double().numpy() + sum(place * own / np.linalg.norm(own) for place, own in enumerate(kept, 1))
    np.testing.assert_allclose(merged.tensors.read(f"{PREFIX}{key}").numpy(), expected, atol=1e-5)


def test_what_a_class_says_of_its_merge_holds_for_that_merge_alone() -> None:
    class Same(Ties):
        """A test."""

    class Other(Ties):
        """A test."""

        def merge(self, task_vectors: TaskVectors) -> Tensor | Delta:
            return super().merge(task_vectors)

    class Below(Other):
        """A test."""

        entrywise: ClassVar[bool] = True

    assert Same.entrywise and Same(density=1.0).linear(1)
    assert not Other.entrywise and not Other(density=1.0).linear(1)
    assert Below.entrywise and not Below(density=1.0).linear(1)


def test_signs_of_other_task_vectors_decide() -> None:
    """Elected by all entries, merged of the trimmed ones."""

    def untrimmed(self: Any, task_vectors: TaskVectors) -> Delta:
        kept = task_vectors.trim(self.density, self.scope)
        return kept.disjoint_merge(task_vectors.elect(), "sum")

    overridden(Ties, untrimmed)
    adapters, weights = repeated("lora"), [2.0, -1.0, 0.5]
    merged = ties_peft.merge(adapters, NAME, weights=weights, density=0.3, scope="module", rank="max")
    own = [vectors(adapter) for adapter in adapters]
    every = definition.stacks([{n: w * v for n, v in o.items()} for o, w in zip(own, weights, strict=True)])
    kept = definition.stacks(definition.trim_all(own, weights, 0.3, "module"))
    wanted = {}
    for name, stack in kept.items():
        signs = np.where(every[name].sum(0) >= 0, 1.0, -1.0)
        wanted[name] = np.where(np.sign(stack) == signs, stack, 0.0).sum(0)
    assert_close(merged, wanted)
