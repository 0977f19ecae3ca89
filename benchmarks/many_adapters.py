"""Measure time and memory against the number of adapters, from one to hundreds: `python benchmarks/many_adapters.py`.

The merges are of one 1024 × 1024 module at rank 16: TIES in delta space, TIES in core space, and the sum. Each figure is
the median of several processes. From 64 adapters on, the adapters together have at least as many columns as the side
of the module. `--no-kernels` leaves out numba, whose 100 MB do not depend on the number of adapters.

The slope of memory is per adapter, and also given as a multiple of the float32 factors of one adapter on the module. From
64 adapters on it is the memory of a further adapter. From one on it includes a step between 8 and 64: exact bases and
sums need some matrices of side × side in float64, 8 MB each, whose size then stays. The peak of a process also includes
memory that the C library keeps after it was freed, up to twice the largest freed block, 32 MB here, in some processes and
not in others. So a single process is not enough.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import synthetic

PROGRAM = """
import resource, sys, time, warnings
warnings.simplefilter("ignore")
import ties_peft
from ties_peft.task_vectors.kernels import backends
backends.MIN_ENTRIES = int(sys.argv[3]) or backends.MIN_ENTRIES
started = time.perf_counter()
ties_peft.merge(sys.argv[4:], rank=16, method=sys.argv[1], space=sys.argv[2])
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
SETTLED = 64  # adapters from which on the matrices of exact bases have their full size
CASES = ("ties/delta", "ties/core", "task_arithmetic/delta")


def run(case: str, paths: list[Path], kernels: bool, times: int) -> tuple[float, float]:
    """Return the seconds and the peak megabytes of one merge, each the median of some processes."""
    min_entries = 0 if kernels else 1 << 62
    command = [sys.executable, "-c", PROGRAM, *case.split("/"), str(min_entries), *map(str, paths)]
    printed = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(times)]
    seconds, megabytes = (statistics.median(map(float, column)) for column in zip(*printed, strict=True))
    return seconds, megabytes


def main() -> None:
    """Measure all cases and numbers of adapters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024, help="of the module (1024)")
    parser.add_argument("--cases", default=",".join(CASES), help="method/space, separated by commas")
    parser.add_argument("--counts", default="1,8,64,128,256,512", help="numbers of adapters, separated by commas")
    parser.add_argument("--times", type=int, default=3, help="number of processes for each figure (3)")
    parser.add_argument("--no-kernels", action="store_true", help="use torch only, also where numba is installed")
    asked = parser.parse_args()
    counts = [int(count) for count in asked.counts.split(",")]
    own = 2 * asked.side * 16 * 4 / 1e6
    with tempfile.TemporaryDirectory() as folder:
        paths = synthetic.write_adapters(Path(folder), max(counts), {"layers.0.q": (asked.side, asked.side)})
        for case in asked.cases.split(","):
            found = {}
            for count in counts:
                seconds, peak = found[count] = run(case, paths[:count], not asked.no_kernels, asked.times)
                each = 1000 * seconds / count
                print(
                    f"{case}, {count:3d} adapters: {seconds:6.2f} s, {each:6.1f} ms each, peak {peak:.0f} MB",
                    flush=True,
                )
            many = counts[-1]
            for few in (counts[0], next((count for count in counts if count >= SETTLED), counts[0])):
                slope = (found[many][1] - found[few][1]) / max(1, many - few)
                print(
                    f"memory from {few} to {many}: {slope:.2f} MB an adapter, "
                    f"{slope / own:.2f} × its float32 factors ({own:.2f} MB)"
                )
    print(synthetic.machine())


if __name__ == "__main__":
    main()
