"""The PEFT types that can be merged, found by looking into this folder."""

from __future__ import annotations

import functools

from ...errors import AdapterError
from ..found_classes import all_classes
from .base import ModuleInfo, PeftType, WritablePeftType

__all__ = ["ModuleInfo", "PeftType", "WritablePeftType", "find_peft_type", "output_type", "peft_types"]


_PROMPT = "which adds virtual tokens or hidden states to the input and changes no weight, so it has no task vector"
_ROUTED = "whose effect depends on each input, so it has no one task vector"
_WHOLE = "which trains the base's own parameters instead of an update beside them"
_NOT_COMPUTED = (
    "whose task vector cannot be computed from its files alone. Merge it into a checkpoint with PEFT instead"
)
WITHOUT_DELTA = {
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING"), _PROMPT),
    **dict.fromkeys(("PREFIX_TUNING", "PROMPT_TUNING"), _PROMPT),
    **dict.fromkeys(("LILY", "POLY", "SHADOW", "XLORA"), _ROUTED),
    **dict.fromkeys(("BEFT", "LN_TUNING", "TRAINABLE_TOKENS"), _WHOLE),
    **dict.fromkeys(("ADAMSS", "FROD", "GLORA", "PSOFT", "ROAD", "TINYLORA", "UNILORA"), _NOT_COMPUTED),
}


@functools.cache
def peft_types() -> dict[str, PeftType]:
    """Return the PEFT types by their names in adapter_config.json."""
    found = {one.config_name: one for cls in all_classes(__name__, PeftType) for one in cls.instances()}
    return dict(sorted(found.items()))


def output_type(peft_type: PeftType) -> WritablePeftType:
    """Return the PEFT type in which a merge of adapters of this type is written."""
    found = next(other for other in peft_types().values() if other.name == peft_type.output_name)
    assert isinstance(found, WritablePeftType)
    return found


def find_peft_type(peft_type: object, label: str) -> PeftType:
    """Return the PEFT type of an adapter by the peft_type in its config.

    Raises: AdapterError if it is missing, unknown or not supported.
    """
    if not isinstance(peft_type, str) or not peft_type:
        raise AdapterError(
            f"adapter '{label}': peft_type is {peft_type!r} in adapter_config.json; "
            f"expected one of {', '.join(peft_types())}. Is this a PEFT adapter?"
        )
    if peft_type.upper() not in peft_types():
        why = WITHOUT_DELTA.get(peft_type.upper(), f"which is none that ties_peft merges ({', '.join(peft_types())})")
        raise AdapterError(f"adapter '{label}' is of PEFT type {peft_type!r}, {why}. Leave it out.")
    return peft_types()[peft_type.upper()]
