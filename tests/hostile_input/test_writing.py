"""Killed at any moment, on a full disk, or twice at once: the output is absent, the old one, or the whole new one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import ties_peft
from ties_peft import Adapter, Merged, RecipeError
from ties_peft.adapters import writer

Make = Callable[..., Path]
pytestmark = [
    pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
KILLS = 60
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "provenance.json", "recipe.yaml"]
WIDE = {f"layers.{i}.q": (256, 256) for i in range(4)}


@pytest.fixture
def results(make_lora: Make) -> tuple[Merged, Merged]:
    """Two merges that differ, large enough that writing them takes a while."""
    a, b = make_lora("a", shapes=WIDE, rank=16), make_lora("b", shapes=WIDE, rank=16, seed=1)
    return ties_peft.merge([a, b]), ties_peft.merge([a, b], method="average")


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child process; its number."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def whole(out: Path, digests: set[str]) -> str | None:
    """The digest of what lies there, which must be all of one of the results; None where nothing does."""
    if not out.exists():
        return None
    assert sorted(path.name for path in out.iterdir()) == FILES
    found = Adapter.load(out).digest
    assert found in digests
    return found


def test_killed_at_random_moments(results: tuple[Merged, Merged], tmp_path: Path) -> None:
    digests = {result.digest for result in results}
    out = tmp_path / "place" / "out"
    seen = set()
    draw = random.Random(0)

    def write_again_and_again() -> None:
        while True:
            for result in results:
                result.save(out, force=True)

    started = time.perf_counter()
    results[0].save(out, force=True)
    results[1].save(out, force=True)
    both = time.perf_counter() - started  # how long the child needs for one round
    for kill in range(10 * KILLS):
        if kill >= KILLS and digests <= seen:
            break
        child = forked(write_again_and_again)
        late = 2 * both * (1 + kill // KILLS)  # later and later, where the machine has become slower since
        time.sleep(draw.uniform(0.0, late))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(whole(out, digests))
    assert digests <= seen, "the kills came too early for both results to be seen"


def test_a_kill_before_the_end_leaves_no_output(results: tuple[Merged, Merged], tmp_path: Path) -> None:
    out = tmp_path / "place" / "out"

    def write_and_die() -> None:
        writer._move_into_place = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        results[0].save(out)

    _, status = os.waitpid(forked(write_and_die), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not out.exists()
    results[1].save(out)  # what the killed one left does not stand in the way
    assert whole(out, {results[1].digest})


def test_a_full_disk(results: tuple[Merged, Merged], tmp_path: Path) -> None:
    """A limit on the size of files, as a disk with no room left: the new output is not there, the old one stays."""
    resource = pytest.importorskip("resource")
    out, said = tmp_path / "place" / "out", tmp_path / "said"
    results[0].save(out)

    def write_too_much() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            results[1].save(out, force=True)
        except RecipeError as error:
            said.write_text(str(error))

    os.waitpid(forked(write_too_much), 0)
    assert "cannot be written" in said.read_text()
    assert whole(out, {results[0].digest})
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_two_at_once(results: tuple[Merged, Merged], tmp_path: Path, force: bool) -> None:
    digests = {result.digest for result in results}
    for turn in range(15):
        out = tmp_path / f"{force}{turn}" / "out"
        out.parent.mkdir()
        said = [out.parent.parent / f"said-{force}{turn}-{i}" for i in range(2)]
        start = time.time() + 0.02

        def write(i: int, out: Path = out, said: list[Path] = said, start: float = start) -> None:
            time.sleep(max(0.0, start - time.time()))
            try:
                results[i].save(out, force=force)
                said[i].write_text("")
            except RecipeError as error:
                said[i].write_text(str(error))

        children = [forked(lambda i=i, write=write: write(i)) for i in range(2)]  # type: ignore[misc]
        for child in children:
            os.waitpid(child, 0)
        ends = [path.read_text() for path in said]
        assert whole(out, digests)
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        if force:
            assert ends == ["", ""]
        else:
            assert sorted(end == "" for end in ends) == [False, True]
            assert any("another process" in end or "not empty" in end for end in ends)


def test_the_command_killed_while_it_works(make_lora: Make, tmp_path: Path) -> None:
    """The whole command, killed early: nothing at the target, nothing beside it but what is hidden."""
    inputs = [make_lora(str(i), seed=i, shapes=WIDE) for i in range(2)]
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    command = [sys.executable, "-m", "ties_peft", "merge", *map(str, inputs), "--out", str(out)]
    for seconds in (0.3, 0.8):
        with pytest.raises(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=seconds, check=False, capture_output=True)  # which kills it
        assert not [path for path in out.parent.iterdir() if not path.name.startswith(".")]
