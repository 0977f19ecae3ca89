"""The matrix of kinds and architectures, its table in the docs, and merges of unlike kinds."""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from pathlib import Path

import peft
import pytest
import torch
from conftest import OLDER_PEFT
from peft_types.matrix import BEGIN, END, KINDS, PAGE, cell, save
from peft_types.models import ARCHITECTURES, make, output
from sampling import covering, some

import ties_peft

pytestmark = pytest.mark.filterwarnings("ignore")
UNLIKE = ("LoRA", "LoRA, rsLoRA and patterns", "DoRA", "AdaLoRA", "LoHa", "LoKr", "VeRA", "HRA")


def table_of_the_page() -> dict[str, dict[str, str]]:
    """Return the marks in the docs by type and architecture."""
    heading, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()
    )
    return {kind: dict(zip(heading[1:], marks, strict=True)) for kind, *marks in rows}


TABLE = table_of_the_page()
CELLS = [(kind, name) for kind, name in product(KINDS, ARCHITECTURES) if TABLE[kind][name] in ("yes", "with base")]
OTHERS = [(kind, name) for kind, name in product(KINDS, ARCHITECTURES) if (kind, name) not in CELLS]


@pytest.mark.parametrize(
    ("kind", "name"), [*covering(CELLS, lambda case: case, "merged"), *some(OTHERS, 3, "not merged")]
)
def test_the_table_in_the_docs_is_what_is_found(kind: str, name: str, tmp_path: Path) -> None:
    found = cell(kind, name, tmp_path)
    if OLDER_PEFT and not found.mark:
        pytest.skip("this release of PEFT makes no such adapter")
    assert found.mark != "WRONG", found.note
    assert TABLE[kind][name] == (found.mark or "–")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_class_of_layer_is_adapted_square_and_otherwise(name: str) -> None:
    """Else a cell would not notice a weight that is transposed where its shape does not tell."""
    targets = tuple(f".{target}" for target in ARCHITECTURES[name].targets)
    square: dict[str, set[bool]] = {}
    for path, layer in make(name).named_modules():
        if path.endswith(targets):
            square.setdefault(type(layer).__name__, set()).add(layer.weight.shape[0] == layer.weight.shape[1])
    assert square and all(seen == {True, False} for seen in square.values()), square
    assert ("Conv1D" in square) == ARCHITECTURES[name].conv1d


def test_the_table_names_every_kind_and_no_other() -> None:
    assert list(TABLE) == list(KINDS)
    assert all(list(row) == list(ARCHITECTURES) for row in TABLE.values())


@pytest.mark.parametrize("space", ["delta", "core", "knots"])
def test_unlike_kinds_add_up_to_the_sum_of_what_peft_merges(space: str, tmp_path: Path) -> None:
    """Σ wΔ against float64 sums of W′ − W by PEFT's own merge_and_unload, on every adapted layer."""
    base = make("Llama")
    base.save_pretrained(tmp_path / "base")
    plain = {name: weight.double() for name, weight in base.state_dict().items()}
    weights = [0.5, -1.0, 2.0, 1.0, 0.7, 1.5, -0.3, 1.1]
    wanted = {name: torch.zeros_like(weight) for name, weight in plain.items()}
    for kind, weight in zip(UNLIKE, weights, strict=True):
        config = KINDS[kind](ARCHITECTURES["Llama"])
        assert config is not None and save("Llama", config, tmp_path / kind) is None
        model = peft.PeftModel.from_pretrained(deepcopy(base).double(), tmp_path / kind, autocast_adapter_dtype=False)
        for name, moved in model.double().merge_and_unload().state_dict().items():
            wanted[name] += weight * (moved - plain[name])
    merged = ties_peft.merge(
        [tmp_path / kind for kind in UNLIKE],
        "task_arithmetic",
        space,
        weights,
        scale=1,
        rank="max",
        base=tmp_path / "base",
    )
    for name in merged.modules:
        delta = merged.delta(name).double()
        assert torch.dist(delta, wanted[f"{name}.weight"]) < 2e-5 * wanted[f"{name}.weight"].norm()
    assert sum(bool(change.any()) for change in wanted.values()) == len(merged.modules)


def test_two_spellings_of_one_module_meet(tmp_path: Path) -> None:
    """An adapter of transformers 5 for ViT, and the same with the names that older ones gave its modules."""
    if not any(name.endswith("q_proj") for name, _ in make("ViT").named_modules()):
        pytest.skip("this transformers has the old names")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "fc2"])
    assert save("ViT", config, tmp_path / "new") is None
    new = ties_peft.Adapter.load(tmp_path / "new")
    old = {"attention.q_proj": "attention.attention.query", "attention.v_proj": "attention.attention.value"}
    old |= {"mlp.fc2": "output.dense", "vit.layers.": "vit.encoder.layer."}
    tensors = {}
    for key in new.tensors.names:
        name = key
        for there, here in old.items():
            name = name.replace(there, here)
        tensors[name] = new.tensors.read(key)
    from ties_peft.adapters.adapter import Adapter

    merged = ties_peft.merge([new, Adapter.from_tensors(new.config, tensors)], "average")
    assert merged.modules == new.modules
    assert any("older versions of transformers" in warning for warning in merged.report.warnings)
    for name in new.modules:
        torch.testing.assert_close(merged.delta(name), new.delta(name), atol=1e-5, rtol=1e-4)
    base = make("ViT")
    found = output(peft.PeftModel.from_pretrained(deepcopy(base), merged.save(tmp_path / "out")), "ViT")
    wanted = output(peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "new"), "ViT")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
