"""Where standard error is no terminal, long work writes a line every half minute there, and nothing on standard output."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli.run_command import run
from learning.models import bases, linear_shapes, make_model, sentences, write_lora

from ties_peft.cli import base
from ties_peft.cli.base import ProgressLines, progress_and_warnings, progress_bar
from ties_peft.errors import RecipeError, warn_caller

Told = tuple[str, int, int]


class Script:
    """A clock, and a wait that moves it: during each wait something is told, and after the last the work is done."""

    def __init__(self, *waits: list[tuple[float, Told]]) -> None:
        self.now = 100.0
        self.lines = ProgressLines(lambda: self.now)
        self._waits = iter(waits)

    def wait(self, seconds: float) -> bool:
        end, told = self.now + seconds, next(self._waits, None)
        for after, what in told or []:
            self.now = end - seconds + after
            self.lines.update(*what)
        self.now = end
        return told is None


def test_a_line_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    """The time left is that of the stage, at its own speed; it is not said before the stage has moved."""
    script = Script(
        [],
        [(10, ("teachers", 1, 2))],
        [(10, ("teachers", 2, 2)), (20, ("distil", 1, 61))],
        [(20, ("distil", 11, 61))],
        [(n, ("distil", 11 + n, 61)) for n in range(1, 30)],
        *[[]] * 116,
    )
    script.lines.run(script.wait)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[:5] == [
        "working (0:30 so far)",
        "teachers: 1 of 2 (1:00 so far)",
        "distil: 1 of 61 (1:30 so far)",
        "distil: 11 of 61, about 3:20 left (2:00 so far)",  # ten steps in 40 s, fifty to go
        "distil: 40 of 61, about 0:38 left (2:30 so far)",  # 39 steps in 70 s, 21 to go
    ]
    assert lines[-1].endswith("(1:00:30 so far)")
    assert len(lines) == 121


def test_the_best_so_far_is_in_the_line_and_makes_no_new_stage(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = ("search", 0, 9), ("search · best so far 0.5000", 3, 9)
    script = Script([(0, first), (30, second)])
    script.lines.run(script.wait)
    assert capsys.readouterr().err == "search · best so far 0.5000: 3 of 9, about 1:00 left (0:30 so far)\n"


def test_a_stage_that_starts_again_has_its_speed_measured_anew(capsys: pytest.CaptureFixture[str]) -> None:
    script = Script([(0, ("distil", 0, 9)), (10, ("distil", 8, 9)), (20, ("distil", 1, 9)), (30, ("distil", 5, 9))])
    script.lines.run(script.wait)
    assert capsys.readouterr().err == "distil: 5 of 9, about 0:10 left (0:30 so far)\n"


def test_lines_come_while_the_work_goes_on_and_end_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One half minute passes; then the work raises, and nothing is left running."""
    passed, asked = threading.Event(), []

    class Half:
        def __init__(self) -> None:
            self.done = threading.Event()
            self.set = self.done.set

        def wait(self, seconds: float) -> bool:
            asked.append(seconds)
            if len(asked) == 1:
                return False
            passed.set()
            return self.done.wait(60)

    monkeypatch.setattr(base, "threading", SimpleNamespace(Event=Half, Thread=threading.Thread))
    before = threading.active_count()
    with pytest.raises(KeyError), progress_bar():
        assert passed.wait(60)
        raise KeyError
    assert asked == [30.0, 30.0]
    assert threading.active_count() == before
    assert capsys.readouterr().err == "working (0:00 so far)\n"


@pytest.fixture
def half_minutes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Half a minute passes with all that is told."""
    tell: Callable[..., None] = ProgressLines.update

    def telling(lines: ProgressLines, *what: object) -> None:
        tell(lines, *what)
        sys.stderr.write(f"{lines.line()}\n")

    monkeypatch.setattr(ProgressLines, "update", telling)
    monkeypatch.setattr(ProgressLines, "run", lambda *_: None)
    return


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["merge", "a", "b", "--method", "ties", "--out", "out", "--json"], ["trim: 2 of 2", "merge: 4 of 4"]),
        (["convert", "a", "--out", "out", "--rank", "1", "--json"], ["merge: 4 of 4"]),
        (["evaluate", "a", "--task", "toy.yaml", "--json"], ["toy: 12 of 12"]),
        (
            ["distil", "a", "b", "--task", "toy.yaml", "--rows", "20", "--steps", "3", "--out", "out", "--json"],
            ["teachers: 2 of 2", "distil: 3 of 3"],
        ),
        (
            ["search", "a", "b", "--task", "toy.yaml", "--budget", "3", "--out", "out", "--json"],
            ["search · best", "3 of 3"],
        ),
        (["statistics", "a", "--task", "toy.yaml", "--kind", "gram", "--json"], ["gram: 12 of 12"]),
        (["signs", "a", "b", "--task", "toy.yaml", "--steps", "2", "--out", "out"], ["training: 2 of 2"]),
    ],
    ids=lambda value: value[0].split(":")[0],
)
def test_every_long_command_tells(
    words: list[str],
    parts: list[str],
    half_minutes: None,
    tmp_path: Path,
    bases: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = linear_shapes(make_model("encoder"), "query", "value")
    for seed, name in enumerate("ab"):
        write_lora(tmp_path / name, shapes, seed, base_model_name_or_path=str(bases["encoder"]))
    rows = [{"text": text, "label": place % 3} for place, text in enumerate(sentences(12, 1))]
    task = {"measure": "descriptions", "descriptions": ["w1 w2", "w3 w4", "w5 w6"], "rows": "rows.jsonl", "name": "toy"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "toy.yaml").write_text(json.dumps(task), encoding="utf-8")
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    assert all(part in outcome.err for part in parts), outcome.err
    assert "so far)" not in outcome.out
    if "--json" in words:
        json.loads(outcome.out)


def test_warnings_come_with_the_work_and_before_what_follows_each_once(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_and_warnings() as tell:
        warn_caller(["of the request"])
        assert capsys.readouterr().err == ""
        tell("teachers", 0, 2)
        assert "warning: of the request\n" in capsys.readouterr().err
        warn_caller(["of the rows", "of the request"])
        assert capsys.readouterr().err == "warning: of the rows\n"


def test_input_that_is_refused_gives_its_error_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecipeError), progress_and_warnings():
        warn_caller(["of the request"])
        raise RecipeError("refused")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kept", ["", "Repeat the command."])
def test_an_interruption_is_said_with_what_remains(kept: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), progress_bar(kept):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == f"interrupted. {kept}".strip() + "\n"


def test_a_block_without_progress_gives_its_warnings_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_and_warnings():
        warn_caller(["of the request"])
    assert capsys.readouterr().err == "warning: of the request\n"
