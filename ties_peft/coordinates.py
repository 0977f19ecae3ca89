"""Coordinates: a merge's task vectors in its space, a module at a time, weighted and prepared.

Where a space needs only one adapter to place it, one adapter is read; where the adapters share their
coordinates, a module's encoding is made once and kept as long as something is left to ask of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .adapter import Adapter
from .companions import Companions
from .delta import Delta, Dense, whole
from .draws import key
from .plan import Plan
from .spaces import Encoding
from .tiles import Workers


@dataclass
class Memory:
    """What a prepared merge keeps between merges.

    Attributes:
        encodings: by module, the coordinates of all its adapters.
        samples: by member, module, part and modules ranked together, some magnitudes and how many each stands for.
        companions: the tokenizer files beside them, once they were looked for.
        crew: the threads of the last merge and their scratch memory, some 8 MB a thread whatever is merged.
    """

    encodings: dict[str, Encoding] = field(default_factory=dict)
    samples: dict[tuple[int, str, int, int], tuple[np.ndarray, float]] = field(default_factory=dict)
    companions: Companions | None = None
    crew: list[Workers] = field(default_factory=list)


class Coordinates:
    """The view of a plan's task vectors that a survey and a merge share.

    Args:
        plan: what is merged.
        memory: of a preparation, whose members are the plan's; None to keep nothing.
    """

    def __init__(self, plan: Plan, memory: Memory | None = None) -> None:
        self.plan = plan
        self.memory = memory
        self._encoded: tuple[str, Encoding] | None = None  # the last module asked for
        self._seen: tuple[str, dict[int, tuple[Delta, ...]]] | None = None

    def delta(self, place: int, module: str) -> Delta:
        """One adapter's task vector on one module, unweighted."""
        return self._read(self.plan.members[place].adapter, module)

    def expect(self, module: str | None) -> None:
        """Have the system fetch what the files say of a module, while another one is worked on."""
        for place, _ in self.plan.holders(module) if module is not None and self.memory is None else ():
            self.plan.members[place].adapter.expect(module or "")

    def signs(self, module: str) -> Delta | None:
        """The task vector that decides the signs of a module, if there is one."""
        giver = self.plan.signs
        return self._read(giver, module) if giver is not None and module in giver.layout else None

    def encoding(self, module: str) -> Encoding:
        """The coordinates of all adapters that have a module; the giver of signs, if there is one, comes last."""
        keep = self.memory is not None and self.plan.signs is None
        if keep and self.memory is not None and module in self.memory.encodings:
            return self.memory.encodings[module]
        if self._encoded is None or self._encoded[0] != module:
            deltas = [self.delta(place, module) for place, _ in self.plan.holders(module)]
            signs = self.signs(module)
            everyone = deltas if signs is None else [*deltas, signs]
            self._encoded = module, self.plan.arithmetic.encode(everyone, self.plan.rank)
        if keep and self.memory is not None:
            self.memory.encodings[module] = self._encoded[1]
        return self._encoded[1]

    def prepared(self, module: str) -> dict[int, tuple[Delta, ...]]:
        """The weighted parts of all adapters that have the module, as the method shall see them, by place."""
        if self._seen is None or self._seen[0] != module:
            encoding, holders = self.encoding(module), self.plan.holders(module)
            parts = [encoding.weighted(i, self.plan.weight(place, module)) for i, (place, _) in enumerate(holders)]
            places = [place for place, _ in holders]
            self._seen = module, dict(zip(places, self._prepare(places, module, parts), strict=True))
        return self._seen[1]

    def parts(self, place: int, module: str) -> tuple[Delta, ...]:
        """One adapter's weighted parts on one module, for the survey."""
        by_module = self.plan.trim is not None and self.plan.trim.scope == "module"
        if self.joint or by_module or self.memory is not None:
            return self.prepared(module)[place]
        alone = self.plan.arithmetic.encode([self.delta(place, module)])
        return self._prepare([place], module, [alone.weighted(0, self.plan.weight(place, module))])[0]

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
