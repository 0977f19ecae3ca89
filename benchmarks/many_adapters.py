"""From one adapter to hundreds: `python benchmarks/many_adapters.py`, time and memory against their number.

TIES in delta space on one 1024 × 1024 module at rank 16, each number in a process of its own. The slope
of memory is per adapter, beside the float32 factors of one adapter on the module.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import synthetic

SETTLED = 128  # adapters by which numba is loaded and the table of cosines, which stops at 64, is behind
PROGRAM = """
import resource, sys, time, warnings
warnings.simplefilter("ignore")
import ties_peft
started = time.perf_counter()
ties_peft.merge(sys.argv[2:], rank=16, method=sys.argv[1])
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--method", default="ties")
    parser.add_argument("--counts", default="1,8,64,128,256,512")
    asked = parser.parse_args()
    counts = [int(count) for count in asked.counts.split(",")]
    own = 2 * asked.side * 16 * 4 / 1e6
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        paths = synthetic.write_adapters(Path(folder), max(counts), {"layers.0.q": (asked.side, asked.side)})
        for count in counts:
            command = [sys.executable, "-c", PROGRAM, asked.method, *map(str, paths[:count])]
            seconds, megabytes = map(
                float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            )
            rows.append((count, seconds, megabytes))
            print(
                f"{count:4d} adapters: {seconds:7.2f} s, {1000 * seconds / count:6.1f} ms each, peak {megabytes:.0f} MB",
                flush=True,
            )
    first = next((row for row in rows if row[0] >= SETTLED), rows[0])
    slope = (rows[-1][2] - first[2]) / max(1, rows[-1][0] - first[0])
    print(
        f"memory from {first[0]} on: {slope:.2f} MB an adapter, {slope / own:.2f} × its float32 factors on the module ({own:.2f} MB)"
    )
    print(synthetic.machine())


if __name__ == "__main__":
    main()
