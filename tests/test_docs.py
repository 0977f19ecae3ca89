"""The documentation: links and anchors exist, Python and commands run on tiny adapters, flags and messages are those of the code."""

from __future__ import annotations

import ast
import itertools
import json
import re
import shlex
import statistics
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from cli.run_command import run
from conftest import lora_config, lora_tensors, write_adapter
from test_readme import commands, joined

import ties_peft
from ties_peft.cli import app
from ties_peft.merging import members
from ties_peft.methods import method_classes

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))
import generate  # noqa: E402

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "generated" not in page.parts]
GENERATED = {"methods": generate.catalogue.page, "cli": generate.command_line, "api": generate.api}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NOT_RUN = "<!-- not run"  # above a block of Python that needs a base model; it is parsed all the same
ELSEWHERE = {"evaluate", "distil", "search", "signs", "statistics"}  # test_readme runs those whose files are here
SKIPPED = {
    "docs/image-models.md",
    "README.md",
}  # files of image models; tests/test_readme.py and notebook 1 run the README's
SHAPES = {"layers.0.self_attn.q": (12, 10), "layers.0.up": (20, 12), "layers.1.self_attn.q": (12, 10)}


class Block(NamedTuple):
    """A block of code on a page."""

    language: str
    text: str
    runs: bool


def identifier(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=identifier)


def text_of(page: Path) -> str:
    """A page; one that is generated is made."""
    if page.parent.name == "generated":
        return str(GENERATED[page.stem]())
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> Iterator[Block]:
    pattern = re.compile(r"(<!-- not run[^\n]*\n)?^ *```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
    for comment, language, text in pattern.findall(text_of(page)):
        yield Block(language, textwrap.dedent(text), not comment)


def links(page: Path) -> set[str]:
    text = re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)
    return {link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them; of the API also autodoc's."""
    text = re.sub(r"```\w*\n.*?```", "", text_of(page), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_to_files_and_headings(page: Path) -> None:
    wrong = []
    for link in sorted(links(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = target.exists() or (target.parent.name == "generated" and target.stem in GENERATED)
        if not known or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@every_page
def test_python_parses_and_recipes_are_read(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)
        if block.language == "yaml" and block.text.startswith("merge_method:"):
            ties_peft.Recipe.from_yaml(block.text)


def test_what_the_other_tests_look_for_is_found() -> None:
    """They would pass on nothing."""
    assert len(set.union(*map(links, PAGES))) > 40
    assert any("#" in link for link in set.union(*map(links, PAGES)))
    assert {"merge", "inspect", "analyze", "convert"} <= {words[1] for words in commands()}
    found = [block for page in PAGES for block in blocks(page)]
    assert len([block for block in found if block.language == "python" and block.runs]) > 8
    assert len([block for block in found if not block.runs]) < 8


def test_commands_and_flags_exist() -> None:
    wrong = []
    for words in commands():
        name, *rest = (word.strip("[]") for word in words[1:])
        if name.startswith("--"):  # of ties-peft itself
            continue
        known = {flag for p in COMMANDS[name].params for flag in (*p.opts, *p.secondary_opts)}
        wrong += [(name, word) for word in rest if word.startswith("--") and word not in known | {"--help"}]
    assert wrong == []


def test_every_page_stands_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in PAGES if page.parts[-2] != ROOT.name}
    assert pages - {"index"} <= set(index)


def runs(words: list[str]) -> bool:
    """Whether a command is run here."""
    return words[1] not in ELSEWHERE | {"push"} and "cuda" not in words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with what a clone holds, where methods that a page registers are forgotten afterwards."""
    for name in ("adapters", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["ties_peft.methods"], "_REGISTERED", {})
    yield tmp_path
    method_classes.cache_clear()


def make_adapters(text: str, folder: Path) -> None:
    """Make a tiny LoRA for each of `runs/NAME` and `clients/NAME` that a page names, of different ranks."""
    for number, name in enumerate(sorted(set(re.findall(r"(?:runs|clients)/\w[\w-]*", text)))):
        rank = 2 + number % 3
        tensors = lora_tensors(SHAPES, rank, number)
        write_adapter(folder / name, lora_config(SHAPES, rank, 8, task_type="CAUSAL_LM"), tensors)


@pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if identifier(page) not in SKIPPED], ids=identifier)
def test_the_snippets_of_a_page_run_in_their_order(page: Path, folder: Path) -> None:
    make_adapters(text_of(page), folder)
    names: dict[str, Any] = {}
    recipe = ""
    for block in blocks(page):
        if block.language == "yaml":
            recipe = block.text
        if block.language == "python" and block.runs:
            exec(compile(block.text, identifier(page), "exec"), names)
        lines = joined(block.text).splitlines() if block.language == "bash" else []
        for words in (shlex.split(line, comments=True) for line in lines):
            if words[:1] != ["ties-peft"] or not runs(words):
                continue
            for flag, value in itertools.pairwise(words):
                if flag == "--recipe" and not Path(value).exists():
                    Path(value).write_text(recipe, encoding="utf-8")
            given = [path for word in words[2:] for path in expanded(word)]
            outcome = run(words[1], *given)
            assert outcome.code == 0, f"{shlex.join(words)}\n{outcome.err}"


def expanded(word: str) -> list[str]:
    """What a shell makes of a pattern of sample adapters; three of them, to save time."""
    return sorted(map(str, Path().glob(word)))[:3] if word == "adapters/lora/*" else [word]


def messages() -> str:
    """The texts in the package's code, each f-string as one text with the names of its values in braces."""
    found = []
    for path in sorted((ROOT / "ties_peft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(map(shown, node.values)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def shown(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"  # type: ignore[attr-defined]


def test_the_messages_that_are_explained_are_those_of_the_code() -> None:
    page = text_of(ROOT / "docs" / "guides" / "troubleshooting.md")
    explained = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    known = messages().replace("{ADAPTER_CONFIG}", "adapter_config.json")
    assert len(explained) > 20
    missing = [text for text in explained for part in text.split("…") if part.strip() not in known]
    assert missing == []


def test_the_figures_of_search_are_those_of_its_results() -> None:
    """Mean and standard deviation over seeds, of the runs with 300 rows and 40 trials."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "search.json").read_text(encoding="utf-8"))
    page = text_of(ROOT / "docs" / "guides" / "judge-and-learn.md")
    rows = {"search": "search", "best single adapter, by the examples": "best single", "base": "base"}
    rows |= {"mean of the adapters": "mean", "random weights, the best of 40": "random weights"}
    for label, name in {**rows, "the search over random adapters": "random adapters"}.items():
        cells = re.search(rf"^\| {re.escape(label)} \| (.*) \|$", page, re.MULTILINE)
        assert cells, label
        expected = []
        for kind in ("lora", "ia3"):
            for count in (5, 20, 50):
                key = re.compile(rf"{kind} {count} \d+ 300 40")
                values = [run[name] for label_, run in stored.items() if key.fullmatch(label_)]
                mean, spread = statistics.mean(values), statistics.stdev(values)
                expected.append(f"{mean:.1f} ± {spread:.1f}" if spread > 0.01 else f"{mean:.1f}")
        assert cells[1].split(" | ") == expected, label


def test_the_ratio_of_norms_that_is_warned_of_is_the_same_everywhere() -> None:
    assert members.UNEQUAL == 3
    sources = [*PAGES, ROOT / "docs/methods.yaml"]
    assert not [page.name for page in sources if "severalfold" in page.read_text(encoding="utf-8")]
    for page in ("guides/analyze.md", "guides/merge-llm-loras.md", "methods.yaml"):
        assert "differ threefold or more" in (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert "`norms differ` | the largest norm is three times" in text_of(ROOT / "docs/guides/troubleshooting.md")


def test_the_guide_to_analyze_has_the_headings_that_are_printed(make_lora: Callable[..., Path]) -> None:
    printed = run("analyze", make_lora("a"), make_lora("b", seed=1)).out
    guide = text_of(ROOT / "docs/guides/analyze.md")
    for heading in ("effective rank", "in largest 20 %", "sign conflict", "predicted", "kept by both", "overlap in"):
        assert heading in printed and f'"{heading}"' in guide
