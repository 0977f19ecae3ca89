"""Test and measure merges on a GPU, in under 8 minutes: `python benchmarks/gpu_check.py`, or `make gpu-check PYTHON=…`.

The script runs the tests that need a GPU, compares merges on the GPU with the same merges on the CPU, and measures the time
and memory of one 4096 × 4096 module and of adapters of Llama-3-8B's shape. It writes `benchmarks/results/gpu.json`.

It makes no environment, installs nothing and needs no network: synthetic adapters are made in a temporary folder, and
the sample adapters are in the repository. Each stage runs in a process of its own, so that one failure does not hide the
others. Exit status 1 means that something failed or could not be run, which is listed under `problems`; 2 means that
nothing was run, because packages or the GPU are missing.

`--device cpu --small` runs the same stages on tiny inputs without a GPU, to test this script.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "results" / "gpu.json"
TOTAL = 7.5 * 60  # seconds for all stages together
MODULES = {"huggingface_hub": "huggingface_hub", "pyyaml": "yaml"}  # of packages whose module has another name
SMALL_METHODS = ("average", "ties")
UNUSED = ("accelerate",)  # a dependency that is not imported here
TOLERANCE = 1e-3  # relative error of a merged delta; an entry at the threshold may be trimmed on one device only


@dataclass(frozen=True)
class Asked:
    """The options of a run.

    Attributes:
        device: that merges.
        small: whether the inputs are tiny.
        folder: of the synthetic adapters.
    """

    device: str
    small: bool
    folder: Path


def missing_packages() -> list[str]:
    """Return the packages that are needed here and cannot be imported."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no tomllib
    block = project.split("\ndependencies = [")[1].split("\n]")[0]
    needed = re.findall(r'^\s*"([\w-]+)', block, re.MULTILINE)
    needed = [name for name in needed if name not in UNUSED] + ["pytest", "hypothesis"]
    return [name for name in needed if importlib.util.find_spec(MODULES.get(name, name)) is None]


# The stages. The result of each is stored under its name.


def run_tests(asked: Asked) -> dict[str, Any]:
    """Run the tests marked `gpu`."""
    report = asked.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-rs", f"--junitxml={report}"]
    done = subprocess.run([*command, "tests/backends/test_gpu.py", "tests/live/test_live.py"], cwd=ROOT, check=False)
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    if done.returncode not in (0, 1) or counts["tests"] == 0:
        raise RuntimeError(f"pytest ended with status {done.returncode}")
    return counts


def compare_with_cpu(asked: Asked) -> dict[str, Any]:
    """Merge the sample adapters on both devices by every method in every space (`--small`: by two methods)."""
    import ties_peft

    found: dict[str, Any] = {}
    for info in [info for info in ties_peft.methods() if not asked.small or info.name in SMALL_METHODS]:
        for kind in info.kinds:
            paths = sorted((ROOT / "adapters" / kind).iterdir())
            paths = paths[: 2 if info.name == "slerp" or asked.small else 6]
            for space in info.spaces if kind == "lora" else ("delta",):
                name = f"{info.name} {space} {kind}"
                found[name] = _difference(paths, asked.device, info.name, space)
    errors = {name: value for name, value in found.items() if isinstance(value, float)}
    return {
        "largest relative error": max(errors.values()),
        "over tolerance": {name: value for name, value in errors.items() if not value <= TOLERANCE},
        "refused": {name: value for name, value in found.items() if isinstance(value, str)},
        "relative errors": errors,
    }


def _difference(paths: list[Path], device: str, method: str, space: str) -> float | str:
    """Return the relative error of one merge, or the reason why it is refused on the CPU, such as missing statistics."""
    import torch

    import ties_peft

    asked: dict[str, Any] = {"method": method, "space": space, "dtype": "float32"}
    try:
        here = ties_peft.merge(paths, **asked)
    except ties_peft.TiesPeftError as error:
        return str(error)
    there = ties_peft.merge(paths, device=device, **asked)
    apart = norm = 0.0
    for name in here.modules:
        one, other = here.delta(name).double(), there.delta(name).double()
        apart += float(torch.linalg.vector_norm(one - other)) ** 2
        norm += float(torch.linalg.vector_norm(one)) ** 2
    return (apart / norm) ** 0.5 if norm else float(apart > 0)


def measure_module(asked: Asked) -> dict[str, Any]:
    """Merge eight rank-16 adapters on one 4096 × 4096 module, in spaces delta and core."""
    import synthetic

    side = 128 if asked.small else 4096
    paths = synthetic.write_adapters(asked.folder / "module", 8, {"layers.0.q": (side, side)}, 16)
    found = {}
    for space in ("delta", "core"):
        found[space] = _timed(paths, asked.device, space, runs=3 if asked.small else 7)
    found["delta, on the CPU"] = _timed(paths, "cpu", "delta", runs=1 if asked.small else 3)
    return found


def measure_model(asked: Asked) -> dict[str, Any]:
    """Merge eight rank-16 adapters of Llama-3-8B's shape, in spaces delta and core."""
    import synthetic
    import whole_model

    layers = 1 if asked.small else 32
    block = {"self_attn.q_proj": (96, 64)} if asked.small else whole_model.BLOCK
    shapes = {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in block.items()}
    started = time.perf_counter()
    paths = synthetic.write_adapters(asked.folder / "model", 8, shapes, 16)
    found: dict[str, Any] = {"modules": len(shapes), "seconds to make the adapters": time.perf_counter() - started}
    for space in ("core", "delta"):
        found[space] = _timed(paths, asked.device, space, runs=2)
    return found


def _timed(paths: list[Path], device: str, space: str, runs: int) -> dict[str, Any]:
    """Return the seconds of the first merge, the median of the others, and the peak memory."""
    import statistics

    import synthetic
    import torch

    import ties_peft

    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        merged = ties_peft.merge(paths, method="ties", space=space, rank=16, device=device)
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return {
        "loops": merged.report.loops,
        "first seconds": seconds[0],
        "median seconds of the further runs": statistics.median(seconds[1:] or seconds),
        "runs": runs,
        "peak MB on the GPU": torch.cuda.max_memory_allocated(device) / 1e6 if cuda else None,
        "peak MB of the process": synthetic.peak(),
    }


STAGES: Mapping[str, Callable[[Asked], dict[str, Any]]] = {
    "module": measure_module,
    "tests": run_tests,
    "model": measure_model,
    "against the CPU": compare_with_cpu,  # last: it takes minutes
}


# Running the stages, in processes of their own, within one time limit


def machine(device: str) -> dict[str, Any]:
    """Describe the machine and the versions that the figures depend on."""
    import torch

    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "numba": getattr(_optional("numba"), "__version__", None),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu MB": properties.total_memory / 1e6, "cuda": torch.version.cuda}
    return found


def _optional(name: str) -> Any:
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


def run_stage(name: str, options: list[str], timeout: float) -> dict[str, Any] | str:
    """Run one stage in a process of its own; return its figures, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, __file__, *options, "--stage", name, "--out", str(result), "--folder", folder]
        try:
            done = subprocess.run(command, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return f"stopped after {timeout:.0f} s"
        if done.returncode != 0 or not result.exists():
            return f"failed with exit status {done.returncode}; see its output"
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def faults(name: str, found: dict[str, Any] | str) -> list[str]:
    """Return the problems of a stage, in words."""
    if isinstance(found, str):
        return [f"{name}: {found}"]
    if name == "tests":
        return [f"tests: {found[what]} {what}" for what in ("failures", "errors", "skipped") if found[what]]
    if name == "against the CPU":
        return [f"{merge}: relative error {error:.2g}" for merge, error in found["over tolerance"].items()]
    return []


def check(asked: argparse.Namespace, options: list[str]) -> int:
    """Run all stages for which there is time, and write the figures after each."""
    started = time.perf_counter()
    report: dict[str, Any] = {"command": "make gpu-check", "machine": machine(asked.device), "problems": []}
    report["not measured"] = ["further GPUs, mixed devices, GPUs of other makers"]
    for name in STAGES:
        left = TOTAL - (time.perf_counter() - started)
        print(f"gpu-check: {name}, {left:.0f} s left", flush=True)
        found = run_stage(name, options, left) if left > 10 else "not run: no time was left"
        report[name] = found if isinstance(found, dict) else None
        report["problems"] += faults(name, found)
        report["seconds in all"] = time.perf_counter() - started
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for problem in report["problems"]:
        print(f"gpu-check: PROBLEM: {problem}")
    print(
        f"gpu-check: {asked.out.name} written, {len(report['problems'])} problem(s), {report['seconds in all']:.0f} s"
    )
    return 1 if report["problems"] else 0


def main() -> int:
    """Read the options, and run all stages or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="that is tested (cuda)")
    parser.add_argument("--small", action="store_true", help="use tiny inputs, to test this script")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the figures")
    parser.add_argument("--stage", choices=STAGES, help="run one stage in this process")
    parser.add_argument("--folder", type=Path, help="with --stage: folder for its inputs")
    asked = parser.parse_args()
    missing = missing_packages()
    if missing:
        print(f"gpu-check: missing packages: {', '.join(missing)}. Install them for {sys.executable}.", file=sys.stderr)
        return 2
    import torch

    if torch.device(asked.device).type == "cuda" and not torch.cuda.is_available():
        print("gpu-check: torch finds no CUDA device here; nothing was run.", file=sys.stderr)
        return 2
    if asked.stage is None:
        return check(asked, ["--device", asked.device, *(["--small"] if asked.small else [])])
    warnings.simplefilter("ignore")
    sys.path[:0] = [str(ROOT), str(HERE)]
    found = STAGES[asked.stage](Asked(asked.device, asked.small, asked.folder))
    asked.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
