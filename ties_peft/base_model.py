"""Base model: single tensors of a base model's checkpoint, read from its files, never the model itself.

A few kinds of adapter have no task vector without the weight they change (DoRA), and a whole tensor
that an adapter saves is a task vector only as the distance from the base's own. Just those tensors are
read; the rest of the checkpoint stays on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from . import sources
from .errors import AdapterError, printable
from .spellings import older
from .tensors import Info, PickleFile, SafetensorsFile, TensorSource

PIPELINE = "diffusion_pytorch_model.safetensors"  # of a pipeline's part, as diffusers saves it
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json", f"{PIPELINE}.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin", PIPELINE)


class BaseModel:
    """The tensors of a base model by name, lazily.

    Args:
        files: where each tensor lies.
        label: how messages name the model.
    """

    def __init__(self, files: dict[str, TensorSource], label: str) -> None:
        self._files = files
        self.label = label

    @classmethod
    def load(cls, source: str | Path, token: str | None = None) -> BaseModel:
        """Open a checkpoint: a folder, one safetensors file, or a Hub id such as `org/name@revision:subfolder`.

        Raises: AdapterError where there is no checkpoint, or none that can be read.
        """
        label = printable(str(source))
        path = sources.local(str(source))
        if path is not None and path.is_file():
            return cls(_whole(path, label), label)
        folder = path or _on_hub(str(source), token)
        index = next((folder / name for name in INDEX if (folder / name).is_file()), None)
        if index is not None:
            return cls(_shards(index, label), label)
        single = next((folder / name for name in SINGLE if (folder / name).is_file()), None)
        if single is None:
            raise AdapterError(
                f"base model '{label}': there is no {', '.join(SINGLE[:-1])} or {SINGLE[-1]} in it. Name the folder that "
                "save_pretrained wrote, or its id on the Hub."
            )
        return cls(_whole(single, label), label)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All tensors, sorted."""
        return tuple(sorted(self._files))

    def find(self, tensor: str) -> str | None:
        """The checkpoint's name of a tensor, also where the checkpoint spells its module the older way."""
        module, _, parameter = tensor.rpartition(".")
        names = [tensor, *(f"{name}.{parameter}" for name in older(module))]
        return next((found for name in names if (found := self._find(name)) is not None), None)

    def _find(self, tensor: str) -> str | None:
        """The checkpoint's name of a tensor, such as `encoder.layer.0.attention.self.query.weight`.

        A model and its checkpoint often differ by what stands in front (`transformer.h.0…`, `h.0…`): the
        name itself is taken where it is there, else the one name that ends in it, else the one that is
        left when its first parts are taken away. None where there is none, or several fit.
        """
        if tensor in self._files:
            return tensor
        longer = [name for name in self.names if name.endswith(f".{tensor}")]
        if longer:
            return longer[0] if len(longer) == 1 else None
        parts = tensor.split(".")
        shorter = (".".join(parts[start:]) for start in range(1, len(parts) - 1))
        return next((name for name in shorter if name in self._files), None)

    def info(self, name: str) -> Info:
        """Shape and dtype of one of `names`."""
        return self._files[name].info(name)

    def read(self, name: str) -> Tensor:
        """One of `names`, on the CPU, in its own dtype."""
        return self._files[name].read(name)

    def only(self, tensors: Sequence[str]) -> TensorSource:
        """Some of its tensors, by the names that `find` knows them by; what is not there is left out."""
        return _Chosen(self, {name: found for name in tensors if (found := self.find(name)) is not None})

    def need(self, tensor: str, what: str) -> Tensor:
        """A tensor by the model's name for it.

        Args:
            tensor: as in `find`.
            what: what needs it, for the message.
        Raises: AdapterError where the checkpoint has no such tensor.
        """
        name = self.find(tensor)
        if name is None:
            raise AdapterError(
                f"base model '{self.label}' has no tensor '{printable(tensor)}' (it has {len(self.names)}, such as "
                f"'{printable(self.names[0]) if self.names else 'none'}'), which {what} needs. Is it the base that the "
                "adapter was trained on, unquantised?"
            )
        return self.read(name)


class _Chosen:
    """Some tensors of a base model, under names of the model's."""

    def __init__(self, base: BaseModel, found: Mapping[str, str]) -> None:
        self._base, self._found = base, dict(found)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._found))

    def info(self, name: str) -> Info:
        return self._base.info(self._found[name])

    def read(self, name: str) -> Tensor:
        return self._base.read(self._found[name])


def _on_hub(source: str, token: str | None) -> Path:
    """The copy of a Hub id's checkpoint, in the Hub's cache."""
    name, colon, inside = source.partition(":")
    if colon and not sources.is_inside(inside):
        raise AdapterError(
            f"base model '{printable(source)}': there is no such folder, and '{printable(inside)}' is no path inside a "
            "repository of the Hub. Expected org/name:folder."
        )
    within = f"{inside.rstrip('/')}/" if inside else ""
    wanted = [f"{within}{file}" for file in (*INDEX, *SINGLE, "*.safetensors")]
    return sources.download(name, wanted, token, "base model") / inside


def _whole(path: Path, label: str) -> dict[str, TensorSource]:
    opened: TensorSource = (SafetensorsFile if path.suffix == ".safetensors" else PickleFile)(path, label)
    return dict.fromkeys(opened.names, opened)


def _shards(index: Path, label: str) -> dict[str, TensorSource]:
    """The tensors of a checkpoint in several files, by its index."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): Path(str(file)).name for name, file in table.items()}
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(
            f"base model '{label}': {index.name} cannot be read ({type(error).__name__}: {printable(str(error))})."
        ) from None
    missing = sorted({file for file in files.values() if not _is_file(index.parent / file)})
    if missing:
        raise AdapterError(
            f"base model '{label}': {len(missing)} of its files are missing, first {printable(missing[0])}. "
            "Download it again, whole."
        )
    opened: dict[str, TensorSource] = {
        file: (SafetensorsFile if file.endswith(".safetensors") else PickleFile)(index.parent / file, label)
        for file in set(files.values())
    }
    return {name: opened[file] for name, file in files.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long
        return False
