"""Check a device, a dtype and whole numbers before any work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..errors import RecipeError
from .options import check_option


def check_device(device: str) -> torch.device:
    """Return a device after a computation on it has worked.

    Raises: RecipeError.
    """
    try:
        where = torch.device(device)
        torch.zeros(1, device=where).item()
    except (TypeError, RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"device {str(device)!r} cannot be used: {first}. Try cpu.") from None
    return where


def output_dtype(asked: torch.dtype | str | None, adapters: Sequence[Adapter]) -> torch.dtype:
    """Return the dtype of the result: as asked for, else that of all adapters, else float32.

    Raises: RecipeError.
    """
    if asked is None:
        found = {adapter.dtype for adapter in adapters}
        return found.pop() if len(found) == 1 else torch.float32
    name = str(asked).removeprefix("torch.")
    check_option("dtype", name)
    made: torch.dtype = getattr(torch, name)
    return made


def check_whole(name: str, value: Any, least: int) -> None:
    """Check that a value is a whole number and not too small.

    Raises: RecipeError.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RecipeError(f"{name} is {value!r}; expected a whole number, {least} or more.")
