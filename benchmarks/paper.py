"""The figures and tables of the TIES paper on the sample adapters: `python benchmarks/paper.py --data DIR`.

Every experiment of Yadav et al. 2023 that adapters allow, on the adapters of all three worlds (LoRA and (IA)³ of a sentence
encoder, LoRA of a language model), and two further settings: that decoder, and convolutional experts over disjoint classes.
Each is a stage; `--stages` runs some of them. What was measured is a line of `--log`, so that a run that was stopped goes on
where it was. The result is `results/paper.json`; from it the pictures `docs/images/paper-*.svg` are drawn, and the tables of
`docs/paper.md` are written (`--draw` does only this).

`FAST=1` in the environment takes fewer rows, points and seeds, and leaves result, pictures and page in `--work`. Needs matplotlib and scikit-learn (the extra `paper`), and for the
stage `edits` the language model (`--base`, see adapters/README.md).
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paper_digits
import paper_encoder
import paper_figures
import paper_language_model
import paper_page
import paper_weights
import torch
from compare import versions
from judge import ROOT, own_adapters
from paper_judge import FAST, FULL, KINDS, Encoder, Log, Sizes, language_model_adapters
from paper_language_model import Writer

RESULT = Path(__file__).parent / "results" / "paper.json"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "paper.md"
Stage = Callable[[], Any]


def stages(asked: argparse.Namespace, log: Log, sizes: Sizes) -> dict[str, Stage]:
    """Return the experiments by name, the cheap ones first."""
    encoder = Encoder(asked.data, log, sizes)
    writer = Writer(asked.data, asked.base, log, sizes)
    folders = {**{kind: own_adapters(kind) for kind in KINDS}, "language model": language_model_adapters()}

    def weights() -> dict[str, Any]:
        def find(world: str) -> Any:
            what = ["weights", world, sizes.modules]
            return log.find(what, lambda: paper_weights.read(paper_weights.Weights(folders[world], sizes.modules)))

        return {world: find(world) for world in folders}

    return {
        "weights": weights,
        "digits": lambda: log.find(["digits", sizes.epochs, sizes.seeds], lambda: paper_digits.table(sizes)),
        "stored": paper_language_model.stored,
        "redundancy": lambda: paper_encoder.redundancy(encoder),
        "flips": lambda: paper_encoder.flips(encoder),
        "scale": lambda: paper_encoder.scale(encoder),
        "ablation": lambda: paper_encoder.ablation(encoder),
        "tuned": lambda: paper_encoder.tuned(encoder),
        "signs": lambda: paper_encoder.signs(encoder),
        "held out": lambda: paper_encoder.held_out(encoder),
        "rank": lambda: paper_encoder.rank(encoder),
        "tasks": lambda: paper_encoder.tasks(encoder),
        "edits": lambda: paper_language_model.edits(writer, sizes),
    }


def parse() -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="a folder for each task")
    parser.add_argument("--base", help="folder or Hub id of the language model (default: the samples' base)")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="no others are run (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / "demo-out" / "paper", help="the log")
    parser.add_argument("--log", type=Path, help="what was measured, a line each (default: log.jsonl in --work)")
    parser.add_argument("--json", type=Path, help="the result, where stages that are not run stay as they are")
    parser.add_argument("--draw", action="store_true", help="run nothing; write pictures and tables of the result")
    return parser.parse_args()


def run(asked: argparse.Namespace, sizes: Sizes) -> None:
    """Run the stages that were asked for and write the result after each."""
    asked.work.mkdir(parents=True, exist_ok=True)
    found = json.loads(asked.json.read_text(encoding="utf-8")) if asked.json.exists() else {}
    fast = "FAST=1 " if sizes == FAST else ""
    found |= {"command": f"{fast}python benchmarks/paper.py --data DIR --base BASE", "versions": versions()}
    known = stages(asked, Log(asked.log or asked.work / "log.jsonl"), sizes)
    for name in asked.stages or known:
        started = time.process_time()
        found[name] = known[name]()
        print(f"{name}: {time.process_time() - started:.0f} s of processor time", flush=True)
        text = json.dumps(found, indent=1, ensure_ascii=False)
        asked.json.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Measure, draw, write."""
    asked = parse()
    warnings.simplefilter("ignore")
    fast = os.environ.get("FAST") == "1"
    asked.json = asked.json or (asked.work / "fast.json" if fast else RESULT)
    if not asked.draw:
        run(asked, FAST if fast else FULL)
    found = json.loads(asked.json.read_text(encoding="utf-8"))
    stored = asked.json == RESULT
    paper_figures.draw(found, IMAGES if stored else asked.work)
    if stored:
        PAGE.write_text(paper_page.filled(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
