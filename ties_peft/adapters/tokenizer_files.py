"""Tokenizer and chat-template files beside the adapters, which are copied into the result.

Either all of them are copied or none: each file must have the same bytes in all inputs that have it, because the files of
one tokenizer depend on each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .sources import TOKENIZER_FILES, stays_inside

LARGEST = 1 << 28  # bytes; tokenizer files are smaller


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of some adapters.

    Attributes:
        files: those to copy, content by name.
        remark: a sentence that says why the files were left out; None if they were not.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    remark: str | None = None

    @property
    def digests(self) -> dict[str, str]:
        """The sha256 of each file, in hexadecimal."""
        return {name: _digest(content) for name, content in self.files.items()}


def collect_tokenizer_files(folders: Iterable[tuple[str, Path | None]]) -> TokenizerFiles:
    """Read the tokenizer files beside some adapters.

    Args:
        folders: of each adapter its name in messages and its folder; None for an adapter in memory.
    Law: the order of the adapters does not matter.
    """
    held: dict[str, dict[str, list[str]]] = {}  # file → its digest → the adapters that have it
    paths: dict[str, Path] = {}
    refused = []
    for adapter, folder in folders:
        for path in _beside(folder):
            if not stays_inside(path) or path.stat().st_size > LARGEST:
                refused.append(f"{path.name} of {adapter} leads out of its folder or is too large")
                continue
            paths[path.name] = path
            held.setdefault(path.name, {}).setdefault(_digest(path.read_bytes()), []).append(adapter)
    differing = [f"{name} ({_owners(own)})" for name, own in sorted(held.items()) if len(own) > 1]
    faults = refused + ([f"these differ: {', '.join(differing)}"] if differing else [])
    if faults:
        left = ", ".join(sorted({*held, *(fault.partition(" ")[0] for fault in refused)}))
        return TokenizerFiles(
            remark=f"tokenizer files beside the adapters were left out ({left}): {'; '.join(faults)}."
        )
    return TokenizerFiles({name: path.read_bytes() for name, path in sorted(paths.items())})


def _beside(folder: Path | None) -> Sequence[Path]:
    return [] if folder is None else [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _owners(by_digest: Mapping[str, Sequence[str]]) -> str:
    """Return which adapters have the same content: their names joined by +, the versions by /."""
    return " / ".join(" + ".join(sorted(names)) for names in sorted(map(list, by_digest.values())))
