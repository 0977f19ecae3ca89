"""Student: an adapter in the making, put on a bench by hooks, so that its parameters can be fitted.

The base's own tensors stay frozen and untouched, and nothing else gets a gradient. What is fitted:

    factors  A and B of every module: y + B·A·x
    gains    one number for each direction of every module, its A and B fixed: y + B·diag(g)·A·x
    vectors  (IA)³: l of every module: l ⊙ y, or W·(l ⊙ x) + b on feed-forward layers

All parameters lie one after the other in one vector, so that an optimiser's step, and a saved state, is
a few vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.types import output_type
from ..adapters.types.base import LINEAR
from ..errors import CompatibilityError
from ..evaluation.loaded_model import Bench
from ..task_vectors.delta import Dense, LowRank
from ..task_vectors.random_numbers import stream_key
from . import FITS

FACTORS, GAINS = FITS
VECTORS = "vectors"
UNIT_OF_ZEROS = 1e-2  # the unit of a step where everything starts at nothing


class Student:
    """An adapter whose parameters are fitted.

    Args:
        start: what it begins as; the layers that it adapts must be linear.
        bench: where it is put on.
        fit: `factors` or `gains`; (IA)³ knows only `vectors`.
        seed: of the draw that wakes directions that start at zero, A being drawn and B staying 0.

    Attributes:
        flat: all parameters, (n,), float32, on the bench's device.
        gradient: theirs, (n,).
        unit: the size by which a step of each is measured, (n,): the root mean square of all parameters
            of its sort (A, B, g, l − 1) at the start.
    """

    def __init__(self, start: Adapter, bench: Bench, fit: str = FACTORS, seed: int = 0) -> None:
        self.start, self.bench = start, bench
        self.fit = fit if start.peft_type.has_rank else VECTORS
        self._fixed: dict[str, tuple[Tensor, Tensor]] = {}
        _check_layers(start, bench)
        values = {name: value for module in start.modules for name, value in self._values(module).items()}
        units = _units(values)
        if self.fit == FACTORS:
            _draw_zero_directions(values, units, seed)
        self.flat = torch.cat([value.reshape(-1) for value in values.values()]).to(bench.device)
        sized = [torch.full((value.numel(),), units[_parameter_kind(name)]) for name, value in values.items()]
        self.unit = torch.cat(sized).to(bench.device)
        self.gradient = torch.zeros_like(self.flat)
        self.parameters = self._leaves(values)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The bench with the student on it."""
        handles: list[Any] = []
        try:
            handles += [self._register_hook(name) for name in self.start.modules]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def set(self, values: Tensor) -> None:
        """Take parameters in place of those it has, (n,)."""
        with torch.no_grad():
            self.flat.copy_(values)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What it has become, as an adapter's file holds it."""
        kind = output_type(self.start.peft_type)
        made: dict[str, Tensor] = {}
        with torch.no_grad():
            for name in self.start.modules:
                module = self.start.module(name)
                made |= kind.pack(module, self._delta(name), module.rank)
        made |= {name: self.start.tensors.read(name) for name in self.start.extra_keys}
        return {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in made.items()}

    def _values(self, name: str) -> dict[str, Tensor]:
        """The parameters of one module at the start; a direction's fixed factors are put aside."""
        delta = self.start.read(name)
        if not isinstance(delta, LowRank):
            return {f"{name}.l": 1 + delta.dense()}
        if self.fit == GAINS:
            self._fixed[name] = (delta.A.to(self.bench.device), delta.B.to(self.bench.device))
            return {f"{name}.g": torch.ones(delta.rank)}
        return {f"{name}.A": delta.A.clone(), f"{name}.B": delta.B.clone()}

    def _leaves(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of each module as leaves of the graph that share their memory with `flat`."""
        leaves, start = {}, 0
        for name, value in values.items():
            stop = start + value.numel()
            leaf = self.flat[start:stop].view(value.shape).detach().requires_grad_()
            leaf.grad = self.gradient[start:stop].view(value.shape)
            leaves[name], start = leaf, stop
        return leaves

    def _delta(self, name: str) -> LowRank | Dense:
        if self.fit == VECTORS:
            return Dense(self.parameters[f"{name}.l"].cpu() - 1)
        A, B = self._factors(name)
        return LowRank(B.cpu(), A.cpu())

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        if self.fit == GAINS:
            A, B = self._fixed[name]
            return A * self.parameters[f"{name}.g"].unsqueeze(1), B
        return self.parameters[f"{name}.A"], self.parameters[f"{name}.B"]

    def _register_hook(self, name: str) -> Any:
        layer = self.bench.layer(name)
        if self.fit != VECTORS:
            return layer.register_forward_hook(self._add_low_rank(name))
        vector = self.parameters[f"{name}.l"]
        if self.start.module(name).on_input:
            return layer.register_forward_pre_hook(lambda _, given: (given[0] * vector.to(given[0].dtype),))
        return layer.register_forward_hook(lambda _, given, out: out * vector.to(out.dtype))

    def _add_low_rank(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(_: nn.Module, given: Any, out: Tensor) -> Tensor:
            A, B = self._factors(name)
            added: Tensor = (given[0].to(A.dtype) @ A.T) @ B.T
            return out + added.to(out.dtype)

        return add


def _parameter_kind(name: str) -> str:
    """A, B, g or l."""
    return name.rpartition(".")[2]


def _units(values: dict[str, Tensor]) -> dict[str, float]:
    """The root mean square of each sort of parameters."""
    found = {}
    for sort in sorted({_parameter_kind(name) for name in values}):
        own = [value - float(sort == "l") for name, value in values.items() if _parameter_kind(name) == sort]
        total = sum(float(value.double().square().sum()) for value in own)
        found[sort] = (total / sum(value.numel() for value in own)) ** 0.5 or UNIT_OF_ZEROS
    return found


def _draw_zero_directions(values: dict[str, Tensor], units: dict[str, float], seed: int) -> None:
    """Directions with A and B both 0 would stay so for ever: draw their A. The function stays the same."""
    for name, A in values.items():
        if _parameter_kind(name) != "A":
            continue
        B = values[f"{name.removesuffix('.A')}.B"]
        idle = ((A == 0).all(1)) & ((B == 0).all(0))
        if idle.any():
            generator = torch.Generator().manual_seed(stream_key(seed, name, 0, "wake") % (1 << 63))
            A[idle] = units["A"] * torch.randn(int(idle.sum()), A.shape[1], generator=generator)


def _check_layers(start: Adapter, bench: Bench) -> None:
    """Every module is a linear layer."""
    bench.check(start)
    odd = [
        name for name in start.modules if start.module(name).layer_type != LINEAR or not _is_linear(bench.layer(name))
    ]
    if odd:
        raise CompatibilityError(
            f"the start adapts {odd[0]!r}, a {start.module(odd[0]).layer_type} module; what is fitted are linear layers. "
            "Start from an adapter without it, or leave out the adapters that have it."
        )


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
