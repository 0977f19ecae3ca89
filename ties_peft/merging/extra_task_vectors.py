"""Merge extra tensors as task vectors: as their differences from the base's own tensors.

    τᵢ = tᵢ − t₀        merged = t₀ + λ · rule(w₁·τ₁, w₂·τ₂, …)

The rule is the method of the merge. It gets each tensor as it gets an (IA)³ vector: flat, in float32, trimmed separately.
An adapter that does not have the tensor has τ = 0.

One tensor of all adapters that have it is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.base_model import BaseModel
from ..adapters.extra_layers import ExtraLayer
from ..adapters.extra_tensors import TOKENS, shape_text
from ..adapters.tensors import FLOATING
from ..errors import MethodError, RecipeError
from ..methods import Stages
from ..methods.base import Method, TaskVectors, merge_to_delta
from ..task_vectors.delta import Dense
from ..task_vectors.elect import WeightTotals
from ..task_vectors.order_statistics import with_order_statistics
from ..task_vectors.random_numbers import stream_key
from ..task_vectors.tiles import thread_pool
from ..task_vectors.trim import Densities
from .members import Member
from .options import MERGE, POLICIES

OTHERS = f"choose another policy for them: --heads {', '.join(p for p in POLICIES if p != MERGE)} (heads=… in Python)"

TIED = ("lm_head.weight", "embed_out.weight", "decoder.weight")  # what a checkpoint leaves out where it is tied


@dataclass(frozen=True)
class ExtraTensorMerge:
    """The merge of extra tensors by the method that merges the modules.

    Attributes:
        base: the model that all adapters were trained on.
        method: takes vectors as well as matrices.
        members: of the merge.
        scale, seed: of the merge.
        device: where the arithmetic is done.
    """

    base: BaseModel
    method: Method
    members: Sequence[Member]
    scale: float
    seed: int
    device: torch.device

    def fault(self, layer: ExtraLayer) -> str | None:
        """Return why a layer cannot be merged; None if it can."""
        if layer.role == TOKENS:
            return "rows of trained tokens are no whole tensor"
        if not layer.all_floating:
            return "whole numbers are no task vector"
        weights = [weight for member in self.members if (weight := member.weight_at(layer.module)) != 0]
        fault = self.method.check(weights, "delta") if weights else None
        if fault:
            return f"method '{self.method.name}': {fault}"
        shapes: dict[str, tuple[int, ...]] = {}
        for extra in (one for own in layer.by_adapter.values() for one in own.values()):
            if shapes.setdefault(extra.tensor, extra.shape) != extra.shape:
                return "the shapes differ"
        faults = (self._fault_of_base(f"{layer.module}.{name}", shape) for name, shape in shapes.items())
        return next((fault for fault in faults if fault), None)

    def _fault_of_base(self, tensor: str, shape: tuple[int, ...]) -> str | None:
        """Return why the base's own tensor cannot be subtracted; None if it can."""
        found = self.base.find(tensor)
        if found is None:
            tied = ", as where a head is tied to the embeddings, which it then shares" * tensor.endswith(TIED)
            return f"base model '{self.base.label}' has no tensor {tensor!r}{tied}"
        own = self.base.info(found)
        if tuple(own.shape) != shape:
            return f"base model '{self.base.label}' has {found!r} {shape_text(tuple(own.shape))}"
        if own.dtype not in FLOATING:
            return f"base model '{self.base.label}' has {found!r} in {own.dtype}, no float"
        return None

    def merged(self, layer: ExtraLayer, name: str) -> Tensor:
        """Return one merged tensor of a layer, in the dtype of the adapters' tensors, float32 if they differ.

        Law: a single adapter with weight 1, scale 1 and density 1 keeps its tensor, up to float32's rounding of
            t₀ + (t − t₀); tensors equal to t₀ count as absent.
        """
        tensor, adapters = f"{layer.module}.{name}", layer.adapters
        origin = self.base.require(tensor, "--heads merge").to(self.device, torch.float32)
        holders = [place for place in layer.holders if name in layer.by_adapter[place]]
        weights = [member.weight_at(layer.module) for member in self.members]
        dtypes = {adapters[place].tensors.info(layer.by_adapter[place][name].key).dtype for place in holders}
        places = [place for place in holders if weights[place] != 0]
        with torch.no_grad(), thread_pool() as pool:
            differences = [layer.read(place, name).to(self.device, torch.float32) - origin for place in places]
            deltas = [d.mul_(weights[place]).reshape(-1) for d, place in zip(differences, places, strict=True)]
            task_vectors = TaskVectors(
                deltas=[Dense(delta) for delta in deltas],
                weights=[weights[place] for place in places],
                totals=WeightTotals.of(weights),
                densities=self._densities(layer, places),
                streams=[stream_key(self.seed, tensor, 0, adapters[place].digest) for place in places],
                pool=pool,
            )
            if places and self.method.order_statistics():
                task_vectors = with_order_statistics(self.method.order_statistics(), task_vectors, pool)
            merged = merge_to_delta(self.method, task_vectors).dense() if places else torch.zeros_like(origin)
        whole = origin.add(merged.reshape(origin.shape), alpha=self.scale).cpu()
        return whole.to(getattr(torch, dtypes.pop())) if len(dtypes) == 1 else whole

    def _densities(self, layer: ExtraLayer, places: Sequence[int]) -> Densities | None:
        """Return what replaces the density of the method in some adapters, if it has one."""
        own: float | None = getattr(self.method, "density", None)
        if own is None:
            return None
        return Densities(own, [self.members[place].density_at(layer.module, own) for place in places])


def make_extra_tensor_merge(
    stages: Stages,
    base: BaseModel | None,
    members: Sequence[Member],
    scale: float,
    seed: int,
    device: torch.device,
) -> ExtraTensorMerge:
    """Return the merge of extra tensors.

    Raises: RecipeError without a base; MethodError for a method that does not take whole tensors.
    """
    if base is None:
        raise RecipeError(
            "heads is 'merge', but no base model is given, and a whole tensor is a task vector only as the distance from "
            f"the base's own. Name its folder or Hub id, --base (base=… in Python), or {OTHERS}."
        )
    method = stages.method
    reasons = {
        "is several methods in a row": len(stages.all) > 1,
        "is for the weights of layers": "ia3" not in method.kinds,
        "is for the factors of (IA)³": "lora" not in method.kinds,
        f"needs {method.needs} statistics, which whole tensors have none of": method.needs is not None,
        "takes its signs from an adapter": getattr(method, "sign_from", None) is not None,
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if reason is not None:
        title = "+".join(stage.name for stage in stages.all)
        raise MethodError(
            f"heads is 'merge', but '{title}' does not merge whole tensors: it {reason}. Merge with one method for LoRA "
            f"and (IA)³ alike, such as ties or task_arithmetic, or {OTHERS}."
        )
    return ExtraTensorMerge(base, method, members, scale, seed, device)
