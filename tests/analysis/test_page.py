"""The page: what it holds, that names cannot change it, which files it may replace. `tests/browser` opens it."""

from __future__ import annotations

import html.parser
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from analysis.large_analysis import large_analysis
from cli.run_command import run

import ties_peft
from ties_peft.analysis.page import STATIC
from ties_peft.errors import printable

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]
HOSTILE = "</script><img src=x onerror=alert(1)>&\u202e"


class Tags(html.parser.HTMLParser):
    """The tags of a page, as a browser would find them, and what stands in its block of data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.data, self._inside = "", False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(value) for name, value in attributes if name in ("src", "href") and tag != "a"]
        self._inside = ("id", "data") in attributes

    def handle_data(self, data: str) -> None:
        self.data += data if self._inside else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


@pytest.fixture
def loras(make_lora: Make) -> list[Path]:
    return [
        make_lora(name, seed=seed, gain=1 + seed)
        for seed, name in enumerate(("first", "second", HOSTILE.replace("/", "")))
    ]


def page_of(*arguments: object, out: Path) -> Tags:
    done = run(*arguments)
    assert done.code == 0, done.err
    return Tags(out.read_text(encoding="utf-8"))


def test_the_page_of_an_analysis_holds_its_figures(loras: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    page = page_of("analyze", *loras, "--methods", "average,iso_c", "--out", out, out=out)
    data, found = json.loads(page.data), ties_peft.analyze(loras, methods=["average", "iso_c"]).to_dict()
    assert not page.sources and {tag for tag in page.tags if tag in ("link", "iframe", "img")} == set()
    assert page.tags.count("script") == 4
    assert [row[1] for row in data["adapters"]["rows"]] == pytest.approx([line["norm"] for line in found["adapters"]])
    assert [value for _, _, value in data["pairs"]["values"]["cosine"]] == pytest.approx(
        [line["cosine"] for line in found["pairs"]], abs=1e-4
    )
    pairs, adapters, left = data["modules"]
    cosine = next(figure for figure in pairs["figures"] if figure["key"] == "cosine")
    for series in range(3):
        for number, module in enumerate(found["modules"]):
            assert cosine["values"][series][number] / cosine["factor"] == pytest.approx(
                module["pairs"][series]["cosine"], abs=1e-3
            )
    assert [place["name"] for place in data["places"]["modules"]] == [module["name"] for module in found["modules"]]
    assert [curve["method"] for curve in data["curves"]] == ["average", "iso_c"]
    assert len(left["series"]) == 6 and len(adapters["series"]) == 3
    assert [row["projection"] for row in data["retention"]["rows"]] == pytest.approx(
        [own["projection"] for line in found["methods"] for own in line["adapters"]]
    )
    advice = [(printable(one["text"]), one["option"]) for one in found["advice"]]
    assert advice and [(one["text"], one["option"]) for one in data["advice"]][: len(advice)] == advice


def test_names_of_files_are_data_alone(loras: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    page = page_of("analyze", *loras, "--methods", "none", "--out", out, out=out)
    assert "img" not in page.tags
    name = json.loads(page.data)["names"][2]
    assert name.startswith("<script><img src=x onerror=alert(1)>&") and "\u202e" not in name


def test_the_page_of_a_merge_holds_its_report(loras: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "merge.html"
    page = page_of("merge", *loras, "--out", tmp_path / "merged", "--report", out, "--rank", 5, out=out)
    data, report = json.loads(page.data), ties_peft.merge(loras, rank=5).report
    assert [row["projection"] for row in data["retention"]["rows"]] == pytest.approx(
        [line.projection for line in report.adapters]
    )
    energy = next(figure for figure in data["modules"][0]["figures"] if figure["key"] == "energy")
    assert [value / energy["factor"] for value in energy["values"][0]] == pytest.approx(
        [line.energy for line in report.modules], abs=1e-3
    )
    assert data["curves"][0]["energies"][-1] == pytest.approx(report.energy, abs=1e-4)
    assert "recipe.yaml" in data["commands"][0]["command"]
    assert ties_peft.Recipe.from_yaml(data["commands"][0]["recipe"]).rank == 5


def test_the_command_of_the_page_makes_the_merge(loras: list[Path], tmp_path: Path) -> None:
    import shlex

    out = tmp_path / "report.html"
    (made,) = json.loads(page_of("analyze", *loras[:2], "--methods", "average", "--out", out, out=out).data)["commands"]
    words = shlex.split(made["command"])
    assert words[:2] == ["ties-peft", "merge"] and words[-2:] == ["--out", "merged"]
    done = run(*words[1:-1], tmp_path / "merged", "--json")
    assert done.code == 0
    assert json.loads(done.out)["recipe"] == ties_peft.Recipe.from_yaml(made["recipe"]).to_dict()


@pytest.mark.parametrize("command", ["analyze", "merge"])
def test_what_is_no_page_of_ours_is_not_replaced(loras: list[Path], tmp_path: Path, command: str) -> None:
    other = tmp_path / "notes.html"
    other.write_text("<p>mine</p>", encoding="utf-8")
    flags = ["--out", tmp_path / "merged", "--report"] if command == "merge" else ["--methods", "none", "--out"]
    for target, words in (
        (other, "no page of ties-peft"),
        (tmp_path, "is a folder"),
        (tmp_path / "x" / "y.html", "does not exist"),
    ):
        done = run(command, *loras, *flags, target)
        assert done.code == 2 and words in done.err and not (tmp_path / "merged").exists()
    assert other.read_text(encoding="utf-8") == "<p>mine</p>"


def test_a_page_of_ours_is_replaced(loras: list[Path], tmp_path: Path) -> None:
    analysis = ties_peft.analyze(loras, methods=[])
    analysis.to_html(tmp_path / "report.html")
    assert analysis.to_html(tmp_path / "report.html").stat().st_size < 700_000


def test_the_bundles_are_the_ones_that_are_named_with_their_licences() -> None:
    for name, version in (("d3", "7.9.2"), ("plot", "0.6.17")):
        start = (STATIC / f"{name}.min.js").read_text(encoding="utf-8")[:100]
        assert f"v{version}" in start and version in (STATIC / "page.html").read_text(encoding="utf-8")
        assert "Permission to use, copy, modify" in (STATIC / f"{name}.LICENSE").read_text(encoding="utf-8")


def test_a_page_of_twenty_adapters_of_an_8b_model_is_small(tmp_path: Path) -> None:
    """The size of a page depends on how many adapters, modules and methods there are, not on what they are."""
    analysis = large_analysis([f"adapter-for-task-{number}" for number in range(20)])
    assert 1_000_000 < analysis.to_html(tmp_path / "report.html").stat().st_size < 5_000_000


def test_layers_and_kinds_stand_in_order(tmp_path: Path) -> None:
    """By number, not by letters; a kind has the shortest name that tells it from the others."""
    kinds = ("attention.self.query", "attention.output.dense", "output.dense")
    names = [f"encoder.layer.{layer}.{kind}" for layer in range(12) for kind in kinds]
    out = large_analysis(["a", "b"], sorted([*names, "head"])).to_html(tmp_path / "report.html")
    places = json.loads(Tags(out.read_text(encoding="utf-8")).data)["places"]
    assert places["layers"] == [*map(str, range(12)), "–"]
    assert sorted(places["kinds"].items()) == sorted(
        zip((*kinds, "head"), ("query", "attention.output.dense", "output.dense", "head"), strict=True)
    )


def test_what_names_hold_cannot_end_the_block_of_data(tmp_path: Path) -> None:
    names = [HOSTILE, "<!--<script>", "{{js}}", "\x00\x1b[31m\u2028", "quotes \"' and \\"]
    out = large_analysis(names, [f"layers.0.{name}" for name in names]).to_html(tmp_path / "report.html")
    page = Tags(out.read_text(encoding="utf-8"))
    assert page.tags.count("script") == 4 and "img" not in page.tags
    data = json.loads(page.data)
    assert data["names"] == [printable(name) for name in names]
    assert [row["name"] for row in data["places"]["modules"]] == [printable(f"layers.0.{name}") for name in names]
