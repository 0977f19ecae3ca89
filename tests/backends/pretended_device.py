"""A device that is not there: tensors that say they live on `lazy`, are computed on the CPU, and mix with nothing.

What a real one refuses is refused: arithmetic between devices (numbers without a dimension apart), NumPy's view
of a tensor. What is brought back to the CPU is counted. It holds for the thread that opened it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy", 0)
MOVES = ("_to_copy", "copy_")  # between devices by right
PLACES = ("index", "index_put_", "index_put", "_index_put_impl_")  # take places from the CPU, too


class PretendedTensor(torch.Tensor):
    """A tensor of that device."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> PretendedTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
        )
        made.held = real
        return made

    def tolist(self) -> Any:
        """Its numbers, which any device gives."""
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"PretendedTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carry_out(func, args, kwargs or {})


class Traffic(TorchDispatchMode):
    """Takes what is made on the device to it.

    Attributes:
        back: how many numbers were brought back to the CPU, by move.
    """

    def __init__(self) -> None:
        super().__init__()
        self.back: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        given = [t for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, Tensor)]
        home = name == "_to_copy" and str((kwargs or {}).get("device")) == "cpu"
        if home or (name == "copy_" and not isinstance(args[0], PretendedTensor)):
            self.back += [t.numel() for t in given[-1:] if isinstance(t, PretendedTensor)]
        return carry_out(func, args, kwargs or {})


def carry_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do it on the CPU, and say that it was done on the device if it was."""
    name = func.overloadpacket.__name__
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there = [t for t in given if isinstance(t, PretendedTensor)]
    here = [t for t in given if not isinstance(t, PretendedTensor) and t.dim() > 0]
    if there and here and name not in (*MOVES, *PLACES):
        raise RuntimeError(f"expected all tensors to be on the same device: {func} of both devices")
    asked = kwargs.get("device")
    goes = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if name == "copy_":
        goes = isinstance(args[0], PretendedTensor)
    plain = {**kwargs, "device": torch.device("cpu")} if asked is not None else kwargs
    made = func(*tree_map(_held, args), **tree_map(_held, plain))
    if name.endswith("_") and not name.startswith("_"):
        return args[0]
    if "out" in kwargs:
        return kwargs["out"]
    return tree_map(lambda t: PretendedTensor(t) if isinstance(t, Tensor) else t, made) if goes else made


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendedTensor) else value


@contextmanager
def pretended_device() -> Iterator[Traffic]:
    """Where `device="lazy"` can be named."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Traffic() as traffic:
            yield traffic
    finally:
        torch.set_num_threads(threads)
