"""The card of a result: its lines of Python, its links, its licence, and that it names no path of this machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from cli.run_command import run
from peft_types.models import TOKENS, llama

import ties_peft
from ties_peft import Adapter

pytestmark = pytest.mark.filterwarnings("ignore::ties_peft.TiesPeftWarning")
Make = Callable[..., Path]
MIT = "---\nlicense: mit\n---\n# a\n"


def card_of(merged: Any) -> str:
    return str(merged.files()["README.md"])


def front(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def block(card: str, language: str) -> str:
    return re.findall(rf"```{language}\n(.*?)\n```", card, re.DOTALL)[0]  # type: ignore[no-any-return]


# The lines of Python


def test_the_lines_of_the_card_load_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, but for the two places that only the reader knows; oracle: W + Δ by hand."""
    torch.manual_seed(0)
    base = llama()
    base.save_pretrained(tmp_path / "bases/tiny")
    for seed, name in enumerate("ab"):
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "bases/tiny")
        torch.manual_seed(seed)
        model.save_pretrained(tmp_path / name)
    merged = ties_peft.merge([tmp_path / "a", tmp_path / "b"])
    merged.save(tmp_path / "out")
    code = block(card_of(merged), "python")
    assert "from_pretrained('path/to/tiny')" in code and "'path/to/this/folder'" in code
    places = {"path/to/tiny": "bases/tiny", "path/to/this/folder": "out"}
    for place, real in places.items():
        code = code.replace(place, str(tmp_path / real))
    space: dict[str, Any] = {}
    exec(code, space)
    for name in merged.modules:
        base.get_submodule(name).weight.data += merged.delta(name)  # type: ignore[operator]
    with torch.no_grad():
        torch.testing.assert_close(space["model"].eval()(TOKENS).logits, base.eval()(TOKENS).logits)


def test_the_card_and_the_command_have_the_same_lines(make_lora: Make, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = run("merge", make_lora("a"), make_lora("b", seed=1), "--out", out)
    printed = "\n".join(line.strip() for line in done.out.split("load it with\n")[1].strip().splitlines())
    code = block((tmp_path / "out/README.md").read_text(), "python")
    assert printed == code.replace("path/to/this/folder", out)


# Links and names


def from_hub(make_lora: Make, name: str, source: str, **config: Any) -> Adapter:
    """An adapter as it is when it came from the Hub."""
    adapter = Adapter.load(make_lora(name, **config))
    adapter.source = source
    return adapter


def test_adapters_of_the_hub_are_links(make_lora: Make) -> None:
    sources = {
        "org/one": "https://huggingface.co/org/one",
        "org/two@v1": "https://huggingface.co/org/two/tree/v1",
        "org/three:best": "https://huggingface.co/org/three/tree/main/best",
        "org/four@v2:runs/best": "https://huggingface.co/org/four/tree/v2/runs/best",
    }
    adapters = [from_hub(make_lora, str(seed), source, seed=seed) for seed, source in enumerate(sources)]
    merged = ties_peft.merge(
        [*adapters, make_lora("mine", seed=9), Adapter.from_tensors(adapters[0].config, _tensors(adapters[0]))]
    )
    card = card_of(merged)
    assert re.findall(r"\n\| \[[^]]+\]\(([^)]+)\) \|", card) == list(sources.values())
    assert "\n| mine |" in card
    assert [line.page for line in merged.report.adapters] == [*sources.values(), None, None]


def _tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {key: adapter.tensors.read(key) for key in adapter.tensors.names}


def test_no_path_of_this_machine_is_in_the_card(
    make_lora: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever names adapters, bases and signs by their paths: table, lines, recipe, notes."""
    home = tmp_path / "some one's home"
    bases = [home / "models/llama", home / "other"]
    folders = [
        make_lora(f"some one's home/runs/{place}/lora", seed=seed, base_model_name_or_path=str(base))
        for seed, (place, base) in enumerate(zip("xy", bases, strict=True))
    ]
    cards = [card_of(ties_peft.merge([*folders, folders[0]], sign_from=str(folders[1])))]
    monkeypatch.chdir(home)
    cards.append(card_of(ties_peft.merge(["runs/x/lora", "runs/y/lora"])))
    for card in cards:
        assert str(tmp_path) not in card and "home" not in card and "runs/" not in card
        assert "different base models (llama, other)" in card
        assert "base_model" not in front(card)
        recipe = yaml.safe_load(block(card, "yaml"))
        assert {entry["adapter"] for entry in recipe["adapters"]} == {"lora"}


# The licence


@pytest.mark.parametrize(
    ("cards", "licence", "note"),
    [
        ([MIT, MIT], {"license": "mit"}, "mit, as the cards of all adapters say"),
        ([MIT], {"license": "mit"}, "mit, as the adapter's card says"),
        ([MIT, MIT.replace("mit", "apache-2.0")], {}, "left out, as the adapters' cards differ: 0: mit; 1: apache-2.0"),
        ([MIT, None], {}, "left out, as the adapters' cards differ: 0: mit; 1: none named"),
        ([MIT, "---\ntags: [x]\n---\n"], {}, "left out, as the adapters' cards differ: 0: mit; 1: none named"),
        ([None, "no front matter"], {}, "left out: no adapter's card names one"),
        (["---\nlicense: [\n---\n", "---\nlicense: {a: b}\n---\n"], {}, "left out: no adapter's card names one"),
        (
            ["---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n"] * 2,
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
            "other (llama3, LICENSE), as the cards of all adapters say",
        ),
        (
            ["---\nlicense: other\nlicense_name: llama3\n---\n", "---\nlicense: other\nlicense_name: gemma\n---\n"],
            {},
            "left out, as the adapters' cards differ: 0: other (llama3); 1: other (gemma)",
        ),
        (["---\r\nlicense: [mit, cc0-1.0]\r\n---\r\n"] * 2, {"license": ["mit", "cc0-1.0"]}, "mit, cc0-1.0, as"),
    ],
)
def test_the_licence_is_taken_over_where_all_agree(
    make_lora: Make, cards: list[str | None], licence: dict[str, Any], note: str
) -> None:
    folders = [make_lora(str(seed), seed=seed) for seed in range(len(cards))]
    for folder, card in zip(folders, cards, strict=True):
        if card is not None:
            (folder / "README.md").write_text(card, newline="")
    merged = ties_peft.merge(folders)
    found = front(card_of(merged))
    assert {key: value for key, value in found.items() if key.startswith("license")} == licence
    assert note in merged.report.licence_note
    row = next(line for line in str(merged.report).splitlines() if line.startswith("licence"))
    assert row.split()[1:4] == note.split()[:3]


def test_the_licence_of_a_repository_holds_for_its_folders(make_lora: Make, tmp_path: Path) -> None:
    """In the Hub's cache a card lies at the top, an adapter in a folder."""
    folder = make_lora("models--org--many/snapshots/abc/best")
    (folder.parent / "README.md").write_text(MIT)
    assert ties_peft.merge([folder]).report.licence == {"license": "mit"}


def test_a_card_that_leads_elsewhere_is_not_read(make_lora: Make, tmp_path: Path) -> None:
    folder = make_lora("a")
    (tmp_path / "README.md").write_text(MIT)
    (folder / "README.md").symlink_to(tmp_path / "README.md")
    assert ties_peft.merge([folder]).report.licence == {}


def test_a_result_hands_its_licence_on(make_lora: Make, tmp_path: Path) -> None:
    folder = make_lora("a")
    (folder / "README.md").write_text(MIT)
    ties_peft.merge([folder]).save(tmp_path / "out")
    assert ties_peft.merge([tmp_path / "out"]).report.licence == {"license": "mit"}


def test_a_card_links_to_no_package_index(make_lora: Make) -> None:
    card = card_of(ties_peft.merge([make_lora("a"), make_lora("b", seed=1)]))
    assert "Made by `ties_peft` with the method" in card and "pypi.org" not in card
