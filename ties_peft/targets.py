"""Targets: what a loader accepts of an adapter, and what has to change for it.

    peft       whatever is written here
    vllm       one number alpha/r for all modules; tensors lora_A and lora_B alone; no modules_to_save, no DoRA;
               ranks up to the server's max_lora_rank, 16 by default, one of `VLLM_RANKS`
    llama.cpp  convert_lora_to_gguf.py: the same tensors, alpha over each tensor's own rank; the base model's
               name leads to its config.json

What is written is plain already: one rank, alpha = r, no patterns. So there is little to fit, and what
cannot be fitted is refused before any work where it can be known.

Source: vllm/lora/peft_helper.py, vllm/lora/utils.py, vllm/config/lora.py; llama.cpp's convert_lora_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from .errors import CompatibilityError, RecipeError, printable, unknown

PEFT, VLLM, LLAMA_CPP = "peft", "vllm", "llama.cpp"
TARGETS = (PEFT, VLLM, LLAMA_CPP)
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes; 16 if it is not given
VLLM_DEFAULT = 16
PLAIN = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight|base_model\.model\..+\.lora_embedding_[AB]")
UNDER = ".base_layer."
NESTED = re.compile(r"\.base_layer\.|\.experts\.lora_[AB]\.")  # one parameter of several in a module: experts
SEVERAL = "belong to one parameter of several in a module, as experts have them"


class Adapted(Protocol):
    """What is asked of a module."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its task vector."""

    @property
    def form(self) -> str:
        """What it is the task vector of."""

    @property
    def kernel(self) -> tuple[int, ...]:
        """Of a convolution."""

    @property
    def path(self) -> str:
        """Of PEFT's layer."""


def check_name(target: str | None) -> None:
    """Refuse what is no target.

    Raises: RecipeError.
    """
    if target is not None and target not in TARGETS:
        raise RecipeError(unknown("target", str(target), TARGETS))


def fit_rank(target: str | None, rank: int | None, asked: int | str, kind: str, warnings: list[str]) -> int | None:
    """The rank of the output that a target can load; what it means or changes is added to `warnings`.

    Args:
        target: one of `TARGETS`; None for peft.
        rank: that was settled; None for a kind that has none.
        asked: as the user said it: a number, `max` or `auto`.
        kind: of the adapters, such as LoRA.
    Raises: CompatibilityError where nothing can be fitted; RecipeError for what is no target.
    """
    check_name(target)
    if target in (None, PEFT):
        return rank
    if rank is None:
        raise CompatibilityError(
            f"target {target}: it loads LoRA alone, and these are {kind}. Merge them for --target peft, and apply the "
            "result to the base model there (PeftModel.merge_and_unload)."
        )
    if target == LLAMA_CPP or rank <= VLLM_DEFAULT:
        return rank
    largest = VLLM_RANKS[-1]
    if rank > largest and isinstance(asked, int):
        raise CompatibilityError(
            f"target vllm: rank {rank} is over {largest}, the most it serves. Ask for --rank {largest}."
        )
    if rank > largest:
        warnings.append(f"target vllm: rank {largest} in place of {rank}, the most it serves.")
        rank = largest
    needed = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    warnings.append(
        f"target vllm: rank {rank} needs a server started with --max-lora-rank {needed} (its default is "
        f"{VLLM_DEFAULT}); --rank {VLLM_DEFAULT} does without, and keeps less."
    )
    return rank


def check_modules(target: str | None, modules: Mapping[str, Adapted], base: str | None, warnings: list[str]) -> None:
    """Refuse modules that a target cannot load, and say what else it wants to know.

    Args:
        target: one of `TARGETS`; None for peft.
        modules: by name.
        base: the base model's name that is written.
    Raises: CompatibilityError naming the modules.
    """
    if target in (None, PEFT):
        return
    faults = {name: fault for name, module in modules.items() if (fault := _fault(module)) is not None}
    if faults:
        first = next(iter(faults.values()))
        raise _cannot(target, [name for name, fault in faults.items() if fault == first], first)
    if target == LLAMA_CPP and base is None:
        warnings.append(
            "target llama.cpp: the adapters name no base model, which its convert_lora_to_gguf.py looks up; "
            "name it here with --base-name, or there with --base."
        )


def _fault(module: Adapted) -> str | None:
    """Why neither vLLM nor llama.cpp loads a module; None where they do."""
    if len(module.shape) != 2 or module.kernel:
        return "are no linear layers"
    if module.form == "bias":
        return "are biases of lora_B"
    return SEVERAL if module.form == "expert" or UNDER in module.path else None


def check_heads(target: str | None, layers: Iterable[str]) -> None:
    """Refuse whole layers, which neither vLLM nor llama.cpp loads from an adapter.

    Args:
        target: one of `TARGETS`; None for peft.
        layers: those that would be written.
    Raises: CompatibilityError naming them.
    """
    names = list(layers)
    if target not in (None, PEFT) and names:
        raise _cannot(target, names, "are whole layers; leave them out (--heads drop)")


def check_written(target: str | None, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a result that a target would load wrongly or not at all: the last word, on what is written.

    Args:
        target: one of `TARGETS`; None for peft.
        config: adapter_config.json.
        names: of the tensors.
    Raises: CompatibilityError naming what is in the way.
    """
    if target in (None, PEFT):
        return
    found = list(names)
    settings = ("modules_to_save", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias")
    switched = [key for key in settings if config.get(key)]
    if switched:
        raise CompatibilityError(f"target {target}: the result needs {', '.join(switched)}, which it does not load.")
    whole = [name for name in found if not PLAIN.fullmatch(name)]
    if whole:
        raise _cannot(target, whole, "are no lora_A or lora_B; leave them out (--heads drop)")
    nested = [name for name in found if NESTED.search(name)]
    if nested:
        raise _cannot(target, nested, SEVERAL)


def _cannot(target: str | None, names: list[str], why: str) -> CompatibilityError:
    some = ", ".join(printable(name) for name in names[:4]) + (", …" if len(names) > 4 else "")
    return CompatibilityError(
        f"target {target}: it cannot load {len(names)} of what would be written, which {why}: {some}. "
        "Write it for --target peft, or apply it to the base model there (PeftModel.merge_and_unload)."
    )
