"""`benchmarks/paper.py`: what it reads off weights equals a definition, it goes on where it was, and its page says what it found."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "paper.md"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("adapters", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)


@pytest.fixture
def found() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "paper.json").read_text(encoding="utf-8"))


def entries(folders: list[Path], scripts: None) -> torch.Tensor:
    """All entries of each adapter, (adapters, entries)."""
    import ties_peft

    adapters = [ties_peft.Adapter.load(folder) for folder in folders]
    return torch.stack([torch.cat([one.delta(name).flatten() for name in one.modules]) for one in adapters]).double()


def test_weights_equal_their_definition(make_lora: Callable[..., Path], scripts: None) -> None:
    import paper_weights

    folders = [make_lora(f"adapter{seed}", seed=seed) for seed in range(3)]
    read = paper_weights.read(paper_weights.Weights({folder.name: folder for folder in folders}))
    whole = entries(folders, scripts)
    count = int(0.2 * whole.shape[1])
    kept = torch.zeros_like(whole)
    for own, values in zip(kept, whole, strict=True):
        top = values.abs().topk(count).indices
        own[top] = values[top]
    for size, shares in zip((2, 3), zip(*list(read["conflict"].values())[1:], strict=True), strict=True):
        expected = []
        for chosen in itertools.combinations(range(3), size):
            part = kept[list(chosen)]
            both = ((part > 0).any(0) & (part < 0).any(0)).sum()
            keeping = (part != 0).sum(0)
            sizes = (whole.shape[1], (keeping >= 1).sum(), (keeping >= 2).sum())
            expected.append([100 * float(both) / float(one) for one in sizes])
        assert shares == pytest.approx(torch.tensor(expected).mean(0).tolist(), abs=0.02)
    unit = float(whole.square().mean().sqrt())
    keeping = (kept != 0).sum(0)
    signs = torch.where(kept.sum(0) < 0, -1.0, 1.0)
    agree = (kept.sign() == signs) & (kept != 0)
    ties = (kept * agree).sum(0).abs() / agree.sum(0).clamp_min(1)
    for times, value in enumerate(read["by influence"]["magnitude"]["trim, elected"]):
        assert value == pytest.approx(float(ties[keeping == times].mean()) / unit, abs=2e-3)
    positive, negative = whole.clamp_min(0).sum(0), -whole.clamp_max(0).sum(0)
    agreement = torch.maximum(positive, negative) / (positive + negative)
    edges = (0.5, 0.6, 0.7, 0.8, 0.9, 1.01)
    for low, high, value in zip(
        edges, edges[1:], read["by agreement"]["magnitude"]["no trim, mean of all"], strict=False
    ):
        inside = (agreement >= low) & (agreement < high)
        assert value == pytest.approx(float(whole.mean(0).abs()[inside].mean()) / unit, abs=5e-3)


def test_a_stage_runs_goes_on_and_is_drawn(tmp_path: Path, scripts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import paper
    import paper_figures
    import paper_judge

    sizes = paper_judge.Sizes(modules=2)
    asked = argparse.Namespace(data=tmp_path, base=None, work=tmp_path, log=None, json=tmp_path / "found.json")
    asked.stages = ["weights", "stored"]
    paper.run(asked, sizes)
    first = json.loads(asked.json.read_text(encoding="utf-8"))
    assert set(first["weights"]) == {"lora", "ia3", "language model"}
    monkeypatch.setattr(paper.paper_weights, "read", lambda weights: pytest.fail("it was in the log"))
    paper.run(asked, sizes)
    assert json.loads(asked.json.read_text(encoding="utf-8")) == first
    paper_figures.draw(first, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["paper-conflict.svg", "paper-magnitude.svg"]


def test_edits_change_the_entries_that_they_name(make_lora: Callable[..., Path], scripts: None) -> None:
    import paper_judge

    import ties_peft

    own = ties_peft.Adapter.load(make_lora("one", seed=1))
    whole = torch.cat([own.delta(name).flatten() for name in own.modules])
    for edited, share in ((paper_judge.trimmed(own, 0.3), 0.3), (paper_judge.flipped(own, 0.3, True, 1.0), 0.3)):
        changed = torch.cat([edited.delta(name).flatten() for name in edited.modules])
        top = torch.zeros_like(whole, dtype=torch.bool)
        top[whole.abs().topk(int(share * len(whole))).indices] = True
        trims = bool((changed == 0).any())
        assert torch.equal(changed, torch.where(top, whole if trims else -whole, 0 * whole if trims else whole))
    smallest = paper_judge.flipped(own, 0.7, False, 1.0)
    changed = torch.cat([smallest.delta(name).flatten() for name in smallest.modules])
    assert int((changed == -whole).sum()) == len(whole) - int(0.3 * len(whole))


def test_the_tables_are_those_of_the_result(found: dict[str, Any], scripts: None) -> None:
    import paper_page

    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (.*?) -->", text)) == set(paper_page.TABLES)
    assert paper_page.filled(text, found) == text


def test_every_picture_is_shown_and_drawn(scripts: None) -> None:
    import paper_figures

    shown = re.findall(r"\]\(images/paper-([a-z-]+)\.svg\)", PAGE.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(paper_figures.PICTURES)
    assert all((ROOT / "docs" / "images" / f"paper-{name}.svg").stat().st_size < 200_000 for name in shown)


def test_figures_in_the_text_stand_in_a_table() -> None:
    """Paragraphs that begin with **Here** say what was found: every decimal number in them is one of a table."""
    text = PAGE.read_text(encoding="utf-8")
    tables = set(re.findall(r"\d+\.\d+", "\n".join(line for line in text.splitlines() if line.startswith("|"))))
    here = [part for part in text.split("\n\n") if part.startswith("**Here**")]
    assert len(here) > 8
    assert [number for part in here for number in re.findall(r"\d+\.\d+", part) if number not in tables] == []
