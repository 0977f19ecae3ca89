"""Share what the benchmarks need: logs from which a stopped run continues, result files, versions, options."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import ties_peft

ROOT = Path(__file__).resolve().parent.parent
Record = dict[str, Any]


class Records:
    """Records by a key, each of which is appended to a log as one line of JSON.

    Args:
        path: of the log, which is read first if it exists; None to keep records in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        self.known: dict[str, Record] = {record["key"]: record for record in map(json.loads, lines)}

    def get(self, *key: Any) -> Record | None:
        """Return the record of a key; None if there is none."""
        return self.known.get(_text(key))

    def add(self, record: Mapping[str, Any], *key: Any) -> Record:
        """Store a record under a key, and return it."""
        self.known[_text(key)] = made = {"key": _text(key), **record}
        if self.path:
            with self.path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(made, ensure_ascii=False) + "\n")
        return made

    def find(self, make: Callable[[], Mapping[str, Any]], *key: Any) -> Record:
        """Return the record of a key, which is made and stored if there is none."""
        return self.get(*key) or self.add(make(), *key)


def _text(key: tuple[Any, ...]) -> str:
    return json.dumps(key, ensure_ascii=False)


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a result as JSON; nothing if the path is None."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    import transformers

    return {
        "ties_peft": ties_peft.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def make_parser(doc: str | None, rows: int, log: Path | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmarks on rows of tasks share.

    Args:
        doc: of the script; its first line is the description.
        rows: the default number of rows.
        log: the default log.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with one for each task"
    )
    parser.add_argument("--rows", type=int, default=rows, help=f"largest number of rows of each task ({rows})")
    parser.add_argument("--log", type=Path, default=log, help="log of every result, from which a stopped run continues")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    return parser
