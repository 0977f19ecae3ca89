"""Where an adapter lies: a folder on this machine, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .errors import AdapterError, printable

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def with_revision(source: str, revision: str | None) -> str:
    """A source and its revision in one text, `org/name@main`; a folder on this machine has none."""
    return source if revision is None or local(source) is not None else f"{source}@{revision}"


def find(source: str, subfolder: str | None = None, token: str | None = None) -> Path:
    """The folder that holds the adapter; a local path is tried first, then the Hub.

    Args:
        source: a path, or a Hub id such as `org/name`; `org/name@revision` is always the Hub's.
        subfolder: a folder in it, on this machine too.
        token: as `huggingface_hub` takes it.
    Raises: AdapterError where there is no such adapter.
    """
    folder = local(source)
    if folder is not None and folder.is_dir():
        return folder / subfolder if subfolder else folder
    if folder is not None:
        raise AdapterError(f"adapter '{printable(source)}' is a file; expected the folder that holds {CONFIG}.")
    within = f"{subfolder.strip('/')}/" if subfolder else ""
    root = download(source, [f"{within}{name}" for name in (CONFIG, *WEIGHTS)], token)
    return root / subfolder if subfolder else root


def local(source: str) -> Path | None:
    """The file or folder of that name on this machine, absolute; None where there is none."""
    try:
        path = Path(source).expanduser().absolute()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # no such user's home, a name too long
        return None


def what_else(folder: Path) -> str:
    """A guess at what a folder without a config is."""
    there = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not there:
        return "Is this a PEFT adapter's folder?"
    return (
        f"It holds {printable(there[0].name)}, as diffusers and other trainers write it: convert it to a PEFT adapter "
        "first (PEFT's save_pretrained writes both)."
    )


def weights_in(folder: Path, label: str) -> Path:
    """The weights' file of an adapter's folder, safetensors before `.bin`.

    Raises: AdapterError where there is none, naming what lies there instead.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    there = ", ".join(sorted(printable(p.name, 40) for p in folder.iterdir())[:6]) or "nothing"
    raise AdapterError(
        f"adapter '{label}': no {' or '.join(WEIGHTS)} beside {CONFIG}; the folder holds {there}. "
        "Save the adapter again with PEFT's save_pretrained."
    )


def download(source: str, patterns: Sequence[str], token: str | None = None, what: str = "adapter") -> Path:
    """The Hub's copy, in its local cache, of the files of a repository that fit some patterns.

    Args:
        source: `org/name` or `org/name@revision`.
        patterns: of file names, as `huggingface_hub` takes them.
        token: likewise.
        what: is looked for, in the message.
    Raises: AdapterError where that is no id, or the Hub gives nothing; huggingface_hub is imported only here.
    """
    name, at, revision = source.partition("@")
    if not HUB_ID.fullmatch(name) or (at and not revision):
        raise AdapterError(f"{what} '{printable(source)}': there is no such folder. Check the path.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, token=token, allow_patterns=list(patterns)))
    except Exception as error:  # the Hub's client raises its own, the network's and the file system's errors
        said = (str(error).strip().splitlines() or [""])[0]
        if token:
            said = said.replace(token, "…")
        raise AdapterError(
            f"{what} '{printable(source)}': there is no such folder here, and the Hub gave no {what} of that id "
            f"({type(error).__name__}: {printable(said)}). "
            "Check the spelling, the network, and whether the repository is private."
        ) from None
