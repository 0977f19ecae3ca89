"""LoRA: Δ = s·B·A, s = alpha/r or, with rsLoRA, alpha/√r; and DoRA: Δ = m∘(W + s·B·A)/‖W + s·B·A‖ − W, by rows.

The rank is that of the tensors; alpha comes from the config by PEFT's matching rule. The type of a layer follows from the
names and shapes of its tensors:

    Linear, Conv1D     A (r, in), B (out, r); on GPT-2's Conv1D (`fan_in_fan_out`) oriented as on a Linear
    convolution        A (r, in, k…), B (out, r, 1…): Δ is flattened to (out, in·k…)
    Embedding          lora_embedding_A (r, vocabulary), lora_embedding_B (dim, r): Δ is (dim, vocabulary)
    lora_bias          lora_B.bias (out,): Δ of the bias is s·b, a matrix (out, 1), as if a 1 were appended to the input
    MultiheadAttention `mha` and `mha.base_layer.out_proj`, which PEFT adapts together
    target_parameters  A (E·r, in), B (out, r·E); the expert is the slowest index of A and the fastest of B. There is a module
                       for each expert; further parameters of the same layer are stored under `base_layer`
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import AdapterError
from ...task_vectors.delta import Delta, Dense, LowRank
from ..base_model import BaseModel
from ..contents import PREFIX, Contents, base_weight
from ..tensors import TensorSource
from .base import BIAS, CONV, EMBEDDING, EXPERT, LINEAR, ModuleInfo, WritablePeftType

A, B, B_BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
SUFFIXES = (A, B, B_BIAS, EMBEDDING_A, EMBEDDING_B, *MAGNITUDES)
NESTED, OUT_PROJ = ".base_layer", ".base_layer.out_proj"
ORDER = ("gate_up_proj", "down_proj")  # in which models define the parameters of experts

REFUSED_SETTINGS = {
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "an Arrow router",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron layers",
}
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")  # initialisations that alter the base's weights


class Lora(WritablePeftType):
    """Low-rank adapters (Hu et al., LoRA, ICLR 2022; Kalajdzievski, rsLoRA, 2023; Liu et al., DoRA, ICML 2024)."""

    name = "lora"
    title = "LoRA"
    config_name = "LORA"

    def layout(self, contents: Contents) -> dict[str, ModuleInfo]:
        """Return the layers with pairs of lora_A and lora_B, their biases and magnitudes; shapes are checked."""
        contents.refuse_settings(REFUSED_SETTINGS)
        _refuse_changed_base(contents)
        layers = contents.layers(SUFFIXES)
        found = [m for path, parts in layers.items() for m in _Layer(path, parts, contents).modules(layers)]
        if any(module.base_tensors for module in found):
            contents.require_base("is a DoRA, whose task vector depends on the weights it was trained on")
        return {module.name: module for module in sorted(found, key=lambda module: module.name)}

    def read(self, module: ModuleInfo, tensors: TensorSource, base: BaseModel | None) -> Delta:
        """Return the factors s·B and A; a dense matrix for DoRA."""
        if module.layer_type == BIAS:
            bias = tensors.read(module.keys[0]).to(torch.float32).reshape(-1, 1)
            return LowRank(bias * module.scaling, torch.ones(1, 1), module.scaling)
        factors = (1.0, module.scaling, 1.0)  # of A, B and a magnitude
        first, second, *magnitude = (
            _float32(tensors.read(key), factor) for key, factor in zip(module.keys, factors, strict=False)
        )
        if module.layer_type == EXPERT:
            which, experts = module.expert
            first = first.reshape(experts, -1, first.shape[-1])[which]
            second = second.reshape(second.shape[0], -1, experts)[:, :, which].contiguous()
        delta = LowRank(second.flatten(1), first.flatten(1), module.scaling)
        return _dora(delta, magnitude[0], module, base) if magnitude else delta

    def written(self, module: ModuleInfo, rank: int) -> ModuleInfo:
        """Return the module with a lora scaling of 1 and the rank of the output."""
        return replace(
            module, rank=rank, keys=_keys(module), scaling=1.0, expert=(0, 1), base_tensors=(), rank_is_trained=True
        )

    def pack(self, module: ModuleInfo, delta: Delta, rank: int) -> dict[str, Tensor]:
        """Return A and B padded with zeros to `rank`, for a lora scaling of 1."""
        if module.layer_type == BIAS:
            return {_keys(module)[0]: delta.dense().reshape(-1)}
        if not isinstance(delta, LowRank):
            raise TypeError(f"a LoRA is written from factors, not from {type(delta).__name__}")
        first, second = torch.zeros(rank, delta.shape[1]), torch.zeros(delta.shape[0], rank)
        first[: delta.rank], second[:, : delta.rank] = delta.A, delta.B
        first = first.reshape(rank, -1, *module.kernel_size)
        second = second.reshape(*second.shape, *(1 for _ in module.kernel_size))
        return dict(zip(_keys(module), (first, second), strict=True))

    def join(self, modules: Sequence[ModuleInfo], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stack the experts of a parameter into one tensor; add biases of zeros if some layers have a bias on lora_B."""
        joined = dict(tensors)
        experts: dict[str, dict[str, list[ModuleInfo]]] = {}
        for module in modules:
            if module.layer_type == EXPERT:
                experts.setdefault(module.path, {}).setdefault(_parameter(module), []).append(module)
        for path, parameters in experts.items():
            for depth, name in enumerate(sorted(parameters, key=_order, reverse=True)):
                joined |= _stacked(f"{PREFIX}{path}{NESTED * depth}", parameters[name], joined)
        if any(module.layer_type == BIAS for module in modules):
            for module in modules:
                if module.layer_type in (LINEAR, CONV):
                    like = tensors[_keys(module)[1]]
                    joined.setdefault(f"{PREFIX}{module.path}.{B_BIAS}", torch.zeros(like.shape[0], dtype=like.dtype))
        return joined

    def config(self, modules: Sequence[ModuleInfo], rank: int) -> dict[str, Any]:
        """Return one rank, alpha = r, no patterns, and the full paths of the modules; other entries only if needed."""
        paths = {m.path for m in modules if m.layer_type not in (EXPERT, BIAS) and not m.path.endswith(OUT_PROJ)}
        parameters = {f"{m.path}.{_parameter(m)}" for m in modules if m.layer_type == EXPERT}
        return {
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(paths),
            **({"target_parameters": sorted(parameters)} if parameters else {}),
            **({"lora_bias": True} if any(m.layer_type == BIAS for m in modules) else {}),
        }

    def fault(self, modules: Sequence[ModuleInfo]) -> str | None:
        """Return why some modules do not fit: PEFT supports a bias on lora_B only for linear layers and convolutions."""
        biased = any(module.layer_type == BIAS for module in modules)
        others = [m for m in modules if m.layer_type in (EMBEDDING, EXPERT) or m.path.endswith(OUT_PROJ)]
        if biased and others:
            return (
                f"some have a bias on lora_B, some adapt {others[0].name!r}, and PEFT has no adapter with "
                "both. Leave one of them out"
            )
        return None


class _Layer:
    """One of PEFT's layers in a file.

    Args:
        path: in the base model.
        parts: its tensors' names by their suffixes.
        contents: of the adapter.
    """

    def __init__(self, path: str, parts: dict[str, str], contents: Contents) -> None:
        self.path, self.parts, self.contents = path, parts, contents
        self.config, self.shapes, self.where = contents.config, contents.shapes(parts), contents.where(path)

    def modules(self, layers: dict[str, dict[str, str]]) -> Iterator[ModuleInfo]:
        """Yield its task vectors."""
        embedding = EMBEDDING_A in self.parts or EMBEDDING_B in self.parts
        pair = (EMBEDDING_A, EMBEDDING_B) if embedding else (A, B)
        self.check_pair(pair)
        first, second = (self.shapes[end] for end in pair)
        layer_type = EMBEDDING if embedding else CONV if first[2:] else LINEAR
        self.check_shapes(first, second, layer_type, pair)
        rank, keys = first[0], (self.parts[pair[0]], self.parts[pair[1]])
        parent = self.path.removesuffix(OUT_PROJ)
        fused = self.config.get("target_parameters") and not self.contents.is_target(self.path)
        if parent == self.path and fused:
            yield from self.experts(layers, keys, (second[0], first[1]), rank)
        else:
            shape, scaling = (second[0], math.prod(first[1:])), self.scaling(parent, rank)
            name = self.path if parent == self.path else f"{parent}.out_proj"
            plain = ModuleInfo(name, shape, rank, keys, scaling, False, layer_type, self.path, kernel_size=first[2:])
            yield self.with_magnitude(plain)
        if B_BIAS in self.parts or (self.config.get("lora_bias") and layer_type in (LINEAR, CONV)):
            yield self.bias(second[0], rank)

    def with_magnitude(self, module: ModuleInfo) -> ModuleInfo:
        """Return the module as it is, or with the magnitudes of DoRA."""
        magnitude = next((end for end in MAGNITUDES if end in self.parts), None)
        if (magnitude is None) == bool(self.config.get("use_dora")):
            seen = "no lora_magnitude_vector" if magnitude is None else "a lora_magnitude_vector"
            raise AdapterError(
                f"{self.where}: use_dora is {self.config.get('use_dora')!r}, but there is {seen}. Save the adapter again."
            )
        if magnitude is None:
            return module
        shape, entries = module.shape, math.prod(self.shapes[magnitude])
        if entries != shape[0]:
            raise AdapterError(
                f"{self.where}: its lora_magnitude_vector has {entries} entries; expected {shape[0]}, one for each output. "
                "Save the adapter again."
            )
        return replace(
            module,
            rank=min(shape),
            keys=(*module.keys, self.parts[magnitude]),
            rank_is_trained=False,
            base_tensors=(f"{self.path}.weight",),
            conv1d=module.layer_type == LINEAR and self.contents.check_conv1d(self.path, shape[0]),
        )

    def bias(self, out: int, rank: int) -> ModuleInfo:
        """Return the task vector of the layer's bias."""
        if B_BIAS not in self.parts or not self.config.get("lora_bias") or self.config.get("use_dora"):
            seen = "a lora_B.bias" if B_BIAS in self.parts else "no lora_B.bias"
            raise AdapterError(
                f"{self.where}: there is {seen}, lora_bias is {self.config.get('lora_bias')!r} and use_dora "
                f"{self.config.get('use_dora')!r}; PEFT has a bias with the first alone. Save the adapter again."
            )
        keys, scaling = (self.parts[B_BIAS],), self.scaling(self.path, rank)
        return ModuleInfo(f"{self.path}.bias", (out, 1), 1, keys, scaling, layer_type=BIAS, layer=self.path)

    def experts(
        self, layers: dict[str, dict[str, str]], keys: tuple[str, ...], shape: tuple[int, int], rows: int
    ) -> Iterator[ModuleInfo]:
        """Yield a module for each expert of one parameter.

        Args:
            layers: of the file, by path.
            shape: of one expert's task vector.
            rows: of lora_A, those of all experts.
        """
        layer, depth = self.path, 0
        while layer.endswith(NESTED):
            layer, depth = layer.removesuffix(NESTED), depth + 1
        nested = next(n for n in itertools.count(1) if layer + NESTED * n not in layers)
        name = f"{layer}.{self.parameters(layer, nested)[depth]}"
        rank = int(self.contents.number("r", "rank_pattern", name, 8))
        if rank < 1 or rows % rank:
            raise AdapterError(
                f"{self.where}: lora_A has {rows} rows, which r = {rank} does not divide. Correct adapter_config.json."
            )
        count, scaling = rows // rank, self.scaling(name, rank)
        for which in range(count):
            own = f"{name}[{which}]" if count > 1 else name
            yield ModuleInfo(own, shape, rank, keys, scaling, layer_type=EXPERT, layer=layer, expert=(which, count))

    def parameters(self, layer: str, count: int) -> list[str]:
        """Return the names of a layer's adapted parameters, the outermost first, which models define last.

        Args:
            layer: its path.
            count: how many of them the file has, one inside the other.
        """
        listed = self.config["target_parameters"]
        if not isinstance(listed, list) or not all(isinstance(target, str) for target in listed):
            raise AdapterError(
                f"{self.contents.label}: target_parameters is {listed!r}; expected a list of parameters' names. "
                "Correct adapter_config.json."
            )
        fitting = [t for t in listed if f"{layer}.{t.rpartition('.')[2]}".endswith(t)]
        dotted = [target for target in fitting if "." in target]
        found = {target.rpartition(".")[2] for target in (dotted if len(dotted) == count else fitting)}
        names = sorted(found, key=_order, reverse=True)
        if len(names) != count or (count > 1 and not found <= set(ORDER)):
            raise AdapterError(
                f"{self.where}: {count} adapted parameters lie in this layer, and target_parameters "
                f"{listed!r} do not tell which is which (known are {', '.join(ORDER)}). Leave it out."
            )
        return names

    def scaling(self, name: str, rank: int) -> float:
        """Return s, with alpha by PEFT's matching rule for alpha_pattern, and r from the tensors."""
        alpha = self.contents.number("lora_alpha", "alpha_pattern", name, 8)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def check_pair(self, ends: tuple[str, str]) -> None:
        """Refuse a layer that lacks one of its two factors."""
        missing = [end.removesuffix(".weight") for end in ends if end not in self.parts]
        if missing:
            seen = next(end for end in (*ends, *self.parts) if end in self.parts).removesuffix(".weight")
            raise AdapterError(f"{self.where}: there is a {seen} but no {missing[0]}. Save the adapter again, whole.")

    def check_shapes(
        self, first: tuple[int, ...], second: tuple[int, ...], layer_type: str, ends: tuple[str, str]
    ) -> None:
        """Refuse shapes that do not fit each other, and layers that PEFT no longer supports."""
        A_name, B_name = (end.removesuffix(".weight") for end in ends)
        seen = f"{A_name} is {list(first)} and {B_name} is {list(second)}"
        if layer_type == CONV and len(second) == len(first) and 0 < second[1] < first[0]:
            raise AdapterError(
                f"{self.where}: {seen}, as on a grouped convolution, whose update PEFT itself cannot write as a matrix. "
                "Leave the adapter out."
            )
        if len(first) == 2 and len(second) == 3:
            raise AdapterError(
                f"{self.where}: {seen}, as in the fused layers of PEFT before 0.3 (enable_lora), which no later PEFT loads. "
                "Convert it with that release, or leave it out."
            )
        tail = (1,) * (len(first) - 2) if layer_type == CONV else ()
        if len(first) != 2 + len(tail) or second[1:] != (first[0], *tail) or 0 in first + second:
            raise AdapterError(
                f"{self.where}: {seen}; expected [r, in] and [out, r] with the same r, at least 1. The file is damaged: save "
                "the adapter again."
            )


def _float32(tensor: Tensor, factor: float) -> Tensor:
    """Return factor · tensor in float32 with at most one copy; more copies of many adapters would fragment the memory."""
    upcast = tensor.to(torch.float32)
    if factor == 1:
        return upcast
    return upcast * factor if upcast is tensor else upcast.mul_(factor)


def _dora(delta: LowRank, magnitude: Tensor, module: ModuleInfo, base: BaseModel | None) -> Dense:
    """Return m∘V/‖V‖ − W with V = W + s·B·A and norms by rows, computed in float64."""
    weight = base_weight(base, module.base_tensors[0], f"DoRA on module {module.name!r}").flatten(1)
    if module.layer_type == EMBEDDING or module.conv1d:
        weight = weight.T
    if tuple(weight.shape) != module.shape:
        raise AdapterError(
            f"module {module.name!r}: the base's weight is {list(weight.shape)}, the adapter's task vector "
            f"{list(module.shape)}. Is it the base that the adapter was trained on?"
        )
    moved = weight + delta.B.double() @ delta.A.double()
    share = magnitude.double().reshape(-1, 1) / torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    return Dense((share * moved - weight).float().contiguous())


def _keys(module: ModuleInfo) -> tuple[str, ...]:
    """Return the names of a module's packed tensors; those of experts are stacked later."""
    if module.layer_type == BIAS:
        return (f"{PREFIX}{module.path}.{B_BIAS}",)
    ends = (EMBEDDING_A, EMBEDDING_B) if module.layer_type == EMBEDDING else (A, B)
    path = module.name if module.layer_type == EXPERT else module.path
    return f"{PREFIX}{path}.{ends[0]}", f"{PREFIX}{path}.{ends[1]}"


def _parameter(module: ModuleInfo) -> str:
    """Return the name of an expert's parameter."""
    return module.name.removeprefix(f"{module.path}.").partition("[")[0]


def _order(parameter: str) -> int:
    return ORDER.index(parameter) if parameter in ORDER else len(ORDER)


def _stacked(path: str, modules: Sequence[ModuleInfo], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return A (E·r, in) and B (out, r·E) of one parameter, and remove its experts' tensors from `tensors`."""
    pairs = [tuple(tensors.pop(key) for key in _keys(m)) for m in sorted(modules, key=lambda m: m.expert)]
    first = torch.cat([pair[0] for pair in pairs])
    second = torch.stack([pair[1] for pair in pairs], dim=2).flatten(1)
    return {f"{path}.{A}": first, f"{path}.{B}": second}


def _refuse_changed_base(contents: Contents) -> None:
    start = contents.config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise AdapterError(
            f"adapter '{contents.label}' was initialised with {start!r}, which changes the base's weights, so its "
            "tensors are not a delta to the plain base. Convert it with PEFT first: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
