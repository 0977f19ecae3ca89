"""Read and encode the task vectors of a merge, one module at a time.

If the adapters do not share their coordinates, one adapter's task vector is encoded without the others. If they do, a
module is encoded once for all adapters; small encodings are kept, because the thresholds and the merge both need them.
A space may go through the task vectors of a module several times; if there are many, they are read again each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.tokenizer_files import TokenizerFiles
from ..spaces import Encoding
from ..task_vectors.delta import Delta, Dense, as_factors
from ..task_vectors.factorise import MAX_GRAM_SIDE
from ..task_vectors.random_numbers import stream_key
from ..task_vectors.tiles import ThreadPool
from .plan import Plan

KEPT_BYTES = 1 << 28  # of encodings that one merge keeps


@dataclass
class MergeCache:
    """What a prepared merge keeps between merges.

    Attributes:
        encodings: of all adapters, by module.
        tokenizer_files: those found beside the adapters.
        pool: the threads of the last merge and their buffers, about 8 MB per thread.
    """

    encodings: dict[str, Encoding] = field(default_factory=dict)
    tokenizer_files: TokenizerFiles | None = None
    pool: list[ThreadPool] = field(default_factory=list)


class EncodedModules:
    """The task vectors of a merge in the coordinates of its space, by module. One module is in memory at a time.

    Args:
        plan: the merge.
        cache: of a prepared merge with the same members; None to keep nothing after this merge.
    """

    def __init__(self, plan: Plan, cache: MergeCache | None = None) -> None:
        self.plan = plan
        self.cache = cache
        self._module: str | None = None  # the one that the next three belong to
        self._deltas: list[Delta] | None = None
        self._encoding: Encoding | None = None
        self._weighted: dict[int, tuple[Delta, ...]] | None = None
        self._small: dict[str, Encoding] = {}
        self._bytes_left = KEPT_BYTES

    @property
    def joint(self) -> bool:
        """Whether one adapter's encoding depends on the other adapters."""
        return self.plan.arithmetic.shared or any(stage.joint for stage in self.plan.stages.before)

    def prefetch(self, module: str) -> None:
        """Ask the system to fetch a module's bytes from the files while another module is merged."""
        if self.cache is None:
            for place, _ in self.plan.holders(module):
                self.plan.members[place].adapter.prefetch(module)

    def read(self, place: int, module: str) -> Delta:
        """Return one adapter's task vector of a module, unweighted."""
        return self._read(self.plan.members[place].adapter, module)

    def read_all(self, module: str) -> list[Delta]:
        """Return all task vectors that are encoded together: those of the adapters, then the one that decides the signs."""
        self._select(module)
        if self._deltas is None:
            self._deltas = [read() for read in self._readers(module)]
        return self._deltas

    def encoding(self, module: str) -> Encoding:
        """Return the encoding of the task vectors that `read_all` returns."""
        self._select(module)
        if self._encoding is None:
            self._encoding = self._cached(module) or self._encode(module)
        return self._encoding

    def all_cached(self, modules: Iterable[str]) -> bool:
        """Encode modules and return whether all encodings are kept, so that going through them again costs little."""
        shared = self.plan.arithmetic.shared and not self.plan.stages.before
        held = [module for module in modules if self.plan.holders(module)]
        return shared and all(self.encoding(module) is self._cached(module) for module in held)

    def weighted(self, module: str) -> dict[int, tuple[Delta, ...]]:
        """Return the parts of w·τ as the method sees them, by the place of each adapter that has the module."""
        encoding = self.encoding(module)
        if self._weighted is None:
            places = [place for place, _ in self.plan.holders(module)]
            parts = [encoding.weighted(i, self.plan.weight(place, module)) for i, place in enumerate(places)]
            self._weighted = dict(zip(places, self._prepare(places, module, parts), strict=True))
        return self._weighted

    def weighted_parts(self, place: int, module: str) -> tuple[Delta, ...]:
        """Return the parts of one adapter's w·τ; other adapters are read only if its encoding depends on them."""
        by_module = self.plan.trim is not None and self.plan.trim.scope == "module"
        if self.joint or by_module or self.cache is not None:
            return self.weighted(module)[place]
        alone = self.plan.arithmetic.encode([self.read(place, module)])
        return self._prepare([place], module, [alone.weighted(0, self.plan.weight(place, module))])[0]

    def stream_key(self, place: int, module: str, part: int) -> int:
        """Return the key of one adapter's random numbers on one part."""
        return stream_key(self.plan.recipe.seed, module, part, self.plan.members[place].adapter.digest)

    def _select(self, module: str) -> None:
        """Release the module at hand before another one is read."""
        if module != self._module:
            self._deltas = self._encoding = self._weighted = None
            self._module = module

    def _cached(self, module: str) -> Encoding | None:
        """Return the encoding of a module if it was kept; a prepared merge keeps none with an adapter that decides the signs."""
        prepared = self.cache.encodings if self.cache is not None and self.plan.signs is None else {}
        return prepared.get(module) or self._small.get(module)

    def _encode(self, module: str) -> Encoding:
        space, rank = self.plan.arithmetic, self.plan.rank
        if self.cache is not None:  # it keeps the task vectors too
            encoding = space.encode(self.read_all(module), rank)
            if self.plan.signs is None:
                self.cache.encodings[module] = encoding
            return encoding
        encoding = space.encode(LazyDeltas(self, module, self._readers(module)), rank)
        if space.shared and encoding.bytes <= self._bytes_left:
            self._bytes_left -= encoding.bytes
            self._small[module] = encoding
        return encoding

    def _prepare(self, places: Sequence[int], module: str, parts: list[tuple[Delta, ...]]) -> list[tuple[Delta, ...]]:
        """Apply the methods that stand before the one that merges, to each part of all adapters."""
        if not self.plan.stages.before:
            return parts
        prepared = []
        for part, deltas in enumerate(zip(*parts, strict=True)):
            changed: Sequence[Delta] = deltas
            for stage in self.plan.stages.before:
                changed = stage.prepare(changed, [self.stream_key(place, module, part) for place in places])
            prepared.append(changed)
        return list(zip(*prepared, strict=True))

    def _readers(self, module: str) -> list[Callable[[], Delta]]:
        readers: list[Callable[[], Delta]] = []
        readers += [partial(self.read, place, module) for place, _ in self.plan.holders(module)]
        if self.plan.signs is not None and module in self.plan.signs.layout:
            readers.append(partial(self._read, self.plan.signs, module))
        return readers

    def _read(self, adapter: Adapter, module: str) -> Delta:
        delta = adapter.read(module)
        if self.plan.arithmetic.in_factors and isinstance(delta, Dense):
            delta = as_factors(delta)
        return delta.to(self.plan.device)


class LazyDeltas(Sequence[Delta]):
    """The task vectors of one module, read when an item is asked for: all at once if they are few, else one at a time."""

    def __init__(self, modules: EncodedModules, module: str, readers: Sequence[Callable[[], Delta]]) -> None:
        self._modules, self._module, self._readers = modules, module, readers
        ranks = [member.adapter.layout[module].rank for _, member in modules.plan.holders(module)]
        self._few = sum(ranks) <= MAX_GRAM_SIDE

    def __len__(self) -> int:
        return len(self._readers)

    def __getitem__(self, place: Any) -> Any:
        return self._modules.read_all(self._module)[place] if self._few else self._readers[place]()
