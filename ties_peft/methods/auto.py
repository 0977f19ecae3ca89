"""The default: a method for the type of the adapters and for what was asked."""

from __future__ import annotations

from ..task_vectors.delta import Delta
from .base import Choice, TaskVectors, merge_to_delta
from .dual import Dual
from .rms_sum import RmsSum
from .ties import Ties


class Auto(Ties):
    """Choose the method: `dual` for LoRA, `rms_sum` for (IA)³, `ties` where something of TIES is asked for.

        LoRA, rank `auto` or at least Σrᵢ     dual, at rank Σrᵢ
        LoRA, a smaller rank                  dual with flatten 0: a flat spectrum has no small directions to leave out
        (IA)³                                 rms_sum

    Its parameters are those of TIES, and each of them selects `ties`; so do a density of one adapter and a space that `dual`
    lacks. A merge replaces `auto` by what it stands for before any work, and the report names that and the reason.

    Law: the result is that of the chosen method.
    Source: our own. On the sample adapters of a sentence encoder (LoRA and (IA)³) and of a language model (LoRA) these
        choices keep more than TIES as published; see docs/measurements.md.
    """

    name = "auto"
    source = "our own"

    def choose(
        self, kind: str, space: str = "delta", own_densities: bool = False, rank: int | None = None, total: int = 0
    ) -> Choice:
        """Return the method that it stands for."""
        if type(self) is not Auto:  # a subclass has a merge of its own
            return Choice(self)
        given = {name: getattr(self, name) for name in sorted(self.model_fields_set)}
        if given or own_densities:
            names = ", ".join(given) or "density"
            return Choice(Ties(**given), f"{names} {'are parameters' if len(given) > 1 else 'is a parameter'} of TIES")
        if kind == "ia3":
            return Choice(RmsSum(), "the result is of type (IA)³")
        if space not in Dual.spaces:
            return Choice(Ties(), f"'{Dual.name}', its choice for LoRA, is not offered in space '{space}'")
        if rank is not None and rank < total:
            why = (
                "the result is a LoRA; its singular values are not brought closer to each other (flatten 0), since "
                f"rank {rank} is under Σrᵢ = {total}"
            )
            return Choice(Dual(flatten=0.0), why)
        return Choice(Dual(), "the result is a LoRA")

    def merge(self, task_vectors: TaskVectors) -> Delta:
        """Merge by the method that it stands for, by the shape alone: a merge of adapters calls that method itself."""
        kind = "lora" if len(task_vectors.shape) == 2 else "ia3"
        return merge_to_delta(self.choose(kind).method, task_vectors)
