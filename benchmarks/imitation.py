"""Choose a rule for the sample LoRAs of a causal language model by imitation, without labels, and compare with what rules keep.

    python benchmarks/imitation.py --data DIR --base DIR --prompts 10 --log FILE

DIR of `--data` holds a folder with `train.jsonl` for each task; the prompts are the first ones, without labels and completions.
Every rule is scored as by `search` with objective "imitate": the mean over the adapters of KL(adapter ‖ merge) on answers that
the adapters give to their own prompts. Beside it stands the share `six` of `results/language_model.json`, on validation rows,
where that file has the rule. With `--log` a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from distil_language_model import read_prompts

import smollm2  # isort: skip

import ties_peft
from ties_peft.search.imitation import Imitation

STORED = Path(__file__).parent / "results" / "language_model.json"


class Rule(NamedTuple):
    """A merge, and the name and space by which its share is stored."""

    name: str
    options: dict[str, Any]
    stored: tuple[str, str] | None


RULES = (
    Rule("auto", {"method": "auto"}, ("auto", "delta")),
    Rule("average", {"method": "average"}, ("average", "delta")),
    Rule("ties λ 0.5", {"method": "ties", "scale": 0.5}, ("ties λ 0.5", "delta")),
    Rule("pico+ties in core", {"method": "pico+ties", "space": "core"}, ("pico+ties", "core")),
    Rule("dual, flatten 0.5", {"method": "dual", "flatten": 0.5}, None),
)


def stored_share(rule: Rule) -> float | None:
    """Return the mean share of the own adapters that is stored for a rule."""
    lines = json.loads(STORED.read_text(encoding="utf-8"))["validation"]["six"]
    found: list[float] = [line["six"] for line in lines if (line["method"], line["space"]) == rule.stored]
    return found[0] if found else None


def imitation(data: Path, base: str, prompts: int) -> Imitation:
    """Return the objective; the adapters answer their prompts when it is first asked."""
    return Imitation(
        [ties_peft.Adapter.load(smollm2.FOLDER / task) for task in smollm2.TASKS],
        [read_prompts(data, task, prompts) for task in smollm2.TASKS],
        [smollm2.FOLDER / "tasks" / f"{task}.yaml" for task in smollm2.TASKS],
        base=base,
    )


def main() -> None:
    """Score the rules that are not known yet, and print all, the one with the lowest divergence first."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base", required=True, help="a folder of the base model, such as smollm2.py --save writes")
    parser.add_argument("--prompts", type=int, default=10, help="of each task")
    parser.add_argument("--log", type=Path, required=True, help="a file with one JSON object a line")
    asked = parser.parse_args()
    torch.manual_seed(0)
    lines = asked.log.read_text(encoding="utf-8").splitlines() if asked.log.exists() else []
    known = {(one["prompts"], one["rule"]): one for one in map(json.loads, lines)}
    missing = [rule for rule in RULES if (asked.prompts, rule.name) not in known]
    objective = imitation(asked.data, asked.base, asked.prompts) if missing else None
    for rule in missing:
        assert objective is not None
        started = time.process_time()
        merged = ties_peft.merge([smollm2.FOLDER / task for task in smollm2.TASKS], rank="max", **rule.options)
        each = dict(zip(smollm2.TASKS, objective.divergences(merged), strict=True))
        record = {
            "prompts": asked.prompts,
            "rule": rule.name,
            "divergence": sum(each.values()) / len(each),
            "each": each,
            "share": stored_share(rule),
            "processor seconds": round(time.process_time() - started, 1),
        }
        known[asked.prompts, rule.name] = record
        with asked.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
    for record in sorted((known[asked.prompts, rule.name] for rule in RULES), key=lambda one: one["divergence"]):
        print(json.dumps(record))


if __name__ == "__main__":
    main()
