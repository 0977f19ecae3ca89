"""Write the pages that the tests open, and keep what the browser says of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from analysis.large_analysis import large_analysis
from conftest import lora_config, lora_tensors, write_adapter

import ties_peft
from ties_peft.analysis.merge_page import merge_page

SHAPES = {
    f"model.layers.{layer}.{kind}": (24, 16) for layer in (0, 1, 2, 10) for kind in ("attn.q", "attn.v", "mlp.up")
}
SHAPES["lm_head"] = (24, 16)
METHODS = ("average", "ties", "iso_c")
RAN = "window.ran=1"  # what hostile names would run
HOSTILE = (
    f"</script><script>{RAN}</script>",
    f"<img src=x onerror='{RAN}'>",
    f"\"'><svg onload={RAN}>",
    f"<!--<script>{RAN}//",
    f"{{{{js}}}} ${{{RAN}}}",
    f"javascript:{RAN}",
    "\x00\x1b[31m\u2028\u2029\u202e",
    "__proto__",
)


@dataclass
class Opened:
    """A page in the browser, what it said on the console and what it asked the network for.

    Attributes:
        page: of Playwright.
        address: of the file.
        faults: messages of the console, uncaught errors, dialogs.
        requests: addresses, without data URLs.
    """

    page: Any
    address: str
    faults: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def write_reports(folder: Path) -> dict[str, Path]:
    """Write pages: of an analysis, of a merge, with hostile names, and of 20 adapters of an 8B model."""
    adapters = [
        write_adapter(folder / name, lora_config(SHAPES, 4, 8), lora_tensors(SHAPES, 4, seed, 1 + seed))
        for seed, name in enumerate(("first-adapter-of-a-user", "second", "third"))
    ]
    made = {name: folder / f"{name}.html" for name in ("analysis", "merge", "hostile", "large")}
    ties_peft.analyze(adapters, rank=6, methods=METHODS).to_html(made["analysis"])
    merged = ties_peft.merge(adapters, "ties", rank=6)
    made["merge"].write_text(merge_page(merged, folder / "merged"), encoding="utf-8")
    modules = [f"layers.{number % 2}.{name}" for number, name in enumerate(HOSTILE)]
    large_analysis(HOSTILE, modules, HOSTILE[:3], ranks=4).to_html(made["hostile"])
    large_analysis([f"adapter-for-task-{number}" for number in range(20)]).to_html(made["large"])
    return made
