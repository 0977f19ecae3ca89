"""Base model: read single tensors of a base model's checkpoint from its files, without loading the model.

The task vectors of some PEFT types, such as DoRA, depend on the weight that they change, and a tensor that an adapter saves as
a whole is a task vector only as its difference from the base's. Only those tensors are read.

Some models of transformers store linear layers as `Conv1D`, with a weight (in, out) instead of (out, in). The shape of a
square weight does not tell which, so the architecture in the checkpoint's config.json decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import AdapterError
from . import sources
from .config_values import read_object
from .module_names import older_names
from .tensors import TensorInfo, TensorSource, open_tensors

PIPELINE = "diffusion_pytorch_model.safetensors"  # the weights of a part of a pipeline of diffusers
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json", f"{PIPELINE}.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin", PIPELINE)
MODEL_CONFIG, PIPELINE_INDEX = "config.json", "model_index.json"
Located = tuple[TensorSource, str]  # a file, and the name of a tensor in it
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")  # all layers of these names in those models


class BaseModel:
    """The tensors of a base model by name, read lazily.

    Args:
        tensors: by name, the file of each tensor and its name in it.
        label: the model's name in messages.
        config: the path of its config.json, which need not exist.
    """

    def __init__(self, tensors: Mapping[str, Located], label: str, config: Path | None = None) -> None:
        self._tensors = tensors
        self.label = label
        self._config = config

    @classmethod
    def load(cls, source: str | Path, token: str | None = None) -> BaseModel:
        """Open a checkpoint: a folder, one safetensors file, or a Hub id such as `org/name@revision:subfolder`.

        The tensors of a pipeline of diffusers, a folder with model_index.json, have their part before their names.

        Raises: AdapterError if there is no checkpoint, or it cannot be read.
        """
        label = str(source)
        path = sources.local_path(str(source))
        if path is not None and path.is_file():
            return cls(_whole(path, label), label, path.parent / MODEL_CONFIG)
        folder = path or _on_hub(str(source), token)
        tensors = _checkpoint(folder, label)
        if tensors is None and (folder / PIPELINE_INDEX).is_file():
            tensors = _pipeline(folder, label)
        if tensors is None:
            raise AdapterError(
                f"base model '{label}': there is no {', '.join(SINGLE[:-1])} or {SINGLE[-1]} in it. Name the folder that "
                "save_pretrained wrote, or its id on the Hub."
            )
        return cls(tensors, label, folder / MODEL_CONFIG)

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """The contents of the checkpoint's config.json; None if there is none.

        Raises: AdapterError if it cannot be read.
        """
        if self._config is None or not _is_file(self._config):
            return None
        try:
            return read_object(self._config)
        except ValueError as error:
            raise AdapterError(
                f"base model '{self.label}': {MODEL_CONFIG} cannot be read: it is {error}. Download it again."
            ) from None

    def is_conv1d(self, module: str) -> bool | None:
        """Return whether a linear layer is a Conv1D; None if the architecture is not known."""
        return None if self.config is None else is_conv1d(module, self.config)

    @property
    def modules(self) -> list[str]:
        """The names of its modules that have a weight."""
        return [name.removesuffix(".weight") for name in self.names if name.endswith(".weight")]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(sorted(self._tensors))

    def find(self, tensor: str) -> str | None:
        """Return the checkpoint's name of a tensor, which may be that of an older release of transformers; None if it has none."""
        module, _, parameter = tensor.rpartition(".")
        own = self._find(tensor)
        if own is not None:
            return own
        others = {found for name in older_names(module) if (found := self._find(f"{name}.{parameter}")) is not None}
        return others.pop() if len(others) == 1 else None

    def _find(self, tensor: str) -> str | None:
        """Return the checkpoint's name of a tensor, such as `encoder.layer.0.attention.self.query.weight`.

        The names of a model and of its checkpoint often differ in a prefix (`transformer.h.0…`, `h.0…`). So an equal name
        comes first, then the only name that ends in this one, then this name without its first parts. None if there is
        none, or if several names end in it.
        """
        if tensor in self._tensors:
            return tensor
        longer = [name for name in self.names if name.endswith(f".{tensor}")]
        if longer:
            return longer[0] if len(longer) == 1 else None
        parts = tensor.split(".")
        shorter = (".".join(parts[start:]) for start in range(1, len(parts) - 1))
        return next((name for name in shorter if name in self._tensors), None)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one of `names`."""
        file, own_name = self._tensors[name]
        return file.info(own_name)

    def read(self, name: str) -> Tensor:
        """Return one of `names` on the CPU, in its own dtype."""
        file, own_name = self._tensors[name]
        return file.read(own_name)

    def require(self, tensor: str, what: str) -> Tensor:
        """Return a tensor by its name in the model.

        Args:
            tensor: as in `find`.
            what: needs the tensor, for the message.
        Raises: AdapterError if the checkpoint has no such tensor.
        """
        name = self.find(tensor)
        if name is None:
            raise AdapterError(
                f"base model '{self.label}' has no tensor {tensor!r} (it has {len(self.names)}, such as "
                f"'{self.names[0] if self.names else 'none'}'), which {what} needs. Is it the base that the "
                "adapter was trained on, unquantised?"
            )
        return self.read(name)


def is_conv1d(module: str, config: Mapping[str, Any]) -> bool | None:
    """Return whether a linear layer of a model stores its weight as (in, out).

    Args:
        module: its path.
        config: the model's config.json.
    Returns: None if the config names no architecture of transformers, because it has no model_type or the model's code
        is in its own repository.

    >>> is_conv1d("transformer.h.0.attn.c_proj", {"model_type": "gpt2"})
    True
    >>> is_conv1d("transformer.h.0.attn.c_proj", {"model_type": "gpt_bigcode"})
    False
    """
    models = set(_model_types(config))
    if not models or "auto_map" in config:
        return None
    return module.rpartition(".")[2] in CONV1D_LAYERS and not models.isdisjoint(CONV1D_MODELS)


def _model_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield every model_type, also those of the parts of a composite model."""
    parts = [config]
    while parts:
        part = parts.pop()
        if isinstance(part.get("model_type"), str):
            yield part["model_type"]
        parts += [value for value in part.values() if isinstance(value, dict)]


def _on_hub(source: str, token: str | None) -> Path:
    """Download the checkpoint of a Hub id, and return its folder in the Hub's cache."""
    name, inside = sources.split_hub_source(source, "base model")
    within = f"{inside}/" if inside else ""
    wanted = [f"{within}{file}" for file in (*INDEX, *SINGLE, "*.safetensors")]
    return sources.download(name, wanted, token, "base model", optional=[f"{within}{MODEL_CONFIG}"]) / inside


def _checkpoint(folder: Path, label: str) -> dict[str, Located] | None:
    """Return the tensors of a model in a folder; None if there is none."""
    index = next((folder / name for name in INDEX if (folder / name).is_file()), None)
    if index is not None:
        return _shards(index, label)
    single = next((folder / name for name in SINGLE if (folder / name).is_file()), None)
    return None if single is None else _whole(single, label)


def _pipeline(folder: Path, label: str) -> dict[str, Located] | None:
    """Return the tensors of a pipeline's parts, each part before the names of its tensors."""
    found: dict[str, Located] = {}
    for inside in sorted(folder.iterdir()):
        tensors = _checkpoint(inside, label) if inside.is_dir() else None
        found |= {f"{inside.name}.{name}": located for name, located in (tensors or {}).items()}
    return found or None


def _whole(path: Path, label: str) -> dict[str, Located]:
    """Return the tensors of one file."""
    opened = open_tensors(path, label)
    return {name: (opened, name) for name in opened.names}


def _shards(index: Path, label: str) -> dict[str, Located]:
    """Return the tensors of a checkpoint in several files, by its index."""
    try:
        files = {str(name): Path(str(file)).name for name, file in read_object(index)["weight_map"].items()}
    except (ValueError, KeyError, AttributeError) as error:
        raise AdapterError(
            f"base model '{label}': {index.name} cannot be read ({type(error).__name__}: {error}). Download it again."
        ) from None
    missing = sorted({file for file in files.values() if not _is_file(index.parent / file)})
    if missing:
        raise AdapterError(
            f"base model '{label}': {len(missing)} of its files are missing, first {missing[0]}. "
            "Download it again, whole."
        )
    opened = {file: open_tensors(index.parent / file, label) for file in set(files.values())}
    return {name: (opened[file], name) for name, file in files.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long
        return False
