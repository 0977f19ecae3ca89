"""Ranks: r of the output, by what was asked and what the adapters have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ..adapters.adapter import Adapter
from ..adapters.types import ModuleInfo
from ..errors import MethodError, RecipeError
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
    """One r for all modules; None for kinds that have none.

    Args:
        asked: a whole number; `max`: Σrᵢ where that loses nothing, else all there is; or `auto`:
            min(Σrᵢ, max(64, largest rᵢ)), and Σrᵢ where the spectrum is flat. A task vector whose rank nobody chose,
            such as DoRA's, which may have all that its shape allows, counts there as at most 64, and is warned of.
        adapters: by how they are named.
        modules: of the merge.
        lossless: whether Σrᵢ loses nothing.
        flat: whether the result has a flat spectrum, which no rank under its own can cut well.
        warnings: added to.
    Raises: RecipeError, MethodError.
    """
    first = next(iter(adapters.values()))
    if not first.peft_type.has_rank:
        if asked != "auto":
            raise MethodError(f"rank is {asked!r}, but {first.peft_type.title} vectors have no rank. Leave it out.")
        return None
    layouts = [adapter.layout for adapter in adapters.values()]
    total = _total(layouts, modules, lambda module: module.rank)
    largest = max(_chosen(module) for layout in layouts for module in layout.values())
    full = max(min(module.shape) for module in modules.values())
    if asked == "auto":
        rank = _total(layouts, modules, _chosen) if flat else min(total, max(AUTO_RANK, largest))
    elif asked == "max":
        rank = total if lossless else full
    elif isinstance(asked, int) and not isinstance(asked, bool) and asked >= 1:
        rank = asked
    else:
        raise RecipeError(f"the rank is {asked!r}; expected a whole number from 1 up, 'max' or 'auto'.")
    if asked == "auto":
        _warn_full(rank, adapters, warnings)
    if rank < largest:
        warnings.append(f"rank {rank} is under the largest of the inputs' own, {largest}.")
    written = min(rank, full)
    if isinstance(asked, int) and written < asked:
        largest_shape = max((module.shape for module in modules.values()), key=min)
        warnings.append(
            f"rank {asked} was asked for and {written} is written, the highest rank that a module of these adapters can "
            f"have ({' × '.join(map(str, largest_shape))})."
        )
    return written


def _total(
    layouts: Sequence[Mapping[str, ModuleInfo]], modules: Iterable[str], rank_of: Callable[[ModuleInfo], int]
) -> int:
    """Return Σrᵢ of the module where it is largest."""
    return max(sum(rank_of(layout[name]) for layout in layouts if name in layout) for name in modules)


def _chosen(module: ModuleInfo) -> int:
    """The rank that counts in `auto`."""
    return module.rank if module.rank_is_trained else min(module.rank, AUTO_RANK)


def _warn_full(rank: int, adapters: Mapping[str, Adapter], warnings: list[str]) -> None:
    """Say where `auto` does not keep all of one adapter."""
    for name, adapter in adapters.items():
        most = max(module.rank for module in adapter.layout.values())
        if most > rank:
            warnings.append(
                f"{name} ({adapter.peft_type.title}) has task vectors of rank up to {most}, of which rank auto keeps {rank}; "
                "the report says how much that is, and rank max keeps all."
            )
