"""Save states of long work in a folder, so that it can be stopped and resumed.

Each state is one file of `torch.save`. It is written under another name and then renamed, so that a stop at any moment
leaves the previous state complete. Each file holds a fingerprint of the work; states of other work are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import RecipeError, one_line

SUFFIX = ".pt"


class Checkpoint:
    """The saved states of one run.

    Args:
        folder: that holds them, made when the first is saved; with None nothing is saved.
        facts: everything that the result depends on, in plain values.
    Raises: RecipeError where the folder holds states of other work, or cannot be used.
    """

    def __init__(self, folder: str | Path | None, facts: Any) -> None:
        self.folder = None if folder is None else Path(folder)
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if self.folder is None:
            return
        existing = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise RecipeError(
                f"the state folder {str(folder)!r} cannot be used, because {str(existing)!r} is no folder that can be written "
                "to. Choose another."
            )
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            self._load(path, mmap=True)  # checks the fingerprint without reading tensors

    def read(self, name: str) -> Any:
        """Return the state that `write` saved under a name, its tensors on the CPU; None where there is none."""
        path = self._path(name)
        return self._load(path) if path is not None and path.is_file() else None

    def write(self, name: str, state: Any) -> None:
        """Save a state, in place of an earlier one of the same name.

        Args:
            name: of the state.
            state: tensors, numbers, texts, and lists and dicts of these.
        """
        path = self._path(name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_suffix(".part")
            torch.save({"fingerprint": self.fingerprint, "state": state}, staged)
            staged.replace(path)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}{SUFFIX}"

    def _load(self, path: Path, mmap: bool = False) -> Any:
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            fingerprint, state = saved["fingerprint"], saved["state"]
        except Exception as error:  # torch's, pickle's and the file system's own
            raise RecipeError(
                f"the state {str(path)!r} cannot be read ({one_line(error)}). Delete the folder to start again."
            ) from None
        if fingerprint != self.fingerprint:
            raise RecipeError(
                f"the state {str(path)!r} is of other work: of other adapters, rows or settings, or of another version. "
                "Choose another folder, or delete this one to start again."
            )
        return state
