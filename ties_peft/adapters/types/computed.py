"""PEFT types whose task vector PEFT itself computes: Δ = W′ − W, where W′ is the weight W after PEFT's merge; read only.

PEFT is imported when such an adapter is read. It gets a model of one layer with the base's weight in float64 and the adapter's
tensors. A second layer has the largest sizes that occur, because some types share tensors of these sizes among all layers.
All types of PEFT were tried; those for which this is exact are listed in `TYPES`.
"""

from __future__ import annotations

import inspect
import math
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import AdapterError, one_line
from ...task_vectors.delta import Dense
from ..base_model import BaseModel
from ..contents import PREFIX, Contents, base_weight
from ..tensors import TensorSource
from .base import ModuleInfo, PeftType

TYPES = {  # config_name: title, prefix of the names of its parameters
    "BOFT": ("BOFT", "boft_"),
    "C3A": ("C3A", "c3a_"),
    "DELORA": ("DeLoRA", "delora_"),
    "FOURIERFT": ("FourierFT", "fourierft_"),
    "GRALORA": ("GraLoRA", "gralora_"),
    "HIRA": ("HiRA", "hira_"),
    "HRA": ("HRA", "hra_"),
    "MISS": ("MiSS", "miss_"),
    "OFT": ("OFT", "oft_"),
    "RANDLORA": ("RandLoRA", "randlora_"),
    "SHIRA": ("SHiRA", "shira_"),
    "VBLORA": ("VB-LoRA", "vblora_"),
    "WAVEFT": ("WaveFT", "waveft_"),
    "PVERA": ("PVeRA", "pvera_"),
    "DEFT": ("DEFT", "deft_"),
    "PEANUT": ("PEANuT", "peanut_"),
    "SUPERTUNING": ("Supertuning", "supertuning_"),
    "OSF": ("OSF", "osf_"),
}
INDEXED = ("SHIRA", "SUPERTUNING")  # their files hold the indices of the entries that they change
LOCK = threading.Lock()  # filters of warnings and the random state belong to the whole process
LARGEST = "of_the_largest_sizes"
LAYERS: Mapping[int, Any] = {2: nn.Linear, 3: nn.Conv1d, 4: nn.Conv2d}  # by the dimensions of the weight


@dataclass(frozen=True)
class ModuleInputs:
    """What a module is computed from, besides its tensors.

    Attributes:
        config: of the adapter.
        largest: the largest (out, in) over all its modules.
        where: the module in messages.
    """

    config: Mapping[str, Any]
    largest: tuple[int, int]
    where: str


class Computed(PeftType):
    """A PEFT type that PEFT merges into a weight for us.

    Args:
        config_name: in adapter_config.json.
        title: in text.
        prefix: of the names of its parameters.
    """

    def __init__(self, config_name: str, title: str, prefix: str) -> None:
        self.config_name, self.title, self.prefix = config_name, title, prefix
        self.name = config_name.lower()
        self.has_integer_tensors = config_name in INDEXED

    @classmethod
    def instances(cls) -> list[PeftType]:
        """Return one instance for each type in `TYPES`."""
        return [cls(config_name, title, prefix) for config_name, (title, prefix) in TYPES.items()]

    def layout(self, contents: Contents) -> dict[str, ModuleInfo]:
        """Return the layers, each with its own tensors and those that all layers share."""
        layers: dict[str, list[str]] = {}
        shared: list[str] = []
        for key in contents.tensors.names:
            path, found, _ = key.partition(f".{self.prefix}")
            if found and path.startswith(PREFIX):
                layers.setdefault(path.removeprefix(PREFIX), []).append(key)
            elif found:
                shared.append(key)
        if layers:
            contents.require_base(f"is of type {self.title}, whose task vector PEFT makes from the base's weights")
        shapes = {name: _shape(name, contents) for name in sorted(layers)}
        largest = tuple(max((shape[side] for shape, _, _ in shapes.values()), default=0) for side in (0, 1))
        return {
            name: ModuleInfo(
                name,
                (out, width * math.prod(kernel)),
                min(out, width * math.prod(kernel)),
                (*layers[name], *shared),
                kernel_size=kernel,
                rank_is_trained=False,
                base_tensors=(f"{name}.weight",),
                conv1d=conv1d,
                details=ModuleInputs(contents.config, (largest[0], largest[1]), contents.where(name)),
            )
            for name, ((out, width), kernel, conv1d) in shapes.items()
        }

    def read(self, module: ModuleInfo, tensors: TensorSource, base: BaseModel | None) -> Dense:
        """Return W′ − W, (out, in), computed in float64."""
        weight = base_weight(base, module.base_tensors[0], f"{self.title} on module {module.name!r}")
        state = {key: tensors.read(key) for key in module.keys}
        try:
            with LOCK, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                torch.manual_seed(0)
                change = self._merged(module, weight, state)
        except AdapterError:
            raise
        except Exception as error:  # PEFT's own, of any type
            raise AdapterError(
                f"{module.details.where}: PEFT cannot make its task vector ({type(error).__name__}: "
                f"{one_line(error)}). Does the adapter load in PEFT on this base?"
            ) from error
        if module.conv1d:
            change = change.T
        return Dense(change.flatten(1).float().contiguous())

    def _merged(self, module: ModuleInfo, weight: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return W′ − W, computed by PEFT on a model with only this layer."""
        import peft

        known: ModuleInputs = module.details
        cls = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.config_name)]
        accepted = inspect.signature(cls).parameters
        given = {key: value for key, value in known.config.items() if key in accepted and key not in FILTERS}
        layer = _layer(weight, module.conv1d)
        largest = _layer(torch.zeros(known.largest[::-1] if module.conv1d else known.largest), module.conv1d)
        root = nn.Module()
        _add_layer(root, module.name, layer)
        root.add_module(LARGEST, largest)
        model = peft.PeftModel(root.double(), cls(**{**given, "target_modules": [module.name, LARGEST]}))
        outcome: Any = peft.set_peft_model_state_dict(model, state)
        if outcome.unexpected_keys:
            raise AdapterError(
                f"{known.where}: PEFT has no place for tensor {outcome.unexpected_keys[0]!r} in a layer of the "
                "base's shape. Is it the base that the adapter was trained on? Embeddings with an adapter of this type cannot be merged."
            )
        model.double().eval()
        adapted: Any = model.get_base_model().get_submodule(module.name)
        plain = adapted.get_base_layer()
        before, bias = plain.weight.detach().clone(), plain.bias.detach().clone()
        with torch.no_grad():
            adapted.merge()
        plain = adapted.get_base_layer()
        if not torch.equal(plain.bias, bias):
            raise AdapterError(
                f"{known.where}: {self.config_name} changes the bias too, for which a LoRA has no form. Leave it out."
            )
        change: Tensor = plain.weight.detach() - before
        return change


def _shape(name: str, contents: Contents) -> tuple[tuple[int, int], tuple[int, ...], bool]:
    """Return (out, in), the kernel size, and whether it is a Conv1D, of a layer's weight in the base."""
    known = contents.base_shape(name)
    if known is None or len(known) not in (2, 3, 4):
        raise AdapterError(
            f"{contents.where(name)}: the base has no weight of that name that is a matrix or a convolution (found {known and list(known)}). Is it the base that the adapter was trained on, unquantised?"
        )
    conv1d = len(known) == 2 and contents.check_conv1d(name)
    return (known[conv1d], known[not conv1d]), known[2:], conv1d


FILTERS = ("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "modules_to_save", "task_type")


def _layer(weight: Tensor, conv1d: bool) -> nn.Module:
    """Make a layer with this weight, and a bias by which a change of the bias can be detected."""
    width, out = weight.shape[not conv1d], weight.shape[conv1d]
    layer: Any
    if conv1d:
        from transformers.pytorch_utils import Conv1D

        layer = Conv1D(out, width)  # type: ignore[no-untyped-call]
    else:
        kernel = [tuple(weight.shape[2:])] if weight.dim() > 2 else []
        layer = LAYERS[weight.dim()](width, out, *kernel)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(torch.linspace(1, 2, out), requires_grad=False)
    found: nn.Module = layer
    return found


def _add_layer(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Add a layer to a model at a dotted path."""
    *parents, last = path.split(".")
    for name in parents:
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, layer)
