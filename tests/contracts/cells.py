"""The cells of the catalogue, method × space × kind, as they are discovered, and adapters to fill them.

Nothing here names a method or a space: one more of either is covered by being there. A kind of its own
form needs samples, in `SAMPLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from conftest import PREFIX, lora_config
from torch import Tensor

import ties_peft
from ties_peft import Adapter, Merged
from ties_peft.adapters.statistics import Statistics
from ties_peft.adapters.types import peft_types
from ties_peft.methods import Method, method_classes
from ties_peft.spaces import spaces

SHAPES = {"layers.0.dot": (1, 1), "layers.0.up": (9, 6), "layers.1.q": (6, 5)}
LENGTHS = {"layers.0.dot": 1, "layers.0.down": 14, "layers.1.k": 9}
RANKS, EQUAL_RANKS, GAINS = (3, 2, 4), (3, 3, 3), (0.4, 0.2, 0.5)


class Cell(NamedTuple):
    """A method in a space on a kind of adapter."""

    method: str
    space: str
    kind: str

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def cls(self) -> type[Method]:
        return method_classes()[self.method]

    @property
    def offered(self) -> bool:
        """Whether the method, the space and the kind say so of each other."""
        return self.space in self.cls.spaces and self.kind in self.cls.kinds and self.kind in spaces()[self.space].kinds

    @property
    def adapters(self) -> list[Adapter]:
        """Three of unlike ranks and norms, the last without a module; two for a method that is for two."""
        mixed = spaces()[self.space]().check({"q": RANKS}) is None
        found = samples(self.kind, RANKS if mixed else EQUAL_RANKS)
        return found[:2] if self.cls().check([1.0, 1.0, 1.0], self.space) else found

    @property
    def plain(self) -> Merged:
        """What it makes of its adapters, asked for nothing more; made once."""
        return plain(self)

    def has(self, parameter: str) -> bool:
        return parameter in self.cls.model_fields

    def merge(self, adapters: Sequence[Adapter] | None = None, **asked: Any) -> Merged:
        """At full rank, where the kind has one."""
        rank = {"rank": "max"} if "rank" not in asked and kind_named(self.kind).has_rank else {}
        chosen = self.adapters if adapters is None else list(adapters)
        return ties_peft.merge(chosen, method=self.method, space=self.space, **rank, **asked)


@cache
def plain(cell: Cell) -> Merged:
    return cell.merge()


def kind_named(name: str) -> Any:
    return next(kind for kind in peft_types().values() if kind.name == name)


# -- samples


def lora(seed: int, rank: int, gain: float, modules: Sequence[str]) -> Adapter:
    """A LoRA on some of the modules, its lora scaling 1½."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {name: SHAPES[name] for name in modules}
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=draw)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = gain * torch.randn(rows, rank, generator=draw)
    return Adapter.from_tensors(lora_config(shapes, rank, 1.5 * rank), tensors)


def ia3(seed: int, rank: int, gain: float, modules: Sequence[str]) -> Adapter:
    """An (IA)³, feed-forward where a module's name ends in `down`; its vectors are positive."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in modules:
        vector = 1 + gain * (2 * torch.rand(LENGTHS[name], generator=draw) - 1)
        tensors[f"{PREFIX}{name}.ia3_l"] = vector.reshape((1, -1) if name.endswith("down") else (-1, 1))
    ahead = [name for name in modules if name.endswith("down")]
    return Adapter.from_tensors(
        {"peft_type": "IA3", "target_modules": [*modules], "feedforward_modules": ahead}, tensors
    )


SAMPLES: Mapping[str, tuple[Callable[[int, int, float, Sequence[str]], Adapter], Mapping[str, Any]]] = {
    "lora": (lora, SHAPES),
    "ia3": (ia3, LENGTHS),
}


@cache
def samples(kind: str, ranks: tuple[int, ...]) -> list[Adapter]:
    """Three adapters, not all at odds with each other; the last lacks the last module."""
    make, modules = SAMPLES[kind]
    names = list(modules)
    settings = enumerate(zip(ranks, GAINS, strict=True))
    return [make(6 + seed, rank, gain, names[:-1] if seed == 2 else names) for seed, (rank, gain) in settings]


def with_tensors(adapter: Adapter, change: Callable[[str, Tensor], Tensor]) -> Adapter:
    """The adapter with every tensor changed."""
    return Adapter.from_tensors(
        dict(adapter.config), {name: change(name, t).contiguous() for name, t in tensors(adapter).items()}
    )


def negated(adapter: Adapter) -> Adapter:
    """The adapter of the opposite task vector: −A, 2 − l."""
    opposite = {"lora_A.weight": torch.neg, "ia3_l": lambda vector: 2 - vector}
    return with_tensors(
        adapter, lambda name, t: next((change(t) for end, change in opposite.items() if name.endswith(end)), t)
    )


def drawing_as(adapter: Adapter, other: Adapter) -> Adapter:
    """The adapter, given the random numbers of another: they belong to its digest."""
    adapter.__class__ = type("Drawing", (Adapter,), {"digest": other.digest})
    return adapter


def in_other_factors(adapter: Adapter, seed: int) -> Adapter:
    """(B·G, G⁻¹·A) for a random G on every module, its scale moved into one of the factors."""
    draw = torch.Generator().manual_seed(seed)
    found = tensors(adapter)
    for module, layout in adapter.layout.items():
        G = 30.0 ** (seed % 3 - 1) * torch.randn(layout.rank, layout.rank, generator=draw, dtype=torch.float64)
        a, b = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")
        found[a] = torch.linalg.solve(G, found[a].double()).float()
        found[b] = (found[b].double() @ G).float()
    return Adapter.from_tensors(dict(adapter.config), found)


def drawn_statistics(adapter: Adapter, kind: str) -> Statistics:
    """Statistics as a function of the task vector that its sign and factors do not matter to: 0.1 + τ², I + τᵀ·τ."""
    made = {}
    for name in adapter.modules:
        tau = adapter.delta(name).double()
        made[name] = (0.1 + tau**2 if kind == "fisher" else torch.eye(tau.shape[-1]) + tau.T @ tau).float()
    return Statistics.make(kind, adapter.digest, made, 1)


# -- results


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    return {name: adapter.tensors.read(name) for name in adapter.tensors.names}


def same_bytes(first: Adapter, second: Adapter) -> bool:
    ours, theirs = tensors(first), tensors(second)
    return ours.keys() == theirs.keys() and all(
        t.dtype == theirs[n].dtype and torch.equal(t.view(torch.uint8), theirs[n].view(torch.uint8))
        for n, t in ours.items()
    )


def distance(first: Adapter, second: Adapter, factor: float = 1.0) -> float:
    """The largest relative error of `first` as factor · `second`, over the modules."""
    assert first.modules == second.modules
    errors = []
    for name in first.modules:
        seen, wanted = first.delta(name).double(), factor * second.delta(name).double()
        errors.append(float((seen - wanted).norm() / wanted.norm().clamp_min(1e-6)))
    return max(errors)


def finite(adapter: Adapter) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors(adapter).values())


CELLS = [
    Cell(method, space, kind)
    for method in method_classes()
    for space in spaces()
    for kind in sorted({kind.output_name for kind in peft_types().values()})
]
OFFERED = [cell for cell in CELLS if cell.offered]
REFUSED = [cell for cell in CELLS if not cell.offered]
