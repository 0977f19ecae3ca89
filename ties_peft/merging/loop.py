"""Go through the modules of a merge: read, encode, merge, decode, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..adapters.types import ModuleInfo
from ..errors import RecipeError
from ..methods import TaskVectors
from ..methods.base import merge_to_delta
from ..task_vectors.delta import Delta, zero
from ..task_vectors.elect import WeightTotals
from ..task_vectors.factorise import Factors
from ..task_vectors.kernels.backends import select_kernels
from ..task_vectors.order_statistics import Group, Values, find_order_statistics, with_order_statistics
from ..task_vectors.processes import ProcessGroup
from ..task_vectors.tiles import ThreadPool, thread_pool
from ..task_vectors.trim import DeclaredTrim
from .encoding import EncodedModules, MergeCache
from .measure import ModuleMeasurement, Totals, measure_module
from .members import module_statistics
from .plan import Plan, Progress
from .thresholds import KeptCount, TrimThresholds, vocabulary_modules


def merge_modules(
    plan: Plan, cache: MergeCache | None, progress: Progress, processes: ProcessGroup
) -> tuple[dict[str, Tensor], Totals, list[KeptCount]]:
    """Merge all modules.

    Args:
        plan: the merge.
        cache: what a prepared merge keeps, if this is one.
        progress: called as progress(stage, done, of).
        processes: that share the work; each of them gets the whole result.
    Returns: the tensors by their names in the file, the sums of the report, and how many entries each trim keeps.
    """
    costs = {name: plan.cost(name) for name in plan.modules}
    mine = processes.share(costs)
    by_entry = plan.method.entrywise and not plan.arithmetic.shared
    kernels = select_kernels(sum(costs.values()), plan.device.type, by_entry)
    written = {}
    with torch.no_grad(), thread_pool(None if cache is None else cache.pool, kernels) as pool:
        loop = _Loop(plan, cache, pool, progress, processes, mine)
        for name, following in zip(mine, [*mine[1:], None], strict=True):
            if following is not None:
                loop.modules.prefetch(following)
            task_vectors = loop.encode(name)
            # No variable names the merged parts: it would keep them, which are dense, while the next module is merged.
            factors = loop.decode(name, loop.merge(name, task_vectors))
            written[name] = loop.write(plan.modules[name], factors)
            progress("merge", len(written), len(mine))
    every = {name: one for of_process in processes.gather(written) for name, one in of_process.items()}
    tensors: dict[str, Tensor] = {}
    totals = Totals(plan, kernels.name)
    for name in plan.modules:
        own, measurement = every[name]
        tensors |= own
        totals.add(measurement)
    return plan.peft_type.join(list(plan.modules.values()), tensors), totals, loop.thresholds.kept()


@dataclass
class _Loop:
    """The state of a merge while it goes through the modules.

    Attributes:
        plan, cache, pool, progress, processes, mine: see `merge_modules`.
        modules: the encoded task vectors.
        thresholds: of the trims.
        order_statistics: those that the method asks for over whole adapters, by (place, module).
        counts: what the method counts for the report on the module at hand.
        prepared: call it to wait for the thread that prepares `decode` of the current module during its merge.
    """

    plan: Plan
    cache: MergeCache | None
    pool: ThreadPool
    progress: Progress
    processes: ProcessGroup
    mine: Sequence[str]
    modules: EncodedModules = field(init=False)
    thresholds: TrimThresholds = field(init=False)
    order_statistics: Values = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    prepared: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self.modules = EncodedModules(self.plan, self.cache)
        self.thresholds = TrimThresholds(self.modules, self.pool, self.progress, self.processes, self.mine)
        self.order_statistics = self._order_statistics_over_adapters()

    def encode(self, name: str) -> list[TaskVectors]:
        """Return w·τ of one module in the coordinates of the space, part by part; none if no adapter has it."""
        self.counts, self.prepared = {}, None
        if not self.plan.holders(name):
            return []
        task_vectors = self._task_vectors(name)
        dense = self.plan.method.entrywise and not self.plan.method.linear(len(task_vectors[0]))
        if dense and self.plan.rank is not None:
            work = self.modules.encoding(name).prepare_decode(self.plan.rank)
            self.prepared = None if work is None else self.pool.submit(work)
        return task_vectors

    def merge(self, name: str, task_vectors: Sequence[TaskVectors]) -> list[Delta]:
        """Return what the method makes of each part of a module, changed by the methods that stand after it."""
        merged = [merge_to_delta(self.plan.method, self._ranked(part)) for part in task_vectors]
        if not self.plan.finishing_methods:
            return merged
        encoding, holders = self.modules.encoding(name), self.plan.holders(name)
        weighted = [encoding.weighted(i, self.plan.weight(place, name)) for i, (place, _) in enumerate(holders)]
        unprepared = [
            replace(part, deltas=deltas) for part, deltas in zip(task_vectors, zip(*weighted, strict=True), strict=True)
        ]
        for stage in self.plan.finishing_methods:
            merged = [stage.finish(*one) for one in zip(merged, unprepared, strict=True)]
        return merged

    def _ranked(self, part: TaskVectors) -> TaskVectors:
        """Return the task vectors of one part with the order statistics that the method asks for."""
        wanted = self.plan.method.order_statistics()
        return with_order_statistics(wanted, part, self.pool) if wanted and not part.order_statistics else part

    def decode(self, name: str, results: Sequence[Delta]) -> Factors:
        """Return the merged task vector of one module at the rank of the plan, scaled."""
        if self.prepared is not None:
            self.prepared()
        factors = Factors(zero(self.plan.modules[name].shape), 0.0, 0.0)
        if results:
            factors = self.modules.encoding(name).decode(results, self.plan.rank, self.pool.map)
        return (factors.restored() if self.plan.recipe.restore_norm else factors).scaled(self.plan.scale)

    def write(self, module: ModuleInfo, factors: Factors) -> tuple[dict[str, Tensor], ModuleMeasurement]:
        """Return the tensors of one module in the dtype of the result, and what the report says of it.

        Raises: RecipeError where that dtype cannot hold the values.
        """
        plan = self.plan
        tensors = plan.peft_type.pack(module, factors.delta.to(torch.device("cpu")), plan.rank or 0)
        written = {name: tensor.to(plan.dtype).contiguous() for name, tensor in tensors.items()}
        if not all(_all_finite(tensor) for tensor in written.values()):
            raise RecipeError(
                f"module {module.name!r}: the merged values are beyond {str(plan.dtype).removeprefix('torch.')} "
                "with this scale and these weights. Lower them, or write float32 or bfloat16 (--dtype, dtype=…)."
            )
        return written, measure_module(self.modules, module, factors, written, self.counts)

    def _task_vectors(self, name: str) -> list[TaskVectors]:
        """Return the task vectors of one module as the method sees them, part by part."""
        plan, encoding, weighted = self.plan, self.modules.encoding(name), self.modules.weighted(name)
        places = list(weighted)
        # An adapter that decides the signs is encoded after those that are merged.
        signs = encoding.parts[len(places)] if len(encoding.parts) > len(places) else None
        return [
            TaskVectors(
                deltas=deltas,
                weights=[encoding.weights(plan.weight(place, name))[part] for place in places],
                totals=WeightTotals(
                    adapters=len(plan.members),
                    weight=plan.total_weight(name),
                    magnitude=sum(abs(encoding.weights(w)[part]) for w in plan.weights(name)),
                ),
                streams=[self.modules.stream_key(place, name, part) for place in places],
                declared=DeclaredTrim(plan.method.trims(), partial(self.thresholds.cuts, name, part)),
                densities=plan.densities(name, places),
                order_statistics=[self.order_statistics[p, name] for p in places] if self.order_statistics else (),
                signs=None if signs is None else signs[part],
                statistics=module_statistics(plan.method, [plan.members[place] for place in places], name),
                inputs=encoding.inputs if plan.method.needs else None,
                pool=self.pool,
                counts=self.counts,
            )
            for part, deltas in enumerate(zip(*weighted.values(), strict=True))
        ]

    def _order_statistics_over_adapters(self) -> Values:
        """Return the order statistics that the method asks for over whole adapters; all modules are read for them."""
        plan, wanted = self.plan, self.plan.method.order_statistics()
        if not wanted or plan.scope != "adapter":
            return {}
        separate = vocabulary_modules(plan)
        density = 1.0 if plan.own_density is None else plan.own_density
        groups = {
            (place, name): (place, name if name in separate else plan.part(name), plan.density(place, name, density))
            for name in plan.modules
            for place, _ in plan.holders(name)
        }
        held = [name for name in self.mine if plan.holders(name)]

        def parts() -> Iterator[tuple[TaskVectors, list[Group]]]:
            for done, name in enumerate(held):
                own: list[Group] = [groups[place, name] for place, _ in plan.holders(name)]
                yield from ((part, own) for part in self._task_vectors(name))
                self.progress("rank", done + 1, len(held))

        densities: dict[Group, float] = {group: group[2] for group in groups.values()}
        found = find_order_statistics(wanted, parts, densities, self.pool, self.processes.gather)
        return {key: found[group] for key, group in groups.items()}


def _all_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite; a finite sum shows it at a fraction of the cost of testing each value."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
