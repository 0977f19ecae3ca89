"""Where an adapter lies: a folder on this machine, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from .errors import AdapterError, printable

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def find(source: str, revision: str | None = None, subfolder: str | None = None, token: str | None = None) -> Path:
    """The folder that holds the adapter; a local path is tried first, then the Hub.

    Args:
        source: a path, or a Hub id such as `org/name`.
        revision, subfolder, token: as `huggingface_hub` takes them; used for a Hub id only, but
            for `subfolder`, which is looked into on this machine too.
    Raises: AdapterError where there is no such adapter.
    """
    folder = local(source)
    if folder is not None and folder.is_dir():
        return folder / subfolder if subfolder else folder
    if folder is not None:
        raise AdapterError(f"adapter '{printable(source)}' is a file; expected the folder that holds {CONFIG}.")
    if not HUB_ID.fullmatch(source) or source.startswith((".", "/", "~")):
        raise AdapterError(f"adapter '{printable(source)}': there is no such folder. Check the path.")
    return _download(source, revision, subfolder, token)


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


def _download(source: str, revision: str | None, subfolder: str | None, token: str | None) -> Path:
    """The Hub's copy in its local cache; huggingface_hub is imported only here."""
    from huggingface_hub import snapshot_download

    within = f"{subfolder.strip('/')}/" if subfolder else ""
    wanted = [f"{within}{name}" for name in (CONFIG, *WEIGHTS)]
    try:
        root = Path(snapshot_download(source, revision=revision, token=token, allow_patterns=wanted))
    except Exception as error:  # the Hub's client raises its own, the network's and the file system's errors
        said = (str(error).strip().splitlines() or [""])[0]
        if token:
            said = said.replace(token, "…")
        raise AdapterError(
            f"adapter '{printable(source)}': there is no such folder here, and the Hub gave no adapter of that id "
            f"({type(error).__name__}: {printable(said)}). "
            "Check the spelling, the network, and whether the repository is private."
        ) from None
    return root / subfolder if subfolder else root
