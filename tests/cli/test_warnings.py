"""What a merge does less of than was asked is said: once on standard error, once in the report, once in Python."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.run_command import run

import ties_peft
from ties_peft.methods import method_classes

Make = Callable[..., Path]
SHAPES = {"layers.0.q": (12, 10), "layers.0.up": (20, 12), "layers.1.q": (5, 40)}
THINNING = [n for n, cls in method_classes().items() if "density" in cls.model_fields and not cls.chooses()]


def warned(adapters: list[Path], **asked: Any) -> list[str]:
    """The warnings of a merge in Python, which are those of its report."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        merged = ties_peft.merge(adapters, **asked)
    said = [str(one.message) for one in found if issubclass(one.category, ties_peft.TiesPeftWarning)]
    assert said == merged.report.warnings
    return said


@pytest.fixture
def folders(make_lora: Make) -> list[Path]:
    return [make_lora(f"a{n}", seed=n, shapes=SHAPES, rank=4) for n in range(3)]


@pytest.mark.parametrize(("asked", "written"), [(1000, 12), (13, 12)])
def test_a_rank_beyond_what_the_modules_can_have_is_said(
    folders: list[Path], tmp_path: Path, asked: int, written: int
) -> None:
    done = run("merge", *folders, "--rank", asked, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    text = f"rank {asked} was asked for; {written} is written"
    assert done.err.count(text) == 1
    assert sum(text in warning for warning in json.loads(done.out)["report"]["warnings"]) == 1
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == written
    assert sum(text in warning for warning in warned(folders, rank=asked)) == 1
    assert run("merge", *folders, "--rank", asked, "--dry-run").err.count(text) == 1
    assert run("convert", folders[0], "--rank", asked, "--out", tmp_path / "converted").err.count(text) == 1


@pytest.mark.parametrize("rank", ["auto", "max", 4, 12])
def test_a_rank_that_is_written_as_asked_is_not(folders: list[Path], rank: int | str) -> None:
    assert not any("was asked for" in warning for warning in warned(folders, rank=rank))


def test_one_adapter_that_ties_trims_is_said(folders: list[Path], tmp_path: Path) -> None:
    done = run("merge", folders[0], "--method", "ties", "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    text = "only one adapter is merged, and 'ties' keeps 20 % of its entries"
    assert done.err.count(text) == 1 and "--density 1" in done.err
    assert sum(text in warning for warning in json.loads(done.out)["report"]["warnings"]) == 1
    assert run("merge", folders[0], "--method", "ties", "--dry-run").err.count(text) == 1


@pytest.mark.parametrize("method", [*THINNING, "dare+average", "dare+ties"])
@pytest.mark.parametrize("absent", [False, True])
def test_so_it_is_by_any_method_that_has_a_density(folders: list[Path], method: str, absent: bool) -> None:
    """Also where the others have a weight of 0."""
    given = {"adapters": folders, "weights": [0, 1.0, 0]} if absent else {"adapters": folders[1:2]}
    said = [warning for warning in warned(method=method, **given) if "only one adapter" in warning]
    parts = [part for part in method.split("+") if part in THINNING]
    assert len(said) == len(parts) and all(f"'{part}' keeps" in text for part, text in zip(parts, said, strict=True))


@pytest.mark.parametrize(
    "asked",
    [
        {"density": 1},
        {"densities": [1]},
        {"method": "average"},
        {"method": "iso_c"},
        {"density": {"over_layers": [1, 1]}},
    ],
)
def test_one_adapter_that_keeps_its_entries_is_not(folders: list[Path], asked: dict[str, Any]) -> None:
    assert not any("only one adapter" in warning for warning in warned(folders[:1], **asked))


@pytest.mark.parametrize(
    ("asked", "share"),
    [
        ({"density": 0.5}, "50 %"),
        ({"density": {"over_layers": [0.3, 1]}}, "30 % or more"),
        ({"densities": [0.125]}, "12.5 %"),
    ],
)
def test_the_share_is_the_adapters_own(folders: list[Path], asked: dict[str, Any], share: str) -> None:
    said = [warning for warning in warned(folders[:1], **asked) if "only one adapter" in warning]
    assert len(said) == 1 and f"keeps {share} of its entries" in said[0]


def test_adapters_of_which_the_density_keeps_nothing_are_named(folders: list[Path]) -> None:
    said = [warning for warning in warned(folders, densities=[1e-9, 0.5, 0.5]) if "keeps no entry" in warning]
    assert len(said) == 1 and "a0" in said[0] and "a1" not in said[0]


def test_several_adapters_are_trimmed_without_a_word(folders: list[Path]) -> None:
    assert not any("only one adapter" in warning for warning in warned(folders))
