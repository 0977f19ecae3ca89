"""The matrix of kinds and architectures: every cell an adapter that PEFT makes, merged alone and loaded again.

`python -m peft_types.matrix` from the folder `tests` writes the table in `docs/what-can-be-merged.md`.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft_types.models import ARCHITECTURES, Architecture, make, output
from torch import Tensor, nn

import ties_peft

PAGE = Path(__file__).parents[2] / "docs" / "what-can-be-merged.md"
BEGIN, END = "<!-- the table is written by tests/peft_types/matrix.py -->\n", "<!-- end of the table -->\n"
TOLERANCE = 1e-4
UNMERGED = ("LoRA, bias on lora_B",)  # PEFT does not merge it into a layer without a bias

Make = Callable[[Architecture], "peft.PeftConfig | None"]


def _made(name: str, settings: Mapping[str, Any]) -> peft.PeftConfig | None:
    """A config; None where this release of PEFT has none of the name, or not all of its settings."""
    cls = getattr(peft, name, None)
    return cls(**settings) if cls and settings.keys() <= cls.__dataclass_fields__.keys() else None


def _lora(**settings: Any) -> Make:
    def config(a: Architecture) -> peft.PeftConfig | None:
        given = {"r": 3, "lora_alpha": 5, "target_modules": a.targets, **fan(a), **settings}
        return _made("LoraConfig", given)

    return config


def fan(a: Architecture) -> dict[str, bool]:
    return {"fan_in_fan_out": a.conv1d}


def embedding(a: Architecture) -> peft.PeftConfig | None:
    if a.embedding is None:
        return None
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=[a.embedding, a.targets[0]], **fan(a))


def experts(a: Architecture) -> peft.PeftConfig | None:
    if not a.parameters:
        return None
    return _lora(target_parameters=a.parameters)(a)


def ia3(a: Architecture) -> peft.PeftConfig:
    return peft.IA3Config(target_modules=a.targets, feedforward_modules=a.feedforward, **fan(a))


def adalora(a: Architecture) -> peft.PeftConfig:
    return peft.AdaLoraConfig(init_r=3, lora_alpha=5, total_step=10, target_modules=a.targets, **fan(a))


def plain(name: str, **settings: Any) -> Make:
    """A kind that takes linear layers, and Conv1D where its config has fan_in_fan_out."""

    def config(a: Architecture) -> peft.PeftConfig | None:
        given = {"target_modules": a.targets, **settings}
        return _made(name, given | fan(a)) or _made(name, given)

    return config


KINDS: dict[str, Make] = {
    "LoRA": _lora(),
    "LoRA, rsLoRA and patterns": _lora(
        use_rslora=True, rank_pattern={r".*\.0\..*": 2}, alpha_pattern={r".*(q_proj|query|c_attn|q)": 7}
    ),
    "LoRA, bias on lora_B": _lora(lora_bias=True),
    "LoRA on embeddings": embedding,
    "LoRA on experts": experts,
    "DoRA": _lora(use_dora=True),
    "(IA)³": ia3,
    "AdaLoRA": adalora,
    "LoHa": plain("LoHaConfig", r=2, alpha=3),
    "LoHa, Tucker": plain("LoHaConfig", r=2, alpha=3, use_effective_conv2d=True),
    "LoKr": plain("LoKrConfig", r=2, alpha=3),
    "LoKr, both of low rank": plain("LoKrConfig", r=1, alpha=3, decompose_both=True, use_effective_conv2d=True),
    "VeRA": plain("VeraConfig", r=6, d_initial=0.4),
    "VeRA, not saved": plain("VeraConfig", r=6, d_initial=0.4, save_projection=False),
    "BOFT": plain("BOFTConfig", boft_block_size=4),
    "C3A": plain("C3AConfig", block_size=4),
    "DEFT": plain("DeftConfig"),
    "DeLoRA": plain("DeloraConfig"),
    "FourierFT": plain("FourierFTConfig", n_frequency=20),
    "GraLoRA": plain("GraloraConfig", r=4),
    "HiRA": plain("HiraConfig", r=4),
    "HRA": plain("HRAConfig", r=4),
    "MiSS": plain("MissConfig", r=4),
    "OFT": plain("OFTConfig", oft_block_size=4),
    "OSF": plain("OSFConfig"),
    "PEANuT": plain("PeanutConfig"),
    "PVeRA": plain("PveraConfig", r=6),
    "RandLoRA": plain("RandLoraConfig", r=4),
    "SHiRA": plain("ShiraConfig", r=2),
    "Supertuning": plain("SupertuningConfig"),
    "VB-LoRA": plain("VBLoRAConfig", vector_length=4, num_vectors=10, topk=2),
    "WaveFT": plain("WaveFTConfig", n_frequency=20),
}


def randomised(model: nn.Module) -> nn.Module:
    """The adapter's own parameters moved to where each of them matters."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def save(name: str, config: peft.PeftConfig, folder: Path) -> str | None:
    """An adapter that PEFT makes and saves; why it cannot, where it cannot."""
    try:
        model = peft.get_peft_model(make(name), config)
        output(randomised(model), name)
        model.save_pretrained(folder, save_embedding_layers=False)
    except Exception as error:  # of PEFT, which has no such layer or cannot run it
        return f"{type(error).__name__}: {error}"
    return None


@dataclass(frozen=True)
class Cell:
    """What becomes of one type of adapter on one architecture.

    Attributes:
        mark: as in the table; empty where PEFT makes no such adapter, WRONG where the result differs.
        note: what there is to say of it.
        error: the larger of two: of what the model computes, relative to its largest output (if over 1), and of the
            change of any one weight that PEFT merges, relative to the norm of that change.
    """

    mark: str
    note: str = ""
    error: float = 0.0


def cell(kind: str, name: str, folder: Path) -> Cell:
    """Return what becomes of one type of adapter on one architecture."""
    config = KINDS[kind](ARCHITECTURES[name])
    if config is None:
        return Cell("", "the model has no such layer")
    fault = save(name, config, folder / "adapter")
    if fault is not None:
        return Cell("", f"PEFT makes none ({fault})")
    base = make(name)
    base.save_pretrained(folder / "base")
    try:
        mark = merge_alone(folder, {} if kind == "(IA)³" else {"rank": "max"})
    except ties_peft.TiesPeftError as error:
        return Cell("refused", str(error))
    try:
        error = error_of(base, name, folder, kind not in UNMERGED)
    except RuntimeError as fault:  # of PEFT, which cannot load the result
        return Cell("WRONG", str(fault), math.inf)
    effect = float((output(load(base, folder / "adapter"), name) - output(base, name)).abs().max())
    wrong = error > TOLERANCE or effect < 1e-3
    return Cell("WRONG" if wrong else mark, f"error {error:.1e}, effect {effect:.1e}" if wrong else "", error)


def error_of(base: nn.Module, name: str, folder: Path, weights: bool) -> float:
    """Return how far `merged` is from `adapter`, in what they compute and, where asked for, in the weights."""
    wanted, found = (output(load(base, folder / which), name) for which in ("adapter", "merged"))
    error = float((wanted - found).abs().max() / max(1.0, float(wanted.abs().max())))
    return max(error, *weight_errors(base, folder / "adapter", folder / "merged").values()) if weights else error


def merge_alone(folder: Path, asked: dict[str, Any]) -> str:
    """Merge `adapter` alone into `merged`, with `base` only where it is asked for; return the mark in the table."""
    try:
        merged, mark = ties_peft.merge([folder / "adapter"], density=1, **asked), "yes"
    except ties_peft.AdapterError as error:
        if "--base" not in str(error):
            raise
        merged, mark = ties_peft.merge([folder / "adapter"], density=1, base=folder / "base", **asked), "with base"
    merged.save(folder / "merged")
    return mark


def load(base: nn.Module, adapter: Path) -> peft.PeftModel:
    """Return PEFT's model of a copy of the base with an adapter from its folder."""
    return peft.PeftModel.from_pretrained(deepcopy(base), adapter, autocast_adapter_dtype=False)


def merged_weights(base: nn.Module, adapter: Path) -> dict[str, Tensor]:
    """Return the weights of the base with an adapter merged into them by PEFT, in float64."""
    model = load(deepcopy(base).double(), adapter).double()
    return dict(model.merge_and_unload().state_dict())


def weight_errors(base: nn.Module, adapter: Path, merged: Path) -> dict[str, float]:
    """Return, for every weight that an adapter changes, how far the merged adapter's change is from it."""
    wanted, found = merged_weights(base, adapter), merged_weights(base, merged)
    before = {key: tensor.double() for key, tensor in base.state_dict().items()}
    changes = {key: float((tensor - before[key]).norm()) for key, tensor in wanted.items()}
    return {
        key: float((found[key] - wanted[key]).norm()) / (changes[key] or 1.0)
        for key in wanted
        if changes[key] or not torch.equal(found[key], wanted[key])
    }


def row(kind: str) -> list[Cell]:
    """Return all cells of one type."""
    cells = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ARCHITECTURES:
            with tempfile.TemporaryDirectory() as folder:
                cells.append(cell(kind, name, Path(folder)))
    return cells


def line(kind: str, marks: list[str]) -> str:
    """One line of the table."""
    return f"| {kind} | " + " | ".join(mark or "–" for mark in marks) + " |\n"


def table(rows: dict[str, list[str]]) -> str:
    """The whole table."""
    head = "| | " + " | ".join(ARCHITECTURES) + " |\n" + "|---" * (len(ARCHITECTURES) + 1) + "|\n"
    return head + "".join(line(kind, marks) for kind, marks in rows.items())


def main() -> None:
    rows, largest = {}, (0.0, "", "")
    for kind in KINDS:
        cells = row(kind)
        rows[kind] = [cell.mark for cell in cells]
        print(line(kind, rows[kind]), end="", flush=True)
        for cell, name in zip(cells, ARCHITECTURES, strict=True):
            largest = max(largest, (cell.error, kind, name))
            if cell.note:
                print(f"    {name}: {cell.mark or '–'} {cell.note[:300]}", flush=True)
    print(f"largest error: {largest[0]:.1e} ({largest[1]} on {largest[2]})")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table(rows) + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
