"""`ties-peft push`: upload an adapter's folder to the Hub."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .base import Json, print_json, print_text, print_warnings

Private = Annotated[
    bool | None,
    typer.Option("--private/--public", help="The visibility of a new repository.", show_default="the account's"),
]


def push(
    folder: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    repo: Annotated[str, typer.Argument(help="The repository on the Hub, org/name.")],
    private: Private = None,
    revision: Annotated[str | None, typer.Option(help="The branch to write to.", show_default="main")] = None,
    message: Annotated[str, typer.Option(help="The message of the commit.")] = "Upload adapter with ties_peft",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of a commit.")] = False,
    as_json: Json = False,
) -> None:
    """Upload an adapter and its card to the Hub; log in first with `hf auth login`."""
    from ..merging.push import push as push_adapter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pushed = push_adapter(folder, repo, private=private, revision=revision, message=message, create_pr=create_pr)
    if pushed.left:
        print_warnings([f"not uploaded, because they are no files of an adapter: {', '.join(pushed.left)}."])
    if as_json:
        print_json(asdict(pushed))
        return
    print_text(f"uploaded {', '.join(pushed.files)} to {pushed.repo}\n{pushed.url}")
