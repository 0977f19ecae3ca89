"""A process that takes part in a search: python worker.py STORAGE BUDGET SECONDS LOG ADAPTER…

Every trial is noted in LOG as it is begun; its objective is the distance to 0.7 of the first task vector less 0.4 of
the last, and takes SECONDS. It begins when as many processes are there as TOGETHER says.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

import ties_peft
from ties_peft import Adapter
from ties_peft.search import study

LORAHUB = {"method": "task_arithmetic", "scale": 1.0}  # exact weighted sums


class NegativeDistance:
    def __init__(self, folders: list[str], seconds: float = 0.0, log: Path | None = None) -> None:
        opened = [Adapter.load(folder) for folder in folders]
        self.target = {m: 0.7 * opened[0].delta(m) - 0.4 * opened[-1].delta(m) for m in opened[0].modules}
        self.size = sum(float(value.square().sum()) for value in self.target.values())
        self.seconds, self.log = seconds, log

    def __call__(self, adapter: Adapter) -> float:
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as lines:
                lines.write(f"{os.getpid()} {[round(adapter.delta(m).sum().item(), 6) for m in self.target]}\n")
        time.sleep(self.seconds)
        return -sum(float((adapter.delta(m) - v).square().sum()) for m, v in self.target.items()) / self.size


if __name__ == "__main__":
    storage, budget, seconds, log, *folders = sys.argv[1:]
    warnings.simplefilter("ignore")
    study.HEARTBEAT, study.GRACE = 1, 2  # seconds, so that a test need not wait
    Path(f"{log}.{os.getpid()}").touch()
    while len(list(Path(log).parent.glob(f"{Path(log).name}.*"))) < int(os.environ["TOGETHER"]):
        time.sleep(0.01)
    found = ties_peft.search(
        folders,
        NegativeDistance(folders, float(seconds), Path(log)),
        budget=int(budget),
        storage=storage,
        controls=(),
        **LORAHUB,
    )
    print(json.dumps([[trial.number, dict(trial.setting), trial.value] for trial in found.trials]))
