"""Coordinates: a merge's task vectors in its space, a module at a time, weighted and prepared.

Where a space needs only one adapter to place it, one adapter is read; where the adapters share their
coordinates, a module's encoding is made once and kept as long as something is left to ask of it, if it is small.
A space may walk the task vectors of a module several times; where they are many they are read anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.tokenizer_files import TokenizerFiles
from ..spaces import Encoding
from ..task_vectors.delta import Delta, Dense, as_factors
from ..task_vectors.factorise import MAX_GRAM_SIDE
from ..task_vectors.random_numbers import stream_key
from ..task_vectors.tiles import ThreadPool
from .plan import Plan

KEPT = 1 << 28  # bytes of encodings that are kept between the passes of a merge


@dataclass
class Memory:
    """What a prepared merge keeps between merges.

    Attributes:
        encodings: by module, the coordinates of all its adapters.
        ranked: by member, module and part, the weight and the weighted magnitudes of a small part in order: as much
            memory as the parts take.
        companions: the tokenizer files beside them, once they were looked for.
        pool: the threads of the last merge and their scratch memory, some 8 MB a thread whatever is merged.
    """

    encodings: dict[str, Encoding] = field(default_factory=dict)
    ranked: dict[tuple[int, str, int], tuple[float, np.ndarray]] = field(default_factory=dict)
    companions: TokenizerFiles | None = None
    pool: list[ThreadPool] = field(default_factory=list)


class Coordinates:
    """The view of a plan's task vectors that a survey and a merge share.

    Args:
        plan: what is merged.
        memory: of a preparation, whose members are the plan's; None to keep nothing.
    """

    def __init__(self, plan: Plan, memory: Memory | None = None) -> None:
        self.plan = plan
        self.memory = memory
        self._read_last: tuple[str, list[Delta]] | None = None
        self._encoded: tuple[str, Encoding] | None = None  # the last module asked for
        self._kept: dict[str, Encoding] = {}  # of many modules, where that takes little
        self._room = KEPT
        self._seen: tuple[str, dict[int, tuple[Delta, ...]]] | None = None

    def delta(self, place: int, module: str) -> Delta:
        """One adapter's task vector on one module, unweighted."""
        return self._read(self.plan.members[place].adapter, module)

    def prefetch(self, module: str | None) -> None:
        """Have the system fetch what the files say of a module, while another one is worked on."""
        for place, _ in self.plan.holders(module) if module is not None and self.memory is None else ():
            self.plan.members[place].adapter.prefetch(module or "")

    def encoding(self, module: str) -> Encoding:
        """The coordinates of all adapters that have a module; the giver of signs, if there is one, comes last."""
        if self._encoded is None or self._encoded[0] != module:
            self._encoded = self._seen = None  # let go of one module before the next is read
            self._encoded = module, self._find(module) or self._encode(module)
        return self._encoded[1]

    def holds(self, modules: Iterable[str]) -> bool:
        """Whether the coordinates of modules are all kept, so that they may be walked often; they are found for it."""
        shared = self.plan.arithmetic.shared and not self.plan.preparations
        mine = [module for module in modules if self.plan.holders(module)]
        return shared and all(self.encoding(module) is self._find(module) for module in mine)

    def everyone(self, module: str) -> list[Delta]:
        """The task vectors of all that share a module's coordinates; of the last module asked for they are kept."""
        if self._read_last is None or self._read_last[0] != module:
            self._read_last = None
            self._read_last = module, [read() for read in self._readers(module)]
        return self._read_last[1]

    def _readers(self, module: str) -> list[Callable[[], Delta]]:
        found = [partial(self.delta, place, module) for place, _ in self.plan.holders(module)]
        giver = self.plan.signs
        return [*found, *([partial(self._read, giver, module)] if giver is not None and module in giver.layout else [])]

    def _find(self, module: str) -> Encoding | None:
        """The encoding of a module where it was kept."""
        prepared = self.memory.encodings if self.memory is not None and self.plan.signs is None else {}
        return prepared.get(module) or self._kept.get(module)

    def _encode(self, module: str) -> Encoding:
        if self.memory is not None:  # what is prepared holds what it is made of
            encoding = self.plan.arithmetic.encode(self.everyone(module), self.plan.rank)
            if self.plan.signs is None:
                self.memory.encodings[module] = encoding
            return encoding
        encoding = self.plan.arithmetic.encode(Vectors(self, module, self._readers(module)), self.plan.rank)
        if self.plan.arithmetic.shared and encoding.bytes <= self._room:
            self._room -= encoding.bytes
            self._kept[module] = encoding
        return encoding

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
        return stream_key(self.plan.seed, module, part, self.plan.members[place].adapter.digest)

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
            delta = as_factors(delta)
        return delta.to(self.plan.device)


class Vectors(Sequence[Delta]):
    """The task vectors of one module, read when they are asked for.

    They are held while they are few and their module is the last one asked for, and read one at a time if many.
    """

    def __init__(self, coordinates: Coordinates, module: str, readers: Sequence[Callable[[], Delta]]) -> None:
        self._coordinates, self._module, self._readers = coordinates, module, readers
        ranks = [member.adapter.layout[module].rank for _, member in coordinates.plan.holders(module)]
        self._few = sum(ranks) <= MAX_GRAM_SIDE

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, place: Any) -> Any:
        return self._coordinates.everyone(self._module)[place] if self._few else self._readers[place]()
