"""Student: an adapter whose parameters are fitted while hooks apply it to a base model.

The base's own tensors stay unchanged and get no gradient. What is fitted:

    factors  A and B of every module: y + B·A·x
    gains    one number for each direction of every module, with A and B fixed: y + B·diag(g)·A·x
    vectors  (IA)³: l of every module: l ⊙ y, or W·(l ⊙ x) + b on feed-forward layers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
SIZE_OF_ZEROS = 1e-2  # the size that parameters are taken to have if all of them start at 0


class Student:
    """An adapter whose parameters are fitted.

    Args:
        start: the adapter that it is at first; it must adapt linear layers only.
        bench: the base model that it is applied to.
        fit: `factors` or `gains`; (IA)³ has only `vectors`.
        seed: of the values that A gets where A and B of a direction of the start are 0.

    Attributes:
        parameters: the fitted tensors, float32, on the bench's device, by `MODULE.A`, `.B`, `.g` or `.l`.
    Raises: CompatibilityError where the start adapts a layer that is not linear.
    """

    def __init__(self, start: Adapter, bench: Bench, fit: str = FACTORS, seed: int = 0) -> None:
        self.start, self.bench, self.seed = start, bench, seed
        self.fit = fit if start.peft_type.has_rank else VECTORS
        self._fixed_factors: dict[str, tuple[Tensor, Tensor]] = {}
        _check_layers(start, bench)
        values = {name: value for module in start.modules for name, value in self._start_values(module).items()}
        self._sizes = _sizes(values)
        if self.fit == FACTORS:
            _draw_zero_directions(values, self._sizes["A"], seed)
        self.parameters = {name: value.to(bench.device).requires_grad_() for name, value in values.items()}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Apply the student to the bench's model by hooks, within a `with` block."""
        with ExitStack() as stack:
            for name in self.start.modules:
                stack.callback(self._register_hook(name).remove)
            yield

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """Return groups of parameters for an optimiser of torch, one for each of A, B, g and l.

        Args:
            rate: a share of the size of the parameters. The learning rate of a group is this times the root mean square
                of the group's parameters at the start (for l, of l − 1).
        """
        return [
            {"params": [p for name, p in self.parameters.items() if _letter(name) == letter], "lr": rate * size}
            for letter, size in self._sizes.items()
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the parameters to values that `state_dict` returned."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors of the adapter as its file holds them, on the CPU."""
        with torch.no_grad():
            return self._packed({name: self._delta(name) for name in self.start.modules}, dtype)

    def started_from(self, deltas: Mapping[str, LowRank]) -> Student:
        """Return a student of the same modules and rank that starts from other task vectors."""
        start = Adapter.from_tensors(self.start.config, self._packed(deltas, torch.float32))
        return Student(start, self.bench, self.fit, self.seed)

    def _packed(self, deltas: Mapping[str, LowRank | Dense], dtype: torch.dtype) -> dict[str, Tensor]:
        kind = output_type(self.start.peft_type)
        packed: dict[str, Tensor] = {}
        for name, delta in deltas.items():
            module = self.start.module(name)
            packed |= kind.pack(module, delta, module.rank)
        packed |= {name: self.start.tensors.read(name) for name in self.start.extra_keys}
        return {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in packed.items()}

    def _start_values(self, name: str) -> dict[str, Tensor]:
        """Return the parameters of one module at the start; for gains, store its fixed factors."""
        delta = self.start.read(name)
        if not isinstance(delta, LowRank):
            return {f"{name}.l": 1 + delta.dense()}
        if self.fit == GAINS:
            self._fixed_factors[name] = (delta.A.to(self.bench.device), delta.B.to(self.bench.device))
            return {f"{name}.g": torch.ones(delta.rank)}
        return {f"{name}.A": delta.A.clone(), f"{name}.B": delta.B.clone()}

    def _delta(self, name: str) -> LowRank | Dense:
        if self.fit == VECTORS:
            return Dense(self.parameters[f"{name}.l"].cpu() - 1)
        A, B = self._factors(name)
        return LowRank(B.cpu(), A.cpu())

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        if self.fit == GAINS:
            A, B = self._fixed_factors[name]
            return A * self.parameters[f"{name}.g"].unsqueeze(1), B
        return self.parameters[f"{name}.A"], self.parameters[f"{name}.B"]

    def _register_hook(self, name: str) -> Any:
        layer = self.bench.layer(name)
        if self.fit != VECTORS:
            return layer.register_forward_hook(self._add_low_rank(name))
        vector = self.parameters[f"{name}.l"]
        if self.start.module(name).on_input:
            return layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * vector.to(inputs[0].dtype),))
        return layer.register_forward_hook(lambda _, inputs, output: output * vector.to(output.dtype))

    def _add_low_rank(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def add(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            A, B = self._factors(name)
            added: Tensor = (inputs[0].to(A.dtype) @ A.T) @ B.T
            return output + added.to(output.dtype)

        return add


def _letter(name: str) -> str:
    """Return A, B, g or l, from a parameter's name."""
    return name.rpartition(".")[2]


def _sizes(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the root mean square of all parameters of each letter, of l that of l − 1."""
    sizes = {}
    for letter in sorted({_letter(name) for name in values}):
        own = [value - float(letter == "l") for name, value in values.items() if _letter(name) == letter]
        total = sum(float(value.double().square().sum()) for value in own)
        sizes[letter] = (total / sum(value.numel() for value in own)) ** 0.5 or SIZE_OF_ZEROS
    return sizes


def _draw_zero_directions(values: Mapping[str, Tensor], size: float, seed: int) -> None:
    """Draw A at random where A and B of a direction are 0, so that B gets a gradient; B·A stays 0 there."""
    for name, A in values.items():
        if _letter(name) != "A":
            continue
        B = values[f"{name.removesuffix('.A')}.B"]
        is_zero = (A == 0).all(1) & (B == 0).all(0)
        if is_zero.any():
            generator = torch.Generator().manual_seed(stream_key(seed, name, 0, "wake") % (1 << 63))
            A[is_zero] = size * torch.randn(int(is_zero.sum()), A.shape[1], generator=generator)


def _check_layers(start: Adapter, bench: Bench) -> None:
    """Refuse a start with a module that is not a linear layer."""
    bench.check(start)
    for name in start.modules:
        layer, layer_type = bench.layer(name), start.module(name).layer_type
        if layer_type != LINEAR or not (isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"):
            raise CompatibilityError(
                f"the start adapts {name!r}, {layer_type} ({type(layer).__name__}); only linear layers can be fitted. Start from "
                "an adapter without it, or leave out the adapters that have it."
            )
