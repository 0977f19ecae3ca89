"""What a merge does less of than was asked is said: once on standard error, once in the report, once in Python."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli.run_command import run
from conftest import SAMPLES

import ties_peft
from ties_peft.methods import method_classes

Make = Callable[..., Path]
ROOT = SAMPLES.parent
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


MEASURE = "The projections are not a measure of accuracy; measure it: ties-peft evaluate ADAPTERS merged --bare --task FILE.yaml"


@pytest.mark.parametrize(("task_type", "said"), [("CAUSAL_LM", True), ("SEQ_CLS", False), (None, False)])
@pytest.mark.parametrize("method", ["auto", "ties"])
def test_the_report_of_a_language_models_adapters_says_once_to_measure(
    make_lora: Make, task_type: str | None, said: bool, method: str, tmp_path: Path
) -> None:
    folders = [make_lora(f"a{n}", seed=n, shapes=SHAPES, task_type=task_type) for n in range(2)]
    done = run("merge", *folders, "--method", method, "--out", tmp_path / "out", "--report", tmp_path / "r.html")
    assert done.code == 0 and "not a measure of accuracy" not in done.err
    report = " ".join(done.out.partition("\nwritten to ")[0].split())
    assert report.count(MEASURE) == said
    assert ("kept more accuracy than ties: docs/measurements.md" in report) == (said and method == "ties")
    assert ("not a measure of accuracy" in (tmp_path / "r.html").read_text(encoding="utf-8")) == said
    if said:
        end = "docs/measurements.md." if method == "ties" else MEASURE
        assert report.endswith(end)


def test_what_is_said_of_ties_on_a_language_model_was_measured() -> None:
    stored = json.loads((ROOT / "benchmarks/results/language_model.json").read_text(encoding="utf-8"))
    for split in ("validation", "test"):
        means = {(row["method"], row["space"]): row["six"] for row in stored[split]["six"]}
        assert all(means["auto", "delta"] > mean for (name, _), mean in means.items() if name.split()[0] == "ties")


def test_one_adapter_alone_is_said_to_have_nothing_to_merge_with(folders: list[Path], tmp_path: Path) -> None:
    said = "There is only one adapter, and nothing to merge it with."
    done = run("merge", folders[0], "--out", tmp_path / "one")
    assert (done.code, done.err) == (0, "") and done.out.count(said) == 1
    assert said not in run("merge", *folders, "--out", tmp_path / "all").out
    assert said not in run("convert", folders[0], "--out", tmp_path / "converted").out


def test_weights_are_printed_with_three_digits_and_stored_with_all(make_lora: Make, tmp_path: Path) -> None:
    folders = [make_lora("a", seed=1), make_lora("b", seed=2, gain=2.345678)]
    done = run("merge", *folders, "--weights", "norm", "--out", tmp_path / "out")
    weights = [line.weight for line in ties_peft.merge(folders, weights="norm").report.adapters]
    shown = [line.split()[2] for line in done.out.splitlines() if line.startswith(("1  a", "2  b"))][:2]
    assert shown == [f"{weight:.3g}" for weight in weights] and max(map(len, shown)) <= 5
    report = json.loads((tmp_path / "out/provenance.json").read_text(encoding="utf-8"))["report"]
    assert [line["weight"] for line in report["adapters"]] == weights
    thousands = run("merge", *folders, "--weights", "1234.5,1", "--out", tmp_path / "big").out
    assert "1230" in thousands and "e+03" not in thousands.partition("cosine")[0].split("norm")[0]


def test_adapters_of_which_the_density_keeps_nothing_are_named(folders: list[Path]) -> None:
    said = [warning for warning in warned(folders, densities=[1e-9, 0.5, 0.5]) if "keeps no entry" in warning]
    assert len(said) == 1 and "a0" in said[0] and "a1" not in said[0]


def test_several_adapters_are_trimmed_without_a_word(folders: list[Path]) -> None:
    assert not any("only one adapter" in warning for warning in warned(folders))
