"""`ties-peft search` and `ties-peft signs`, on a tiny base in a folder."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.run_command import Terminal, run

import ties_peft
from ties_peft.cli.base import progress_bar

sys.path.insert(0, str(Path(__file__).parents[1] / "statistics"))
import tiny_models as tiny

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved_encoder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def task(tmp_path: Path, base: Path) -> Path:
    lines = "\n".join(json.dumps(row) for row in tiny.rows())
    (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps({**tiny.ENCODER, "rows": "rows.jsonl", "base": str(base)}), encoding="utf-8")
    return path


@pytest.fixture
def folders(make_lora: Make) -> list[Path]:
    return [make_lora(name, seed=seed, shapes=tiny.BERT, gain=0.1) for seed, name in enumerate("ab")]


def test_a_search_prints_its_controls_and_writes_an_adapter(folders: list[Path], task: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("search", *folders, "--task", task, "--judge", task, "--budget", 4, "--out", out)
    assert done.code == 0, done.err
    rows = [line.split("  ")[0] for line in done.out.splitlines()]
    assert rows[1:7] == ["found", "base", "mean", "best single", "random weights", "random adapters"]
    assert done.out.split()[:2] == ["score", "judged"]
    for text in (
        "score   minus the mean loss on the rows, in nats; larger is better",
        "judged  share of the rows that are right, from 0 to 1; larger is better",
        "tried   4 trials, by the sampler cobyla",
        "best of 4 trials:",
        f"written to {out}; load it with",
        f"  model = PeftModel.from_pretrained(base, '{out}')",
        "to try more, repeat the command with a larger --budget and --force",
    ):
        assert text in done.out
    assert ties_peft.Adapter.load(out).modules == tuple(sorted(tiny.BERT))
    assert (tmp_path / "out.study.db").is_file()


def test_it_goes_on_and_as_json(folders: list[Path], task: Path, tmp_path: Path) -> None:
    common = ("search", *folders, "--task", task, "--no-controls", "--json")
    flags = ("--tune", "density=[0.1,1.0]", "--tune", "scale={low: 0.5, high: 2, log: true}", "--method", "ties")
    storage = ("--storage", f"journal:{tmp_path / 'log'}")
    first = run(*common, *flags, *storage, "--budget", 2, "--out", tmp_path / "first")
    more = run(*common, *flags, *storage, "--budget", 4, "--out", tmp_path / "more")
    assert (first.code, more.code) == (0, 0), first.err + more.err
    assert json.loads(more.out)["trials"][:2] == json.loads(first.out)["trials"]
    assert len(json.loads(more.out)["trials"]) == 4


def test_choices_are_tried_once_and_the_last_line_says_whether_all_were(
    folders: list[Path], task: Path, tmp_path: Path
) -> None:
    common = ("search", *folders, "--task", task, "--no-controls", "--tune", "method=[auto,ties,average]")
    done = run(*common, "--out", tmp_path / "all")
    assert done.code == 0, done.err
    assert "best of all 3 combinations:" in done.out
    assert done.out.splitlines()[-1].endswith("; all combinations of the choices were tried")
    cut = run(*common, "--sampler", "grid", "--budget", 2, "--out", tmp_path / "cut")
    assert "warning: the budget is 2, so the grid tries only the first 2 of its 3 combinations." in cut.err
    assert "best of 2 of 3 combinations:" in cut.out
    assert cut.out.splitlines()[-1].endswith("to try more, repeat the command with a larger --budget and --force")
    whole = run(*common, "--out", tmp_path / "cut", "--force")
    assert "best of all 3 combinations:" in whole.out
    other = run(*common, "--budget", 2, "--out", tmp_path / "other")
    assert other.out.splitlines()[-1].endswith("repeat the command with --sampler tpe, a larger --budget and --force")
    more = run(*common, "--sampler", "tpe", "--budget", 3, "--force", "--out", tmp_path / "other", "--json")
    assert (json.loads(more.out)["sampler"], len(json.loads(more.out)["trials"])) == ("tpe", 3)


def test_bad_input_is_one_message(folders: list[Path], task: Path, tmp_path: Path) -> None:
    common = ("search", *folders, "--task", task, "--out", tmp_path / "out")
    for flags, text in (
        (("--tune", "density"), "expected NAME=VALUE"),
        (("--tune", "densty=[0.1,1.0]", "--method", "ties"), "did you mean 'density'"),
        (("--budget", 0), "the budget is 0"),
        (("--storage", "nosuch://x"), "the study cannot be kept in 'nosuch://x'"),
        (("--rank", "many"), "rank is 'many'"),
        (("--seed", -1), "seed is -1"),
        (("--set", "densty=0.2", "--method", "ties"), "did you mean 'density'"),
        (("--set", "densty=0.2", "--tune", "method=[ties,flat_tsv]"), "did you mean 'density'"),
        (("--objective", "imitat"), "expected imitate"),
    ):
        done = run(*common, *flags)
        assert done.code == 2
        assert text in done.err
        assert done.err.startswith("error: ")
        assert done.err.count("\n") == 1
        assert not list(tmp_path.glob("out*"))


def test_signs_are_written_and_taken(folders: list[Path], task: Path, tmp_path: Path) -> None:
    done = run("signs", *folders, "--task", task, "--steps", 4, "--out", tmp_path / "signs")
    assert done.code == 0, done.err
    assert f"--set sign_from={tmp_path / 'signs'}" in done.out
    merged = run("merge", *folders, "--set", f"sign_from={tmp_path / 'signs'}", "--out", tmp_path / "merged")
    assert merged.code == 0, merged.err


def test_it_says_where_the_trials_stay_and_makes_the_folders_around_them(
    folders: list[Path], task: Path, tmp_path: Path
) -> None:
    out = tmp_path / "not" / "there" / "out"
    common = ("search", *folders, "--task", task, "--no-controls", "--out", out)
    first = run(*common, "--budget", 2)
    assert first.code == 0, first.err
    assert first.err.count("org/base") == 1
    for part in (f"{out}.study.db (study 'search')", "--budget", "--force"):
        assert part in first.out.splitlines()[-1]
    again = run(*common, "--budget", 3, "--force")
    assert again.code == 0, again.err
    assert "best of 3 trials:" in again.out
    printed = json.loads(run(*common, "--budget", 3, "--force", "--json").out)
    assert (printed["storage"], printed["study"]) == (f"{out}.study.db", "search")


def test_an_output_that_could_not_be_written_is_refused_before_the_trials(
    folders: list[Path], task: Path, tmp_path: Path
) -> None:
    foreign, adapter = tmp_path / "foreign", tmp_path / "a"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    nowhere = tmp_path / "nowhere.yaml"  # read after the output is looked at
    nowhere.write_text(json.dumps({**tiny.ENCODER, "rows": "gone.jsonl"}), encoding="utf-8")
    for out, flags, text in (
        (foreign, (), "exists and is not empty"),
        (foreign, ("--force",), "holds files that ties_peft did not write (thesis.tex)"),
        (adapter, ("--force",), "lies in the input"),
        (tmp_path / "out", ("--storage", tmp_path / "out" / "s.db"), "is, holds or lies in the output"),
        (tmp_path / "out", ("--storage", tmp_path / "out"), "is, holds or lies in the output"),
        (tmp_path / "signs", ("--set", f"sign_from={adapter}", "--out", adapter, "--force"), "lies in the input"),
    ):
        done = run("search", *folders, "--task", nowhere, "--out", out, *flags)
        assert done.code == 2
        assert text in done.err
        assert done.err.count("\n") == 1
    assert sorted(path.name for path in foreign.iterdir()) == ["thesis.tex"]
    assert not list(tmp_path.glob("**/*.db"))


def test_the_help_can_be_read_as_it_was_written() -> None:
    for width in ("80", "200"):
        without_password = " ".join(run("search", "--help", env={"COLUMNS": width}).out.replace("│", " ").split())
        for text in (
            "method=[ties,flat_tsv];",
            "density=[0.05,1.0];",
            "postgresql+psycopg2://…",
            "A list of two numbers is a range",
            "[default: (40; with the sampler grid all combinations)]",
            "[default: (grid where only choices are searched, in no more combinations than the budget; else auto)]",
        ):
            assert text in without_password
        assert "Likewise" not in without_password


def test_one_bar_for_a_stage_whose_best_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar() as tell:
        bars = inspect.getclosurevars(tell).nonlocals["progress"]
        tell("search", 0, 3)
        for done, stage in enumerate(("search · best so far 0.1", "search · best so far 0.2", "search"), start=1):
            tell(stage, done, 3)
            (bar,) = bars.tasks
            assert (bar.description, bar.completed, bar.total) == (stage, done, 3)
        tell("random weights", 1, 3)
        assert [bar.description for bar in bars.tasks] == ["search", "random weights"]
