"""The commands of the README and of the guides that need a task: their files are here, and they run as they stand."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.run_command import run
from conftest import SAMPLES

import ties_peft
from ties_peft.evaluation.rows import FILES
from ties_peft.evaluation.task import Task, read_task

ROOT = SAMPLES.parent
TASKS = sorted((ROOT / "examples" / "tasks").glob("*.yaml"))
SHORT = {
    "evaluate": (),
    "distil": ("--steps", "4"),
    "search": ("--budget", "2", "--no-controls"),
    "signs": ("--steps", "2"),
}


def joined(block: str) -> str:
    """A shell block with a command that goes on after a backslash on one line."""
    return re.sub(r"\\\n\s*", " ", block)


def commands() -> Iterator[list[str]]:
    """The words of every ties-peft command in a shell block of the README and the guides, without its comment."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))]
    for block in re.findall(r"```bash\n(.*?)```", "\n".join(texts), re.DOTALL):
        yield from (
            words
            for line in joined(block).splitlines()
            if (words := shlex.split(line, comments=True))[:1] == ["ties-peft"]
        )


def task_files(words: list[str]) -> list[str]:
    return [value for flag, value in itertools.pairwise(words) if flag in ("--task", "--judge")]


def is_local(task: Task) -> bool:
    return isinstance(task.rows, str) and task.rows.endswith(FILES)


LOCAL = [
    pytest.param(words, id=f"{words[1]}-{number}", marks=[pytest.mark.slow] if "--tune" in words else [])
    for number, words in enumerate(commands())
    if words[1] in SHORT and task_files(words) and all(is_local(read_task(ROOT / path)) for path in task_files(words))
]


def test_the_commands_that_judge_and_learn_name_the_files_that_are_here() -> None:
    named = {path for words in commands() for path in task_files(words)}
    assert named == {str(path.relative_to(ROOT)) for path in TASKS}
    assert {"evaluate", "distil", "search"} <= {param.values[0][1] for param in LOCAL}  # type: ignore[index]


def test_the_output_in_the_readme_is_what_its_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line by line; … stands for what is left out."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(
        r"^ties-peft (merge [^\n]*--method ties[^\n]*)\n```\n\n```\n(.*?)```", text, re.MULTILINE | re.DOTALL
    )
    assert found
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").symlink_to(ROOT / "adapters")
    words = shlex.split(found[1], comments=True)
    given = [path for word in words for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    outcome = run(*given)
    printed = " ".join(f"{outcome.out} {outcome.err}".split())
    shown = found[2].splitlines()
    assert len(shown) > 4
    for line in shown:
        assert " ".join(line.rstrip("…; ").split()) in printed


@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_a_task_file_is_read_and_its_rows_fit_it(path: Path) -> None:
    task = read_task(path)
    if is_local(task):
        task.check_rows()
        answers = task.label_numbers(task.read())
        assert len({answers.count(number) for number in range(len(task.options or ()))}) == 1  # all as often


def test_a_measure_is_said_only_where_it_is_not_clear() -> None:
    """One for an encoder, one by choices, one of generated text or its loss."""
    assert {read_task(path).measure for path in TASKS} == {"descriptions", "choices", "loss"}
    assert [path.stem for path in TASKS if re.search("^measure:", path.read_text(encoding="utf-8"), re.MULTILINE)] == [
        "gsm8k"
    ]


@pytest.mark.parametrize("words", LOCAL)
def test_a_command_runs_as_it_stands(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with what a clone holds; the base from a package instead of the Hub, and fewer steps."""
    monkeypatch.syspath_prepend(SAMPLES)
    base = importlib.import_module("minilm").base_source()
    monkeypatch.chdir(tmp_path)
    for name in ("adapters", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    ties_peft.merge(sorted(Path("adapters/lora").iterdir()), "average").save("merged")
    given = [path for word in words[2:] for path in (sorted(map(str, Path().glob(word))) if "*" in word else [word])]
    json_too = () if words[1] == "signs" else ("--json",)
    outcome = run(words[1], *given, *SHORT[words[1]], "--base", base, *json_too)
    assert outcome.code == 0, outcome.err
    if words[1] == "evaluate":
        scores = {line["adapter"]: line["scores"] for line in json.loads(outcome.out)["evaluated"]}
        assert list(scores) == ["base", "merged", "sst2"]
        assert scores["sst2"][0]["accuracy"] > 0.8
        assert scores["base"][1]["accuracy"] > 0.3
    else:
        assert ties_peft.Adapter.load(words[words.index("--out") + 1]).modules
