"""Sources: find an adapter's files on this machine or in a repository of the Hugging Face Hub.

    folder                           a folder with adapter_config.json and the weights
    folder:name                      the adapter in its sub-folder `name`; folder/name is the same
    folder/adapter_model.bin         a file of weights, with adapter_config.json beside it
    org/name[@revision][:subfolder]  on the Hub; the subfolder may end in a file of weights
    style.safetensors                a LoRA of an image model, without a config
    'runs/*/lora'                    a pattern: all adapters that match it, sorted; 'loras/*.safetensors' all such files

This machine is searched first. A Hub id is a name and not a path: no part of it may be `..`, and its files are searched only
in the Hub's cache.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import quote

from ..errors import AdapterError, nearest, one_line, some

ADAPTER_CONFIG, CARD = "adapter_config.json", "README.md"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")  # of a file of weights
GGUF = ".gguf"  # of llama.cpp's files
FULL_MODEL_CONFIGS = ("config.json", "model_index.json")  # of a model of transformers; of a pipeline of diffusers
OTHER_WEIGHT_FILES = (
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapters.safetensors",
)  # other programs'
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
HUB_ID = re.compile(r"(?=.{1,96}$)(?!.*(?:\.\.|--))[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
HUB_NAME = re.compile(r"(?=.{1,96}$)(?!.*(?:\.\.|--))[A-Za-z0-9][A-Za-z0-9_.-]*")  # old ids have no organisation
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
WILDCARDS = re.compile(r"[*?\[]")


class AdapterFiles(NamedTuple):
    """An adapter's files.

    Attributes:
        folder: holds adapter_config.json.
        weights: the file of weights, if one was named; None for the folder's own.
    """

    folder: Path
    weights: Path | None = None


def join_source(source: str, revision: str | None = None, subfolder: str | None = None) -> str:
    """Join a source, a revision and a subfolder into one source: `folder/sub`, `org/name@revision:sub`.

    Args:
        source: as the user wrote it.
        revision: on the Hub; it is ignored for a folder on this machine.
        subfolder: in it.
    """
    inside = subfolder.rstrip("/") if subfolder else ""
    if local_path(source) is not None:
        joined = f"{source.rstrip('/')}/{inside}"
        return source if not inside else joined if local_path(joined) is not None else f"{source}:{inside}"
    name, colon, outer = source.partition(":")
    inner = "/".join(part for part in (outer.rstrip("/"), inside) if part)
    return f"{name}{f'@{revision}' if revision else ''}{f':{inner}' if colon or inner else ''}"


def find_files(source: str, token: str | None = None) -> AdapterFiles:
    """Find the files of an adapter on this machine, else on the Hub.

    Args:
        source: as in the table above, but no pattern.
        token: as in `huggingface_hub`.
    Raises: AdapterError if there is no such adapter.
    """
    path = local_path(source)
    if source.endswith(GGUF) and (path is None or path.is_file()):
        refuse_gguf(source)
    if path is None:
        _refuse_missing_part(source)
        path = _on_hub(source, token)
    if path.is_file() and path.suffix in WEIGHT_SUFFIXES:
        return AdapterFiles(path.parent, path)
    if path.exists() and not path.is_dir():
        raise AdapterError(
            f"adapter {source!r} is a file; expected the folder that holds {ADAPTER_CONFIG}, or the weights beside it."
        )
    return AdapterFiles(path)


def refuse_gguf(label: str) -> NoReturn:
    """Refuse a file in llama.cpp's format.

    Raises: AdapterError.
    """
    raise AdapterError(
        f"adapter '{label}' is in llama.cpp's GGUF format, which cannot be read. Name the PEFT adapter that it was "
        "converted from."
    )


def local_path(source: str) -> Path | None:
    """Return the absolute path of a file or folder on this machine; None if there is none."""
    whole = _existing(source)
    if whole is not None or ":" not in source:
        return whole
    folder, _, inside = source.rpartition(":")
    outer = _existing(folder) if folder and is_inside(inside) else None
    return _existing(str(outer / inside)) if outer is not None and outer.is_dir() else None


def _existing(source: str) -> Path | None:
    try:
        path = Path(source).expanduser().absolute()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # no such user's home, a name too long
        return None


def similar_folder(source: str) -> str:
    """Return a question that names the folder of most similar name beside a missing one; empty if there is none."""
    try:
        path = Path(source).expanduser()
        beside = [one.name for one in path.parent.iterdir() if one.is_dir()]
    except (OSError, RuntimeError, ValueError):  # as in `_existing`
        return ""
    near = nearest(path.name, beside, 0.6)
    return f" Did you mean {str(path.with_name(near))!r}?" if near else ""


def local_file(source: str, file: str) -> Path | None:
    """Return the path of a file in a local folder or in the Hub's cache, without downloading; None if it is not there.

    Args:
        source: a folder, a file in it, or a Hub id such as `org/name@revision:subfolder`.
        file: its path inside.
    """
    folder = local_path(source)
    if folder is None:
        name, _, inside = source.partition(":")
        folder = _cached(*name.partition("@")[::2])
        folder = folder / inside if folder is not None and (not inside or is_inside(inside)) else None
    elif folder.is_file():
        folder = folder.parent
    found = None if folder is None else _existing(str(folder / file))
    return found if found is not None and found.is_file() else None


def hub_url(source: str | None) -> str | None:
    """Return the URL of an adapter's page on the Hub; None for one on this machine or in memory."""
    if source is None or local_path(source) is not None:
        return None
    name, _, inside = source.partition(":")
    repository, _, revision = name.partition("@")
    if not HUB_ID.fullmatch(repository):
        return None
    place = f"/tree/{revision or 'main'}/{inside}".rstrip("/") if revision or inside else ""
    return f"https://huggingface.co/{repository}{quote(place)}"


def is_hub_name(text: str) -> bool:
    """Return whether a text names a repository on the Hub, and nothing on this machine."""
    return bool(HUB_ID.fullmatch(text) or HUB_NAME.fullmatch(text)) and local_path(text) is None


def card_paths(folder: Path) -> list[Path]:
    """Return the possible paths of an adapter's card: in its folder and, in the Hub's cache, at the top of its repository."""
    top = next((parent for parent in folder.parents if parent.parent.name == "snapshots"), None)
    return [folder / CARD, *([top / CARD] if top is not None else [])]


def _cached(name: str, revision: str) -> Path | None:
    """Return a repository's folder in the Hub's cache, whose layout is documented; huggingface_hub is slow to import."""
    if not is_hub_name(name) or ".." in revision:
        return None
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or str(Path(home) / "hub")
    repository = _existing(str(Path(cache) / f"models--{name.replace('/', '--')}"))
    if repository is None:
        return None
    reference = _existing(str(repository / "refs" / (revision or "main")))
    commit = revision
    if reference is not None and reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    return _existing(str(repository / "snapshots" / commit)) if commit and "/" not in commit else None


def is_inside(subfolder: str) -> bool:
    """Return whether a subfolder's name is a relative path that stays inside its folder."""
    parts = subfolder.rstrip("/").split("/")
    return subfolder.isprintable() and "\\" not in subfolder and not {"", ".", ".."} & set(parts)


def holds_adapter(path: Path) -> bool:
    """Return whether a path is an adapter's folder, or a file of weights beside an adapter_config.json."""
    if path.is_dir():
        return any((path / name).is_file() for name in (ADAPTER_CONFIG, OTHER_WEIGHT_FILES[0]))
    return (path.parent / ADAPTER_CONFIG).is_file() and path.suffix in WEIGHT_SUFFIXES


def adapter_subfolders(folder: Path) -> list[str]:
    """Return the sub-folders, one or two levels down, that hold an adapter; PEFT saves named adapters there."""
    try:
        return sorted(
            str(config.parent.relative_to(folder))
            for depth in ("*", "*/*")
            for config in folder.glob(f"{depth}/{ADAPTER_CONFIG}")
            if config.is_file() and not any(part.startswith(".") for part in config.relative_to(folder).parts)
        )
    except OSError:
        return []


def expand_pattern(source: str) -> tuple[list[str], list[str]]:
    """Return the adapters that match a pattern, sorted, and the other paths that match it; a plain source as it is.

    Raises: AdapterError if no adapter matches.
    """
    if local_path(source) is not None or not WILDCARDS.search(source):
        return [source], []
    fitting = sorted(glob.glob(str(Path(source).expanduser()), recursive=True))  # noqa: PTH207  (it may be absolute)
    files = source.endswith(WEIGHT_SUFFIXES)
    adapters = [name for name in fitting if holds_adapter(Path(name)) or (files and Path(name).is_file())]
    rest = [name for name in fitting if name not in set(adapters)]
    if not adapters:
        seen = f"{len(rest)} other file(s) and folders, such as {rest[0]}" if rest else "nothing"
        raise AdapterError(
            f"adapters {source!r}: the pattern fits no folder that holds {ADAPTER_CONFIG}; it fits {seen}. Check the path."
        )
    return adapters, rest


def expand_patterns(given: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the adapters that sources and patterns stand for, in order, and a remark on each pattern."""
    names, remarks = [], []
    for source in given:
        found, rest = expand_pattern(source)
        names += found
        if found != [source]:
            left = f"; no adapters, so left out: {some(rest, 40)}" if rest else ""
            remarks.append(f"{source!r} stands for {len(found)}: {some(found, 40)}{left}.")
    return names, remarks


def stays_inside(path: Path) -> bool:
    """Return whether a file is in its folder, and no link that leads out of it; links to the Hub cache's blobs are allowed."""
    real, folder = path.resolve(), path.parent.resolve()
    cache = next((parent for parent in folder.parents if parent.name == "snapshots"), None)
    allowed = [folder, *([cache.parent / "blobs"] if cache is not None else [])]
    return any(parent in real.parents for parent in allowed)


def find_weights(folder: Path, label: str) -> Path:
    """Return the file of weights in an adapter's folder, safetensors before `.bin`.

    Raises: AdapterError if there is none, listing what the folder holds.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise AdapterError(
        f"adapter '{label}': no {' or '.join(WEIGHT_FILES)} beside {ADAPTER_CONFIG}; the folder holds {list_folder(folder)}. "
        "Save the adapter again with PEFT's save_pretrained."
    )


def list_folder(folder: Path) -> str:
    """Return the first few names in a folder."""
    return some(sorted(path.name for path in folder.iterdir()), 6) or "nothing"


def _refuse_missing_part(source: str) -> None:
    """Refuse a sub-folder that a folder on this machine does not have; it is not searched on the Hub."""
    name, colon, inside = source.rpartition(":")
    folder = _existing(name) if colon and name else None
    if folder is not None and folder.is_dir():
        raise AdapterError(
            f"adapter {source!r}: the folder {name!r} holds no {inside!r}; it holds "
            f"{list_folder(folder)}. Check the name after the colon: it leads into the folder."
        )


def split_hub_source(source: str, what: str) -> tuple[str, str]:
    """Return the repository and the path inside it of a source such as `org/name:folder`.

    Args:
        source: a Hub id.
        what: what is searched, for the message.
    Raises: AdapterError if the path would lead out of the repository.
    """
    name, colon, inside = source.partition(":")
    if colon and not is_inside(inside):
        raise AdapterError(
            f"{what} {source!r}: there is no such folder, and {inside!r} is no path inside a repository of the Hub. "
            "Expected org/name:folder."
        )
    return name, inside.rstrip("/")


def _on_hub(source: str, token: str | None) -> Path:
    """Download a Hub id's folder or file, and return its path in the Hub's cache."""
    name, inside = split_hub_source(source, "adapter")
    named = [inside] if inside.endswith(WEIGHT_SUFFIXES) else []
    folder = inside.rpartition("/")[0] if named else inside
    within = f"{folder}/" if folder else ""
    root = download(
        name,
        [f"{within}{file}" for file in (ADAPTER_CONFIG, *([] if named else WEIGHT_FILES))] + named,
        token,
        optional=[*(f"{within}{file}" for file in (*TOKENIZER_FILES, CARD)), *([CARD] if within else [])],
    )
    if not named and not (root / folder / ADAPTER_CONFIG).is_file():  # for the message that says what it is instead
        others = (f"*/{ADAPTER_CONFIG}", *OTHER_WEIGHT_FILES, *FULL_MODEL_CONFIGS)
        download(name, [f"{within}{file}" for file in others], token)
    return root / inside if inside else root


def download(
    source: str, patterns: Sequence[str], token: str | None = None, what: str = "adapter", optional: Sequence[str] = ()
) -> Path:
    """Download the files of a repository that match some patterns, and return its folder in the Hub's cache.

    Args:
        source: `org/name` or `org/name@revision`.
        patterns: of file names, as in `huggingface_hub`.
        token: as in `huggingface_hub`.
        what: what is searched, for the message: adapter, base model.
        optional: further patterns, ignored if the cache lacks such files and the Hub cannot be reached.
    Raises: AdapterError if the source is no Hub id, or the download fails.
    """
    name, at, revision = source.partition("@")
    if not HUB_ID.fullmatch(name) or (at and not (revision and revision.isprintable() and ".." not in revision)):
        raise AdapterError(f"{what} {source!r}: there is no such folder.{similar_folder(source)} Check the path.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        wanted = [*patterns, *optional]
        return Path(snapshot_download(name, revision=revision or None, token=token, allow_patterns=wanted))
    except Exception as error:  # the Hub's client raises its own, the network's and the file system's errors
        if isinstance(error, LocalEntryNotFoundError) and optional:
            return download(source, patterns, token, what)
        raise AdapterError(
            f"{what} {source!r}: there is no such folder here, and the Hub gave no {what} of that id "
            f"({error_text(error, token)}).{similar_folder(source)} Check the spelling, the network, and whether the "
            "repository is private."
        ) from None


def error_text(error: Exception, token: str | None = None) -> str:
    """Return an error of the Hub's client in one line, without tokens."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    if token:
        text = text.replace(token, "…")
    return f"{type(error).__name__}: {one_line(HUB_TOKEN.sub('…', text))}"
