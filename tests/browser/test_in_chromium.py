"""The pages of `analyze` and `merge` in Chromium: what they draw, how they are used, who can read them.

Where there is no Chromium these tests fail.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.reports import HOSTILE, METHODS, SHAPES, Opened, write_reports

from ties_peft.errors import printable

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")]
Open = Callable[..., Opened]
WIDTHS = {"desktop": 1280, "phone": 360}
MODULES = "section:has(h2:text-is('Modules by layer: pairs of adapters'))"
RETENTION = "section:has(h2:text-is('What is left of each adapter'))"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Headless Chromium, from Debian's package; Playwright's own browsers are not needed."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.fail("no Chromium was found. Run `apt-get install chromium`, or name it in the variable CHROMIUM.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_reports(tmp_path_factory.mktemp("reports"))


@pytest.fixture
def open_report(chromium: Any, reports: dict[str, Path]) -> Iterator[Callable[..., Opened]]:
    """open_report(name, width=1280, theme="light") → the page, once its figures are drawn."""
    contexts: list[Any] = []

    def opened(name: str, width: int = 1280, theme: str = "light", **options: Any) -> Opened:
        context = chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=theme, **options)
        context.set_default_timeout(10_000)
        contexts.append(context)
        found = Opened(context.new_page(), reports[name].as_uri())
        found.page.on("console", lambda message: found.faults.append(message.text))
        found.page.on("pageerror", lambda error: found.faults.append(str(error)))
        found.page.on("dialog", lambda dialog: (found.faults.append(dialog.message), dialog.dismiss()))
        found.page.on("request", lambda one: None if one.url.startswith("data:") else found.requests.append(one.url))
        found.page.goto(found.address)
        found.page.wait_for_selector("svg[aria-label*='of each module'] rect")
        return found

    yield opened
    for context in contexts:
        context.close()


def data_of(path: Path) -> dict[str, Any]:
    """The block of data of a page."""
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def tip(section: Any) -> str:
    """The text that hovering shows, without the blanks of no width that Plot puts in front of lines."""
    section.locator("g[aria-label='tip'] tspan").first.wait_for()
    return "\n".join(section.locator("g[aria-label='tip'] tspan").all_text_contents()).replace("\u200b", "")


def open_tables(place: Any) -> None:
    """Open every closed table of a page or section. A table is filled by an event that comes after the click."""
    for details in place.locator("details").all():
        details.locator("summary").click()
        details.locator("tbody tr").first.wait_for()


def rows(table: Any) -> list[list[str]]:
    return [row.locator("th, td").all_text_contents() for row in table.locator("tbody tr").all()]


@pytest.mark.parametrize("name", ["analysis", "merge", "hostile", "large"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_a_page_says_nothing_on_the_console_asks_for_nothing_and_is_no_wider_than_the_screen(
    open_report: Open, name: str, width: int
) -> None:
    found = open_report(name, width)
    assert found.page.evaluate("document.documentElement.scrollWidth") <= width
    for _ in range(2):  # charts are drawn anew for the other theme
        found.page.get_by_role("button", name="Light or dark").click()
    assert found.page.locator("svg[aria-label*='of each module']").count() == (1 if name == "merge" else 3)
    assert found.faults == [] and found.requests == [found.address]


def test_every_section_is_there(open_report: Open) -> None:
    titles = open_report("analysis").page.locator("h2").all_text_contents()
    assert titles == [
        *("Advice", "Adapters", "What is left of each adapter", "Energy against rank", "Pairs of adapters"),
        *(f"Modules by layer: {what}" for what in ("pairs of adapters", "adapters", "what is left of each adapter")),
        "To repeat it",
    ]


def test_hovering_shows_the_value_of_a_module(open_report: Open, reports: dict[str, Path]) -> None:
    section = open_report("analysis").page.locator(MODULES)
    data = data_of(reports["analysis"])
    cosine = data["modules"][0]["figures"][0]
    section.get_by_label("Pair").select_option(index=2)  # the first is the mean over all
    section.locator("g[aria-label='cell'] rect").first.hover()
    value = cosine["values"][1][0] / cosine["factor"]
    shown = data["places"]["modules"][0]
    assert tip(section).split("\n")[:2] == [shown["name"], shown["shape"]]
    assert float(tip(section).rsplit(":")[-1]) == pytest.approx(value, abs=1e-3)


def test_hovering_shows_what_a_method_leaves(open_report: Open, reports: dict[str, Path]) -> None:
    section = open_report("analysis").page.locator(RETENTION)
    section.locator("g[aria-label='bar'] rect").first.hover()
    first = data_of(reports["analysis"])["retention"]["rows"][0]
    for figure in ("projection", "cosine", "others"):
        assert f"{figure}: {first[figure]:.3f}" in tip(section)
    assert tip(section).startswith("average: first-adapter")


MIDDLE = """path => {
  const point = path.getPointAtLength(path.getTotalLength() / 2).matrixTransform(path.getScreenCTM());
  return [point.x, point.y];
}"""


def test_hovering_shows_the_energy_of_a_rank(open_report: Open, reports: dict[str, Path]) -> None:
    page = open_report("analysis").page
    section = page.locator("section:has(h2:text-is('Energy against rank'))")
    section.scroll_into_view_if_needed()
    x, y = section.locator("g[aria-label='line'] path").first.evaluate(MIDDLE)
    page.mouse.move(x, y)
    method, said = tip(section).split("\n")[0], re.search(r"rank (\d+) keeps ([\d.]+) %", tip(section))
    (curve,) = [curve for curve in data_of(reports["analysis"])["curves"] if curve["method"] == method]
    assert said is not None and float(said[2]) == pytest.approx(100 * curve["energies"][int(said[1]) - 1], abs=0.06)


def test_a_choice_of_figure_and_of_pair_draws_other_values(open_report: Open) -> None:
    section = open_report("analysis").page.locator(MODULES)
    seen = set()
    for figure, pair in itertools.product(("cosine", "sign conflict"), (0, 1)):
        section.get_by_label("Figure").select_option(label=figure)
        section.get_by_label("Pair").select_option(index=pair)
        assert section.locator("svg[aria-label]").get_attribute("aria-label").startswith(f"{figure} of each module")
        cells = section.locator("g[aria-label='cell'] rect")
        seen.add(tuple(cells.evaluate_all("cells => cells.map(cell => cell.getAttribute('fill'))")))
    assert len(seen) == 4 and {len(fills) for fills in seen} == {len(SHAPES)}


def test_layers_stand_in_the_order_of_their_numbers(open_report: Open) -> None:
    labels = open_report("analysis").page.locator(MODULES).locator("g[aria-label='y-axis tick label'] text")
    assert labels.all_text_contents() == ["0", "1", "2", "10", "–"]


def test_a_table_is_sorted_and_filtered(open_report: Open) -> None:
    section = open_report("analysis").page.locator(MODULES)
    open_tables(section)
    names = [row[0] for row in rows(section)]
    assert sorted(names) == sorted(SHAPES)
    section.get_by_role("button", name="module").click()
    assert rows(section)[0][0] == "lm_head"
    assert [row[1] for row in rows(section)][1:] == [layer for layer in ("0", "1", "2", "10") for _ in range(3)]
    heads = section.locator("thead th")
    column = heads.all_text_contents().index("cosine")
    for times, order in ((1, "descending"), (2, "ascending")):
        section.get_by_role("button", name="cosine", exact=True).click()
        values = [float(row[column]) for row in rows(section)]
        assert values == sorted(values, reverse=times == 1) and len(set(values)) > 3
        assert heads.nth(column).get_attribute("aria-sort") == order
    section.get_by_label("Show rows with").fill("layers.1.")
    assert {row[0] for row in rows(section)} == {name for name in SHAPES if "layers.1." in name}


def test_all_controls_are_reached_by_keyboard(open_report: Open) -> None:
    page = open_report("analysis").page
    controls = page.locator("a[href], button, select, summary, [tabindex]")
    visible = [one for one in controls.all() if one.is_visible()]
    reached = []
    for _ in range(len(visible) + 1):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("[...document.querySelectorAll('*')].indexOf(document.activeElement)"))
    places = [one.evaluate("one => [...document.querySelectorAll('*')].indexOf(one)") for one in visible]
    assert reached[: len(places)] == places and len(places) > 20


def test_the_keyboard_chooses_sorts_and_opens(open_report: Open) -> None:
    page = open_report("analysis").page
    section = page.locator(RETENTION)
    section.get_by_label("Figure").focus()
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    page.keyboard.press("ArrowDown")
    assert section.locator("svg[aria-label]").get_attribute("aria-label").startswith("cosine of each adapter")
    assert page.evaluate(outline) == "solid"  # what has the focus is seen
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    section.locator("tbody tr").first.wait_for()
    assert section.locator("tbody tr").count() == 3 * len(METHODS)
    section.get_by_role("button", name="projection").focus()
    page.keyboard.press("Enter")
    values = [float(row[2]) for row in rows(section)]
    assert values == sorted(values, reverse=True)


def test_the_command_is_copied(open_report: Open, reports: dict[str, Path]) -> None:
    found = open_report("analysis", permissions=["clipboard-read", "clipboard-write"])
    section = found.page.locator("section:has(h2:text-is('To repeat it'))")
    section.get_by_label("Method").select_option(label="iso_c")
    commands = {one["method"]: one for one in data_of(reports["analysis"])["commands"]}
    section.get_by_role("button", name="Copy the command").click()
    section.get_by_text("copied").wait_for()
    assert section.get_by_label("command", exact=True).text_content() == commands["iso_c"]["command"]
    assert section.get_by_label("recipe", exact=True).text_content() == commands["iso_c"]["recipe"]
    assert found.page.evaluate("navigator.clipboard.readText()") == commands["iso_c"]["command"]


# What is read


def contrast(first: str, second: str) -> float:
    """The contrast of two colours `rgb(r, g, b)`, after WCAG 2."""

    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        r, g, b = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((light(first), light(second)))
    return (high + 0.05) / (low + 0.05)


# Every text with its colour and that of the nearest background; an SVG's text lies on the page, or on a tip's box.
COLOURS = """() => {
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const own = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !own.getClientRects().length || own.closest("script, style, g[aria-label=text]")) continue;
    const inside = own.closest("svg") !== null;
    let behind = own;
    while (behind && /, 0\\)$|transparent/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const style = getComputedStyle(own);
    found.push([walker.currentNode.data, inside ? style.fill : style.color, getComputedStyle(behind ?? document.body).backgroundColor]);
  }
  return found;
}"""
# The numbers in the matrix of pairs, each on the cell of the same place.
NUMBERS = """() => {
  const cells = [...document.querySelectorAll("svg[aria-label*='every pair'] g[aria-label=cell] rect")];
  const texts = [...document.querySelectorAll("svg[aria-label*='every pair'] g[aria-label=text] text")];
  return texts.map((text, place) => [text.textContent, getComputedStyle(text).fill, getComputedStyle(cells[place]).fill]);
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["analysis", "merge"])
def test_text_has_the_contrast_of_wcag_aa(open_report: Open, name: str, theme: str) -> None:
    page = open_report(name, theme=theme).page
    open_tables(page)
    texts, numbers = page.evaluate(COLOURS), page.evaluate(NUMBERS)
    assert len(texts) > 100 and len(numbers) == 3
    low = [(text, *colours) for text, *colours in texts + numbers if contrast(*colours) < 4.5]
    assert low == []


def test_a_theme_that_is_chosen_is_drawn(open_report: Open) -> None:
    page = open_report("analysis").page
    back = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(back)
    page.get_by_role("button", name="Light or dark").click()
    assert contrast(before, page.evaluate(back)) > 10


def test_figures_and_controls_have_names_for_a_screen_reader(open_report: Open) -> None:
    page = open_report("analysis").page
    tree = page.locator("body").aria_snapshot()
    for words in ('combobox "Figure"', 'combobox "Pair"', 'heading "Advice" [level=2]', 'columnheader "norm"'):
        assert words in tree
    drawn = page.locator(".chart svg[aria-label]").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert len(drawn) == 6 and all("table" in label for label in drawn)


# Hostile names


def test_names_are_shown_and_never_run(open_report: Open) -> None:
    found = open_report("hostile")
    open_tables(found.page)
    for select in found.page.locator("select").all():
        for number in range(select.locator("option").count()):
            select.select_option(index=number)
    for cells in ("svg[aria-label*='every pair'] g[aria-label='cell'] rect", "g[aria-label='bar'] rect"):
        found.page.locator(cells).first.hover()
    assert found.page.evaluate("window.ran ?? 0") == 0 and found.faults == []
    assert found.page.locator("img, iframe, object, main script, svg[onload]").count() == 0
    tables = found.page.locator("section:has(h2:text-is('Adapters')) tbody th").all_text_contents()
    assert tables == [printable(name) for name in HOSTILE]
    modules = [row[0] for row in rows(found.page.locator(MODULES))]
    assert sorted(modules) == sorted(printable(f"layers.{i % 2}.{name}") for i, name in enumerate(HOSTILE))


@pytest.mark.parametrize("name", HOSTILE[:3])
def test_such_a_name_would_run_if_it_were_markup(chromium: Any, tmp_path: Path, name: str) -> None:
    """That nothing runs in the test above is no property of the names."""
    path = tmp_path / "page.html"
    path.write_text(f'<!doctype html><title>x</title><p title="">{name}</p><p title="{name}"></p>', encoding="utf-8")
    page = chromium.new_page()
    page.goto(path.as_uri())
    page.wait_for_function("window.ran > 0")
    page.close()
