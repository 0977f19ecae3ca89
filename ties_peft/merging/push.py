"""Push an adapter with its card to the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adapters import IMAGE_TARGETS, sources, writer
from ..adapters.adapter import Adapter
from ..errors import RecipeError, warn_caller
from .card import PLACEHOLDER_FOLDER


@dataclass(frozen=True)
class Pushed:
    """What was sent to the Hub.

    Attributes:
        repo: `org/name`.
        url: of the commit or the pull request.
        files: that were sent, sorted.
        left: the other files of the folder, which were not sent.
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
    """Send an adapter to the Hub; a repository that does not exist is created.

    Only an adapter's own files are sent: config, weights, card, recipe, provenance and tokenizer files. Other files of the
    folder and files behind links that leave the folder are not sent.

    Args:
        adapter: the result of `merge` or `convert`, an `Adapter`, or its folder.
        repo: `org/name` on the Hub.
        private: whether a new repository is private; by default as the account is set up.
        revision: the branch; the main one by default.
        message: of the commit.
        create_pr: open a pull request instead of a commit to the branch.
        token: by default the one that `hf auth login` stored; it appears in no file and no message.
    Returns: where the adapter is and what was sent.
    Raises: RecipeError if the name is not valid or the Hub refuses; AdapterError if the folder has no adapter.
    """
    if not isinstance(repo, str) or not sources.HUB_ID.fullmatch(repo):
        raise RecipeError(
            f"the repository {str(repo)!r} is no name on the Hub; expected org/name, of letters, digits, -, _ and ."
        )
    with tempfile.TemporaryDirectory(prefix="ties-peft-") as temporary:
        if isinstance(adapter, Adapter):
            folder = writer.write_folder(Path(temporary) / "adapter", adapter.files())
        else:
            folder = _folder(adapter)
        own = _own_files(folder)
        left = tuple(path.name for path in sorted(folder.iterdir()) if path not in own)
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
    if left:
        warn_caller([f"not sent to {repo}, because they are no files of an adapter: {', '.join(left[:8])}."])
    return Pushed(repo, str(commit.pr_url or commit.commit_url), tuple(path.name for path in own), left)


def _folder(adapter: str | Path) -> Path:
    """Return the folder of an adapter on this machine."""
    path = sources.local_path(str(adapter))
    if path is None or not path.is_dir():
        raise RecipeError(f"{str(adapter)!r} is no folder. Name the folder of the adapter that is to be pushed.")
    Adapter.load(path)  # raises if it is no adapter
    return path


def _content(path: Path, repo: str) -> Path | bytes:
    """Return what is sent of a file; in the card, the lines of Python load the adapter from its repository."""
    if path.name != sources.CARD:
        return path
    return path.read_bytes().replace(repr(PLACEHOLDER_FOLDER).encode(), repr(repo).encode())


def _own_files(folder: Path) -> list[Path]:
    """Return the files of an adapter's folder that are its own and no links that leave the folder, sorted.

    Raises: RecipeError if its config or its weights are not among them.
    """
    known = {sources.ADAPTER_CONFIG, *sources.WEIGHT_FILES, *writer.OUTPUT_FILES, *sources.TOKENIZER_FILES}
    own = [path for path in sorted(folder.iterdir()) if path.name in known and path.is_file()]
    own = [path for path in own if sources.stays_inside(path)]
    names = {path.name for path in own}
    image = names & set(IMAGE_TARGETS.values())
    if not image and (sources.ADAPTER_CONFIG not in names or not names & set(sources.WEIGHT_FILES)):
        raise RecipeError(
            f"{str(folder)!r} holds its config or weights only as links to elsewhere, which are not followed. "
            "Copy them there."
        )
    return own
