"""Card: the README.md of a merged adapter, with the front matter that the Hub reads."""

from __future__ import annotations

import re
from typing import Any

import yaml

from .report import Report, rider_texts

KIND_TAGS = {"LoRA": "lora", "(IA)³": "ia3"}


def card(report: Report, recipe: str, config: dict[str, Any]) -> str:
    """The text of the card.

    Args:
        report: of the merge.
        recipe: its YAML.
        config: adapter_config.json of the result.
    """
    base = config.get("base_model_name_or_path")
    front = {
        **({"base_model": base} if base else {}),
        "library_name": "peft",
        "tags": ["merge", "ties_peft", KIND_TAGS.get(report.kind, "peft"), report.method],
    }
    rows = "\n".join(
        f"| {_cell(line.name)} | {line.weight:g} | {', '.join(map(str, line.ranks))} | {line.norm:.4g} | `{line.digest[:12]}` |"
        for line in report.adapters
    )
    kept = (
        f" Its rank, {report.rank}, keeps {report.energy:.1%} of the merged energy." if report.rank is not None else ""
    )
    whole = "".join(f"\n- {text}" for text in rider_texts(report.riders))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))  # which no name in it can close
    notes = "".join(f"\n- {warning}" for warning in report.warnings)
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---
# A merge of {len(report.adapters)} {report.kind} adapters

Made by [ties_peft](https://pypi.org/project/ties-peft/) with the method `{report.method}` in space `{report.space}`, scale {report.scale_text}.{kept}

| adapter | weight | rank | norm | digest |
|---|---|---|---|---|
{rows}
{f"{chr(10)}Layers that some of them hold whole:{chr(10)}{whole}{chr(10)}" if whole else ""}
```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```

The recipe, which makes the same bytes again from the same inputs:

{fence}yaml
{recipe.strip()}
{fence}
{f"{chr(10)}Noted while merging:{chr(10)}{notes}{chr(10)}" if notes else ""}"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
