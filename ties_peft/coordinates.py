"""Coordinates: a merge's task vectors in its space, a module at a time, weighted and prepared.

Where a space needs only one adapter to place it, one adapter is read; where the adapters share their
coordinates, a module's encoding is made once and kept as long as something is left to ask of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .adapter import Adapter
from .delta import Delta, Dense, LowRank, whole
from .draws import key
from .plan import Plan
from .spaces import Encoding


@dataclass
class Memory:
    """What a prepared merge keeps between merges.

    Attributes:
        deltas: by (adapter, module).
        encodings: by module, for the adapters of the preparation.
    """

    deltas: dict[tuple[int, str], Delta] = field(default_factory=dict)
    encodings: dict[str, Encoding] = field(default_factory=dict)


class Coordinates:
    """The view of a plan's task vectors that a survey and a merge share.

    Args:
        plan: what is merged.
        memory: of a preparation, whose members are the plan's; None to keep nothing.
    """

    def __init__(self, plan: Plan, memory: Memory | None = None) -> None:
        self.plan = plan
        self.memory = memory
        self._kept: dict[str, list[tuple[Delta, ...]]] = {}

    def delta(self, place: int, module: str) -> Delta:
        """One adapter's task vector on one module, unweighted."""
        if self.memory is None:
            return self._read(self.plan.members[place].adapter, module)
        found = self.memory.deltas.get((place, module))
        if found is None:
            found = self.memory.deltas[place, module] = self._read(self.plan.members[place].adapter, module)
        return found

    def deltas(self, module: str) -> list[Delta]:
        """Those of all adapters that have the module, in order."""
        return [self.delta(place, module) for place, _ in self.plan.holders(module)]

    def signs(self, module: str) -> Delta | None:
        """The task vector that decides the signs of a module, if there is one."""
        giver = self.plan.signs
        return self._read(giver, module) if giver is not None and module in giver.layout else None

    def encoding(self, module: str, deltas: Sequence[Delta]) -> Encoding:
        """The coordinates of a module; the giver of signs, if there is one, comes last."""
        if self.memory is not None and module in self.memory.encodings and self.plan.signs is None:
            return self.memory.encodings[module]
        signs = self.signs(module)
        made = self.plan.arithmetic.encode([*deltas, *([signs] if signs is not None else [])], self.plan.rank)
        if self.memory is not None and self.plan.signs is None and self.plan.arithmetic.shared:
            self.memory.encodings[module] = made
        return made

    def prepared(self, module: str, encoding: Encoding) -> list[tuple[Delta, ...]]:
        """The weighted parts of all adapters that have the module, as the method shall see them."""
        holders = self.plan.holders(module)
        parts = [encoding.weighted(i, self.plan.weight(place, module)) for i, (place, _) in enumerate(holders)]
        return self._prepare([place for place, _ in holders], module, parts)

    def parts(self, place: int, module: str) -> tuple[Delta, ...]:
        """One adapter's weighted parts on one module, for the survey."""
        if not self.joint:
            delta = self.delta(place, module)
            alone = self.plan.arithmetic.encode([delta]).weighted(0, self.plan.weight(place, module))
            return self._prepare([place], module, [alone])[0]
        if module not in self._kept:
            self._kept[module] = self.prepared(module, self.encoding(module, self.deltas(module)))
        return self._kept[module][[holder for holder, _ in self.plan.holders(module)].index(place)]

    @property
    def joint(self) -> bool:
        """Whether one adapter's parts depend on the others."""
        return self.plan.arithmetic.shared or any(stage.joint for stage in self.plan.preparations)

    def stream(self, place: int, module: str, part: int) -> int:
        """The key of one adapter's random numbers on one part."""
        return key(self.plan.seed, module, part, self.plan.members[place].adapter.digest)

    def _prepare(self, places: Sequence[int], module: str, parts: list[tuple[Delta, ...]]) -> list[tuple[Delta, ...]]:
        if not self.plan.preparations:
            return parts
        columns = []
        for part, column in enumerate(zip(*parts, strict=True)):
            seen: Sequence[Delta] = column
            for stage in self.plan.preparations:
                seen = stage.prepare(seen, [self.stream(place, module, part) for place in places])
            columns.append(seen)
        return list(zip(*columns, strict=True))

    def _read(self, adapter: Adapter, module: str) -> Delta:
        delta = adapter.read(module)
        if self.plan.arithmetic.in_factors and isinstance(delta, Dense):
            delta = whole(delta)
        return delta.to(self.plan.device)


def factored(deltas: Sequence[Delta]) -> list[LowRank]:
    """Those that are held in factors."""
    return [delta for delta in deltas if isinstance(delta, LowRank)]
