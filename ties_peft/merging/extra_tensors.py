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
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..adapters.base_model import BaseModel
from ..adapters.contents import PREFIX
from ..adapters.extra_layers import ExtraLayer
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
from ..errors import CompatibilityError, RecipeError, first_rows, unknown
from .extra_task_vectors import OTHERS, ExtraTensorMerge
from .members import Member
from .options import AVERAGE, DROP, KEEP, MERGE
from .recipes.recipe import Recipe
from .report import ExtraTensorLine, describe_outcomes
from .values import output_dtype


@dataclass(frozen=True)
class ExtraTensors:
    """What becomes of the extra tensors of a merge.

    Attributes:
        layers: that the adapters store as a whole, sorted by their paths.
        members: of the merge.
        modules: that the merge adapts; a bias inside one of them has another key.
        dtype: asked for; None to keep each tensor's own.
        merging: merges them with policy `merge`.
    """

    layers: tuple[ExtraLayer, ...]
    members: Sequence[Member]
    modules: frozenset[str]
    dtype: torch.dtype | None
    merging: ExtraTensorMerge | None = None

    @cached_property
    def kept(self) -> list[ExtraLayer]:
        """The layers that are in the result."""
        return [layer for layer in self.layers if layer.used]

    def lines(self) -> list[ExtraTensorLine]:
        """Return a line of the report for each layer."""
        return [
            ExtraTensorLine(
                module=layer.module,
                form=layer.role,
                tensors=[tensor.size for tensor in layer.tensors.values()],
                fate=layer.outcome,
                adapters=[layer.names[place] for place in layer.used or layer.holders],
            )
            for layer in self.layers
        ]

    def config(self) -> dict[str, object]:
        """Return the keys of adapter_config.json by which PEFT finds the tensors; empty if it needs none."""
        by_role = {role: [layer for layer in self.kept if layer.role == role] for role in (LAYER, BIAS, TOKENS)}
        inside = all(layer.module in self.modules for layer in by_role[BIAS])
        rows = {layer.module: list(next(iter(layer.tensors.values())).rows) for layer in by_role[TOKENS]}
        return {
            **({"modules_to_save": [layer.module for layer in by_role[LAYER]]} if by_role[LAYER] else {}),
            **({"bias": "lora_only" if inside else "all"} if by_role[BIAS] else {}),
            **({"trainable_token_indices": rows} if rows else {}),
        }

    def loads(self, task: str) -> bool:
        """Return whether PEFT loads the result with a task type.

        No trained layer may be left out, and a task with a head needs one: PEFT does not load a SEQ_CLS adapter without.
        """
        trained = [layer for layer in self.layers if layer.role == LAYER]
        headed = any(is_head(layer.module) for layer in trained)
        return all(layer.used for layer in trained) and (headed or task not in HEADED)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the result by their keys in its file; one at a time is read.

        Raises: RecipeError where the dtype that was asked for cannot hold them.
        """
        made: dict[str, Tensor] = {}
        for layer in self.kept:
            for name in layer.tensors:
                key = self._key(layer, name)
                made[key] = self._cast(self._tensor(layer, name), key)
        return dict(sorted(made.items()))

    def check(self, policy: str) -> None:
        """Check that every layer has an outcome that one PEFT adapter can hold.

        Raises: CompatibilityError or RecipeError.
        """
        self._check_equal()
        if policy == AVERAGE:
            self._check_averages()
        if self.merging is not None:
            self._check_mergeable(self.merging)
        self._check_not_adapted()

    def _key(self, layer: ExtraLayer, name: str) -> str:
        """Return a tensor's key in the result.

        A tensor of the base under an adapted layer has `base_layer` in its key, also if the adapter that holds it does not
        adapt that layer; one under trained rows of tokens has the wrapper's name too, if the result has such rows.
        """
        plain = f"{PREFIX}{layer.module}.{name}"
        if layer.role in (LAYER, TOKENS):
            return plain
        rows = any(other.role == TOKENS for other in self.kept)
        keys = [own[name].key for own in layer.by_adapter.values() if name in own]
        under = [key for key in keys if UNDER in key and (rows or f".{WRAPPER}." not in key)]
        if not under and layer.module in self.modules:
            return f"{PREFIX}{layer.module}{UNDER}{name}"
        return next(iter((*under, *(key for key in keys if UNDER not in key), plain)))

    def _tensor(self, layer: ExtraLayer, name: str) -> Tensor:
        """Return one tensor of a layer: unchanged, merged, or Σw·t / Σw with one tensor in memory beside the sum."""
        if layer.outcome == "merged" and self.merging is not None:
            return self.merging.merged(layer, name)
        if layer.outcome != "average":
            return layer.read(layer.used[0], name)
        mean, dtypes = torch.zeros(layer.tensors[name].shape), set()
        total = self._total_weight(layer)
        for place in layer.used:
            tensor = layer.read(place, name)
            dtypes.add(tensor.dtype)
            mean.add_(tensor.to(torch.float32), alpha=self.members[place].weight_at(layer.module) / total)
        return mean.to(dtypes.pop()) if len(dtypes) == 1 else mean

    def _total_weight(self, layer: ExtraLayer) -> float:
        """Return Σw of the adapters whose values a layer takes."""
        return sum(self.members[place].weight_at(layer.module) for place in layer.used)

    def _cast(self, tensor: Tensor, key: str) -> Tensor:
        """Return the tensor in the dtype asked for; whole numbers, such as counters, keep theirs."""
        made = tensor if self.dtype is None or not tensor.is_floating_point() else tensor.to(self.dtype)
        if not torch.isfinite(made).all():
            raise RecipeError(
                f"tensor {key!r} holds values beyond {str(made.dtype).removeprefix('torch.')}. Write float32 or "
                'bfloat16 (--dtype, dtype=…), or leave the whole layers out (--heads drop, heads="drop").'
            )
        return made.contiguous().clone()

    def _check_equal(self) -> None:
        differing = [layer for layer in self.layers if not layer.outcome]
        if not differing:
            return
        mean = " (they have no average, because their shapes or tensors differ or hold whole numbers)"
        if all(layer.can_average for layer in differing):
            mean = ", or take their weighted mean with average"
        raise CompatibilityError(
            f"the adapters hold {len(differing)} whole layer(s) that differ:\n{_differences(differing)}\n"
            f"Say which to keep: --heads {_keep_flags(differing)}; leave them out with drop{mean} (heads=… in Python)."
        )

    def _check_averages(self) -> None:
        averaged = [layer for layer in self.layers if layer.outcome == "average"]
        differing = [layer for layer in averaged if not layer.can_average]
        if differing:
            raise CompatibilityError(
                f"heads is 'average', but {len(differing)} whole layer(s) have no mean, because their shapes or tensors differ or "
                f"hold whole numbers:\n{_differences(differing)}\n"
                f"Keep one adapter's, --heads {_keep_flags(differing)}, or leave them out, --heads drop (heads=… in Python)."
            )
        for layer in averaged:
            if self._total_weight(layer) == 0:
                raise RecipeError(
                    f"heads is 'average', but the weights of the adapters that hold {layer.module!r} sum to 0, "
                    "which an average divides by."
                )

    def _check_mergeable(self, merging: ExtraTensorMerge) -> None:
        merged = [layer for layer in self.layers if layer.outcome == "merged"]
        faults = [(layer, fault) for layer in merged if (fault := merging.fault(layer))]
        if faults:
            rows = [f"  {layer.module}: {layer.contents()}; {fault}" for layer, fault in faults]
            raise CompatibilityError(
                f"heads is 'merge', but {len(faults)} whole layer(s) cannot be merged as task vectors:\n"
                f"{first_rows(rows)}\n{OTHERS[0].upper()}{OTHERS[1:]}."
            )

    def _check_not_adapted(self) -> None:
        """Check that no layer is stored as a whole and adapted as well, or trained in some rows: PEFT cannot hold both."""
        rows = {layer.module for layer in self.kept if layer.role == TOKENS}
        for layer in self.kept:
            path = layer.module
            inside = [m for m in self.modules | rows if m == path or m.startswith(f"{path}.")]
            if layer.role == LAYER and inside:
                others = [member.name for member in self.members if any(map(member.has, inside))]
                raise CompatibilityError(
                    f"layer {path!r} is saved whole in {', '.join(layer.names[p] for p in layer.used)}, while "
                    f"{', '.join(others) or 'another'} adapts {min(inside)!r} or rows of it; one PEFT adapter cannot do "
                    "both. Leave the whole layers out (--heads drop), keep those of another adapter (--heads keep=NAME; heads=… in "
                    "Python), or leave one adapter out."
                )


def _differences(layers: Sequence[ExtraLayer]) -> str:
    """Return a table with a row for each layer: what each adapter holds of it."""
    return first_rows([f"  {layer.module}: {layer.difference()}" for layer in layers])


def _keep_flags(layers: Sequence[ExtraLayer]) -> str:
    names = [layers[0].names[place] for place in sorted({place for layer in layers for place in layer.holders})]
    return " or ".join(f"{KEEP}{name}" for name in names[:4]) + " or …" * (len(names) > 4)


def plan_extra_tensors(
    recipe: Recipe,
    members: Sequence[Member],
    modules: Iterable[str],
    merging: ExtraTensorMerge | None,
    base: BaseModel | None,
    warnings: list[str],
) -> ExtraTensors:
    """Decide what becomes of every extra tensor; only tensors that must be compared are read.

    Args:
        recipe: of the merge, with the policy and the dtype.
        members, modules: of the merge.
        merging: see `ExtraTensors`.
        base: the base model, if it is at hand.
        warnings: receives what is left out.
    Raises: RecipeError where keep=NAME names none of them; CompatibilityError if the adapters differ and the policy does not
        resolve it.
    """
    policy = recipe.heads
    dtype = None if recipe.dtype is None else output_dtype(recipe.dtype, ())
    chosen = _kept_adapter(policy, [member.name for member in members])
    layers = tuple(_decide(layer, policy, chosen, base) for layer in _collect(members, warnings))
    extra = ExtraTensors(layers, members, frozenset(modules), dtype, merging)
    extra.check(policy)
    if chosen is not None and not any(chosen in layer.by_adapter for layer in layers):
        raise RecipeError(f"heads is {policy!r}, but {members[chosen].name} holds no whole layers. Leave it out.")
    lost = describe_outcomes([line for line in extra.lines() if line.fate in ("left out", "unchanged")])
    warnings.extend(f"{text}; the base's own is used." for text in lost)
    return extra


def _kept_adapter(policy: str, names: Sequence[str]) -> int | None:
    """Return the place of the adapter that keep=NAME names; None for the other policies."""
    if not policy.startswith(KEEP):
        return None
    name = policy.removeprefix(KEEP)
    if name not in names:
        raise RecipeError(f"heads is {policy!r}: {unknown('adapter', name, names)}")
    return list(names).index(name)


def _collect(members: Sequence[Member], warnings: list[str]) -> list[ExtraLayer]:
    """Return the layers that any adapter stores as a whole, sorted by path."""
    starts = whole_layer_names(member.adapter.config for member in members)
    held: dict[tuple[str, bool], dict[int, dict[str, ExtraTensor]]] = {}
    for place, member in enumerate(members):
        tensors = member.adapter.extra_tensors(starts)
        for tensor in tensors:
            own = held.setdefault((tensor.module, tensor.role == TOKENS), {}).setdefault(place, {})
            own[tensor.tensor] = tensor
        warnings.extend(f"{member.name}: {text}" for text in missing_layers(member.adapter.config, tensors))
        unused = unused_copies(member.adapter.extra_keys)
        if unused:
            warnings.append(
                f"{member.name} has {len(unused)} tensor(s) that PEFT does not read, copies of a whole layer or of the "
                f"untrained one. They are left out: {unused[0]}{', …' if len(unused) > 1 else ''}."
            )
    adapters, names = [member.adapter for member in members], [member.name for member in members]
    return [ExtraLayer(module, own, adapters, names) for (module, _), own in sorted(held.items())]


def _decide(layer: ExtraLayer, policy: str, chosen: int | None, base: BaseModel | None) -> ExtraLayer:
    """Return the layer with its outcome; an empty one if the adapters differ and the policy does not resolve it."""
    used, outcome = layer.holders, ""
    if policy == DROP:
        used, outcome = (), "left out"
    elif base is not None and layer.equals_base(base):
        used, outcome = (), "unchanged"
    elif chosen is not None:
        used, outcome = ((chosen,), "kept") if chosen in used else ((), "left out")
    elif policy == MERGE and layer.is_mergeable:
        outcome = "merged"
    elif len(used) == 1:
        outcome = "only"
    elif layer.all_equal:
        outcome = "identical"
    elif policy in (AVERAGE, MERGE):
        outcome = "average" if policy == AVERAGE else "merged"
    else:
        used = ()
    return replace(layer, used=used, outcome=outcome)
