"""Compare optimisers for a search: what each has found after 20, 40, 100 and 200 trials, in 2 to 50 numbers.

    python benchmarks/optimisers.py [--seeds 10] [--out optimisers.json]

The objectives resemble the real ones and take no time: the loss of a weighted sum of adapters on 20 rows (logistic, with
LoRAHub's penalty on the weights), the share of wrong rows (a step function), a quadratic function whose optimum has few
weights that are not 0, and a quadratic function with many local minima. All start at 0. Printed is the share of the
distance from the value at the start to the best known value that is left, in the mean over seeds: 0 is the best known
value, 1 that of the start. nevergrad and cma are compared where they are installed.
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
Objective = Callable[[Array], float]  # to be minimised
Optimiser = Callable[[Objective, int, int, int], None]  # (objective, numbers, budget, seed)
BOUND = 1.5
BUDGETS = (20, 40, 100, 200)
SIZES = (2, 6, 20, 50)
SLOW = {"optuna gp": (20, 2, 40), "nevergrad NGOpt": (50, 2, 100)}  # the largest numbers of weights, seeds and trials


def objectives(size: int, seed: int) -> dict[str, Objective]:
    """Return the objectives of one seed, by name."""
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
    """Return one of Optuna's samplers."""

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
    """Return one of nevergrad's optimisers, set up as in LoRAHub."""

    def run(objective: Objective, size: int, budget: int, seed: int) -> None:
        import nevergrad

        space = nevergrad.p.Array(init=[0.0] * size, lower=-BOUND, upper=BOUND)
        space.random_state.seed(seed)
        nevergrad.optimizers.registry[name](parametrization=space, budget=budget, num_workers=1).minimize(objective)

    return run


def by_cma(objective: Objective, size: int, budget: int, seed: int) -> None:
    """Run the reference implementation of CMA-ES."""
    import cma

    quiet = {"seed": seed + 1, "verbose": -9, "bounds": [-BOUND, BOUND], "maxfevals": budget}
    objective(np.zeros(size))
    strategy = cma.CMAEvolutionStrategy(np.zeros(size), 0.5, quiet)
    while not strategy.stop():
        points = strategy.ask()
        strategy.tell(points, [objective(point) for point in points])


def by_cmaes(step: float, share: float) -> Optimiser:
    """Return CMA-ES of the package `cmaes`, with a first step and a population as shares of the range and the usual one."""

    def run(objective: Objective, size: int, budget: int, seed: int) -> None:
        from cmaes import CMA

        objective(np.zeros(size))
        population = max(4, int(share * (4 + int(3 * np.log(size)))))
        bounds = np.array([[-BOUND, BOUND]] * size)
        strategy = CMA(np.zeros(size), step * 2 * BOUND, bounds=bounds, seed=seed, population_size=population)
        while True:
            points = [strategy.ask() for _ in range(population)]
            strategy.tell([(point, objective(point)) for point in points])

    return run


def by_scipy(name: str, **options: Any) -> Optimiser:
    """Return one of SciPy's methods without gradients."""

    def run(objective: Objective, size: int, budget: int, seed: int) -> None:
        from scipy.optimize import minimize

        minimize(objective, np.zeros(size), method=name, bounds=[(-BOUND, BOUND)] * size, options=options)

    return run


OPTIMISERS: dict[str, Optimiser] = {
    "scipy COBYLA": by_scipy("COBYLA", rhobeg=0.5),
    "scipy Powell": by_scipy("Powell"),
    **{f"cmaes {step} {share}": by_cmaes(step, share) for step in (0.03, 0.06, 0.1, 0.17) for share in (0.5, 1.0)},
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
    """Run an optimiser, and return the best value after each trial."""
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
    """Return for each optimiser the share left after each budget, by objective, and the seconds of a trial."""
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
        except Exception as error:  # not installed, or not compatible with other packages
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
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (10)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of weights (2 6 20 50)")
    parser.add_argument("--out", type=Path, help="file to write the result to")
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
