"""Push: an adapter to the Hugging Face Hub, with its card; through huggingface_hub, with its token."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import sources, writer
from ..adapters.adapter import Adapter
from ..errors import RecipeError, warn_caller
from .card import PLACEHOLDER_FOLDER


@dataclass(frozen=True)
class Pushed:
    """What went to the Hub.

    Attributes:
        repo: `org/name`.
        url: of the commit, or of the pull request.
        files: that were sent, sorted.
        left: names of what lies in the folder too and was not sent.
    """

    repo: str
    url: str
    files: tuple[str, ...]
    left: tuple[str, ...] = ()


def push(
    adapter: Adapter | str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload adapter with ties_peft",
    create_pr: bool = False,
    token: str | None = None,
) -> Pushed:
    """Send an adapter to the Hub; a repository that does not exist is made.

    Only an adapter's own files are sent: config, weights, card, recipe, provenance and the tokenizer files
    beside them; nothing else that lies in the folder, and nothing that a link leads to elsewhere.

    Args:
        adapter: what `merge` or `convert` gave, an `Adapter`, or the folder that holds one.
        repo: `org/name` on the Hub.
        private: whether a new repository is; by default as the account has it.
        revision: the branch; the main one by default.
        message: of the commit.
        create_pr: open a pull request in place of a commit to the branch.
        token: by default the one that `hf auth login` stored; it is in no file and no message.
    Returns: where it is, and what was sent.
    Raises: RecipeError where the Hub refuses, or the name is none; AdapterError where the folder holds no adapter.
    """
    if not isinstance(repo, str) or not sources.HUB_ID.fullmatch(repo):
        raise RecipeError(
            f"the repository {str(repo)!r} is no name on the Hub; expected org/name, of letters, digits, -, _ and ."
        )
    if isinstance(adapter, Adapter):
        with tempfile.TemporaryDirectory(prefix="ties-peft-") as room:
            folder = writer.write_folder(Path(room) / "adapter", adapter.files())
            return _send(folder, repo, private, revision, message, create_pr, token)
    path = sources.local_path(str(adapter))
    if path is None or not path.is_dir():
        raise RecipeError(f"{str(adapter)!r} is no folder. Name the folder of the adapter that is to be pushed.")
    Adapter.load(path)  # refuses what is none
    pushed = _send(path, repo, private, revision, message, create_pr, token)
    if pushed.left:
        warn_caller([f"not sent to {repo}, being no adapter's files: {', '.join(pushed.left[:8])}."])
    return pushed


def _send(
    folder: Path,
    repo: str,
    private: bool | None,
    revision: str | None,
    message: str,
    create_pr: bool,
    token: str | None,
) -> Pushed:
    own = [path for path in sorted(folder.iterdir()) if _is_own(path)]
    left = [path.name for path in sorted(folder.iterdir()) if path not in own]
    names = {path.name for path in own}
    if sources.ADAPTER_CONFIG not in names or not names & set(sources.WEIGHT_FILES):
        raise RecipeError(
            f"{str(folder)!r} holds its config or weights only as links to elsewhere, which are not followed. "
            "Copy them there."
        )
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api = HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        operations: list[Any] = [CommitOperationAdd(path.name, _content(path, repo)) for path in own]
        commit = api.create_commit(
            repo, operations, commit_message=message, revision=revision, create_pr=create_pr or None
        )
    except Exception as error:  # the Hub's client raises its own, the network's and the file system's errors
        raise RecipeError(
            f"the Hub did not take {folder.name} as '{repo}' ({sources.error_text(error, token)}). Check the "
            "name, the network, and that you are logged in (hf auth login) with the right to write there."
        ) from None
    return Pushed(repo, str(commit.pr_url or commit.commit_url), tuple(path.name for path in own), tuple(left))


def _content(path: Path, repo: str) -> Path | bytes:
    """What is sent of a file: itself, but that the lines in the card load the adapter from its repository."""
    if path.name != sources.CARD:
        return path
    return path.read_bytes().replace(repr(PLACEHOLDER_FOLDER).encode(), repr(repo).encode())


def _is_own(path: Path) -> bool:
    """Whether it is a file of an adapter, and not a link to elsewhere."""
    known = {sources.ADAPTER_CONFIG, *sources.WEIGHT_FILES, *writer.OUTPUT_FILES, *sources.TOKENIZER_FILES}
    return path.name in known and path.is_file() and sources.stays_inside(path)
