"""What merged adapters do to tasks that none of them was trained on, on the language model.

    python benchmarks/left_out.py --data DIR --base DIR [--adapter NAME=FOLDER ...] [--json FILE]

Rows of three tasks with prompts and completions (`--data` holds a folder with `test.jsonl` for each), scored with the bare
base, with merges of the six sample adapters and with further adapters, such as `distil_language_model.py --adapters`
keeps. A score is the loss per token of the completion, in nats. After it stands the difference from the base's with its
paired standard error over the rows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from causal import CausalJudge, Factors, Rows, factors_of
from records import versions, write_json
from rich.console import Console
from rich.table import Table

import smollm2  # isort: skip

import ties_peft

TASKS = ("nl_regex", "svamp", "viggo")
SPLIT = "test"
MERGES: Mapping[str, Mapping[str, Any]] = {
    "auto": {},
    "average": {"method": "average"},
    "ties": {"method": "ties"},
}


def read_rows(data: Path, tokenizer: Any, count: int) -> dict[tuple[str, str], Rows]:
    """Return the first rows of each task, whose completions are scored."""
    form, found = smollm2.Prompting("{text}", "prompt", "completion", None), {}
    for task in TASKS:
        with (data / task / f"{SPLIT}.jsonl").open(encoding="utf-8") as lines:
            examples = [form.example(tokenizer, json.loads(line)) for line, _ in zip(lines, range(count), strict=False)]
        found[SPLIT, task] = Rows(examples, None)
    return found


def per_token(judge: CausalJudge, factors: Factors) -> dict[str, torch.Tensor]:
    """Return for each task the rows' losses, divided by the mean number of tokens, so that their mean is the loss per token."""
    scored = judge.score(factors, list(judge.rows))
    tokens = {key: sum(len(one.completion) for one in rows.examples) for key, rows in judge.rows.items()}
    return {task: one.losses.cpu() * len(one.losses) / tokens[split, task] for (split, task), one in scored.items()}


def line(found: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return each task's loss per token, its difference from the base's, and the standard error of that."""
    row: dict[str, Any] = {}
    for task, losses in found.items():
        change = losses - base[task]
        error = float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else 0.0
        row[task] = {
            "loss": round(float(losses.mean()), 3),
            "difference": round(float(change.mean()), 3),
            "error": round(error, 3),
        }
    return row


def main() -> None:
    """Print the table, and store it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", required=True, help="a folder of the base model, such as smollm2.py --save writes")
    parser.add_argument("--adapter", nargs="*", default=[], metavar="NAME=FOLDER", help="further adapters")
    parser.add_argument("--rows", type=int, default=60, help="of each task, at most (60)")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = smollm2.load_base(asked.base)
    judge = CausalJudge(model, read_rows(asked.data, tokenizer, asked.rows))
    sources = [smollm2.FOLDER / task for task in smollm2.TASKS]
    made = {name: factors_of(ties_peft.merge(sources, **options)) for name, options in MERGES.items()}
    for name, _, folder in (one.partition("=") for one in asked.adapter):
        made[name] = factors_of(ties_peft.Adapter.load(folder))
    base = per_token(judge, {})
    rows = {"base": line(base, base), **{name: line(per_token(judge, one), base) for name, one in made.items()}}
    table = Table(
        "adapter", *TASKS, title=f"loss per token, {asked.rows} {SPLIT} rows a task (difference from the base)"
    )
    for name, row in rows.items():
        cells = (row[task] for task in TASKS)
        table.add_row(name, *(f"{one['loss']:.2f} ({one['difference']:+.2f} ± {one['error']:.2f})" for one in cells))
    Console(width=120).print(table)
    command = f"python benchmarks/left_out.py --data DIR --base DIR --rows {asked.rows} --adapter NAME=FOLDER"
    write_json(asked.json, {"command": command, "rows": asked.rows, "split": SPLIT, **versions(), "adapters": rows})


if __name__ == "__main__":
    main()
