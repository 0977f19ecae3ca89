"""Which optimiser a search should use: what each has found after 20, 40, 100 and 200 trials, in 2 to 50 numbers.

    python benchmarks/optimisers.py [--seeds 10] [--out optimisers.json]

Objectives that cost nothing and look like the real ones: the loss of a weighted sum of adapters on 20 rows
(logistic, with LoRAHub's penalty on the weights), the same loss counted in rows that are right (steps), a bowl
whose optimum has few weights that are not 0, and a bowl with many dents. Every one starts at 0. What is printed
is the share of the way from the start to the best known value that is left, the mean over seeds: 0 is done,
1 is nothing found. nevergrad and cma are compared where they are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Objective = Callable[[Array], float]  # to be made small
Optimiser = Callable[[Objective, int, int, int], None]  # (objective, numbers, budget, seed)
BOUND = 1.5
BUDGETS = (20, 40, 100, 200)
SIZES = (2, 6, 20, 50)
SLOW = {"optuna gp": (20, 2, 40), "nevergrad NGOpt": (50, 2, 100)}  # at most so many numbers, seeds and trials


def objectives(size: int, seed: int) -> dict[str, Objective]:
    """By name, drawn anew for each seed."""
    draw = np.random.default_rng([size, seed])
    truth = np.zeros(size)
    truth[draw.choice(size, max(1, size // 5), replace=False)] = draw.uniform(-1.2, 1.2, max(1, size // 5))
    features = draw.standard_normal((20, size)) * 3 / np.sqrt(size) + draw.standard_normal((20, 1))
    labels = np.sign(features @ truth * 3 + draw.standard_normal(20))

    def loss(w: Array) -> float:
        return float(np.logaddexp(0, -labels * (features @ w)).mean() + 0.05 * np.abs(w).sum())

    return {
        "loss": loss,
        "rows": lambda w: float((labels * (features @ w - 0.1) <= 0).mean() + 0.001 * np.abs(w).sum()),
        "bowl": lambda w: float(((w - truth) ** 2 * np.logspace(0, 1, size)).sum()),
        "dents": lambda w: float(((w - truth) ** 2).sum() + 0.3 * (1 - np.cos(6 * (w - truth))).sum()),
    }


def by_optuna(name: str) -> Optimiser:
    """One of Optuna's samplers."""

    def run(objective: Objective, size: int, budget: int, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        made = {
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
            "qmc": lambda: optuna.samplers.QMCSampler(seed=seed, scramble=True),
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
            "tpe, joint": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed, deterministic_objective=True),
            "cma-es": lambda: optuna.samplers.CmaEsSampler(seed=seed, x0=dict.fromkeys(names, 0.0), sigma0=0.5),
            "cma-es, separable": lambda: optuna.samplers.CmaEsSampler(
                seed=seed, x0=dict.fromkeys(names, 0.0), sigma0=0.5, use_separable_cma=True
            ),
        }
        names = [f"w{i}" for i in range(size)]
        study = optuna.create_study(sampler=made[name]())
        study.enqueue_trial(dict.fromkeys(names, 0.0))
        study.optimize(
            lambda trial: objective(np.array([trial.suggest_float(n, -BOUND, BOUND) for n in names])), budget
        )

    return run


def by_nevergrad(name: str) -> Optimiser:
    """One of nevergrad's optimisers, as LoRAHub sets it up."""

    def run(objective: Objective, size: int, budget: int, seed: int) -> None:
        import nevergrad

        space = nevergrad.p.Array(init=[0.0] * size, lower=-BOUND, upper=BOUND)
        space.random_state.seed(seed)
        nevergrad.optimizers.registry[name](parametrization=space, budget=budget, num_workers=1).minimize(objective)

    return run


def by_cma(objective: Objective, size: int, budget: int, seed: int) -> None:
    """The reference implementation of CMA-ES."""
    import cma

    quiet = {"seed": seed + 1, "verbose": -9, "bounds": [-BOUND, BOUND], "maxfevals": budget}
    objective(np.zeros(size))
    strategy = cma.CMAEvolutionStrategy(np.zeros(size), 0.5, quiet)
    while not strategy.stop():
        points = strategy.ask()
        strategy.tell(points, [objective(point) for point in points])


OPTIMISERS: dict[str, Optimiser] = {
    **{
        f"optuna {name}": by_optuna(name)
        for name in ("random", "qmc", "tpe", "tpe, joint", "gp", "cma-es", "cma-es, separable")
    },
    **{f"nevergrad {name}": by_nevergrad(name) for name in ("NGOpt", "OnePlusOne", "Cobyla", "TwoPointsDE")},
    "cma": by_cma,
}


class Stop(Exception):
    """The budget is spent."""


def trace(optimiser: Optimiser, objective: Objective, size: int, budget: int, seed: int) -> list[float]:
    """The best value after each trial."""
    best: list[float] = []

    def watched(w: Array) -> float:
        if len(best) == budget:
            raise Stop
        value = objective(np.asarray(w, dtype=float))
        best.append(min(value, best[-1]) if best else value)
        return value

    with contextlib.suppress(Stop):
        optimiser(watched, size, budget, seed)
    return best


def measure(size: int, seeds: int) -> dict[str, dict[str, Any]]:
    """By optimiser and objective: what is left after each budget; and the seconds a trial costs."""
    traces: dict[tuple[str, str, int], list[float]] = {}
    seconds: dict[str, float] = {}
    for name, optimiser in OPTIMISERS.items():
        most, some, budget = SLOW.get(name, (size, seeds, BUDGETS[-1]))
        if size > most:
            continue
        started, count = time.perf_counter(), 0
        try:
            for seed in range(min(seeds, some)):
                for what, objective in objectives(size, seed).items():
                    traces[name, what, seed] = trace(optimiser, objective, size, budget, seed)
                    count += budget
        except Exception as error:  # not installed, or at odds with what is
            print(f"{name}: {type(error).__name__}: {error}")
            continue
        seconds[name] = (time.perf_counter() - started) / count
    left: dict[str, dict[str, Any]] = {name: {"seconds": value} for name, value in seconds.items()}
    for name in seconds:
        for what in objectives(size, 0):
            own = {seed: t for (n, w, seed), t in traces.items() if (n, w) == (name, what)}
            floors = {s: min(t[-1] for (_, w, o), t in traces.items() if (w, o) == (what, s)) for s in own}
            left[name][what] = [
                float(
                    np.mean(
                        [(t[min(b, len(t)) - 1] - floors[s]) / max(t[0] - floors[s], 1e-12) for s, t in own.items()]
                    )
                )
                for b in BUDGETS
            ]
    return left


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    found = {}
    for size in asked.sizes:
        found[size] = measure(size, asked.seeds)
        print(f"\n{size} numbers; share left after {', '.join(map(str, BUDGETS))} trials: mean of objectives | each")
        means = {n: np.mean([row[w] for w in objectives(2, 0)], axis=0) for n, row in found[size].items()}
        for name in sorted(means, key=lambda n: float(means[n].mean())):
            row = found[size][name]
            each = "  ".join(f"{w} " + " ".join(f"{v:.2f}" for v in row[w]) for w in objectives(2, 0))
            mean = " ".join(f"{v:.3f}" for v in means[name])
            print(f"{name:<26}{mean} | {each} | {row['seconds'] * 1000:.1f} ms", flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
