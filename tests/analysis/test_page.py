"""The page: what it holds, that names cannot change it, which files it may replace; in a browser, where one is."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.run_command import run

import ties_peft
from ties_peft.analysis.figures import Measured
from ties_peft.analysis.method_figures import MethodResult
from ties_peft.analysis.module_places import module_places
from ties_peft.analysis.page import STATIC
from ties_peft.errors import printable

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
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
    assert [place["name"] for place in data["places"]] == [module["name"] for module in found["modules"]]
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


# In a browser


@pytest.fixture
def browser() -> Iterator[Any]:
    """Headless Chromium, from Debian's package `chromium`."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
    if CHROMIUM is None:
        pytest.skip("no Chromium was found: apt-get install chromium")
    with api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


def contrast(first: str, second: str) -> float:
    """The contrast of two colours `rgb(r, g, b)`, after WCAG 2."""

    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((light(first), light(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(browser: Any, loras: list[Path], tmp_path: Path, theme: str, width: int) -> None:
    out = ties_peft.analyze(loras, methods=["average", "iso_c"]).to_html(tmp_path / "report.html")
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme).new_page()
    faults: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(out.as_uri())
    page.wait_for_selector("svg[aria-label*='of each module'] rect")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in requests if not url.startswith("data:")] == [out.as_uri()]
    assert len(page.query_selector_all("svg[aria-label]")) >= 6

    # Hovering over a cell shows its value.
    cells = page.locator("svg[aria-label*='of each module'] g[aria-label='cell'] rect")
    cells.first.hover()
    assert "cosine" in page.locator("svg[aria-label*='of each module'] g[aria-label='tip']").first.text_content()

    # A choice changes the figure; a table is sorted by keyboard and filtered.
    section = page.locator("section", has_text="Modules by layer: pairs").first
    before = section.locator("svg[aria-label*='of each module']").get_attribute("aria-label")
    section.get_by_label("Figure").select_option(label="sign conflict")
    assert section.locator("svg[aria-label*='of each module']").get_attribute("aria-label") != before
    section.locator("summary").focus()
    page.keyboard.press("Enter")
    section.get_by_label("Show rows with").fill("layers.1")
    assert section.locator("tbody tr").count() == 1
    section.get_by_label("Show rows with").fill("")
    section.locator("th button").first.focus()
    page.keyboard.press("Enter")
    assert section.locator("th").first.get_attribute("aria-sort") == "ascending"

    pairs = "[...document.querySelectorAll('p, li, th, td, label, h2, code, footer')].map(e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor])"
    assert min(contrast(*colours) for colours in page.evaluate(pairs)) >= 4.5
    assert faults == []


def test_a_page_of_twenty_adapters_of_an_8b_model_is_small(tmp_path: Path) -> None:
    """The size of a page depends on how many adapters, modules and methods there are, not on what they are."""
    adapters, ranks, methods = 20, 64, ("ties", "task_arithmetic", "iso_c", "tsv")
    kinds = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    names = [f"model.layers.{layer}.{kind}" for layer in range(32) for kind in kinds]
    draw = np.random.default_rng(0)
    measured = Measured(len(names), adapters)
    measured.has[:] = True
    for key, value in vars(measured).items():
        if isinstance(value, np.ndarray) and value.dtype == float:
            setattr(measured, key, draw.uniform(0.5, 1, value.shape))
    of_modules = (len(names), adapters)
    results = [
        MethodResult(
            *(
                method,
                method,
                "delta",
                1.0,
                ranks,
                0.9,
                np.sort(draw.uniform(size=ranks)),
                draw.uniform(size=(len(names), ranks)),
            ),
            *(list(draw.uniform(size=adapters)) for _ in range(3)),
            *(draw.uniform(-1, 1, of_modules) for _ in range(2)),
            norms=draw.uniform(size=len(names)),
            seconds=1.0,
        )
        for method in methods
    ]
    sources = [f"organisation/adapter-for-task-{number}" for number in range(adapters)]
    places = module_places(names)
    analysis = ties_peft.Analysis(
        sources, sources, "LoRA", 0.2, 1.0, names, [(4096, 4096)] * len(names), places, measured, results
    )
    size = analysis.to_html(tmp_path / "report.html").stat().st_size
    assert 1_000_000 < size < 5_000_000
