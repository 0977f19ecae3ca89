"""Choose the rank of the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from operator import attrgetter

from ..adapters.adapter import Adapter
from ..adapters.types import ModuleInfo
from ..errors import MethodError
from .options import Rank

AUTO_RANK = 64


def output_rank(
    asked: Rank,
    adapters: Mapping[str, Adapter],
    modules: Mapping[str, ModuleInfo],
    lossless: bool,
    flat: bool,
    warnings: list[str],
) -> int | None:
    """Return one r for all modules; None for PEFT types that have none.

    Args:
        asked: a whole number; `max`: Σrᵢ if that is lossless, else the full rank; or `auto`: min(Σrᵢ, max(64, largest
            rᵢ)), and Σrᵢ if the spectrum is flat. A task vector whose rank was not chosen, such as DoRA's, which can be as
            high as its shape allows, counts in `auto` as at most 64 and is warned of.
        adapters: by name.
        modules: of the merge.
        lossless: whether rank Σrᵢ loses nothing.
        flat: whether the spectrum of the result is flat, so that any smaller rank loses much.
        warnings: receives what is unwise.
    Raises: MethodError for a rank of a PEFT type that has none.
    """
    first = next(iter(adapters.values()))
    if not first.peft_type.has_rank:
        if asked != "auto":
            raise MethodError(f"rank is {asked!r}, but {first.peft_type.title} vectors have no rank. Leave it out.")
        return None
    total = total_rank(adapters.values(), modules)
    largest = max(_chosen(module) for adapter in adapters.values() for module in adapter.layout.values())
    full = max(min(module.shape) for module in modules.values())
    if asked == "auto":
        rank = total_rank(adapters.values(), modules, _chosen) if flat else min(total, max(AUTO_RANK, largest))
    elif asked == "max":
        rank = total if lossless else full
    else:
        rank = int(asked)
    if asked == "auto":
        _warn_full(rank, adapters, warnings)
    if rank < largest:
        warnings.append(f"rank {rank} is smaller than the largest rank of the adapters, {largest}.")
    written = min(rank, full)
    if isinstance(asked, int) and written < asked:
        largest_shape = max((module.shape for module in modules.values()), key=min)
        warnings.append(
            f"rank {asked} was asked for; {written} is written, the full rank of the largest module "
            f"({' × '.join(map(str, largest_shape))})."
        )
    return written


def total_rank(
    adapters: Iterable[Adapter],
    modules: Container[str] | None = None,
    rank_of: Callable[[ModuleInfo], int] = attrgetter("rank"),
) -> int:
    """Return the largest Σrᵢ of some modules, by default of all that an adapter has."""
    totals: Counter[str] = Counter()
    for adapter in adapters:
        own = adapter.layout.items()
        totals.update({name: rank_of(module) for name, module in own if modules is None or name in modules})
    return max(totals.values(), default=0)


def _chosen(module: ModuleInfo) -> int:
    """Return the rank that counts in `auto`."""
    return module.rank if module.rank_is_trained else min(module.rank, AUTO_RANK)


def _warn_full(rank: int, adapters: Mapping[str, Adapter], warnings: list[str]) -> None:
    """Warn if `auto` does not keep all of one adapter."""
    for name, adapter in adapters.items():
        most = max(module.rank for module in adapter.layout.values())
        if most > rank:
            warnings.append(
                f"{name} ({adapter.peft_type.title}) has task vectors of rank up to {most}, and rank auto keeps {rank}. The "
                "report gives the energy that this keeps; rank max keeps all of it."
            )
