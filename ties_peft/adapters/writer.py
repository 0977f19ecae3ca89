"""Writer: a folder that appears whole or not at all.

Everything is written into a hidden folder beside the target and renamed into place at the end, so
that a failure, whenever it comes, leaves the target as it was.
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

from ..errors import RecipeError

Content = str | bytes | dict[str, Tensor]  # a text file, any file, or the tensors of a safetensors file
PROVENANCE = "provenance.json"
COPIED = "copied"  # in it: the files that were copied from beside the inputs, a sha256 each
OUTPUT_FILES = frozenset(
    {"adapter_config.json", "adapter_model.safetensors", "README.md", "recipe.yaml", PROVENANCE}
    | {"fisher.safetensors", "gram.safetensors"}  # statistics, which are of no use without the adapter beside them
)
ATTEMPTS = 20  # to get into the target while other processes do the same


def json_text(value: Mapping[str, Any]) -> str:
    """JSON as we write it: indented, keys in their order, ending in a newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def check_output_folder(folder: Path, force: bool, inputs: Iterable[Path] = ()) -> None:
    """Refuse a target that would destroy something; to be asked before any work is done.

    Args:
        folder: where the output shall go.
        force: whether an existing folder may be replaced.
        inputs: folders that are read; neither they nor a folder around or inside them is a target.
    Raises: RecipeError.
    """
    try:
        _check_target(folder, folder.resolve(), force, [path.resolve() for path in inputs])
    except (OSError, RuntimeError) as error:  # a name too long, links in a ring
        raise RecipeError(f"the output {str(folder)!r} cannot be used: {error}.") from None


def check_outside_output(folder: Path, kept: Path | None, what: str) -> None:
    """Refuse a target that something which stays would be in the way of; to be asked before any work is done.

    Args:
        folder: where the output shall go.
        kept: a file or folder that the work keeps; None for nothing.
        what: it, as the message names it.
    Raises: RecipeError where it is the target, holds it or lies in it.
    """
    if kept is None:
        return
    target, place = folder.resolve(), kept.resolve()
    if place == target or place in target.parents or target in place.parents:
        raise RecipeError(
            f"{what} {str(kept)!r} is, holds or lies in the output {str(folder)!r}, which "
            "is written whole at the end. Choose another place for one of them."
        )


def _check_target(folder: Path, target: Path, force: bool, inputs: Iterable[Path]) -> None:
    for source in inputs:
        if target == source or target in source.parents or source in target.parents:
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
            f"the output '{folder}' exists and is not empty. Choose another folder, or replace it with --force."
        )
    foreign = [path.name for path in unexpected_files(folder)]
    if foreign:
        raise RecipeError(
            f"the output '{folder}' holds files that ties_peft did not write ({', '.join(foreign[:4])}), "
            "so --force does not replace it. Choose another folder, or empty it yourself."
        )


def unexpected_files(folder: Path) -> list[Path]:
    """What lies in a folder and is none of ours: not of our names, nor as we copied it there."""
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
    """Write files into a new folder, whole or not at all.

    Args:
        folder: the target; its parents are made.
        files: content by file name.
        force, inputs: as in `check_output_folder`.
    Returns: the folder.
    Raises: RecipeError where the target is refused or cannot be written; nothing is left behind.
    """
    check_output_folder(folder, force, inputs)
    made = _missing_parents(folder)
    staged: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        staged.chmod(0o777 & ~_umask())
        for name, content in files.items():
            _write(staged / name, content)
        _move_into_place(staged, folder, force)
    except OSError as error:
        _discard(staged, made)
        raise RecipeError(f"the output '{folder}' cannot be written: {error.strerror or error}.") from None
    except BaseException:
        _discard(staged, made)
        raise
    return folder


def _write(path: Path, content: Content) -> None:
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_tensors(path, content)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """A safetensors file, with metadata in its metadata.

    Raises: OSError.
    """
    try:
        save_file(tensors, path, metadata={"format": "pt", **metadata})
    except Exception as error:  # safetensors wraps the file system's errors in its own
        raise OSError(None, str(error)) from None
    path.chmod(0o666 & ~_umask())


def _move_into_place(staged: Path, folder: Path, force: bool) -> None:
    """Put the staged folder in the target's place, which another process may be filling at the same time.

    Without `force` whoever comes first stays; with it whoever comes last, either of them whole.
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
        "--force."
    )


def _rename_into_place(staged: Path, folder: Path) -> bool:
    """Rename into place; False where something stands there. An empty folder gives way."""
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
    """Let what stands in the target step aside for the staged folder; it comes back if that fails."""
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


def _missing_parents(folder: Path) -> list[Path]:
    """The parents that will have to be made, innermost first."""
    return [parent for parent in folder.parents if not parent.exists()]


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
