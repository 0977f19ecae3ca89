"""State: what a long piece of work keeps in a folder, so that it can be stopped and go on.

Safetensors files with a line of JSON, each written beside its place and then renamed into it: a stop at
any moment leaves the one before. A fingerprint of what was asked stands in each, and a file of other work is
refused, not mixed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import RecipeError, one_line

SUFFIX = ".safetensors"


class Checkpoint:
    """Files of one piece of work.

    Args:
        folder: where; None keeps nothing.
        fingerprint: of what was asked, everything that the result depends on.
    Raises: RecipeError where the folder holds the state of other work, or cannot be used.
    """

    def __init__(self, folder: str | Path | None, fingerprint: str) -> None:
        self.folder = None if folder is None else Path(folder)
        self.fingerprint = fingerprint
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise OSError(None, "it cannot be written to")
        except OSError as error:
            raise RecipeError(
                f"the state folder {str(folder)!r} cannot be used: {error.strerror or error}. Choose another."
            ) from None
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            self._open(path)

    def read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts by the name that `write` was given; None where there are none."""
        path = self._path(name)
        return self._open(path, whole=True) if path is not None and path.is_file() else None

    def write(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Keep tensors and plain facts, in place of those of that name."""
        path = self._path(name)
        if path is None:
            return
        staged = path.with_suffix(".part")
        held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        save_file(held, staged, metadata={"fingerprint": self.fingerprint, "facts": json.dumps(dict(facts))})
        staged.replace(path)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}{SUFFIX}"

    def _open(self, path: Path, whole: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                facts = file.metadata() or {}
                names = list(file.keys()) if whole else []
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise RecipeError(
                f"the state {str(path)!r} cannot be read ({one_line(error)}). Delete the folder to begin anew."
            ) from None
        if facts.get("fingerprint") != self.fingerprint:
            raise RecipeError(
                f"the state {str(path)!r} is of other work: other adapters, rows or settings, or another "
                "version. Choose another folder, or delete this one to begin anew."
            )
        return tensors, json.loads(facts["facts"])
