"""What `analyze` costs: `python benchmarks/analyze.py`, seconds by stage, core-seconds and peak memory.

The six sample adapters of each type, and 20 synthetic rank-16 adapters of Llama-3-8B's shape, each in a process of its own,
after torch is imported.
The stages: `open` (files, digests, checks), `factors` (norms, cosines, ranks, subspaces, from Gram matrices), `entries`
(thresholds, sign conflicts, redundancy; of the large ones on a part of the rows), `methods` (the merges that are compared).
`--layers 2` for a look; `--only samples` or `large`. The large adapters are made once in --folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import synthetic
from whole_model import BLOCK

ROOT = Path(__file__).parent.parent
TYPES = ("lora", "ia3", "smollm2")
PROGRAM = """
import json, resource, sys, time, warnings
warnings.simplefilter("ignore")
import ties_peft
methods = json.loads(sys.argv[1])
analyze = ties_peft.analyze  # imports torch, which takes two seconds or more, before the clock starts
ends, started, spent = {}, time.perf_counter(), time.process_time()
def told(stage, done, of):
    ends.setdefault("open", time.perf_counter())
    if stage == "factors" or (stage == "signs" and done == of):
        ends[stage] = time.perf_counter()
found = analyze(sys.argv[2:], methods=methods, progress=told)
whole = time.perf_counter() - started
opened, factors = ends["open"] - started, ends["factors"] - ends["open"]
entries = ends["signs"] - ends["factors"]
print(json.dumps({"adapters": len(found.names), "modules": len(found.modules), "seconds": whole, "core": time.process_time() - spent, "open": opened,
    "factors": factors, "entries": entries, "methods": whole - opened - factors - entries, "counted": found.counted,
    "compared": [result.method for result in found.methods],
    "MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""
STAGES = ("open", "factors", "entries", "methods")


def run(what: str, paths: list[Path], methods: list[str] | None) -> None:
    """Analyze in a new process and print a row."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(methods), *map(str, paths)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    stages = ", ".join(f"{stage} {found[stage]:.1f}" for stage in STAGES)
    print(
        f"{what}, {found['adapters']} adapters, {found['modules']} modules: {found['seconds']:.1f} s ({stages}), "
        f"{found['core']:.1f} core-seconds, peak "
        f"{found['MB']:.0f} MB; {found['counted']:.2%} of the rows counted; methods {', '.join(found['compared']) or 'none'}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "ties-peft-analyze"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--only", choices=("samples", "large"))
    asked = parser.parse_args()
    if asked.only != "large":
        for kind in TYPES:
            folders = sorted(path.parent for path in (ROOT / "adapters" / kind).glob("*/adapter_config.json"))
            folders = [folder for folder in folders if folder.name != "multitask"]
            run(f"samples, {kind}, the default methods", folders, None)
            run(f"samples, {kind}, no methods", folders, [])
    if asked.only != "samples":
        folder = asked.folder / f"{asked.layers}-layers-{asked.adapters}-adapters"
        if not folder.exists():
            shapes = {f"model.layers.{n}.{name}": shape for n in range(asked.layers) for name, shape in BLOCK.items()}
            synthetic.write_adapters(folder, asked.adapters, shapes)
        run("Llama-3-8B's shape, no methods", sorted(folder.iterdir()), [])
        run("Llama-3-8B's shape, the default methods", sorted(folder.iterdir()), None)
    print(synthetic.machine())


if __name__ == "__main__":
    main()
