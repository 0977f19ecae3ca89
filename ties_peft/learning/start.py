"""Make the adapter that `distil` starts from: by default a merge of its teachers at the rank of the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.types import ModuleInfo, output_type, peft_types
from ..errors import MethodError, RecipeError, one_line, unknown
from ..evaluation.loaded_model import Bench, transposed
from ..merging.merge import merge
from ..merging.merged import Merged
from ..merging.options import Options
from ..task_vectors.delta import LowRank
from ..task_vectors.factorise import factorise
from .student import GAINS

DEFAULTS: dict[str, dict[str, Any]] = {
    "factors": {"method": "tsv", "scale": 0.6, "restore_norm": True},
    "gains": {"method": "flat_tsv", "rank": "max"},
    "ia3": {"method": "power_mean"},
}
DEFAULT_RANK = 16  # of a LoRA where no teacher has a rank


def make_start(
    teachers: Sequence[Adapter],
    bench: Bench,
    start: Any = None,
    kind: str | None = None,
    fit: str = "factors",
    rank: int | None = None,
    base_model: str | None = None,
) -> tuple[Merged, str]:
    """Return a merge in float32, and a text that says how it was made.

    Args:
        teachers: the adapters to imitate.
        bench: the base model, whose weights are needed to approximate an (IA)³ vector by a LoRA.
        start, kind, fit, rank, base_model: as in `distil`.
    Raises: RecipeError, MethodError or CompatibilityError where the start that was asked for is impossible.
    """
    chosen = _kind(teachers, kind)
    has_rank = peft_types()[chosen].has_rank
    if rank is not None and not has_rank:
        raise MethodError(f"rank is {rank!r}, but the result is (IA)³, whose vectors have no rank. Leave rank out.")
    largest = max([a.ranks[-1] for a in teachers if a.peft_type.has_rank], default=DEFAULT_RANK)
    ranked: dict[str, Any] = {"rank": rank or largest} if has_rank and (rank or fit != GAINS) else {}
    shared: dict[str, Any] = {"dtype": "float32", "base_model": base_model, "allow_disjoint": True}
    if bench.form == "classifier":  # each teacher is imitated with its own head
        shared["heads"] = "drop"
    if start is not None and not isinstance(start, Mapping):
        adapter = start if isinstance(start, Adapter) else Adapter.load(start)
        if adapter.peft_type.config_name != chosen:
            raise RecipeError(
                f"the start '{adapter.label}' is {adapter.peft_type.title}; expected {peft_types()[chosen].title}, the kind of "
                "the result. Start from an adapter of that kind, or name another kind (kind=, --kind)."
            )
        return merge([adapter], "average", **ranked, **shared), f"'{adapter.label}'"
    own = [a for a in teachers if a.peft_type.config_name == chosen]
    if has_rank:
        own = [a if a.peft_type.has_rank else as_lora(a, bench, rank or largest) for a in teachers]
    asked = dict(start) if start is not None else DEFAULTS[fit if has_rank else "ia3"]
    description = ", ".join(f"{key} {value}" for key, value in (asked | ranked).items() if key != "method")
    try:
        merged = merge(own, **(asked | ranked | shared))
    except TypeError as error:
        raise RecipeError(f"start: {one_line(error)}. Give arguments of `merge`, or an adapter.") from None
    return merged, f"{asked.get('method', Options.method)} of the adapters{', ' if description else ''}{description}"


def as_lora(adapter: Adapter, bench: Bench, rank: int) -> Adapter:
    """Return the LoRA closest to an (IA)³ adapter: the best rank-r factors of W·diag(l − 1) or diag(l − 1)·W.

    The effect of the vectors on biases is left out, which a LoRA cannot have. So this is a start, not a conversion.
    """
    lora = output_type(peft_types()["LORA"])
    tensors: dict[str, torch.Tensor] = {}
    modules = []
    for name in adapter.modules:
        layer, module, vector = bench.layer(name), adapter.module(name), adapter.delta(name)
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        plain = weight.detach().float().cpu()
        if plain.dim() != 2:
            raise RecipeError(
                f"adapter '{adapter.label}', module {name!r}: only (IA)³ vectors on linear layers can start a "
                "LoRA. Give a start of your own (start=)."
            )
        plain = plain.T if transposed(layer) else plain
        delta = factorise(plain * (vector if module.on_input else vector.unsqueeze(1)), rank).delta
        assert isinstance(delta, LowRank)
        packed = lora.written(ModuleInfo(name, (plain.shape[0], plain.shape[1]), rank, ()), rank)
        tensors |= lora.pack(packed, delta, rank)
        modules.append(packed)
    config = {"peft_type": "LORA", "base_model_name_or_path": adapter.base_name, **lora.config(modules, rank)}
    return Adapter.from_tensors(config, tensors, adapter.source)


def _kind(teachers: Sequence[Adapter], asked: str | None) -> str:
    """Return the PEFT type of the result: as asked, else LoRA if any teacher is one."""
    by_name = {kind.name: kind.config_name for kind in peft_types().values() if kind.name in ("lora", "ia3")}
    if asked is not None and asked not in by_name:
        raise RecipeError(unknown("kind", str(asked), by_name))
    if asked is not None:
        chosen = by_name[asked]
        if chosen == by_name["ia3"] and all(a.peft_type.config_name != chosen for a in teachers):
            raise RecipeError(
                "the result is to be (IA)³, but none of the adapters is (IA)³, and a LoRA's task vector is no vector. Leave "
                "kind out, for a LoRA."
            )
        return chosen
    return by_name["ia3"] if all(not adapter.peft_type.has_rank for adapter in teachers) else by_name["lora"]
