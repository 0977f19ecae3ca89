"""The command line, run in this process: what it returns, what it prints, what it leaves on disk."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from ties_peft import cli

COLOURS = ("FORCE_COLOR", "TTY_COMPATIBLE", "GITHUB_ACTIONS", "PY_COLORS")


class Outcome(NamedTuple):
    """How a command ended."""

    code: object
    out: str
    err: str


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def run(*arguments: object, err: io.StringIO | None = None, env: dict[str, str] | None = None) -> Outcome:
    """`ties-peft ARGUMENTS`; an exception that is not an exit is the test's failure."""
    out, err = io.StringIO(), err or io.StringIO()
    plain = {key: value for key, value in os.environ.items() if key not in COLOURS}
    setting = {**plain, "COLUMNS": "120", **(env or {})}
    code: object = 0
    with (
        mock.patch.object(sys, "argv", ["ties-peft", *map(str, arguments)]),
        mock.patch.dict(os.environ, setting, clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    return Outcome(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything under a folder, hidden files too: content by path, None for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


class TookTooLong(BaseException):
    """Raised by `within`; not an Exception, so that little takes it for a fault of its own."""

    fired = False


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """End what runs longer, rather than hang the whole test run."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    late = TookTooLong(f"still running after {seconds} s")

    def stop(*_: object) -> None:
        late.fired = True
        raise late

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if late.fired:  # whatever became of it on its way here
            raise late
