"""Writer: write an output folder completely or not at all.

The files are written to a hidden folder beside the output folder, which is renamed at the end. A failure at any time leaves
the output folder as it was.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..errors import RecipeError, some
from . import IMAGE_TARGETS
from .tensors import TensorFile

Content = str | bytes | dict[str, Tensor] | TensorFile  # a text file, any file, or the contents of a safetensors file
PROVENANCE = "provenance.json"
COPIED = "copied"  # its key for the files copied from the inputs' folders, a sha256 each
OUTPUT_FILES = frozenset(
    {"adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml", PROVENANCE}
    | set(IMAGE_TARGETS.values())
    | {"fisher.safetensors", "gram.safetensors"}  # statistics of this very adapter
)
ATTEMPTS = 20  # to rename a folder into place while other processes do the same


def json_text(value: Mapping[str, Any]) -> str:
    """Return a mapping as indented JSON with a newline at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def check_output_folder(folder: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output folder that cannot be written without destroying other files. Call it before any work is done.

    Args:
        folder: of the output.
        force: whether an existing folder may be replaced.
        inputs: folders that are read; the output may not be one of them, contain one or lie in one.
    Raises: RecipeError.
    """
    try:
        _check_target(folder, folder.resolve(), force, [path.resolve() for path in inputs])
    except (OSError, RuntimeError) as error:  # a name too long, links in a ring
        raise RecipeError(f"the output {str(folder)!r} cannot be used: {error}.") from None


def check_outside_output(folder: Path, kept: Path | None, what: str) -> None:
    """Refuse an output folder that overlaps a file or folder that must be kept. Call it before any work is done.

    Args:
        folder: of the output.
        kept: the file or folder that must be kept; None for nothing.
        what: its name in the message.
    Raises: RecipeError if it is the output folder, contains it or lies in it.
    """
    if kept is not None and _overlap(folder.resolve(), kept.resolve()):
        raise RecipeError(
            f"{what} {str(kept)!r} is, holds or lies in the output {str(folder)!r}, which "
            "is written whole at the end. Choose another place for one of them."
        )


def _overlap(one: Path, other: Path) -> bool:
    """Return whether two resolved paths are one, or one of them lies in the other."""
    return one == other or one in other.parents or other in one.parents


def _check_target(folder: Path, target: Path, force: bool, inputs: Iterable[Path]) -> None:
    for source in inputs:
        if _overlap(target, source):
            raise RecipeError(
                f"the output '{folder}' is, holds or lies in the input '{source}'. Choose another folder."
            )
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RecipeError(f"the output '{folder}' exists and is not a folder. Choose another.")
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RecipeError(f"the output '{folder}' cannot be made in '{above}'. Choose a folder that can be written to.")
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    if not there:
        return
    if not force:
        raise RecipeError(
            f"the output '{folder}' exists and is not empty. Choose another folder, or replace it with "
            "--force (force=True)."
        )
    foreign = [path.name for path in unexpected_files(folder)]
    if foreign:
        raise RecipeError(
            f"the output '{folder}' holds files that ties_peft did not write ({some(foreign)}), "
            "so --force (force=True) does not replace it. Choose another folder, or empty it yourself."
        )


def unexpected_files(folder: Path) -> list[Path]:
    """Return the files of a folder that ties_peft did not write, by their names, and by their digests if they were copied."""
    copied = _copied(folder / PROVENANCE)
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.is_file()
        or (path.name not in OUTPUT_FILES and not (path.name in copied and _is(path, copied[path.name])))
    ]


def _copied(provenance: Path) -> dict[str, str]:
    try:
        copied = json.loads(provenance.read_text(encoding="utf-8"))[COPIED]
        return {str(name): str(digest) for name, digest in copied.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _is(path: Path, digest: str) -> bool:
    return hashlib.sha256(path.read_bytes()).hexdigest() == digest


def write_folder(folder: Path, files: Mapping[str, Content], force: bool = False, inputs: Iterable[Path] = ()) -> Path:
    """Write files into a new folder, completely or not at all.

    Args:
        folder: the output folder; its parents are made.
        files: content by file name.
        force, inputs: as in `check_output_folder`.
    Returns: the folder.
    Raises: RecipeError if the folder is refused or cannot be written; nothing is left behind.
    """
    check_output_folder(folder, force, inputs)
    made = [parent for parent in folder.parents if not parent.exists()]  # innermost first
    staged: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        staged.chmod(0o777 & ~_umask())
        for name, content in files.items():
            _write(staged / name, content)
        _move_into_place(staged, folder, force)
    except BaseException as error:
        _discard(staged, made)
        if isinstance(error, OSError):
            raise RecipeError(f"the output '{folder}' cannot be written: {error.strerror or error}.") from None
        raise
    return folder


def _write(path: Path, content: Content) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, TensorFile):
        write_tensors(path, content.tensors, content.metadata)
    else:
        write_tensors(path, content)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """Write a safetensors file with some entries in its metadata.

    Raises: OSError.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except Exception as error:  # safetensors wraps errors of the file system in its own
        raise OSError(None, str(error)) from None
    path.chmod(0o666 & ~_umask())


def _move_into_place(staged: Path, folder: Path, force: bool) -> None:
    """Rename the finished folder to the output folder, to which other processes may write at the same time.

    Without `force` the first process succeeds, with it the last one; the folder is complete either way.
    """
    for _ in range(ATTEMPTS):
        if _rename_into_place(staged, folder):
            return
        if not force:
            break
        _replace(staged, folder)
        if not staged.exists():
            return
    raise RecipeError(
        f"the output '{folder}' was written by another process meanwhile. Choose another folder, or replace it with "
        "--force (force=True)."
    )


def _rename_into_place(staged: Path, folder: Path) -> bool:
    """Rename a folder; return False if the new name is taken by a folder that is not empty."""
    try:
        if os.name == "nt" and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        staged.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _replace(staged: Path, folder: Path) -> None:
    """Move the existing output folder away and rename the finished one; move it back if that fails."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    old = aside / "old"
    try:
        folder.rename(old)
        _rename_into_place(staged, folder)
    except FileNotFoundError:  # another process took it away first
        pass
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _discard(staged: Path | None, made: list[Path]) -> None:
    if staged is not None:
        shutil.rmtree(staged, ignore_errors=True)
    for parent in made:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
