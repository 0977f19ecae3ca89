"""Decide what becomes of the extra tensors of a merge: heads, embeddings, biases and other layers stored as a whole.

The policy `heads` decides for each such layer:

    error      keep it if one adapter has it or all that have it agree; raise an error if they differ
    drop       leave it out: the result uses the base's own layer
    keep=NAME  keep those of one adapter, named by its short name, and no others
    average    Σw·t / Σw over the adapters that have it; equal tensors are kept unchanged
    merge      t₀ + λ·rule(wᵢ·(tᵢ − t₀)), with the base's own t₀ and the method of the merge; see `extra_task_vectors`.
               Tensors that are equal in all adapters are kept unchanged, as are rows of tokens and whole numbers on which
               the adapters that have them agree

The tensors of one layer are treated alike. Tensors that are kept keep their values and, if no dtype was asked for, their
dtype. The mean of two heads is seldom a good head (the rows of two classifiers need not mean the same), so a mean is
taken only on request.

Except with `merge`, neither the method nor λ applies to these tensors, because without the base's own tensor they are no
task vectors. If the base is at hand, a copy of its own weight under an adapted module that no adapter changed is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.base_model import BaseModel
from ..adapters.extra_layers import (
    ROWS,
    ExtraLayer,
    all_equal,
    can_average,
    difference_table,
    equals_base,
    holders_text,
    is_mergeable,
    layer_role,
)
from ..adapters.extra_tensors import (
    BIAS,
    HEADED,
    LAYER,
    TOKENS,
    UNDER,
    WRAPPER,
    ExtraTensor,
    is_head,
    missing_layers,
    unused_copies,
    whole_layer_names,
)
from ..adapters.types.base import PREFIX
from ..errors import CompatibilityError, RecipeError, unknown
from .extra_task_vectors import OTHERS, ExtraTensorMerge, WeightOf
from .options import AVERAGE, DROP, KEEP, MERGE, POLICIES, is_policy
from .report import ExtraTensorLine, describe_extra_tensors


@dataclass(frozen=True)
class ExtraTensors:
    """What becomes of the extra tensors of a merge.

    Attributes:
        layers: that the adapters store as a whole, sorted by their paths.
        modules: the adapted modules of the merge; a bias inside one of them has another key.
        names: of the adapters.
        dtype: asked for; None to keep each tensor's own.
        rule: merges them with policy `merge`.
    """

    layers: tuple[ExtraLayer, ...]
    modules: frozenset[str]
    names: tuple[str, ...]
    dtype: torch.dtype | None
    rule: ExtraTensorMerge | None = None

    @property
    def kept(self) -> list[ExtraLayer]:
        """The layers that are in the result."""
        return [layer for layer in self.layers if layer.used]

    def lines(self) -> list[ExtraTensorLine]:
        """Return a line of the report for each layer."""
        return [
            ExtraTensorLine(
                module=layer.module,
                form=layer.role,
                tensors=[rider.size for rider in layer.tensors.values()],
                fate=layer.outcome,
                adapters=[self.names[place] for place in layer.used or sorted(layer.by_adapter)],
            )
            for layer in self.layers
        ]

    def config(self) -> dict[str, object]:
        """Return the keys of adapter_config.json by which PEFT finds the tensors; empty if it needs none."""
        forms = {form: [layer for layer in self.kept if layer.role == form] for form in (LAYER, BIAS, TOKENS)}
        inside = all(layer.module in self.modules for layer in forms[BIAS])
        rows = {layer.module: list(next(iter(layer.tensors.values())).rows) for layer in forms[TOKENS]}
        return {
            **({"modules_to_save": [layer.module for layer in forms[LAYER]]} if forms[LAYER] else {}),
            **({"bias": "lora_only" if inside else "all"} if forms[BIAS] else {}),
            **({"trainable_token_indices": rows} if rows else {}),
        }

    def loads(self, task: str) -> bool:
        """Return whether PEFT loads the result with a task type.

        No trained layer may be left out, and a task with a head needs one: PEFT does not load a SEQ_CLS adapter without.
        """
        trained = [layer for layer in self.layers if layer.role == LAYER]
        headed = any(is_head(layer.module) for layer in trained)
        return all(layer.used for layer in trained) and (headed or task not in HEADED)

    def tensors(self, adapters: Sequence[Adapter], weight_of: WeightOf) -> dict[str, Tensor]:
        """Return the tensors of the result by their keys in its file; one at a time is read.

        Raises: RecipeError where the dtype that was asked for cannot hold them.
        """
        found: dict[str, Tensor] = {}
        for layer in self.kept:
            for name in layer.tensors:
                key = self._key(layer, name)
                found[key] = _cast(_result_of(layer, name, adapters, weight_of, self.rule), self.dtype, key)
        return dict(sorted(found.items()))

    def _key(self, layer: ExtraLayer, name: str) -> str:
        """Return a tensor's key in the result: with `base_layer` if the result adapts a layer that this adapter does not."""
        if layer.role in (LAYER, TOKENS):
            return f"{PREFIX}{layer.module}.{name}"
        rows = any(other.role == TOKENS for other in self.kept)
        keys = [own[name].key for own in layer.by_adapter.values() if name in own]
        under = next((key for key in keys if UNDER in key and (rows or f".{WRAPPER}." not in key)), None)
        if under is None and layer.module in self.modules:
            return f"{PREFIX}{layer.module}{UNDER}{name}"
        return under or next((key for key in keys if UNDER not in key), f"{PREFIX}{layer.module}.{name}")


def plan_extra_tensors(
    policy: str,
    names: Sequence[str],
    adapters: Sequence[Adapter],
    modules: Iterable[str],
    weight_of: WeightOf,
    dtype: torch.dtype | None,
    warnings: list[str],
    rule: ExtraTensorMerge | None = None,
    base: BaseModel | None = None,
) -> ExtraTensors:
    """Decide what becomes of every extra tensor; only tensors that must be compared are read.

    Args:
        policy: one of `POLICIES`.
        names, adapters: of the merge, in order.
        modules: that the merge adapts.
        weight_of: weight_of(place, module) is w of an adapter, for the average.
        dtype: asked for, if any.
        warnings: receives what is left out.
        rule: for policy merge.
        base: the base model, if it is at hand.
    Raises: RecipeError for an impossible policy; CompatibilityError if the adapters differ and the policy does not
        resolve it.
    """
    chosen = _kept_adapter(policy, names)
    layers = [_decide(layer, policy, chosen, adapters, base) for layer in _collect(adapters, names, warnings)]
    adapted = frozenset(modules)
    _check_equal(layers, names, adapters)
    if policy == AVERAGE:
        _check_averages(layers, names, adapters, weight_of)
    if rule is not None:
        _check_mergeable(layers, names, adapters, weight_of, rule)
    _check_not_adapted(layers, adapted, names, adapters)
    if chosen is not None and not any(chosen in layer.by_adapter for layer in layers):
        raise RecipeError(f"heads is {policy!r}, but {names[chosen]} holds no whole layers. Leave it out.")
    heads = ExtraTensors(tuple(layers), adapted, tuple(names), dtype, rule)
    lost = describe_extra_tensors([line for line in heads.lines() if line.fate in ("left out", "unchanged")])
    warnings.extend(f"{text}; the base's own is used." for text in lost)
    return heads


def _kept_adapter(policy: str, names: Sequence[str]) -> int | None:
    """Return the place of the adapter that keep=NAME names; None for the other policies."""
    if not is_policy(policy):
        raise RecipeError(f"heads is {policy!r}; expected {', '.join(POLICIES)}.")
    if not policy.startswith(KEEP):
        return None
    name = policy.removeprefix(KEEP)
    if name not in names:
        raise RecipeError(f"heads is {policy!r}: {unknown('adapter', name, names)}")
    return list(names).index(name)


def _collect(adapters: Sequence[Adapter], names: Sequence[str], warnings: list[str]) -> list[ExtraLayer]:
    """Return the layers that any adapter stores as a whole, sorted by path."""
    starts = whole_layer_names(adapter.config for adapter in adapters)
    held: dict[tuple[str, bool], dict[int, dict[str, ExtraTensor]]] = {}
    for place, adapter in enumerate(adapters):
        riders = adapter.extra_tensors(starts)
        for rider in riders:
            own = held.setdefault((rider.module, rider.role == TOKENS), {}).setdefault(place, {})
            own[rider.tensor] = rider
        warnings.extend(f"{names[place]}: {text}" for text in missing_layers(adapter.config, riders))
        idle = unused_copies(adapter.extra_keys)
        if idle:
            warnings.append(
                f"{names[place]} has {len(idle)} tensor(s) that PEFT does not read, copies of a whole layer or of the "
                f"untrained one. They are left out: {idle[0]}{', …' if len(idle) > 1 else ''}."
            )
    return [ExtraLayer(module, layer_role(own, tuple(own)), own) for (module, _), own in sorted(held.items())]


def _decide(
    layer: ExtraLayer, policy: str, chosen: int | None, adapters: Sequence[Adapter], base: BaseModel | None
) -> ExtraLayer:
    """Return the layer with its outcome; an empty one if the adapters differ and the policy does not resolve it."""
    holders = tuple(sorted(layer.by_adapter))
    places: tuple[int, ...]
    if policy == DROP:
        places, fate = (), "left out"
    elif base is not None and equals_base(layer, adapters, base):
        places, fate = (), "unchanged"
    elif chosen is not None:
        places, fate = ((chosen,), "kept") if chosen in holders else ((), "left out")
    elif policy == MERGE and is_mergeable(layer, adapters):
        places, fate = holders, "merged"
    elif len(holders) == 1:
        places, fate = holders, "only"
    elif all_equal(layer, adapters):
        places, fate = holders, "identical"
    elif policy in (AVERAGE, MERGE):
        places, fate = holders, "average" if policy == AVERAGE else "merged"
    else:
        places, fate = (), ""
    return ExtraLayer(layer.module, layer_role(layer.by_adapter, places or holders), layer.by_adapter, places, fate)


def _check_equal(layers: Sequence[ExtraLayer], names: Sequence[str], adapters: Sequence[Adapter]) -> None:
    odd = [layer for layer in layers if not layer.outcome]
    if not odd:
        return
    averages = all(can_average(layer, adapters) for layer in odd)
    mean = (
        ", or take their weighted mean with average"
        if averages
        else " (they have no average, being of unlike shapes or tensors, or of whole numbers)"
    )
    raise CompatibilityError(
        f"the adapters hold {len(odd)} whole layer(s) that differ:\n{difference_table(odd, names)}\n"
        f"Say which to keep: --heads {_keep_flags(odd, names)}; leave them out with drop{mean} (heads=… in Python)."
    )


def _check_averages(
    layers: Sequence[ExtraLayer], names: Sequence[str], adapters: Sequence[Adapter], weight_of: WeightOf
) -> None:
    mixed = [layer for layer in layers if layer.outcome == "average"]
    odd = [layer for layer in mixed if not can_average(layer, adapters)]
    if odd:
        raise CompatibilityError(
            f"heads is 'average', but {len(odd)} whole layer(s) have no mean, being of unlike shapes or tensors, or of "
            f"whole numbers:\n{difference_table(odd, names)}\n"
            f"Keep one adapter's, --heads {_keep_flags(odd, names)}, or leave them out, --heads drop."
        )
    for layer in mixed:
        if sum(weight_of(place, layer.module) for place in layer.used) == 0:
            raise RecipeError(
                f"heads is 'average', but the weights of the adapters that hold {layer.module!r} sum to 0, "
                "which an average divides by."
            )


def _check_mergeable(
    layers: Sequence[ExtraLayer],
    names: Sequence[str],
    adapters: Sequence[Adapter],
    weight_of: WeightOf,
    rule: ExtraTensorMerge,
) -> None:
    odd = [
        (layer, rule.fault(layer.module, layer.by_adapter, adapters, weight_of))
        for layer in layers
        if layer.outcome == "merged"
    ]
    faults = {layer.module: f"{holders_text(layer, names)}; {fault}" for layer, fault in odd if fault}
    if faults:
        rows = "\n".join(f"  {module}: {text}" for module, text in list(faults.items())[:ROWS])
        more = f"\n  … and {len(faults) - ROWS} more" if len(faults) > ROWS else ""
        raise CompatibilityError(
            f"heads is 'merge', but {len(faults)} whole layer(s) cannot be merged as task vectors:\n"
            f"{rows}{more}\n{OTHERS[0].upper()}{OTHERS[1:]}."
        )


def _check_not_adapted(
    layers: Sequence[ExtraLayer], modules: frozenset[str], names: Sequence[str], adapters: Sequence[Adapter]
) -> None:
    """Check that no layer is stored as a whole and adapted as well, or trained in some rows: PEFT cannot hold both.

    Raises: CompatibilityError.
    """
    rows = {layer.module for layer in layers if layer.role == TOKENS and layer.used}
    for layer in layers:
        if layer.role != LAYER or not layer.used:
            continue
        inside = [m for m in modules | rows if m == layer.module or m.startswith(f"{layer.module}.")]
        if inside:
            others = [n for n, a in zip(names, adapters, strict=True) if any(m in a.layout for m in inside)]
            raise CompatibilityError(
                f"layer {layer.module!r} is saved whole in {', '.join(names[p] for p in layer.used)}, while "
                f"{', '.join(others) or 'another'} adapts {min(inside)!r} or rows of it; one PEFT adapter "
                f"cannot do both. Leave the whole layers out (--heads drop), keep those of another adapter "
                "(--heads keep=NAME), or leave one adapter out."
            )


def _keep_flags(layers: Sequence[ExtraLayer], names: Sequence[str]) -> str:
    holders = sorted({place for layer in layers for place in layer.by_adapter})
    return " or ".join(f"{KEEP}{names[place]}" for place in holders[:4]) + (" or …" if len(holders) > 4 else "")


def _result_of(
    layer: ExtraLayer, name: str, adapters: Sequence[Adapter], weight_of: WeightOf, rule: ExtraTensorMerge | None
) -> Tensor:
    """Return one tensor of a layer: unchanged, merged, or Σw·t / Σw with one tensor in memory beside the sum."""
    if layer.outcome == "merged" and rule is not None:
        return rule.merged(layer.module, name, layer.by_adapter, adapters, weight_of)
    if layer.outcome != "average":
        place = layer.used[0]
        return adapters[place].tensors.read(layer.by_adapter[place][name].key)
    total, dtypes = torch.zeros(layer.tensors[name].shape), set()
    whole = sum(weight_of(place, layer.module) for place in layer.used)
    for place in layer.used:
        tensor = adapters[place].tensors.read(layer.by_adapter[place][name].key)
        dtypes.add(tensor.dtype)
        total.add_(tensor.to(torch.float32), alpha=weight_of(place, layer.module) / whole)
    return total.to(dtypes.pop()) if len(dtypes) == 1 else total


def _cast(tensor: Tensor, dtype: torch.dtype | None, key: str) -> Tensor:
    """Return the tensor in the dtype asked for; whole numbers, such as counters, keep theirs."""
    fitted = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
    if not torch.isfinite(fitted).all():
        raise RecipeError(
            f"tensor {key!r} holds values beyond {str(fitted.dtype).removeprefix('torch.')}. Write float32 or "
            "bfloat16 (--dtype), or leave the whole layers out (--heads drop)."
        )
    return fitted.contiguous().clone()
